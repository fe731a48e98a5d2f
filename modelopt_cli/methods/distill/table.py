"""Every loss of distillation: one row each. Imports no torch, so that the command line reads it, too."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Loss:
    """One way to compare a student with its teacher.

    Attributes:
        help: the quantity that is compared, and the paper.
        looks_at: what of the two networks; embeddings are what their last layers get, flattened.
        weight: where the user gives none. It goes with weight 1 of the labels.
        make: for logits the loss itself, ``make(student, teacher, labels, temperature)``, as in
            ``distill/logits.py``. For the others ``make(student, teacher, samples)`` gives a module, from the
            two shapes without the batch and the number of training samples; the module is called with the two
            features and may have parameters that learn.
    """

    help: str
    looks_at: Literal["logits", "features", "embeddings"]
    weight: float
    make: Callable[..., Any]


def _logits() -> Any:
    from modelopt_cli.methods.distill import logits

    return logits


def _features() -> Any:
    from modelopt_cli.methods.distill import features

    return features


def _relations() -> Any:
    from modelopt_cli.methods.distill import relations

    return relations


LOSSES: dict[str, Loss] = {
    "kd": Loss(
        "softened probabilities (Hinton et al. 2015)", "logits", 0.9, lambda *given: _logits().kd(*given)
    ),
    "mse": Loss("logits (Ba and Caruana 2014)", "logits", 1.0, lambda *given: _logits().mse(*given)),
    "dkd": Loss(
        "whether it is the label's class, and apart from that which other one (Zhao et al. 2022)",
        "logits",
        1.0,
        lambda *given: _logits().dkd(*given),
    ),
    "std": Loss(
        "softened probabilities of standardised logits (Sun et al. 2024)",
        "logits",
        9.0,
        lambda *given: _logits().std(*given),
    ),
    "dist": Loss(
        "correlation of probabilities over classes and over samples (Huang et al. 2022)",
        "logits",
        2.0,
        lambda *given: _logits().dist(*given),
    ),
    "hint": Loss(
        "features, through an adapter that learns (Romero et al. 2015)",
        "features",
        # 100 in the code of the authors of CRD, behind a batch norm: without that it diverges.
        1.0,
        lambda student, teacher, samples: _features().Hint(student, teacher),
    ),
    "at": Loss(
        "where features are large (Zagoruyko and Komodakis 2017)",
        "features",
        1000.0,
        lambda student, teacher, samples: _features().Attention(student, teacher),
    ),
    "rkd": Loss(
        "distances and angles between samples (Park et al. 2019)",
        "embeddings",
        25.0,
        lambda student, teacher, samples: _relations().Relational(),
    ),
    "crd": Loss(
        "which embeddings are of one sample (Tian et al. 2020)",
        "embeddings",
        0.8,
        lambda *given: _relations().Contrastive(*given),
    ),
}
"""By the name in ``--loss``."""
