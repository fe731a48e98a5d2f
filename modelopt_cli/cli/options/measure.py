"""How much is measured, how, and what must hold."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import typer

from modelopt_cli.cli.values import Reader, parse_fraction

MEASURING = "Measuring"  # titles of the groups
GATES = "Gates (exit code 1 if not met)"

_measure = partial(typer.Option, rich_help_panel=MEASURING)
_gates = partial(typer.Option, rich_help_panel=GATES)

NoEval = Annotated[bool, _measure("--no-eval", help="Only write the file; measure nothing.")]


@dataclass(frozen=True)
class MeasureOptions:
    """How much is measured, and how."""

    latency_batch_size: Annotated[
        int,
        _measure(
            "--batch-size",
            "--latency-batch-size",
            min=1,
            metavar="N",
            help="Samples in one pass when latency is measured.",
        ),
    ] = 1
    latency_warmup: Annotated[
        int,
        _measure("--warmup", "--latency-warmup", min=0, metavar="N", help="Passes before those that count."),
    ] = 5
    runs: Annotated[
        int, _measure(min=0, metavar="N", help="Passes that count; 0 leaves out latency, memory and loading.")
    ] = 30
    limit: Annotated[
        int | None, _measure(min=1, metavar="N", help="Evaluate on at most this many samples of --data.")
    ] = None
    data_batch_size: Annotated[
        int, _measure(min=1, metavar="N", help="Samples in one pass when accuracy is measured.")
    ] = 64

    def values(self) -> dict[str, Any]:
        """By the names that ``measure.EvalOptions`` has for them."""
        return {name.removeprefix("latency_"): value for name, value in vars(self).items()}


@dataclass(frozen=True)
class MeasureTrainedOptions(MeasureOptions):
    """The same where ``--batch-size`` and ``--warmup`` are those of training."""

    latency_batch_size: Annotated[
        int, _measure(min=1, metavar="N", help="Samples in one pass when latency is measured.")
    ] = 1
    latency_warmup: Annotated[int, _measure(min=0, metavar="N", help="Passes before those that count.")] = 5


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
        _gates(
            min=0,
            metavar="X",
            help="At least this many times faster, at the lower end of the 95 % interval.",
        ),
    ] = None
    min_coverage: Annotated[
        float | None,
        _gates(metavar="F", parser=parse_fraction, help="At least this fraction of the layers compressed."),
    ] = None

    confident: Annotated[
        bool,
        _gates("--confident", help="Judge --max-drop by the upper end of the 95 % interval."),
    ] = False

    def read(self, reader: Reader) -> dict[str, Any]:
        """The gates that were asked for, by name."""
        given = {
            name: value for name, value in vars(self).items() if value is not None and value is not False
        }
        for name, value in given.items():
            reader.check(math.isfinite(value), f"--{name.replace('_', '-')}", "not a finite number")
        fine = 0 <= (self.min_coverage or 0) <= 1
        reader.check(fine, "--min-coverage", f"{self.min_coverage} is not between 0 and 1")
        reader.check(not self.confident or self.max_drop is not None, "--confident", "needs --max-drop")
        return given
