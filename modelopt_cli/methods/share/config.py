"""What to share, how coarsely, and by what measure."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from modelopt_cli.errors import UsageError
from modelopt_cli.settings import CALIBRATION, Config, Setting, fraction, option

AUTO = "auto"
MAX_BITS = 8
SCOPES: dict[str, str] = {
    "tensor": "a table for each weight",
    "channels": "a table for every --group output channels",
    "network": "one table for all weights",
}
INITS: dict[str, str] = {
    "linear": "evenly spaced over the range of the weights (Han et al. 2016)",
    "density": "evenly spaced over the sorted weights",
    "kmeans++": "drawn one after the other, far from each other (Arthur and Vassilvitskii 2007)",
    "exact": "no start: the best codebook there is, by dynamic programming",
}
WEIGHTINGS: dict[str, str] = {
    "none": "every weight counts the same",
    "fisher": "by the squared gradient of the network's answers",
    "hessian": "by what it does to its layer's outputs; the weights after it make up for its error",
}
TUNINGS: dict[str, str] = {
    "fixed": "the tables learn, the indices stay",
    "epoch": "weights learn and go to the nearest entry at the beginning of every epoch",
    "dkm": "differentiable k-means: indices are soft at first, and learn too",
}
TARGETS = ("bytes", "ratio", "max_drop")
_BUDGET = "Budget of --bits auto (give one, or --max-drop on the calibration data)"


def _bits(text: str) -> int | str:
    """A number of bits or ``auto``; raises ValueError."""
    if text != AUTO and not (text.isascii() and text.isdigit()):
        raise ValueError(f"'{text}' is neither a number nor {AUTO}")
    return text if text == AUTO else int(text)


@dataclass(frozen=True)
class ShareConfig(Config, title="Sharing"):
    """Settings of ``share``.

    Attributes:
        max_drop: for ``bits="auto"``, points of accuracy that may be lost on the calibration data.
    """

    bits: Annotated[
        int | str | None,
        Setting(
            f"Bits of an index, for codebooks of 2**N values, N from 1 to {MAX_BITS}; auto: as many as each "
            "weight needs.",
            metavar=f"N|{AUTO}",
            parse=_bits,
        ),
    ] = None
    entries: Annotated[
        int | None, Setting("Values in a codebook, instead of --bits.", least=2, advanced=True)
    ] = None
    scope: Annotated[str, Setting("Weights that have a codebook in common.", choices=SCOPES)] = "tensor"
    group: Annotated[
        int,
        Setting(
            "Output channels that have a codebook in common, for scope channels.", least=1, advanced=True
        ),
    ] = 1
    init: Annotated[str, Setting("Codebook that k-means starts from.", choices=INITS, advanced=True)] = (
        "linear"
    )
    weighting: Annotated[
        str | None,
        Setting(
            "Weights whose error counts more.",
            choices=WEIGHTINGS,
            default="none; for --bits auto with data, hessian",
            advanced=True,
        ),
    ] = None
    vector: Annotated[
        int,
        Setting(
            "Weights in a row that share one index; --bits is up to 16 then.", least=1, most=64, advanced=True
        ),
    ] = 1
    rate: Annotated[
        float,
        Setting(
            "Squared error, over the variance of the weights, that saving a bit is worth.",
            least=0,
            most=100,
            advanced=True,
        ),
    ] = 0.0
    bytes: Annotated[
        float | None,
        Setting(
            "Keep this fraction of the file, written as an artifact.",
            metavar="F",
            parse=fraction,
            above=0,
            below=1,
            title=_BUDGET,
        ),
    ] = None
    ratio: Annotated[
        float | None,
        Setting(
            "Make the file this many times smaller than the original written plain.", above=1, title=_BUDGET
        ),
    ] = None
    max_drop: float | None = None
    tune: Annotated[str, Setting("With --train: what is trained.", choices=TUNINGS)] = "fixed"
    fold: Annotated[
        bool | None,
        Setting(
            "Fold batch norms into the weights before them first.",
            default="only for --bits auto",
            advanced=True,
        ),
    ] = None
    include: Annotated[
        tuple[str, ...], Setting("Share only layers whose names match; may be repeated.", metavar="GLOB")
    ] = ()
    exclude: Annotated[
        tuple[str, ...], Setting("Leave layers whose names match; may be repeated.", metavar="GLOB")
    ] = ()
    skip_first: Annotated[bool, Setting("Leave the first layer as it is.", advanced=True)] = False
    skip_last: Annotated[bool, Setting("Leave the last layer as it is.", advanced=True)] = False
    calibration_samples: Annotated[
        int, Setting("Look at no more than this many samples.", least=1, title=CALIBRATION, advanced=True)
    ] = 512

    def conflicts(self) -> Iterator[str]:
        """Settings that contradict each other or have no meaning together."""
        yield from self._wrong_size()
        yield from self._wrong_budget()
        bits, vector = option("bits"), option("vector")
        if self.automatic and (self.vector > 1 or self.scope != "tensor" or self.rate):
            others = f"{vector}, {option('scope')} and {option('rate')}"
            yield f"{bits} auto excludes {others}: it chooses by itself"
        if self.automatic and self.tune != "fixed":
            tune = option("tune")
            yield (
                f"{tune} {self.tune} assigns weights anew, without the bits that {bits} auto counts; "
                f"use {tune} fixed"
            )
        if self.vector > 1 and (self.scope == "network" or self.rate):
            yield f"{vector} excludes {option('scope')} network and {option('rate')}"
        if (self.automatic or self.vector > 1) and self.init != ShareConfig.init:
            yield f"{option('init')} has no meaning with {bits} auto or {vector}"
        if self.scope != "channels" and self.group != 1:
            yield f"{option('group')} has no meaning without {option('scope')} channels"

    def _wrong_size(self) -> Iterator[str]:
        most = 16 if self.vector > 1 else MAX_BITS
        if self.bits is not None and self.entries is not None:
            yield f"{option('bits')} and {option('entries')} exclude each other"
        if isinstance(self.bits, int) and not 1 <= self.bits <= most:
            yield f"{option('bits')}: must be 1 to {most}, or auto, not {self.bits}"
        if isinstance(self.bits, str) and self.bits != AUTO:
            yield f"{option('bits')}: must be 1 to {most}, or auto, not '{self.bits}'"
        if self.entries is not None and self.entries > 1 << most:
            yield f"{option('entries')}: must be at most {1 << most}, not {self.entries}"

    def _wrong_budget(self) -> Iterator[str]:
        given = [option(name) for name in TARGETS if getattr(self, name) is not None]
        if self.max_drop is not None and not 0 <= self.max_drop <= 100:
            yield f"{option('max_drop')}: must be 0 to 100 points, not {self.max_drop:g}"
        if given and not self.automatic:
            yield f"{', '.join(given)} has no meaning without {option('bits')} auto"
        if self.automatic and len(given) > 1:
            yield f"{', '.join(given)} exclude each other"

    @property
    def automatic(self) -> bool:
        """Whether each weight gets as many bits as it needs."""
        return self.bits == AUTO

    @property
    def folds(self) -> bool:
        """Whether batch norms are folded into the layers before them first."""
        return self.automatic if self.fold is None else self.fold

    @property
    def size(self) -> int:
        """Entries of a table.

        Raises:
            UsageError: nothing says how many.
        """
        if self.entries is not None:
            return self.entries
        if not isinstance(self.bits, int):
            hint = f"give {option('bits')} or {option('entries')}"
            raise UsageError("nothing says how large the codebooks are", hint=hint)
        return 1 << self.bits

    @property
    def target(self) -> tuple[str, float]:
        """The budget of ``auto``: ``bytes`` with the fraction left, or ``max_drop`` with points.

        Raises:
            UsageError: there is none.
        """
        if self.max_drop is not None:
            return "max_drop", self.max_drop
        if self.ratio is not None:
            return "bytes", 1 / self.ratio
        if self.bytes is None:
            names = ", ".join(map(option, TARGETS))
            raise UsageError(f"{option('bits')} auto needs a budget", hint=f"give one of {names}")
        return "bytes", self.bytes
