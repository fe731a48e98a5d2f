"""The options of ``prune`` alone."""

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from modelopt_cli.cli.values import Reader, parse_choice, parse_fraction
from modelopt_cli.methods.prune.allocation import ALLOCATIONS
from modelopt_cli.methods.prune.criteria import CRITERIA
from modelopt_cli.settings import did_you_mean

STRUCTURES = ("unstructured", "N:M", "block", "channels", "layers")
SCHEDULES = ("one-shot", "iterative", "gradual")
TARGETS = ("sparsity", "flops", "params", "bytes", "latency")
PICTURES = (".png", ".svg")
AUTO = "auto"

_prune = partial(typer.Option, rich_help_panel="Pruning")
_target = partial(
    typer.Option,
    rich_help_panel="Target (give one; of the original, between 0 and 1)",
    metavar="F",
    parser=parse_fraction,
)


@dataclass(frozen=True)
class PruneOptions:
    """What to prune, by what measure, how far, in how many steps."""

    structure: Annotated[
        str, _prune(metavar="|".join(STRUCTURES), help="What goes. N:M is a pattern such as 2:4.")
    ] = "channels"
    criterion: Annotated[
        str,
        _prune(
            metavar="|".join((AUTO, *CRITERIA)),
            help="How importance is judged; taylor, wanda and obs look at data.",
        ),
    ] = AUTO
    allocation: Annotated[
        str, _prune(metavar="|".join((AUTO, *ALLOCATIONS)), help="How much each layer has to give.")
    ] = AUTO
    sparsity: Annotated[float | None, _target(help="Remove this fraction.")] = None
    flops: Annotated[float | None, _target(help="Keep this fraction of the arithmetic.")] = None
    params: Annotated[float | None, _target(help="Keep this fraction of the parameters.")] = None
    bytes: Annotated[
        float | None, _target(help="Keep this fraction of the file, written as an artifact.")
    ] = None
    latency: Annotated[float | None, _target(help="Keep this fraction of the latency, measured here.")] = None
    schedule: Annotated[
        str, _prune(metavar="|".join(SCHEDULES), help="All at once, in rounds, or while it trains.")
    ] = SCHEDULES[0]
    rounds: Annotated[int, _prune(min=1, metavar="N", help="Rounds of the iterative schedule.")] = 3
    block: Annotated[int, _prune(min=2, metavar="N", help="Input weights in a row of a block.")] = 4
    round_to: Annotated[
        int, _prune(min=1, metavar="N", help="Keep a multiple of this many channels, where it can be.")
    ] = 8
    include: Annotated[
        list[str] | None, _prune(metavar="GLOB", help="Prune only the layers so named; may be repeated.")
    ] = None
    exclude: Annotated[
        list[str] | None, _prune(metavar="GLOB", help="Leave the layers so named whole; may be repeated.")
    ] = None
    skip_first: Annotated[bool, _prune("--skip-first", help="Leave the first layer whole.")] = False
    skip_last: Annotated[bool, _prune("--skip-last", help="Leave the last layer whole.")] = False
    calib: Annotated[
        str | None, _prune(metavar="SPEC", help="Look at this data [default: --train, else --data].")
    ] = None
    calibration_samples: Annotated[
        int, _prune(min=1, metavar="N", help="Look at this many samples, at most.")
    ] = 512
    reestimate: Annotated[
        bool, _prune("--reestimate/--no-reestimate", help="Compute batch-norm statistics afresh.")
    ] = True
    sensitivity: Annotated[
        bool, _prune("--sensitivity", help="With --dry-run: what pruning each layer alone costs.")
    ] = False
    plot: Annotated[
        Path | None,
        _prune(metavar="FILE", help="With --sensitivity: also draw it as .png or .svg (plots extra)."),
    ] = None

    def read(self, reader: Reader) -> dict[str, Any]:
        """The fields of ``methods.prune.PruneConfig``, which cannot be imported without torch."""
        reader.read("--structure", self.structure, _structure)
        for option, text, choices in (
            ("--criterion", self.criterion, (AUTO, *CRITERIA)),
            ("--allocation", self.allocation, (AUTO, *ALLOCATIONS)),
            ("--schedule", self.schedule, SCHEDULES),
        ):
            reader.read(option, text, partial(parse_choice, choices=choices))
        if self.plot is not None:
            reader.check(self.sensitivity, "--plot", "has no meaning without --sensitivity")
            fine = self.plot.suffix.lower() in PICTURES
            reader.check(fine, "--plot", f"{self.plot} ends in none of {', '.join(PICTURES)}")
        globs = {name: tuple(getattr(self, name) or ()) for name in ("include", "exclude")}
        given = {k: v for k, v in vars(self).items() if k not in ("calib", "sensitivity", "plot")}
        return given | globs


def _structure(text: str) -> str:
    """A structure, or a pattern such as ``2:4``."""
    if text in STRUCTURES and text != "N:M":
        return text
    if re.fullmatch(r"[1-9]\d?:[1-9]\d?", text, re.ASCII):
        return text
    hint = did_you_mean(text, STRUCTURES)
    known = ", ".join(STRUCTURES).replace("N:M", "N:M such as 2:4")
    raise ValueError(f"'{text}' is not one of {known}" + (f"; {hint}" if hint else ""))
