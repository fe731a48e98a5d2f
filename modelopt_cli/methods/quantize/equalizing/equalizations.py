"""Equalisation: how the factors are chosen that channels are divided by, before anything is rounded.

One row each. Imports no torch, so that the command line reads it, too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelopt_cli.lazy_names import deferred

if TYPE_CHECKING:
    from torch import Tensor

    from modelopt_cli.methods.quantize.equalizing.channel_factors import Channels


@dataclass(frozen=True)
class Equalization:
    """One way to bring the channels of a value to one size.

    Attributes:
        name: in ``--equalize`` and the history.
        help: one line.
        paper: where it is described.
        factors: of channels, float64 ``(C,)``; None where they stay as they are.
        needs_data: it looks at the values that calibration shows.
    """

    name: str
    help: str
    paper: str
    factors: "Callable[[Channels], Tensor | None] | None" = None
    needs_data: bool = False


_HOME = "modelopt_cli.methods.quantize.equalizing.channel_factors"
_ROWS = (
    Equalization("none", "channels stay as they are", ""),
    Equalization(
        "weights",
        "the largest weights that make a channel and that read it become equal",
        'Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, '
        "section 4.1",
        deferred(_HOME, "by_weights"),
    ),
    Equalization(
        "outputs",
        "ranges of channels come closer as far as that lowers the predicted error of the layers' outputs",
        'Xiao et al., "SmoothQuant", ICML 2023, section 4, for convolutions and chains of layers, too',
        deferred(_HOME, "by_outputs"),
        needs_data=True,
    ),
)
EQUALIZATIONS = {row.name: row for row in _ROWS}
"""By name."""
