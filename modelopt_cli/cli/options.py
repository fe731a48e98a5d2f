"""The options that commands share, declared once."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import typer

from modelopt_cli.artifact import check_output
from modelopt_cli.cli.values import (
    Reader,
    parse_choice,
    parse_crop,
    parse_device,
    parse_floats,
    parse_resize,
    parse_size,
)

Interpolation = Literal["nearest", "bilinear", "bicubic"]
SCHEMES = ("int8", "int8-dynamic", "int8-weight")
EXPORTS = (".json", ".md", ".csv")
OBSERVERS = ("minmax", "percentile", "mse", "entropy")

_input = partial(typer.Option, rich_help_panel="Network and data")
_quantize = partial(typer.Option, rich_help_panel="Quantizing")
_run = partial(typer.Option, rich_help_panel="Running")
_measure = partial(typer.Option, rich_help_panel="Measuring")
_gates = partial(typer.Option, rich_help_panel="Gates (exit code 1 if not met)")
_output = partial(typer.Option, rich_help_panel="Output")

Checkpoint = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint of any kind, or a modelopt file.")
]
Output = Annotated[
    Path | None,
    _output(
        "-o",
        "--output",
        metavar="FILE",
        help="The file to write [default: NAME-SCHEME.safetensors in the current directory].",
    ),
]
Force = Annotated[bool, _output("--force", help="Replace the output file if it exists.")]
DryRun = Annotated[
    bool,
    _output("--dry-run", help="Print the plan for each layer and the size to expect; write nothing."),
]
Export = Annotated[
    list[Path] | None,
    _output(
        "--export",
        metavar="FILE",
        help="Also write the table to FILE.json, FILE.md or FILE.csv; may be repeated.",
    ),
]


@dataclass(frozen=True)
class InputValues:
    """What was said about the input on the command line; None where nothing was.

    The fields are those of ``data.PreprocessOverrides``, which cannot be imported without torch.
    """

    input_size: tuple[int, int] | None
    resize: int | tuple[int, int] | None
    crop: int | float | None
    interpolation: Interpolation | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    channels: int | None

    def given(self) -> dict[str, Any]:
        """Only what was said, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class NetworkOptions:
    """Which network it is, which data to use, and how an image becomes its input."""

    arch: Annotated[
        str | None,
        _input(
            metavar="SPEC",
            help="torchvision:NAME, timm:NAME, builtin:NAME, FILE.py:CALLABLE or package.module:CALLABLE, "
            "with ?num_classes=10 and the like; left out, it is recognised from the checkpoint.",
        ),
    ] = None
    data: Annotated[
        str | None,
        _input(
            metavar="SPEC",
            help="DIR (one folder for each class), csv:FILE, idx:DIR, npz:FILE, torchvision:NAME@ROOT, "
            "FILE.py:CALLABLE, digits or synthetic:3x224x224.",
        ),
    ] = None
    input_size: Annotated[
        str | None,
        _input(metavar="N|HxW", help="Height and width of the network's input, in pixels."),
    ] = None
    resize: Annotated[
        str | None,
        _input(metavar="N|HxW", help="Resize images to this short side, or to exactly this size."),
    ] = None
    crop: Annotated[
        str | None,
        _input(metavar="N|FRACTION", help="Crop the centre: pixels after resizing, or a fraction before it."),
    ] = None
    interpolation: Annotated[
        str | None,
        _input(metavar="|".join(get_args(Interpolation)), help="How to resample."),
    ] = None
    mean: Annotated[
        str | None,
        _input(metavar="X,X,X", help="Subtract this from each channel, on the scale 0..1."),
    ] = None
    std: Annotated[
        str | None,
        _input(metavar="X,X,X", help="Then divide each channel by this."),
    ] = None
    channels: Annotated[str | None, _input(metavar="1|3", help="Grey or colour.")] = None

    def read(self, reader: Reader) -> InputValues:
        """The typed values of the options about images."""
        channels = reader.read("--channels", self.channels, lambda text: parse_choice(text, ("1", "3")))
        values = InputValues(
            input_size=reader.read("--input-size", self.input_size, parse_size),
            resize=reader.read("--resize", self.resize, parse_resize),
            crop=reader.read("--crop", self.crop, parse_crop),
            interpolation=reader.read("--interpolation", self.interpolation, _interpolation),
            mean=reader.read("--mean", self.mean, parse_floats),
            std=reader.read("--std", self.std, parse_floats),
            channels=int(channels) if channels else None,
        )
        reader.check(min(values.std or (1,)) > 0, "--std", "every number must be above 0")
        for option, numbers in (("--mean", values.mean), ("--std", values.std)):
            fits = len(numbers or (0,)) in (1, values.channels or len(numbers or ()))
            reader.check(fits, option, f"{len(numbers or ())} numbers for {values.channels} channels")
        return values


def _interpolation(text: str) -> Interpolation:
    return cast(Interpolation, parse_choice(text, get_args(Interpolation)))


@dataclass(frozen=True)
class RunOptions:
    """How to run: where, with how many threads, from which seed."""

    seed: Annotated[int, _run(min=0, metavar="N", help="Seed of everything random.")] = 0
    threads: Annotated[
        int | None,
        _run(min=1, metavar="N", help="CPU threads [default: torch's own choice]."),
    ] = None
    device: Annotated[str, _run(metavar="cpu|cuda|cuda:N", help="Where to run.")] = "cpu"
    workers: Annotated[
        int,
        _run(min=0, metavar="N", help="Processes that load data besides this one."),
    ] = 0

    def read(self, reader: Reader) -> None:
        """Check what typer could not."""
        reader.read("--device", self.device, parse_device)


@dataclass(frozen=True)
class QuantizeOptions:
    """Which scheme, on which layers, calibrated how."""

    scheme: Annotated[
        str,
        _quantize(metavar="|".join(SCHEMES), help="Static int8, int8 linear layers, or int8 weights only."),
    ] = SCHEMES[0]
    observer: Annotated[
        str, _quantize(metavar="|".join(OBSERVERS), help="How calibration chooses activation ranges.")
    ] = "mse"
    include: Annotated[
        list[str] | None,
        _quantize(metavar="GLOB", help="Quantize only the layers so named; may be repeated."),
    ] = None
    exclude: Annotated[
        list[str] | None,
        _quantize(metavar="GLOB", help="Leave the layers so named in float; may be repeated."),
    ] = None
    skip_first: Annotated[bool, _quantize("--skip-first", help="Leave the first layer in float.")] = False
    skip_last: Annotated[bool, _quantize("--skip-last", help="Leave the last layer in float.")] = False
    calib: Annotated[
        str | None, _quantize(metavar="SPEC", help="Calibrate on this data [default: on --data].")
    ] = None
    calibration_samples: Annotated[
        int, _quantize(min=1, metavar="N", help="Calibrate on this many samples, at most.")
    ] = 512

    def read(self, reader: Reader) -> dict[str, Any]:
        """The fields of ``methods.quantize.QuantizeConfig``, which cannot be imported without torch."""
        reader.read("--scheme", self.scheme, lambda text: parse_choice(text, SCHEMES))
        reader.read("--observer", self.observer, lambda text: parse_choice(text, OBSERVERS))
        return {
            "scheme": self.scheme,
            "observer": self.observer,
            "include": tuple(self.include or ()),
            "exclude": tuple(self.exclude or ()),
            "skip_first": self.skip_first,
            "skip_last": self.skip_last,
            "calibration_samples": self.calibration_samples,
        }


@dataclass(frozen=True)
class MeasureOptions:
    """How much is measured, and how."""

    batch_size: Annotated[
        int, _measure(min=1, metavar="N", help="Samples in one pass when latency is measured.")
    ] = 1
    warmup: Annotated[int, _measure(min=0, metavar="N", help="Passes before those that count.")] = 5
    runs: Annotated[int, _measure(min=0, metavar="N", help="Passes that count; 0 leaves latency out.")] = 30
    limit: Annotated[
        int | None, _measure(min=1, metavar="N", help="Evaluate on at most this many samples of --data.")
    ] = None
    data_batch_size: Annotated[
        int, _measure(min=1, metavar="N", help="Samples in one pass when accuracy is measured.")
    ] = 64


@dataclass(frozen=True)
class GateOptions:
    """What must hold in comparison to the baseline."""

    max_drop: Annotated[
        float | None,
        _gates(metavar="PP", help="At most this loss of top-1, in points."),
    ] = None
    min_ratio: Annotated[
        float | None,
        _gates(min=0, metavar="R", help="At least this many times smaller."),
    ] = None
    min_speedup: Annotated[
        float | None,
        _gates(min=0, metavar="X", help="At least this many times faster."),
    ] = None
    min_coverage: Annotated[
        float | None,
        _gates(min=0, max=1, metavar="F", help="At least this fraction of the layers compressed."),
    ] = None

    def read(self, reader: Reader) -> dict[str, float]:
        """The gates that were asked for, by name."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        for name, value in given.items():
            reader.check(math.isfinite(value), f"--{name.replace('_', '-')}", "not a finite number")
        return given


@dataclass(frozen=True)
class Request:
    """What quantize and eval are both asked, read and checked, before torch is imported."""

    network: NetworkOptions
    image: InputValues
    run: RunOptions
    measure: MeasureOptions
    gates: dict[str, float]

    def keywords(self, baseline: int = 0) -> dict[str, Any]:
        """The keyword arguments that ``api.quantize`` and ``api.evaluate`` share."""
        from modelopt_cli.data import PreprocessOverrides
        from modelopt_cli.measure import EvalOptions, Gates

        return {
            "arch": self.network.arch,
            "data": self.network.data,
            "overrides": PreprocessOverrides(**self.image.given()),
            "options": EvalOptions(baseline=baseline, **vars(self.measure), **vars(self.run)),
            "gates": Gates(**self.gates),
        }


def read_request(
    reader: Reader, network: NetworkOptions, run: RunOptions, measure: MeasureOptions, gates: GateOptions
) -> Request:
    """Check the values of all groups; what is wrong is left with ``reader``."""
    run.read(reader)
    return Request(network, network.read(reader), run, measure, gates.read(reader))


def read_exports(reader: Reader, paths: list[Path] | None) -> tuple[Path, ...]:
    """The files to export to; their endings choose the format."""
    for path in paths or ():
        fine = path.suffix.lower() in EXPORTS
        reader.check(fine, "--export", f"{path} ends in none of {', '.join(EXPORTS)}")
    return tuple(paths or ())


def check_exports(paths: tuple[Path, ...], force: bool) -> None:
    """Refuse files that must not be written to, before anything is measured; raises OutputError."""
    for path in paths:
        check_output(path, force)
