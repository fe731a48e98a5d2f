"""Quantization schemes: one row each. Imports no torch, so that the command line reads it, too."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from modelopt_cli.lazy_names import deferred
from modelopt_cli.methods.quantize.widths import BYTE

if TYPE_CHECKING:
    from modelopt_cli.methods.context import Context, MethodResult
    from modelopt_cli.program import Program


class NetworkForm(IntEnum):
    """Forms in which a checkpoint is opened; each offers what the ones before it do."""

    TENSORS = 1
    """A bare state dict."""
    MODULE = 2
    """A network whose layers are known, without a graph."""
    GRAPH = 3
    """A traced Program."""


@dataclass(frozen=True)
class Scheme:
    """One way to quantize a network.

    Attributes:
        name: in ``--scheme``, the history and tables.
        help: one line.
        title: its name in a sentence.
        weight_bits: of the integers that weights become, where nothing else is asked for.
        activation_bits: of the integers that weights are multiplied with, likewise; None where activations
            stay float and weights are floats again once the file is loaded.
        float_type: the half-precision type that weights are stored in, where they become no integers.
        of_layers: a network of several precisions may have it for single layers, next to integers.
        of_floats: name of the scheme that takes its place where activations are to stay float, if one does.
        source: the least that must be known of the network.
        needs_calibration: ranges of activations are taken from samples.
        layers: names of the ``torch.nn`` classes that it takes; none: every weight.
        code: default of ``--code``, a key of ``artifact.coding.CODINGS``.
        suffix: of the output's name where the user gives none.
        least_snr_db: signal-to-noise of the outputs in dB, below which more is lost than rounding to at least
            8 bits takes.
        apply: quantizes a Program.
    """

    name: str
    help: str
    title: str
    weight_bits: int
    activation_bits: int | None
    of_floats: str | None
    source: NetworkForm
    needs_calibration: bool
    layers: tuple[str, ...]
    code: str
    suffix: str
    least_snr_db: float
    apply: "Callable[[Program, Any, Context], MethodResult]"
    float_type: str | None = None
    of_layers: bool = False

    @property
    def integer_arithmetic(self) -> bool:
        """True if weights are multiplied as integers, so that their sums must not overflow."""
        return self.activation_bits is not None

    def least_db(self, bits: int) -> float:
        """The signal-to-noise in dB, below which more is lost than rounding to so many bits takes."""
        return self.least_snr_db if bits >= BYTE else LEAST_NARROW_SNR_DB


_HOME = "modelopt_cli.methods.quantize"


def _cast(name: str, float_type: str, of_layers: bool = False) -> Scheme:
    """The row of a scheme that casts weights to a half-precision type."""
    return Scheme(
        name=name,
        help=f"weights cast to {float_type}, and products computed in it where the hardware can",
        title=f"{float_type} storage",
        weight_bits=16,
        activation_bits=None,
        of_floats=None,
        source=NetworkForm.TENSORS,
        needs_calibration=False,
        layers=(),
        code="plain",
        suffix=name,
        least_snr_db=20.0,
        apply=deferred(f"{_HOME}.weight_only", "quantize_weights"),
        float_type=float_type,
        of_layers=of_layers,
    )


_ROWS = (
    Scheme(
        name="int8",
        help="weights and activations int8, scales fixed by calibration data",
        title="static int8",
        weight_bits=8,
        activation_bits=8,
        of_floats="int8-weight",
        source=NetworkForm.GRAPH,
        needs_calibration=True,
        layers=(
            *("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "Linear", "Embedding"),
            *("GRU", "LSTM", "GRUCell", "LSTMCell"),
        ),
        code="plain",
        suffix="int8",
        least_snr_db=20.0,
        apply=deferred(f"{_HOME}.static", "quantize_static"),
    ),
    Scheme(
        name="int8-dynamic",
        help="linear layers and embeddings int8, activations scaled at every call, no data needed",
        title="dynamic int8",
        weight_bits=8,
        activation_bits=8,
        of_floats=None,
        source=NetworkForm.MODULE,
        needs_calibration=False,
        layers=("Linear", "Embedding"),
        code="plain",
        suffix="int8-dynamic",
        least_snr_db=20.0,
        apply=deferred(f"{_HOME}.dynamic", "quantize_dynamic"),
    ),
    Scheme(
        name="int8-weight",
        help="weights stored as int8, computed in float32, no data needed",
        title="int8 storage",
        weight_bits=8,
        activation_bits=None,
        of_floats="int8-weight",
        source=NetworkForm.TENSORS,
        needs_calibration=False,
        layers=(),
        code="plain",
        suffix="int8-weight",
        least_snr_db=20.0,
        apply=deferred(f"{_HOME}.weight_only", "quantize_weights"),
    ),
    _cast("fp16", "float16"),
    _cast("bf16", "bfloat16", of_layers=True),
)
SCHEMES = {row.name: row for row in _ROWS}
"""By name."""
LEAST_NARROW_SNR_DB = 10.0
"""``Scheme.least_snr_db`` for fewer than 8 bits: a tenth of the outputs' power is noise."""


def uncalibrated() -> list[str]:
    """Names of the schemes that need no calibration data."""
    return [row.name for row in _ROWS if not row.needs_calibration]


def usable(source: NetworkForm) -> list[str]:
    """Names of the schemes that can quantize what was opened so."""
    return [row.name for row in _ROWS if row.source <= source]
