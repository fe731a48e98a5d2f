"""Settings of ``share``: weight clustering (palettization). Imports no torch."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from modelopt_cli.artifact.coding import Code
from modelopt_cli.errors import UsageError
from modelopt_cli.methods.share.choices import (
    BUDGETS,
    INITS,
    NO_DATA,
    SCOPES,
    TUNINGS,
    WEIGHTINGS,
    Budget,
    Scope,
    Tuning,
    Weighting,
)
from modelopt_cli.settings import CALIBRATION, Config, Setting, fraction, option

AUTO = "auto"
MAX_BITS, MAX_VECTOR_BITS = 8, 16
"""Largest number of bits of an index: of a single weight, and of a vector."""
_BUDGET = f"Budget of --bits {AUTO} (give one, or --max-drop on the calibration data)"


def _names(rows: Mapping[str, Any], attribute: str) -> str:
    """The rows that have something, as a text names them."""
    return " or ".join(name for name, row in rows.items() if getattr(row, attribute))


def _bits(text: str) -> int | str:
    """A number of bits or ``auto``; raises ValueError."""
    if text != AUTO and not (text.isascii() and text.isdigit()):
        raise ValueError(f"'{text}' is neither a number nor {AUTO}")
    return text if text == AUTO else int(text)


def was_shared(history: Iterable[Mapping[str, Any]]) -> bool:
    """True if a history says that weights were shared."""
    return any(entry.get("method") == ShareConfig.method for entry in history)


@dataclass(frozen=True)
class ShareConfig(Config, title="Sharing"):
    """Settings of ``share``, which clusters weights so that few distinct values are left.

    Attributes:
        max_drop: for ``bits="auto"``, what may be lost of the task's main metric on the calibration data.
    """

    method: ClassVar[str] = "share"
    """Name of the command, in the history and in ``METHODS``."""
    code: ClassVar[Code] = "entropy"
    """Coding of the file where none is asked for."""
    bits: Annotated[
        int | str | None,
        Setting(
            f"Bits of an index, for codebooks of 2**N centroids, N from 1 to {MAX_BITS}; {AUTO}: as many as "
            "each weight needs.",
            metavar=f"N|{AUTO}",
            parse=_bits,
        ),
    ] = None
    centroids: Annotated[
        int | None,
        Setting("Centroids of a codebook, instead of --bits.", least=2, older=("--entries",), advanced=True),
    ] = None
    scope: Annotated[str, Setting("Weights that have a codebook in common.", choices=SCOPES)] = "tensor"
    group: Annotated[
        int,
        Setting(
            f"Output channels to a codebook, for --scope {_names(SCOPES, 'grouped')}.",
            least=1,
            advanced=True,
        ),
    ] = 1
    init: Annotated[str, Setting("Centroids that k-means starts from.", choices=INITS, advanced=True)] = (
        "linear"
    )
    weighting: Annotated[
        str | None,
        Setting(
            "Weights whose error counts more.",
            choices=WEIGHTINGS,
            default=f"{NO_DATA}; for --bits {AUTO} with data, {_names(WEIGHTINGS, 'compensates')}",
            advanced=True,
        ),
    ] = None
    vector: Annotated[
        int,
        Setting(
            f"Neighbouring weights that share one index; --bits is up to {MAX_VECTOR_BITS} then.",
            least=1,
            most=64,
            advanced=True,
        ),
    ] = 1
    rate: Annotated[
        float,
        Setting(
            "Squared error that saving a bit is worth, over the variance of the weights.",
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
    tune: Annotated[
        str, Setting("With --train: the parts of clustered weights that learn.", choices=TUNINGS)
    ] = "fixed"
    fold: Annotated[
        bool | None,
        Setting(
            "Fold batch norms into the weights before them first.",
            default=f"only for --bits {AUTO}",
            advanced=True,
        ),
    ] = None
    include: Annotated[
        tuple[str, ...], Setting("Share only layers whose names match; may be repeated.", of_layers=True)
    ] = ()
    exclude: Annotated[
        tuple[str, ...], Setting("Leave layers whose names match; may be repeated.", of_layers=True)
    ] = ()
    skip_first: Annotated[bool, Setting("Leave the first layer as it is.", advanced=True)] = False
    skip_last: Annotated[bool, Setting("Leave the last layer as it is.", advanced=True)] = False
    calibration_samples: Annotated[
        int, Setting("Look at no more than this many samples.", least=1, title=CALIBRATION, advanced=True)
    ] = 512

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form, for the history, where ``centroids`` keeps the name that it has in older files."""
        settings = super().as_dict()
        return settings | {"entries": settings.pop("centroids")}

    def conflicts(self) -> Iterator[str]:
        """Settings that contradict each other or have no meaning together."""
        yield from self._wrong_size()
        yield from self._wrong_budget()
        bits, vector, scope = option("bits", AUTO), option("vector"), option("scope")
        if self.automatic:
            yield from self._wrong_with_auto(bits)
        if self.vector > 1 and (self.scope_row.whole_network or self.rate):
            yield f"{vector} excludes {scope} {_names(SCOPES, 'whole_network')} and {option('rate')}"
        if (self.automatic or self.vector > 1) and self.init != ShareConfig.init:
            yield f"{option('init')} has no meaning with {bits} or {vector}"
        if not self.scope_row.grouped and self.group != ShareConfig.group:
            yield f"{option('group')} has no meaning without {scope} {_names(SCOPES, 'grouped')}"

    def _wrong_size(self) -> Iterator[str]:
        most = MAX_VECTOR_BITS if self.vector > 1 else MAX_BITS
        if self.bits is not None and self.centroids is not None:
            yield f"{option('bits')} and {option('centroids')} exclude each other"
        if isinstance(self.bits, int) and not 1 <= self.bits <= most:
            yield f"{option('bits')}: must be 1 to {most}, or {AUTO}, not {self.bits}"
        if isinstance(self.bits, str) and not self.automatic:
            yield f"{option('bits')}: must be 1 to {most}, or {AUTO}, not '{self.bits}'"
        if self.centroids is not None and self.centroids > 1 << most:
            yield f"{option('centroids')}: must be at most {1 << most}, not {self.centroids}"

    def _wrong_budget(self) -> Iterator[str]:
        budgets = [option(name) for name in BUDGETS if getattr(self, name) is not None]
        if self.max_drop is not None and not 0 <= self.max_drop < math.inf:
            yield f"{option('max_drop')}: must be a number from 0, not {self.max_drop:g}"
        if budgets and not self.automatic:
            yield f"{', '.join(budgets)} has no meaning without {option('bits', AUTO)}"
        if self.automatic and len(budgets) > 1:
            yield f"{', '.join(budgets)} exclude each other"

    def _wrong_with_auto(self, bits: str) -> Iterator[str]:
        if self.vector > 1 or self.scope != ShareConfig.scope or self.rate:
            excluded = f"{option('vector')}, {option('scope')} and {option('rate')}"
            yield f"{bits} excludes {excluded}: it chooses by itself"
        if not self.tuning_row.keeps_assignments:
            tune = option("tune")
            yield (
                f"{tune} {self.tune} assigns weights again, without the bits that {bits} counts; "
                f"use {tune} {_names(TUNINGS, 'keeps_assignments')}"
            )
        if not self.weighting_row.suits_auto:
            weighting = option("weighting")
            able = _names(WEIGHTINGS, "suits_auto")
            yield f"{bits} excludes {weighting} {self.weighting}; use {weighting} {able}"

    @property
    def automatic(self) -> bool:
        """True if each weight gets as many bits as it needs."""
        return self.bits == AUTO

    @property
    def folds(self) -> bool:
        """True if batch norms are folded into the layers before them first."""
        return self.automatic if self.fold is None else self.fold

    @property
    def scope_row(self) -> Scope:
        """The declaration of the scope."""
        return SCOPES[self.scope]

    @property
    def weighting_row(self) -> Weighting:
        """The declaration of the weighting; where none is named, that of no weighting."""
        return WEIGHTINGS[self.weighting or NO_DATA]

    @property
    def tuning_row(self) -> Tuning:
        """The declaration of the tuning."""
        return TUNINGS[self.tune]

    @property
    def budget(self) -> tuple[Budget, float]:
        """The declaration of the budget of ``auto``, and its limit in the unit of its metric.

        Raises:
            UsageError: there is none.
        """
        for name, row in BUDGETS.items():
            if getattr(self, name) is not None:
                return row, row.limit(getattr(self, name))
        names = ", ".join(map(option, BUDGETS))
        raise UsageError(f"{option('bits', AUTO)} needs a budget", hint=f"give one of {names}")

    @property
    def chooses_on_data(self) -> bool:
        """True if the result is chosen by its outputs on the calibration data, which cannot judge it then."""
        return self.automatic and self.budget[0].on_data

    @property
    def looks_at_data(self) -> bool:
        """True if calibration data are looked at, where there are any."""
        return self.automatic or self.weighting_row.needs_data

    @property
    def size(self) -> int:
        """Centroids of a codebook.

        Raises:
            UsageError: nothing says how many.
        """
        if self.centroids is not None:
            return self.centroids
        if not isinstance(self.bits, int):
            hint = f"give {option('bits')} or {option('centroids')}"
            raise UsageError("nothing says how large the codebooks are", hint=hint)
        return 1 << self.bits

    def require_size(self) -> None:
        """Raise UsageError if neither a size nor a budget says how large codebooks are."""
        self.budget if self.automatic else self.size  # noqa: B018
