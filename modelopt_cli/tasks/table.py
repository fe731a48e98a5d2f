"""Tasks, the values of ``--task``: one row each. Imports no torch.

A row is all that there is to add: data, evaluation, training and the documentation take it from here.
"""

import re

from modelopt_cli.lazy_names import deferred
from modelopt_cli.tasks.task import Logits, Task

_TASKS = "modelopt_cli.tasks"

TASKS: dict[str, Task] = {
    "classify": Task(
        "one class for each sample",
        "a whole number from 0, or the name of a class",
        deferred(f"{_TASKS}.classification", "targets"),
        deferred(f"{_TASKS}.classification", "judged"),
        ("top1", "top5"),
        ("logits", "out"),
        loss="cross-entropy",
        logits=Logits(1, (2,)),
        predicted=deferred(f"{_TASKS}.classification", "predicted"),
    ),
    "multilabel": Task(
        "classes that are there or not, each by itself",
        "a row of 0 and 1, one for each class",
        deferred(f"{_TASKS}.multilabel", "targets"),
        deferred(f"{_TASKS}.multilabel", "judged"),
        ("map", "f1"),
        ("logits", "out"),
        loss="binary-cross-entropy",
        logits=Logits(1, (2,), exclusive=False),
    ),
    "regress": Task(
        "numbers",
        "a number, or a row of them",
        deferred(f"{_TASKS}.regression", "targets"),
        deferred(f"{_TASKS}.regression", "judged"),
        ("mae", "r2"),
        ("logits", "out"),
        loss="mse",
    ),
    "segment": Task(
        "a class for each pixel",
        "a mask `(H, W)` of class ids, as large as the input; pixels of class `ignore` do not count",
        deferred(f"{_TASKS}.segmentation", "targets"),
        deferred(f"{_TASKS}.segmentation", "judged"),
        ("miou", "pixel_accuracy"),
        ("logits", "out"),
        loss="cross-entropy-places",
        logits=Logits(1, (3, 4, 5)),
        options={"ignore": 255},
    ),
    "detect": Task(
        "boxes with a class and a score",
        "a dictionary: `boxes` `(K, 4)`, left, top, right and bottom in pixels of the input, and `labels` "
        "`(K,)`, numbered as the network does; perhaps `iscrowd` `(K,)`",
        deferred(f"{_TASKS}.detection", "targets"),
        deferred(f"{_TASKS}.detection", "judged"),
        ("map50_95", "map50"),
        loss="own",
    ),
    "restore": Task(
        "an image from an image",
        "an image `(C, H, W)` of floats, at most `peak`; where the network loses a border, its middle counts",
        deferred(f"{_TASKS}.restoration", "targets"),
        deferred(f"{_TASKS}.restoration", "judged"),
        ("psnr", "ssim"),
        ("reconstruction", "out"),
        loss="l1",
        options={"peak": 1.0},
    ),
    "text": Task(
        "one class for each row of token ids",
        "a whole number from 0, or the name of a class",
        deferred(f"{_TASKS}.classification", "targets"),
        deferred(f"{_TASKS}.classification", "judged"),
        ("top1", "top5"),
        ("logits", "out"),
        loss="cross-entropy",
        logits=Logits(1, (2,)),
        predicted=deferred(f"{_TASKS}.classification", "predicted"),
    ),
    "embed": Task(
        "vectors whose cosine says how alike two samples are",
        "a dictionary: `pair`, the number of the pair that the sample belongs to, and `score`, how alike "
        "its two are; or the vector that the sample should have",
        deferred(f"{_TASKS}.embedding", "targets"),
        deferred(f"{_TASKS}.embedding", "judged"),
        ("spearman", "pair_cosine"),
        ("sentence_embedding", "embeddings", "last_hidden_state", "out"),
        loss="cosine",
    ),
    "language": Task(
        "the next token of a text",
        "token ids `(T,)` of the text itself, -100 where there is none; without a target, those of the input",
        deferred(f"{_TASKS}.language", "targets"),
        deferred(f"{_TASKS}.language", "judged"),
        ("perplexity",),
        ("logits", "out"),
        loss="cross-entropy-next",
        logits=Logits(2, (3,)),
    ),
    "sequence": Task(
        "a row of classes, such as characters, from a longer one of frames (CTC)",
        "class ids `(L,)` without the `blank`, or a text of the names of the network's classes",
        deferred(f"{_TASKS}.sequence", "targets"),
        deferred(f"{_TASKS}.sequence", "judged"),
        ("cer",),
        ("logits", "out"),
        loss="ctc",
        logits=Logits(2, (3,)),
        options={"blank": 0},
    ),
    "FILE.py:CALLABLE": Task(
        "a metric of your own: called with outputs and targets of a batch, it returns a number for each",
        "anything",
        deferred(f"{_TASKS}.own", "targets"),
        deferred(f"{_TASKS}.own", "judged"),
        ("own",),
        spelling=re.compile(r".+:[A-Za-z_]\w*(\.\w+)*"),
    ),
}
"""By name. What is not known otherwise is taken for the first."""

DEFAULT = next(iter(TASKS))
