"""The options of ``quantize`` alone."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import typer

from modelopt_cli.cli.values import Reader, parse_choice

SCHEMES = ("int8", "int8-dynamic", "int8-weight")
OBSERVERS = ("minmax", "percentile", "mse", "entropy")

_quantize = partial(typer.Option, rich_help_panel="Quantizing")


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
