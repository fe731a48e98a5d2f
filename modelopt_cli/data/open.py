"""Opening of a data spec: its samples, brought into the form that the network expects."""

from dataclasses import replace
from typing import TYPE_CHECKING

from PIL import Image
from torch import Tensor

from modelopt_cli.data.config import PreprocessOverrides
from modelopt_cli.data.data_spec import parse_spec
from modelopt_cli.data.dataset import Data
from modelopt_cli.data.preprocess import ImageTransform, resolve_preprocess
from modelopt_cli.data.raw_inputs import describe_inputs
from modelopt_cli.data.source import Samples, Source, Stream
from modelopt_cli.errors import DataError
from modelopt_cli.program.input_spec import InputSpec

if TYPE_CHECKING:
    from modelopt_cli.data.norm_samples import ForNetwork


def open_data(
    spec: Samples,
    *,
    input_spec: InputSpec | None = None,
    overrides: PreprocessOverrides | None = None,
    seed: int = 0,
    labels: bool = True,
    network: "ForNetwork | None" = None,
) -> Data:
    """Open data and decide how its samples become the network's input.

    Args:
        spec: a folder of class folders, ``csv:FILE``, ``text:FILE``, ``tar:PATTERN``, ``parquet:PATTERN``,
            ``idx:DIR``, ``torchvision:NAME@ROOT``, ``npz:FILE``, ``wav:DIR``, ``FILE.py:CALLABLE``,
            ``digits`` or ``synthetic:3x224x224``; see ``docs/data.md``. Or samples that are open already.
        input_spec: input that the network expects, as far as it is known.
        overrides: preprocessing that the user asks for instead.
        seed: seed of synthetic noise.
        labels: True if they are read; calibration and the like do without, and take any targets or none.
        network: what samples are learned from where there are none: they are for calibration alone.

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
        known = input_spec.with_samples_of(overrides.sample) if input_spec is not None else overrides.sample
        input_spec, overrides = known, PreprocessOverrides()
    source: Source | Stream
    if parsed is None:
        assert not isinstance(spec, str)
        source = spec
    elif parsed.row.follows_network:
        of_network = (network,) if parsed.row.for_network else ()
        source = parsed.row.open(parsed, _shaped(input_spec, overrides), seed, *of_network)
    else:
        source = parsed.row.open(parsed)
    if isinstance(source, Stream) or source.ready:
        return _open_ready(source, input_spec, overrides, labels)
    return _open_images(source, input_spec, overrides, labels)


def _shaped(known: InputSpec | None, overrides: PreprocessOverrides) -> InputSpec | None:
    """The network's input with the shape that the user asks for instead."""
    shape = resolve_preprocess(known, overrides)[1] if overrides else None
    if shape is None:
        return None if overrides else known
    return replace(known, shape=shape) if known is not None else InputSpec(shape)


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
            assert isinstance(image, Image.Image)
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
    if first is None or isinstance(first, Image.Image):
        raise DataError("yields no samples", where=source.name)
    spec = recorded or describe_inputs(first)
    if overrides:
        native = 1 if isinstance(first, Tensor) and first.ndim == 3 and len(first) == 1 else 3
        preprocess, shape = resolve_preprocess(recorded, overrides, native)
        spec = replace(spec, preprocess=preprocess, shape=shape or spec.shape)
    data = Data(source, spec, reads_labels=labels)
    next(data.batches(1))
    return data
