"""Tasks, the values of ``--task``: one row each. Imports no torch.

A row is all that there is to add: data, evaluation, training and the documentation take it from here.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from modelopt_cli.lazy_names import deferred
from modelopt_cli.tasks.task import Logits, Task


def _of(module: str, name: str) -> Callable[..., Any]:
    """A function of one of this package's modules, imported when it is first called."""
    return deferred(f"modelopt_cli.tasks.{module}", name)


def _functions(module: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The functions that every task's module has: ``form`` and ``judged`` of its row."""
    return _of(module, "targets"), _of(module, "judged")


_BY_PROBABILITIES = "ce:0.1+kd:0.9"
"""Losses of tasks whose outputs stand for probabilities."""

_CLASSIFY = Task(
    "one class for each sample",
    "an integer from 0, or the name of a class",
    *_functions("classification"),
    ("logits", "out"),
    losses=("cross-entropy",),
    distilled_by=_BY_PROBABILITIES,
    logits=Logits(1, (2,), labels=_of("classification", "row_labels")),
    predicted=_of("classification", "predicted"),
)

TASKS: dict[str, Task] = {
    "classify": _CLASSIFY,
    "multilabel": Task(
        "classes that are there or not, each by itself",
        "a row of 0 and 1, one for each class",
        *_functions("multilabel"),
        ("logits", "out"),
        losses=("binary-cross-entropy",),
        distilled_by=_BY_PROBABILITIES,
        logits=Logits(1, (2,), exclusive=False),
    ),
    "regress": Task(
        "numbers",
        "a number, or a row of them",
        *_functions("regression"),
        ("logits", "out"),
        losses=("mse", "l1", "huber"),
    ),
    "segment": Task(
        "a class for each pixel",
        "a mask `(H, W)` of class ids, as large as the input; pixels of class `ignore` do not count",
        *_functions("segmentation"),
        ("logits", "out"),
        losses=("cross-entropy-places",),
        distilled_by=_BY_PROBABILITIES,
        logits=Logits(1, (3, 4, 5), labels=_of("segmentation", "row_labels")),
        options={"ignore": 255},
    ),
    "detect": Task(
        "boxes with a class and a score",
        "a dictionary: `boxes` `(K, 4)`, left, top, right and bottom in pixels of the input, and `labels` "
        "`(K,)`, numbered as the network does; perhaps `iscrowd` `(K,)`, and `names` of the labels",
        *_functions("detection"),
        losses=("own",),
        distilled_by=None,
    ),
    "restore": Task(
        "an image from an image",
        "an image `(C, H, W)` of floats, at most a quarter above `peak`; where the network loses a "
        "border, its middle counts",
        *_functions("restoration"),
        ("reconstruction", "out"),
        losses=("l1", "mse", "huber"),
        options={"peak": 1.0},
    ),
    "text": replace(
        _CLASSIFY, help="one class for each row of token ids", counted=_of("language", "attended")
    ),
    "embed": Task(
        "vectors whose cosine says how alike two samples are",
        "a dictionary: `pair`, the number of the pair that the sample belongs to, and `score`, how alike "
        "its two are; or the vector that the sample should have",
        *_functions("embedding"),
        ("sentence_embedding", "embeddings", "last_hidden_state", "out"),
        losses=("cosine",),
        counted=_of("language", "attended"),
    ),
    "language": Task(
        "the next token of a text",
        "token ids `(T,)` of the text itself, -100 where there is none; without a target, those of the input",
        *_functions("language"),
        ("logits", "out"),
        losses=("cross-entropy-next",),
        distilled_by=_BY_PROBABILITIES,
        logits=Logits(2, (3,), labels=_of("language", "row_labels")),
        counted=_of("language", "counted"),
    ),
    "sequence": Task(
        "a row of classes, such as characters, from a longer one of frames (CTC)",
        "class ids `(L,)` without the `blank`, or a text of the names of the network's classes",
        *_functions("sequence"),
        ("logits", "out"),
        losses=("ctc",),
        distilled_by=_BY_PROBABILITIES,
        logits=Logits(2, (3,)),
        options={"blank": 0, "batch_first": ("auto", "true", "false")},
        batch_axis=_of("sequence", "batch_axis"),
        infer=_of("sequence", "inferred"),
    ),
    "FILE.py:CALLABLE": Task(
        "a metric of your own: called with outputs and targets of a batch, it returns a number for each",
        "anything",
        *_functions("own"),
        spelling=re.compile(r".+:[A-Za-z_]\w*(\.\w+)*"),
    ),
}
"""By name. What is not known otherwise is taken for the first."""

DEFAULT = next(iter(TASKS))
