"""The options of ``share`` alone."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import typer

from modelopt_cli.cli.values import Reader, parse_choice, parse_fraction

SCOPES = ("tensor", "channels", "network")
INITS = ("linear", "density", "kmeans++", "exact")
WEIGHTINGS = ("none", "fisher", "hessian")
TUNINGS = ("fixed", "epoch", "dkm")
AUTO = "auto"

_share = partial(typer.Option, rich_help_panel="Sharing")
_budget = partial(typer.Option, rich_help_panel="Budget of --bits auto (give one, or --max-drop on --calib)")


@dataclass(frozen=True)
class ShareOptions:
    """How many values, by what measure, or the budget to meet."""

    bits: Annotated[
        str | None,
        _share(metavar="N|auto", help="Tables of 2**N values, 1 to 8; auto: as each weight needs."),
    ] = None
    entries: Annotated[int | None, _share(metavar="N", help="Tables of N values, 2 to 256.")] = None
    scope: Annotated[str, _share(metavar="|".join(SCOPES), help="What has a table in common.")] = SCOPES[0]
    group: Annotated[
        int, _share(min=1, metavar="N", help="Output channels to a table, for --scope channels.")
    ] = 1
    init: Annotated[
        str, _share(metavar="|".join(INITS), help="Where k-means starts; exact: the best there is.")
    ] = INITS[0]
    weighting: Annotated[
        str | None,
        _share(
            metavar="|".join(WEIGHTINGS),
            help="Which errors count more; fisher and hessian look at data [default: none; "
            "for --bits auto with data hessian].",
        ),
    ] = None
    vector: Annotated[
        int, _share(min=1, max=64, metavar="N", help="Share vectors of N weights; --bits is up to 16 then.")
    ] = 1
    rate: Annotated[
        float,
        _share(
            min=0, max=100, metavar="X", help="Squared error, over the variance, that saving a bit is worth."
        ),
    ] = 0.0
    bytes: Annotated[
        float | None,
        _budget(
            metavar="F", parser=parse_fraction, help="Keep this fraction of the file, written as an artifact."
        ),
    ] = None
    ratio: Annotated[
        float | None,
        _budget(metavar="X", help="Make the file so many times smaller than the original written plain."),
    ] = None
    tune: Annotated[str, _share(metavar="|".join(TUNINGS), help="With --train: what is learned.")] = TUNINGS[
        0
    ]
    fold: Annotated[
        bool | None,
        _share("--fold/--no-fold", help="Fold batch norms into weights first [default: for --bits auto]."),
    ] = None
    include: Annotated[
        list[str] | None, _share(metavar="GLOB", help="Share only the layers so named; may be repeated.")
    ] = None
    exclude: Annotated[
        list[str] | None, _share(metavar="GLOB", help="Leave the layers so named; may be repeated.")
    ] = None
    skip_first: Annotated[bool, _share("--skip-first", help="Leave the first layer.")] = False
    skip_last: Annotated[bool, _share("--skip-last", help="Leave the last layer.")] = False
    calib: Annotated[
        str | None, _share(metavar="SPEC", help="Look at this data [default: --train, else --data].")
    ] = None
    calibration_samples: Annotated[
        int, _share(min=1, metavar="N", help="Look at this many samples, at most.")
    ] = 512

    def read(self, reader: Reader, max_drop: float | None) -> dict[str, Any]:
        """The fields of ``methods.share.ShareConfig``, which cannot be imported without torch.

        Args:
            reader: collects what is wrong.
            max_drop: the gate, which is also the budget where there is no other.
        """
        bits = None if self.bits is None else reader.read("--bits", self.bits, _bits)
        for option, text, choices in (
            ("--scope", self.scope, SCOPES),
            ("--init", self.init, INITS),
            ("--weighting", self.weighting, WEIGHTINGS),
            ("--tune", self.tune, TUNINGS),
        ):
            if text is not None:
                reader.read(option, text, partial(parse_choice, choices=choices))
        globs = {name: tuple(getattr(self, name) or ()) for name in ("include", "exclude")}
        given = {name: value for name, value in vars(self).items() if name != "calib"}
        budget = max_drop if bits == AUTO and self.bytes is None and self.ratio is None else None
        return given | globs | {"bits": bits, "max_drop": budget}


def _bits(text: str) -> int | str:
    if text == AUTO:
        return text
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"'{text}' is neither a number nor auto")
    return int(text)
