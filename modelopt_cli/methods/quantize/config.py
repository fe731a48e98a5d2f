"""Settings of ``quantize``."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from modelopt_cli.artifact.coding import Code
from modelopt_cli.errors import UsageError
from modelopt_cli.methods.quantize.equalizing.bias_corrections import BIAS_CORRECTIONS
from modelopt_cli.methods.quantize.equalizing.equalizations import EQUALIZATIONS
from modelopt_cli.methods.quantize.observers import OBSERVERS
from modelopt_cli.methods.quantize.precision.precisions import PRECISIONS, PREFERENCES, Preference
from modelopt_cli.methods.quantize.schemes import SCHEMES, Scheme
from modelopt_cli.methods.quantize.weight_rounding.roundings import ROUNDINGS
from modelopt_cli.methods.quantize.widths import BYTE, FLOATS, HALF, Widths
from modelopt_cli.settings import CALIBRATION, Config, Setting, option

_CHOSEN_SINCE = (
    *("weight_bits", "act_bits", "edge_bits", "group_size", "asymmetric"),
    *("rounding", "rounding_steps"),
    *("precision", "prefer", "max_drop", "min_ratio", "min_speedup", "sensitivity"),
)
"""Settings that a file's history names only where they are not as usual."""
_OF_CALIBRATED = ("equalize", "bias_correction")
"""Settings that only schemes heed that calibrate."""


@dataclass(frozen=True)
class QuantizeConfig(Config, title="Quantizing"):
    """Settings of ``quantize``.

    Attributes:
        max_drop: budget of ``precision="auto"``: what may be lost of the task's main metric on the
            calibration data or, without labels, of agreement.
        min_ratio: the same: how many times smaller the file becomes than the original written plain.
        min_speedup: the same: how many times faster one sample becomes than in the fastest float32.
    """

    method: ClassVar[str] = "quantize"
    """Name of the command, in the history and in ``METHODS``."""
    scheme: Annotated[str, Setting("Number format of weights and activations.", choices=SCHEMES)] = "int8"
    weight_bits: Annotated[
        int,
        Setting(
            "Bits of the integers that weights become; with --precision auto, the least.", least=2, most=BYTE
        ),
    ] = BYTE
    act_bits: Annotated[
        int | None,
        Setting(
            "Bits of activations: 2 to 8, or 16 or 32 where they stay floats.",
            least=2,
            most=32,
            default="8, or 32 where the scheme leaves activations in float",
        ),
    ] = None
    edge_bits: Annotated[
        int,
        Setting(
            "Least bits of weights and activations of the first and the last layers.",
            least=2,
            most=BYTE,
            advanced=True,
        ),
    ] = BYTE
    group_size: Annotated[
        int | None,
        Setting(
            "Input features of a linear layer or embedding that share a scale; of weights that are stored.",
            least=1,
            default="all of an output",
        ),
    ] = None
    asymmetric: Annotated[
        bool, Setting("Give each scale of a weight a zero point; of weights that are stored.")
    ] = False
    observer: Annotated[
        str, Setting("Rule that chooses activation ranges from calibration data.", choices=OBSERVERS)
    ] = "outputs"
    precision: Annotated[str, Setting("Precision of each layer.", choices=PRECISIONS)] = "uniform"
    prefer: Annotated[
        str, Setting("With --precision auto: what is made as small as it can be.", choices=PREFERENCES)
    ] = "size"
    max_drop: float | None = None
    min_ratio: float | None = None
    min_speedup: float | None = None
    sensitivity: Annotated[
        bool,
        Setting(
            "Keep in the history what rounding each layer alone costs, and why; with --dry-run, show it and "
            "write nothing.",
            advanced=True,
        ),
    ] = False
    rounding: Annotated[
        str, Setting("Rule by which weights go up or down to an integer.", choices=ROUNDINGS)
    ] = "nearest"
    rounding_steps: Annotated[
        int,
        Setting(
            "Steps of learning for each layer or block, where rounding is learned.", least=1, advanced=True
        ),
    ] = 300
    equalize: Annotated[
        str, Setting("Rule that brings channels to one size before rounding.", choices=EQUALIZATIONS)
    ] = "outputs"
    bias_correction: Annotated[
        str,
        Setting(
            "Rule that takes back the mean error of rounding in layers' outputs.", choices=BIAS_CORRECTIONS
        ),
    ] = "measured"
    include: Annotated[
        tuple[str, ...],
        Setting("Quantize only layers whose names match; may be repeated.", of_layers=True),
    ] = ()
    exclude: Annotated[
        tuple[str, ...],
        Setting("Leave layers whose names match in float; may be repeated.", of_layers=True),
    ] = ()
    skip_first: Annotated[
        bool, Setting("Leave the first convolution or linear layer in float.", advanced=True)
    ] = False
    skip_last: Annotated[
        bool, Setting("Leave the last convolution or linear layer in float.", advanced=True)
    ] = False
    calibration_samples: Annotated[
        int, Setting("Calibrate on at most this many samples.", least=1, title=CALIBRATION)
    ] = 512

    @property
    def automatic(self) -> bool:
        """True if each layer gets a precision of its own, chosen by what it loses."""
        return PRECISIONS[self.precision].choose is not None

    @property
    def preference(self) -> Preference:
        """The declaration of what is made small: where the one limit is a speed, time."""
        if self.min_speedup is not None and self.min_ratio is None:
            return next(row for row in PREFERENCES.values() if row.of_time)
        return PREFERENCES[self.prefer]

    def require_budget(self) -> None:
        """Raise UsageError if precisions are to be chosen and nothing says how far."""
        limits = (self.max_drop, self.min_ratio, self.min_speedup)
        if self.automatic and not PREFERENCES[self.prefer].alone and all(limit is None for limit in limits):
            alone = " or ".join(option("prefer", name) for name, row in PREFERENCES.items() if row.alone)
            names = ", ".join(map(option, ("max_drop", "min_ratio", "min_speedup")))
            raise UsageError(
                f"{option('precision', self.precision)} needs a budget",
                hint=f"give one of {names}, or {alone}",
            )

    @property
    def chooses_on_labels(self) -> bool:
        """True if the result is chosen by its outputs on the calibration data, which cannot judge it then."""
        return self.automatic and self.max_drop is not None

    def conflicts(self) -> Iterator[str]:
        """Settings that contradict each other or have no meaning together."""
        yield from self._conflicts_of_widths()
        yield from self._conflicts_of_choosing()
        rounding = ROUNDINGS[self.rounding]
        stores = self.row.activation_bits is None and self.row.float_type is None
        served = self.row.needs_calibration or (rounding.of_stored and stores)
        if rounding.needs_data and not served:
            if self.row.name == self.scheme:
                with_data = self._named(lambda row: row.needs_calibration)
                why, instead = option("scheme", self.scheme), f"use {option('scheme')} {with_data}"
            else:
                why, instead = option("act_bits", self.act_bits), f"leave {option('act_bits')} out"
            chosen = option("rounding", rounding.name)
            yield f"{chosen} needs samples of layer inputs, unlike {why}; {instead}"
        if not rounding.learned and self.rounding_steps != QuantizeConfig.rounding_steps:
            learned = " or ".join(name for name, row in ROUNDINGS.items() if row.learned)
            yield f"{option('rounding_steps')} has no meaning without {option('rounding')} {learned}"
        if not self.row.needs_calibration:
            idle = {
                "equalize": EQUALIZATIONS[self.equalize].factors is None,
                "bias_correction": BIAS_CORRECTIONS[self.bias_correction].correct is None,
            }
            for name in _OF_CALIBRATED:  # not the observer, which scripts give to every scheme
                if getattr(self, name) != getattr(QuantizeConfig, name) and not idle[name]:
                    yield f"{option(name)} has no meaning where activations are not calibrated"

    def _conflicts_of_widths(self) -> Iterator[str]:
        bits, row = self.act_bits, SCHEMES[self.scheme]
        if row.float_type is not None:
            for name in ("weight_bits", "act_bits", "edge_bits", "group_size", "asymmetric"):
                if getattr(self, name) != getattr(QuantizeConfig, name):
                    problem = f"scheme {row.name} casts weights to {row.float_type}, which leaves no choice"
                    yield f"{option(name)}: {problem}"
            return
        if self.row.activation_bits is not None:
            able = self._named(lambda other: other.activation_bits is None and other.float_type is None)
            for name in ("group_size", "asymmetric"):
                if getattr(self, name):
                    problem = f"scheme {row.name} multiplies integers with one scale for each output"
                    yield f"{option(name)}: {problem}; use {option('scheme', able)}"
        if self.edge_bits != QuantizeConfig.edge_bits and not (self.widths.narrow or self.automatic):
            fewer = option("weight_bits")
            yield f"{option('edge_bits')} has no meaning where all layers have 8 bits; give {fewer}"
        if bits is None:
            return
        if bits > BYTE and bits not in FLOATS:
            yield f"{option('act_bits')}: must be 2 to 8, 16 or 32, not {bits}"
        elif bits in FLOATS and row.of_floats is None:
            able = self._named(lambda other: other.activation_bits is None and other.float_type is None)
            problem = f"scheme {row.name} rounds activations at every call"
            yield f"{option('act_bits', bits)}: {problem}; {option('scheme')} {able} leaves them in float"
        elif bits <= BYTE and row.activation_bits is None:
            able = self._named(lambda other: other.activation_bits is not None)
            problem = f"scheme {row.name} leaves activations in float"
            yield f"{option('act_bits', bits)}: {problem}; {option('scheme')} {able} rounds them"

    @staticmethod
    def _named(fits: Callable[[Scheme], bool]) -> str:
        return " or ".join(name for name, row in SCHEMES.items() if fits(row))

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form, for the history; what became a choice later is left out where it is usual."""
        values = super().as_dict()
        left_out = _CHOSEN_SINCE if self.row.needs_calibration else _CHOSEN_SINCE + _OF_CALIBRATED
        usual = {name: getattr(QuantizeConfig, name) for name in left_out}
        return {name: value for name, value in values.items() if name not in usual or value != usual[name]}

    @property
    def row(self) -> Scheme:
        """The scheme that runs: where activations stay float, the one that leaves them so."""
        row = SCHEMES[self.scheme]
        return SCHEMES[row.of_floats] if self.act_bits in FLOATS and row.of_floats else row

    @property
    def needs_data(self) -> bool:
        """True if samples are looked at."""
        return self.row.needs_calibration or ROUNDINGS[self.rounding].needs_data

    @property
    def widths(self) -> Widths:
        """Widths of each layer but the first and the last."""
        usual = self.row.activation_bits
        return Widths(self.weight_bits, usual and (self.act_bits or usual))

    @property
    def edge_widths(self) -> Widths:
        """Widths of the first and the last layers."""
        return self.widths.at_least(self.edge_bits)

    @property
    def half_scales(self) -> bool:
        """True if scales are bfloat16, so that layers compute in it: activations have 16 bits."""
        return self.act_bits == HALF

    @property
    def label(self) -> str:
        """The scheme's name in a sentence, with its widths where they are not 8 bits."""
        return self.row.title.replace("int8", str(self.widths)) if self.widths.narrow else self.row.title

    @property
    def suffix(self) -> str:
        """Ending of the output's name where none is given."""
        if self.automatic:
            return "mixed"
        narrow = str(self.widths).lower() if self.widths.activation else f"int{self.weight_bits}"
        return self.row.suffix.replace("int8", narrow) if self.widths.narrow else self.row.suffix

    @property
    def code(self) -> Code:
        """Coding of the file where none is asked for: that of the scheme, or integers in their bits."""
        return "packed" if self.widths.weight < BYTE else self.row.code

    def _conflicts_of_choosing(self) -> Iterator[str]:
        precision = option("precision", self.precision)
        if self.automatic and not SCHEMES[self.scheme].needs_calibration:
            able = " or ".join(name for name, row in SCHEMES.items() if row.needs_calibration)
            yield (
                f"{precision} needs scales that are fixed, which {option('scheme', self.scheme)} has not; "
                f"use {option('scheme', able)}"
            )
        if self.sensitivity and not self.row.needs_calibration:
            yield f"{option('sensitivity')} is measured with fixed scales, which {self.row.title} has not"
        for name in ("act_bits", "edge_bits"):
            if self.automatic and getattr(self, name) != getattr(QuantizeConfig, name):
                yield f"{option(name)} has no meaning with {precision}, which gives activations 8 bits"
        if not self.automatic and self.prefer != QuantizeConfig.prefer:
            able = " or ".join(name for name, row in PRECISIONS.items() if row.choose is not None)
            yield f"{option('prefer')} has no meaning without {option('precision', able)}"
