"""What to share, how coarsely, and by what measure."""

from dataclasses import asdict, dataclass
from typing import Any

from modelopt_cli.errors import UsageError

AUTO = "auto"
MAX_BITS = 8
SCOPES: dict[str, str] = {
    "tensor": "a table for each weight",
    "channels": "a table for every --group output channels",
    "network": "one table for all weights",
}
INIT_NAMES = ("linear", "density", "kmeans++", "exact")
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


@dataclass(frozen=True)
class ShareConfig:
    """Settings of ``share``.

    Attributes:
        bits: a table has ``2**bits`` entries; ``auto`` lets each weight have what it needs.
        entries: of a table, instead of ``bits``.
        scope: a key of ``SCOPES``.
        group: output channels to a table, for scope ``channels``.
        init: one of ``INIT_NAMES``.
        weighting: a key of ``WEIGHTINGS``; None means ``hessian`` for ``auto`` with data, else ``none``.
        vector: weights to an entry, along a row; 1 shares single weights.
        rate: what a bit is worth: a weight takes an entry whose squared error is larger by up to so many
            times the weights' variance if that saves a bit.
        bytes: for ``auto``, the fraction of the file that may be left.
        ratio: for ``auto``, how many times smaller the file should be.
        max_drop: for ``auto``, points of accuracy that may be lost on the calibration data.
        tune: a key of ``TUNINGS``, where there is training.
        fold: whether batch norms are folded into the layers before them first; None does so for ``auto``.
        include: globs of layers to share; empty means all.
        exclude: globs of layers to leave out.
        skip_first: leave out the first layer.
        skip_last: leave out the last layer.
        calibration_samples: to look at, at most.
    """

    bits: int | str | None = None
    entries: int | None = None
    scope: str = "tensor"
    group: int = 1
    init: str = "linear"
    weighting: str | None = None
    vector: int = 1
    rate: float = 0.0
    bytes: float | None = None
    ratio: float | None = None
    max_drop: float | None = None
    tune: str = "fixed"
    fold: bool | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    skip_first: bool = False
    skip_last: bool = False
    calibration_samples: int = 512

    def __post_init__(self) -> None:
        for name, choices in (
            ("scope", SCOPES),
            ("init", INIT_NAMES),
            ("tune", TUNINGS),
            *((("weighting", WEIGHTINGS),) if self.weighting is not None else ()),
        ):
            if getattr(self, name) not in choices:
                raise UsageError(
                    f"unknown {name} {getattr(self, name)!r}", hint=f"one of {', '.join(choices)}"
                )
        self._check_size()
        for name, allowed, fits in (
            ("group", "at least 1", self.group >= 1),
            ("vector", "1 to 64", 1 <= self.vector <= 64),
            ("rate", "0 to 100", 0 <= self.rate <= 100),
            ("bytes", "a fraction above 0 and below 1", self.bytes is None or 0 < self.bytes < 1),
            ("ratio", "a number above 1", self.ratio is None or 1 < self.ratio < float("inf")),
            ("max-drop", "0 to 100 points", self.max_drop is None or 0 <= self.max_drop <= 100),
            ("calibration-samples", "at least 1", self.calibration_samples >= 1),
        ):
            if not fits:
                raise UsageError("is out of range", where=f"--{name}", hint=f"give {allowed}")
        self._check_together()

    def _check_size(self) -> None:
        if self.bits is not None and self.entries is not None:
            raise UsageError("--bits and --entries exclude each other")
        if self.bits is not None and self.bits != AUTO:
            most = 16 if self.vector > 1 else MAX_BITS
            if type(self.bits) is not int or not 1 <= self.bits <= most:
                raise UsageError(
                    f"{self.bits} is out of range", where="--bits", hint=f"give 1 to {most}, or auto"
                )
        if self.entries is not None:
            most = 1 << 16 if self.vector > 1 else 1 << MAX_BITS
            if not 2 <= self.entries <= most:
                raise UsageError(
                    f"{self.entries} is out of range", where="--entries", hint=f"give 2 to {most}"
                )

    def _check_together(self) -> None:
        given = [name for name in TARGETS if getattr(self, name) is not None]
        options = ", ".join("--" + name.replace("_", "-") for name in given or TARGETS)
        if self.automatic and len(given) != 1:
            what = "exclude each other" if given else "is missing: --bits auto needs one of them"
            raise UsageError(f"{options} {what}")
        if given and not self.automatic:
            raise UsageError(f"{options} has no meaning without --bits auto")
        if self.automatic and (self.vector > 1 or self.scope != "tensor" or self.rate):
            raise UsageError("--bits auto excludes --vector, --scope and --rate: it chooses by itself")
        if self.automatic and self.tune != "fixed":
            raise UsageError(
                f"--tune {self.tune} assigns weights anew, without the bits that --bits auto counts",
                hint="use --tune fixed",
            )
        if self.vector > 1 and (self.scope == "network" or self.rate):
            raise UsageError("--vector excludes --scope network and --rate")
        if (self.automatic or self.vector > 1) and self.init != ShareConfig.init:
            raise UsageError("--init has no meaning with --bits auto or --vector")
        if self.scope != "channels" and self.group != 1:
            raise UsageError("--group has no meaning without --scope channels")

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
            raise UsageError("nothing says how large the tables are", hint="give --bits or --entries")
        return 1 << self.bits

    @property
    def target(self) -> tuple[str, float]:
        """The budget of ``auto``: ``bytes`` with the fraction left, or ``max_drop`` with points."""
        if self.max_drop is not None:
            return "max_drop", self.max_drop
        if self.ratio is not None:
            return "bytes", 1 / self.ratio
        assert self.bytes is not None
        return "bytes", self.bytes

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form, for the history."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}
