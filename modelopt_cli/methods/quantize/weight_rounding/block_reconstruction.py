"""Reconstruction of a network block by block, weights and activation steps together.

Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction", ICLR 2021: the
result of a residual block is reconstructed at once, so that its layers make up for each other. Wei et al.,
"QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training Quantization", ICLR 2022: while
that is learned, each activation stays unrounded with a probability of one half, so that weights fit rounded
and unrounded ones, and samples that were not looked at. Step sizes of activations learn with the weights
(Esser et al., "Learned Step Size Quantization", ICLR 2020).
"""

from modelopt_cli.methods.quantize.weight_rounding.block_learning import Learning
from modelopt_cli.methods.quantize.weight_rounding.reconstruction import Reconstruction
from modelopt_cli.methods.quantize.weight_rounding.reconstruction_blocks import find_blocks
from modelopt_cli.methods.quantize.weight_rounding.rounding_problem import Rounded, RoundingProblem
from modelopt_cli.methods.quantize.weight_rounding.simulation import simulate

LEARNING = Learning(step_way=0.6, dropped=True)


def reconstruct_blocks(problem: RoundingProblem) -> Rounded:
    """The integers of every layer that may be rounded freely, and the steps of activations.

    Raises:
        DataError: there are no samples.
    """
    simulation = simulate(problem)
    return Reconstruction(problem, simulation, LEARNING).run(find_blocks(problem, simulation))
