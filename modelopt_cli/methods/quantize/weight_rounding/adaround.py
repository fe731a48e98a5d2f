"""AdaRound: weights go up or down as the outputs of each layer stay nearest to those of the float network.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020: layer by layer, the
activation included, on inputs from the integer network so far (their "asymmetric reconstruction").
"""

from modelopt_cli.methods.quantize.weight_rounding.block_learning import Learning
from modelopt_cli.methods.quantize.weight_rounding.reconstruction import Reconstruction
from modelopt_cli.methods.quantize.weight_rounding.reconstruction_blocks import layer_blocks
from modelopt_cli.methods.quantize.weight_rounding.rounding_problem import Rounded, RoundingProblem
from modelopt_cli.methods.quantize.weight_rounding.simulation import simulate

LEARNING = Learning()


def adaround(problem: RoundingProblem) -> Rounded:
    """The integers of every layer that may be rounded freely.

    Raises:
        DataError: there are no samples.
    """
    simulation = simulate(problem)
    return Reconstruction(problem, simulation, LEARNING).run(layer_blocks(problem, simulation))
