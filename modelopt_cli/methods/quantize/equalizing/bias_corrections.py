"""Bias correction: how the mean error that rounding makes in a layer's outputs is found and taken back.

One row each. Imports no torch, so that the command line reads it, too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from modelopt_cli.lazy_names import deferred


@dataclass(frozen=True)
class BiasCorrection:
    """One way to correct the biases of an int8 network.

    Attributes:
        name: in ``--bias-correction`` and the history.
        help: one line.
        paper: where it is described.
        correct: changes the biases of an int8 Program in place, from what it was made of, a
            ``static.Calibrated``, and the context; None where they stay.
        correct_layer: changes that of a layer alone; see ``bias_correction.correct_layer``; None likewise.
    """

    name: str
    help: str
    paper: str
    correct: Callable[..., Any] | None = None
    correct_layer: Callable[..., Any] | None = None


_HOME = "modelopt_cli.methods.quantize.equalizing"
_ROWS = (
    BiasCorrection("none", "biases stay as they are", ""),
    BiasCorrection(
        "measured",
        "the mean of each channel behind the activation becomes that of the float network, layer by layer",
        'Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, '
        "section 4.2 and appendix D, behind the activation",
        deferred(f"{_HOME}.bias_correction", "correct_by_data"),
        deferred(f"{_HOME}.bias_correction", "correct_layer"),
    ),
    BiasCorrection(
        "analytic",
        "the error of each weight times the mean of its input, which follows from the batch norm before it",
        'Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, '
        "section 4.2.1 and appendix C",
        deferred(f"{_HOME}.analytic_correction", "correct_by_norms"),
    ),
)
BIAS_CORRECTIONS = {row.name: row for row in _ROWS}
"""By name."""
