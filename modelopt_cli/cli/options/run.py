"""How to run: where, with how many threads, from which seed."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import typer

from modelopt_cli.cli.values import Reader, parse_device

_run = partial(typer.Option, rich_help_panel="Running")


@dataclass(frozen=True)
class RunOptions:
    """How to run: where, with how many threads, from which seed."""

    seed: Annotated[int, _run(min=0, max=2**32 - 1, metavar="N", help="Seed of everything random.")] = 0
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
