"""Outputs of a network on calibration data, and how far those of changed networks are from them.

Logits are compared by the divergence of their probabilities, row by row: of a sample, a pixel or a token.
Other outputs are compared by their noise, as a fraction of the signal: ``10^(-dB / 10)``. Of a detector that
was captured in parts, whose boxes do not belong together one by one, they are what the parts return.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from modelopt_cli.data import Data
from modelopt_cli.errors import DataError
from modelopt_cli.measure.fidelity import mean_cosine
from modelopt_cli.methods.batches import comparable, input_batches, require_finite
from modelopt_cli.methods.context import Context
from modelopt_cli.program import Program
from modelopt_cli.program.input_batch import Inputs, call, to
from modelopt_cli.program.output_structure import are_detections, flatten, plain
from modelopt_cli.program.parted import PartCall, PartedProgram, recorded_calls
from modelopt_cli.program.shapes import evaluation_mode
from modelopt_cli.tasks import CLASSIFY, TaskSpec

LARGEST = 1 << 26
"""Numbers of outputs that are kept, about: those of pixels would fill the memory."""


@dataclass(frozen=True)
class ReferenceOutputs:
    """Outputs of a network, to compare others with; no labels are needed.

    Attributes:
        inputs: batches of samples.
        original: of the network on them, float64: log-softmax of logits, ``(rows, classes)``, or each output
            that counts, ``(N, numbers)``.
        device: where to compute.
        task: says which output counts.
        are_logits: True if that is logits of which one class is right.
        calls: of the parts of a detector, whose outputs are compared in place of the boxes that it finds;
            none of any other network.
    """

    inputs: tuple[Inputs, ...]
    original: tuple[Tensor, ...]
    device: str
    task: TaskSpec = CLASSIFY
    are_logits: bool = True
    calls: tuple[PartCall, ...] = ()

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
        if calls := _detecting_calls(program, inputs, context.device):
            original = _repeated(program, calls, context.device)
            return cls(inputs, original, context.device, context.task, are_logits=False, calls=calls)
        original, batches, are_logits = _rows(program, inputs, context.device, context.task, LARGEST)
        for part in original:
            require_finite(part, some.name)
        return cls(inputs[:batches], original, context.device, context.task, are_logits)

    def compare(self, changed: Program) -> tuple[float, float]:
        """Compare a changed network's outputs with the original's: distance, and share that is the same.

        Of logits the mean KL(original || changed) in nats, and the fraction of rows with the same top class.
        Of other outputs the noise as a fraction of the signal, and the cosine, at least 0; of several outputs
        the means of these.
        """
        if self.calls:
            rows = _repeated(changed, self.calls, self.device)
        else:
            rows, _, _ = _rows(changed, self.inputs, self.device, self.task)
        measure = compare if self.are_logits else compare_outputs
        changes = [measure(*pair) for pair in zip(self.original, rows, strict=True)]
        distances, likenesses = zip(*changes, strict=True)
        return sum(distances) / len(changes), sum(likenesses) / len(changes)


def _detecting_calls(program: Program, inputs: Sequence[Inputs], device: str) -> tuple[PartCall, ...]:
    """Calls of a detector's parts, of batches until there are ``LARGEST`` numbers; none of other networks."""
    calls: list[PartCall] = []
    if not isinstance(program, PartedProgram):
        return ()
    network, numbers = program.to(device), 0
    try:
        with evaluation_mode(network), torch.inference_mode():
            for batch in inputs:
                with recorded_calls(network) as seen:
                    outputs = call(network, to(batch, device))
                if not are_detections(plain(outputs)):
                    return ()
                calls += (PartCall(each.path, _moved(each.inputs, "cpu"), None) for each in seen)
                numbers += sum(part.numel() for each in seen for part in each.inputs)
                if numbers >= LARGEST:
                    break
    finally:
        program.to("cpu")
    return tuple(calls)


def _repeated(program: Program, calls: Sequence[PartCall], device: str) -> tuple[Tensor, ...]:
    """Outputs of a detector's parts in these calls, float64, each ``(N, numbers)``."""
    network, rows = program.to(device), list[Tensor]()
    try:
        with evaluation_mode(network), torch.inference_mode():
            for each in calls:
                outputs = replace(each, inputs=_moved(each.inputs, device)).repeated(network)
                tensors = [part for part in flatten(outputs).values() if part.is_floating_point()]
                rows += [part.cpu().double().flatten(1) for part in tensors if part.numel()]
    finally:
        program.to("cpu")
    return tuple(rows)


def _moved(tensors: tuple[Tensor, ...], device: str) -> tuple[Tensor, ...]:
    return tuple(tensor.to(device) for tensor in tensors)


def _rows(
    program: Program, inputs: Sequence[Inputs], device: str, task: TaskSpec, most: float = math.inf
) -> tuple[tuple[Tensor, ...], int, bool]:
    """Rows that a network is compared by, of batches until there are ``most`` numbers.

    Returns:
        Log-softmax of logits, or each output that counts, float64; number of batches; True of logits.
    """
    network, rows, are_logits = program.to(device), list[list[Tensor]](), False
    try:
        with evaluation_mode(network), torch.inference_mode():
            for batch in inputs:
                if sum(part.numel() for parts in rows for part in parts) >= most:
                    break
                parts, are_logits = comparable(call(network, to(batch, device)), batch, task)
                rows.append([part.cpu() for part in parts])
    finally:
        program.to("cpu")
    joined = [torch.cat(parts).double() for parts in zip(*rows, strict=True)]
    if are_logits:
        joined = [F.log_softmax(part, dim=1) for part in joined]
    return tuple(joined), len(rows), are_logits


def compare_outputs(original: Tensor, changed: Tensor) -> tuple[float, float]:
    """Noise as a fraction of the signal, and mean cosine, at least 0, of two sets of outputs ``(N, D)``."""
    noise = float((original - changed).square().sum())
    signal = float(original.square().sum())
    ratio = noise / signal if signal else math.inf if noise else 0.0
    return ratio if math.isfinite(ratio) else math.inf, max(0.0, mean_cosine(original, changed))


def compare(original: Tensor, changed: Tensor) -> tuple[float, float]:
    """Divergence and agreement of two sets of log-probabilities ``(N, classes)``."""
    divergence = F.kl_div(changed, original, reduction="batchmean", log_target=True)
    agreement = (original.argmax(1) == changed.argmax(1)).double().mean()
    # Rounding may leave a tiny negative number; a network that gives no numbers is infinitely far.
    nats = max(0.0, float(divergence)) if torch.isfinite(divergence) else math.inf
    return nats, float(agreement)
