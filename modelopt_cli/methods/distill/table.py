"""Every loss of distillation: one row each."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from modelopt_cli.methods.distill import logits
from modelopt_cli.methods.distill.features import Attention, Hint
from modelopt_cli.methods.distill.relations import Contrastive, Relational


@dataclass(frozen=True)
class Loss:
    """One way to compare a student with its teacher.

    Attributes:
        what: it compares, and the paper.
        looks_at: what of the two networks; embeddings are what their last layers get, flattened.
        weight: where the user gives none. It goes with weight 1 of the labels.
        make: for logits the loss itself, ``make(student, teacher, labels, temperature)``, as in
            ``distill/logits.py``. For the others ``make(student, teacher, samples)`` gives a module, from the
            two shapes without the batch and the number of training samples; the module is called with the two
            features and may have parameters that learn.
    """

    what: str
    looks_at: Literal["logits", "features", "embeddings"]
    weight: float
    make: Callable[..., Any]


LOSSES: dict[str, Loss] = {
    "kd": Loss("softened probabilities (Hinton et al. 2015)", "logits", 0.9, logits.kd),
    "mse": Loss("logits (Ba and Caruana 2014)", "logits", 1.0, logits.mse),
    "dkd": Loss(
        "whether it is the label's class, and apart from that which other one (Zhao et al. 2022)",
        "logits",
        1.0,
        logits.dkd,
    ),
    "std": Loss("softened probabilities of standardised logits (Sun et al. 2024)", "logits", 9.0, logits.std),
    "dist": Loss(
        "correlation of probabilities over classes and over samples (Huang et al. 2022)",
        "logits",
        2.0,
        logits.dist,
    ),
    "hint": Loss(
        "features, through an adapter that learns (Romero et al. 2015)",
        "features",
        # 100 in the code of the authors of CRD, behind a batch norm: without that it diverges.
        1.0,
        lambda student, teacher, samples: Hint(student, teacher),
    ),
    "at": Loss(
        "where features are large (Zagoruyko and Komodakis 2017)",
        "features",
        1000.0,
        lambda student, teacher, samples: Attention(student, teacher),
    ),
    "rkd": Loss(
        "distances and angles between samples (Park et al. 2019)",
        "embeddings",
        25.0,
        lambda student, teacher, samples: Relational(),
    ),
    "crd": Loss("which embeddings are of one sample (Tian et al. 2020)", "embeddings", 0.8, Contrastive),
}
"""By the name in ``--loss``."""
