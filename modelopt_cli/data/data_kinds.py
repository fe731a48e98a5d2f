"""Kinds of data that ``--data`` can name, one row each."""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from modelopt_cli.data.shards import find_shards
from modelopt_cli.errors import DataError
from modelopt_cli.lazy_names import deferred
from modelopt_cli.settings import did_you_mean

Scalar: TypeAlias = bool | int | float | str
Options: TypeAlias = Mapping[str, Scalar]

_CLOSE = 0.65
"""Likeness to the name of a kind from which on a module is taken for a slip: 'target' is 0.6 like 'text'."""
_CALLABLE = re.compile(r"(?P<module>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_]\w*)")


@dataclass(frozen=True)
class DataKind:
    """Kind of data that ``--data`` can name.

    Attributes:
        help: one line for the documentation.
        form: how it is written.
        open: makes a ``Source`` or a ``Stream`` of a ``DataSpec``.
        defaults: its options.
        any_option: options are the dataset's own; ``defaults`` are then only those that it is known to have.
        is_path: the target is the path of a file or a folder.
        canonical: the target in one spelling for all that mean the same; by default as it is written, or a
            path with its links followed.
        needs_target: something must follow the colon.
        takes_target: something may follow the colon.
        sharded: the target is a pattern, which may match several files.
        suffix: of a file that is likely to be meant by it.
        target: the target in a text, and the options after it, where the text is no ``NAME:TARGET``; or None.
        follows_network: ``open`` takes the network's input, as far as it is known, and a seed, too.
        of_network: an option that is the network's own folder where it is not given.
        for_network: ``open`` learns the samples from a network's batch norms, and takes it, too; such data
            are there to calibrate on.
        labelled: there may be labels.
        says_task: what is opened may say its task, see ``Source.task``; or the option with which it may.
    """

    help: str
    form: str
    open: Callable[..., Any]
    defaults: Options = field(default_factory=dict)
    any_option: bool = False
    is_path: bool = False
    canonical: Callable[[str], list[str]] | None = None
    needs_target: bool = True
    takes_target: bool = True
    sharded: bool = False
    suffix: str = ""
    target: Callable[[str], tuple[str, str] | None] | None = None
    follows_network: bool = False
    of_network: str = ""
    for_network: bool = False
    labelled: bool = True
    says_task: bool | str = False


def _folder(text: str) -> tuple[str, str] | None:
    return (text, "") if Path(text).is_dir() else None


def _callable(text: str) -> tuple[str, str] | None:
    """``FILE.py:NAME`` or ``package.module:NAME``, where that is no slip in the name of a kind."""
    body, _, query = text.partition("?")
    place, _, name = body.partition(":")
    # A shard's name has a dot: MODULE:NAME is no slip in tar:, and modules are called target or start.
    kinds = [known for known, kind in DATA_KINDS.items() if kind.target is None and not kind.sharded]
    if not place.endswith(".py") and (not _CALLABLE.fullmatch(body) or did_you_mean(place, kinds, _CLOSE)):
        return None
    if not name.isidentifier():
        raise DataError("names no callable", where=text, hint="write FILE.py:CALLABLE")
    return body, query


def _at_root(target: str) -> list[str]:
    name, at, root = target.partition("@")
    return [f"{name}{at}{Path(root).resolve()}"]


def _both(target: str) -> list[str]:
    return ["@".join(os.path.realpath(side) for side in target.split("@"))]


def _shards(target: str) -> list[str]:
    return [os.path.realpath(path) for path in find_shards(target)]


_ROOM = "modelopt_cli.data"

DATA_KINDS: dict[str, DataKind] = {
    "folder": DataKind(
        "images in one folder for each class; labels follow the names of the folders sorted as text, as in "
        "torchvision's `ImageFolder`",
        "DIR",
        deferred(f"{_ROOM}.images", "open_folder"),
        is_path=True,
        target=_folder,
    ),
    "csv": DataKind(
        "table with columns `path,label`; paths start at the file; labels are integers from 0, or class "
        "names, which are numbered in sorted order; `?labels=a,b` names columns of 0 and 1, or of numbers, "
        "`?inputs=c,d` columns of numbers in place of images, `?path=e` that of images",
        "csv:FILE",
        deferred(f"{_ROOM}.csv_columns", "open_columns"),
        {"path": "", "labels": "", "inputs": ""},
        is_path=True,
        suffix=".csv",
        says_task="labels",
    ),
    "pairs": DataKind(
        "two folders or patterns of images that belong together by their names: inputs, and masks of class "
        "ids (8-bit or 16-bit grey, or palette images) or target pictures; `?target=mask` or `?target=image` "
        "says which, where nothing else does",
        "pairs:INPUTS@TARGETS",
        deferred(f"{_ROOM}.pairs", "open_pairs"),
        {"target": "", "classes": ""},
        canonical=_both,
        says_task=True,
    ),
    "coco": DataKind(
        "images with boxes, as COCO's JSON of object detection has them; file names in FILE start at DIR; "
        "`?labels=ids`, `names` or `order` says how its categories become the network's classes",
        "coco:FILE@DIR",
        deferred(f"{_ROOM}.coco", "open_coco"),
        {"labels": ""},
        canonical=_both,
        says_task=True,
    ),
    "text": DataKind(
        "texts: a CSV, TSV or JSONL with a column `text`, and perhaps `label`, or a file of lines, as token "
        "ids by the tokenizer of a Hugging Face folder, by default the network's own; also "
        "`?tokenizer=FOLDER&text=review&label=stars`, a second text `pair`, and a `score` of the two; needs "
        "`pip install 'modelopt-cli[hf]'`",
        "text:FILE",
        deferred(f"{_ROOM}.texts", "open_texts"),
        {"tokenizer": "", "text": "", "pair": "", "label": "", "score": "", "length": 0},
        is_path=True,
        suffix=".jsonl",
        follows_network=True,
        of_network="tokenizer",
        says_task=True,
    ),
    "wav": DataKind(
        "sounds (`.wav`, `.flac`, `.ogg`, `.mp3` and others) in one folder for each class, or in a CSV with "
        "columns `path,label`, or `path,text` for what is said; also `?rate=16000&length=16000&crop=middle`; "
        "needs `pip install 'modelopt-cli[audio]'`",
        "wav:DIR",
        deferred(f"{_ROOM}.sounds", "open_sounds"),
        {
            "processor": "",
            "rate": 0,
            "length": 0,
            "crop": "start",
            "normalize": False,
            "path": "",
            "label": "",
            "text": "",
        },
        is_path=True,
        suffix=".wav",
        follows_network=True,
        of_network="processor",
        says_task=True,
    ),
    "tar": DataKind(
        "tar shards as WebDataset writes them: `0001.jpg` and `0001.cls` are one sample",
        "tar:PATTERN",
        deferred(f"{_ROOM}.tar", "open_tar"),
        canonical=_shards,
        sharded=True,
        suffix=".tar",
    ),
    "parquet": DataKind(
        "Parquet files with a column of encoded images, or Hugging Face's struct of `bytes` and `path`, and "
        "one of labels, integers from 0; needs `pip install 'modelopt-cli[parquet]'`",
        "parquet:PATTERN",
        deferred(f"{_ROOM}.parquet", "open_parquet"),
        {"image": "image", "label": "label"},
        canonical=_shards,
        sharded=True,
        suffix=".parquet",
    ),
    "idx": DataKind(
        "IDX files of the MNIST family, plain or `.gz`; also `?split=train`",
        "idx:DIR",
        deferred(f"{_ROOM}.arrays", "open_idx"),
        {"split": "test"},
        is_path=True,
    ),
    "npz": DataKind(
        "NumPy arrays: images in `x`, `images` or `data`, labels in `y` or `labels`; never pickled objects",
        "npz:FILE",
        deferred(f"{_ROOM}.arrays", "open_npz"),
        is_path=True,
        suffix=".npz",
    ),
    "torchvision": DataKind(
        "a class of `torchvision.datasets` with its own options, such as `?train=true`; by default the test "
        "split, or the validation split where no test labels are published",
        "torchvision:NAME@ROOT",
        deferred(f"{_ROOM}.dataset_sources", "open_torchvision"),
        {"split": "test"},
        any_option=True,
        canonical=_at_root,
    ),
    "callable": DataKind(
        "a function or class of yours, called with the options as arguments, that returns a map- or "
        "iterable-style Dataset of (inputs already preprocessed, target), or of inputs alone: a float "
        "tensor, or several in a tuple or a dictionary; also `package.module:CALLABLE`",
        "FILE.py:CALLABLE",
        deferred(f"{_ROOM}.dataset_sources", "open_callable"),
        any_option=True,
        suffix=".py",
        target=_callable,
    ),
    "digits": DataKind(
        "1,797 bundled 8x8 digits; also `?split=train` and `?split=all`",
        "digits",
        deferred(f"{_ROOM}.arrays", "open_digits"),
        {"split": "test"},
        needs_target=False,
        takes_target=False,
    ),
    "synthetic": DataKind(
        "seeded noise without labels, `n` samples; `synthetic:128:int64?below=30000` gives integers from 0 "
        "to 29,999; without a shape, that of the network's input",
        "synthetic:3x224x224",
        deferred(f"{_ROOM}.synthetic", "open_synthetic"),
        {"n": 256, "below": 2},
        needs_target=False,
        follows_network=True,
        labelled=False,
    ),
    "none": DataKind(
        "to calibrate on alone: `n` samples learned from the means and variances that the network's "
        "batch norms recorded in training",
        "none",
        deferred(f"{_ROOM}.norm_samples", "open_norm_samples"),
        {"n": 32},
        needs_target=False,
        takes_target=False,
        follows_network=True,
        for_network=True,
        labelled=False,
    ),
}
"""Every kind by its name, in the order in which a text is compared with them."""

_, *_OTHERS, _LAST = (kind.form for kind in DATA_KINDS.values() if not kind.for_network)
FORMS = f"a folder of class folders, {', '.join(_OTHERS)} or {_LAST}"
"""How each kind of given samples is written, in words."""
