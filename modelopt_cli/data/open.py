"""Open a ``--data`` spec: the one table of kinds, and the merge with what the network expects."""

from collections.abc import Callable
from typing import cast

from torch import Tensor

from modelopt_cli.data.arrays import open_digits, open_idx, open_npz
from modelopt_cli.data.config import PreprocessOverrides
from modelopt_cli.data.dataset import Data
from modelopt_cli.data.datasets import open_callable, open_torchvision
from modelopt_cli.data.files import open_folder
from modelopt_cli.data.parquet import open_parquet
from modelopt_cli.data.preprocess import ImageTransform, resolve_preprocess
from modelopt_cli.data.source import Source, Stream
from modelopt_cli.data.spec import DataSpec, parse_spec
from modelopt_cli.data.synthetic import open_synthetic
from modelopt_cli.data.table import open_csv
from modelopt_cli.data.tar import open_tar
from modelopt_cli.errors import DataError
from modelopt_cli.program.input_spec import InputSpec, InputType
from modelopt_cli.program.samples import DTYPES

_OPENERS: dict[str, Callable[[DataSpec], Source | Stream]] = {
    "folder": open_folder,
    "csv": open_csv,
    "tar": open_tar,
    "parquet": open_parquet,
    "idx": open_idx,
    "npz": open_npz,
    "torchvision": open_torchvision,
    "callable": open_callable,
    "digits": open_digits,
}


def open_data(
    spec: str,
    *,
    input_spec: InputSpec | None = None,
    overrides: PreprocessOverrides | None = None,
    seed: int = 0,
    labels: bool = True,
) -> Data:
    """Open what ``--data`` names and settle how its samples become the network's input.

    Args:
        spec: a folder of class folders, ``csv:FILE``, ``tar:PATTERN``, ``parquet:PATTERN``, ``idx:DIR``,
            ``torchvision:NAME@ROOT``, ``npz:FILE``, ``FILE.py:CALLABLE``, ``digits`` or
            ``synthetic:3x224x224``; see ``docs/data.md``.
        input_spec: what the network expects, as far as it is known.
        overrides: what the user said instead.
        seed: of synthetic noise.
        labels: whether they are read; calibration and the like do without, and take any targets or none.

    Returns:
        Data whose ``input`` holds the sample's shape and the preprocessing to record.

    Raises:
        DataError: the spec is malformed, or what it names is missing, empty, unreadable or of another shape.
        EnvironmentFailure: an optional package is missing.
        UsageError: an override is out of range or contradicts another.
    """
    parsed = parse_spec(spec)
    overrides = overrides or PreprocessOverrides()
    if overrides.sample is not None:
        input_spec, overrides = overrides.sample, PreprocessOverrides()
    if parsed.kind == "synthetic":
        shape = (
            resolve_preprocess(input_spec, overrides)[1]
            if overrides
            else input_spec.shape
            if input_spec
            else None
        )
        source: Source | Stream = open_synthetic(
            parsed, shape, seed, input_spec.dtype if input_spec else "float32"
        )
    else:
        source = _OPENERS[parsed.kind](parsed)
    if isinstance(source, Stream) or source.ready:
        return _open_ready(source, input_spec, overrides, labels)
    return _open_images(source, input_spec, overrides, labels)


def _open_images(
    source: Source, recorded: InputSpec | None, overrides: PreprocessOverrides, labels: bool
) -> Data:
    try:
        preprocess, shape = resolve_preprocess(recorded, overrides, source.channels)
    except DataError as error:
        error.where = error.where or source.name
        raise
    transform = ImageTransform(preprocess)
    if shape is None:
        try:
            image = source.load(0)[0]
            assert not isinstance(image, Tensor)
            shape = tuple(transform(image).shape)
        except DataError as error:
            error.where = error.where or source.where(0)
            raise
    data = Data(source, InputSpec(shape, preprocess), transform, reads_labels=labels)
    data.get(0)
    return data


def _open_ready(
    source: Source | Stream, recorded: InputSpec | None, overrides: PreprocessOverrides, labels: bool
) -> Data:
    """Samples that need no preprocessing: only their shape is checked; what is recorded stays as it was."""
    first = source.load(0)[0] if isinstance(source, Source) else next(iter(source), (None,))[0]
    if not isinstance(first, Tensor):
        raise DataError("yields no samples", where=source.name)
    preprocess = recorded.preprocess if recorded else None
    shape = recorded.shape if recorded else None
    if overrides:
        native = 1 if first.ndim == 3 and len(first) == 1 else 3
        preprocess, shape = resolve_preprocess(recorded, overrides, native)
    shape = shape or tuple(first.shape)
    own = str(first.dtype).removeprefix("torch.")
    dtype = recorded.dtype if recorded else own if own in DTYPES else "float32"
    data = Data(source, InputSpec(shape, preprocess, cast(InputType, dtype)), reads_labels=labels)
    next(data.batches(1))
    return data
