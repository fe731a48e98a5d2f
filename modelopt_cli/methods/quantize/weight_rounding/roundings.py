"""Roundings: how a weight between two integers goes up or down. One row each.

Imports no torch, so that the command line reads it, too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelopt_cli.lazy_names import deferred

if TYPE_CHECKING:
    from modelopt_cli.data import Data
    from modelopt_cli.methods.context import Context
    from modelopt_cli.methods.quantize.stored_weights import WeightSteps
    from modelopt_cli.methods.quantize.weight_rounding.rounding_problem import Rounded, RoundingProblem
    from modelopt_cli.program import Program


@dataclass(frozen=True)
class Rounding:
    """One way to round the weights of a network.

    Attributes:
        name: in ``--rounding`` and the history.
        help: one line.
        paper: where it is described.
        find: the integers of the weights, and what goes with them; None where each weight takes the nearest.
        learned: it takes steps of learning.
        of_stored: puts weights that are only stored as integers onto their steps, in place; None where it
            serves none.
    """

    name: str
    help: str
    paper: str
    find: "Callable[[RoundingProblem], Rounded] | None"
    learned: bool = False
    of_stored: "Callable[[Program, Mapping[str, WeightSteps], Data, Context], None] | None" = None

    @property
    def needs_data(self) -> bool:
        """True if it looks at the inputs of layers, so that it needs samples and a graph."""
        return self.find is not None


_HOME = "modelopt_cli.methods.quantize.weight_rounding"
_ROWS = (
    Rounding(
        name="nearest",
        help="each weight to the nearest integer",
        paper='Jacob et al., "Quantization and Training of Neural Networks for Efficient '
        'Integer-Arithmetic-Only Inference", CVPR 2018, section 2.1',
        find=None,
    ),
    Rounding(
        name="adaround",
        help="up or down as the outputs of each layer stay nearest, learned",
        paper='Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020',
        find=deferred(f"{_HOME}.adaround", "adaround"),
        learned=True,
    ),
    Rounding(
        name="gptq",
        help="column by column, later columns making up for the error of earlier ones",
        paper='Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained '
        'Transformers", ICLR 2023',
        find=deferred(f"{_HOME}.gptq", "gptq"),
        of_stored=deferred(f"{_HOME}.gptq_stored", "compensate"),
    ),
    Rounding(
        name="block",
        help="weights and activation steps learned together, one block of layers after the other",
        paper='Li et al., "BRECQ", ICLR 2021; Wei et al., "QDrop", ICLR 2022; steps: Esser et al., '
        '"Learned Step Size Quantization", ICLR 2020',
        find=deferred(f"{_HOME}.block_reconstruction", "reconstruct_blocks"),
        learned=True,
    ),
)
ROUNDINGS = {row.name: row for row in _ROWS}
"""By name."""
