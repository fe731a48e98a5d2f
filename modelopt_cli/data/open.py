"""Opening of a data spec: its samples, brought into the form that the network expects."""

from typing import cast

from torch import Tensor

from modelopt_cli.data.config import PreprocessOverrides
from modelopt_cli.data.dataset import Data
from modelopt_cli.data.preprocess import ImageTransform, resolve_preprocess
from modelopt_cli.data.source import Samples, Source, Stream
from modelopt_cli.data.spec import parse_spec
from modelopt_cli.errors import DataError
from modelopt_cli.program.input_spec import InputSpec, InputType
from modelopt_cli.program.samples import DTYPES


def open_data(
    spec: Samples,
    *,
    input_spec: InputSpec | None = None,
    overrides: PreprocessOverrides | None = None,
    seed: int = 0,
    labels: bool = True,
) -> Data:
    """Open data and settle how its samples become the network's input.

    Args:
        spec: a folder of class folders, ``csv:FILE``, ``tar:PATTERN``, ``parquet:PATTERN``, ``idx:DIR``,
            ``torchvision:NAME@ROOT``, ``npz:FILE``, ``FILE.py:CALLABLE``, ``digits`` or
            ``synthetic:3x224x224``; see ``docs/data.md``. Or samples that are open already.
        input_spec: input that the network expects, as far as it is known.
        overrides: preprocessing that the user asks for instead.
        seed: seed of synthetic noise.
        labels: True if they are read; calibration and the like do without, and take any targets or none.

    Returns:
        Data whose ``input`` holds the sample's shape and the preprocessing to record.

    Raises:
        DataError: the spec is malformed, or the data is missing, empty, unreadable or of another shape.
        EnvironmentFailure: an optional package is missing.
        UsageError: an override is out of range or contradicts another.
    """
    parsed = parse_spec(spec) if isinstance(spec, str) else None
    overrides = overrides or PreprocessOverrides()
    if overrides.sample is not None:
        input_spec, overrides = overrides.sample, PreprocessOverrides()
    source: Source | Stream
    if parsed is None:
        assert not isinstance(spec, str)
        source = spec
    elif parsed.row.follows_network:
        shape = input_spec.shape if input_spec else None
        if overrides:
            shape = resolve_preprocess(input_spec, overrides)[1]
        source = parsed.row.open(parsed, shape, seed, input_spec.dtype if input_spec else "float32")
    else:
        source = parsed.row.open(parsed)
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
