"""Outputs of a network on calibration data, and how far those of changed networks are from them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from modelopt_cli.data import Data
from modelopt_cli.errors import DataError
from modelopt_cli.methods.batches import input_batches, output_rows
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.finite import require_finite
from modelopt_cli.program import Program
from modelopt_cli.program.inputs import Inputs
from modelopt_cli.program.shapes import evaluation_mode


@dataclass(frozen=True)
class ReferenceOutputs:
    """Outputs of a network, to compare others with; no labels are needed.

    Attributes:
        inputs: batches of samples.
        original: log-softmax of the network's main output on them, float64 ``(N, classes)``.
        device: where to compute.
    """

    inputs: tuple[Inputs, ...]
    original: Tensor
    device: str

    @classmethod
    def of(cls, program: Program, data: Data, context: Context, samples: int) -> "ReferenceOutputs":
        """Outputs of a network on calibration data.

        Args:
            program: the network.
            data: samples, labelled or not.
            context: seed, batch size, workers and device.
            samples: largest number of samples.


        Raises:
            DataError: there are no samples, or the outputs are not finite.
        """
        some = data.sample(samples, context.seed)
        inputs = tuple(input_batches(some, context))
        if not inputs:
            raise DataError("no samples to calibrate on", hint="give data with at least one sample")
        original = log_probabilities(program, inputs, context.device)
        require_finite(original, some.name)
        return cls(inputs, original, context.device)

    def compare(self, changed: Program) -> tuple[float, float]:
        """Mean KL(original || changed) in nats, and the fraction of samples with the same top class."""
        return compare(self.original, log_probabilities(changed, self.inputs, self.device))


def log_probabilities(program: Program, inputs: Sequence[Inputs], device: str) -> Tensor:
    """Log-softmax of a network's main output, float64 ``(N, classes)``."""
    network = program.to(device)
    try:
        with evaluation_mode(network), torch.inference_mode():
            outputs = [output_rows(network, batch, device).cpu() for batch in inputs]
    finally:
        program.to("cpu")
    return F.log_softmax(torch.cat(outputs).double(), dim=1)


def compare(original: Tensor, changed: Tensor) -> tuple[float, float]:
    """Divergence and agreement of two sets of log-probabilities ``(N, classes)``."""
    divergence = F.kl_div(changed, original, reduction="batchmean", log_target=True)
    agreement = (original.argmax(1) == changed.argmax(1)).double().mean()
    # Rounding may leave a tiny negative number; a network that gives no numbers is infinitely far.
    nats = max(0.0, float(divergence)) if torch.isfinite(divergence) else math.inf
    return nats, float(agreement)
