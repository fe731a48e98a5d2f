"""Choosing ranges of activations by what they cost the operations that read them.

The squared error of a value says little of what becomes of it. Rounding errors are independent of one another
and average out in a sum of products; clipping errors have one sign and add up, or a ReLU may take them away.
So each candidate is tried: a value is rounded by it, and the operations that read the value are run on that
next to the value itself, all else in float.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from modelopt_cli.methods.quantize.precision_plan import PrecisionPlan
from modelopt_cli.methods.quantize.roles import Role
from modelopt_cli.program import Program
from modelopt_cli.program.input_batch import Inputs
from modelopt_cli.program.parted import interpret
from modelopt_cli.program.patterns import activation_of, sole_user
from modelopt_cli.program.quantization import ACTIVATIONS, QParams, dequantize, quantize

SAMPLES = 16
"""Calibration samples that candidates are tried on."""
LEAST_GAIN = 0.5
"""Fraction of the widest range's error that may be left for another to be taken. Other samples reach beyond
what these show, and what one value clips is clipped at the same places in the next ones, where it adds up.
"""


def least_errors(
    program: Program,
    plan: PrecisionPlan,
    candidates: Mapping[fx.Node, Sequence[QParams]],
    batches: Iterable[Inputs],
) -> dict[fx.Node, QParams]:
    """The candidate of each value by which the operations that read it lose the least, if clearly so.

    Args:
        program: the float Program that the plan was made for.
        plan: what becomes uint8.
        candidates: at least one for each value, by representative; the last one is the widest.
        batches: of the network's inputs.
    """
    trial = _Trial(program, plan, {value: tried for value, tried in candidates.items() if len(tried) > 1})
    with torch.inference_mode():
        for batch in batches if trial.candidates else ():
            interpret(trial, program, batch)
    return {value: tried[_best(trial.errors.get(value, [0.0]))] for value, tried in candidates.items()}


def _best(errors: Sequence[float]) -> int:
    """Index of the least error, or -1 where the last one is hardly larger."""
    best = min(range(len(errors)), key=errors.__getitem__)
    return best if errors[best] < LEAST_GAIN * errors[-1] else -1


class _Trial(fx.Interpreter):
    """Runs a graph and, at each operation that reads rounded values, this operation by each candidate.

    Attributes:
        errors: squared error of each candidate, against the squares of what is computed, by representative.
    """

    def __init__(
        self, program: Program, plan: PrecisionPlan, candidates: Mapping[fx.Node, Sequence[QParams]]
    ) -> None:
        super().__init__(program)
        self.plan, self.candidates = plan, candidates
        self.layers = dict(program.named_modules())
        self.heads = {unit.head for unit in (*plan.layers.values(), *plan.adds.values())} | plan.calibrated
        self.errors = {value: [0.0] * len(tried) for value, tried in candidates.items()}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        rounded = [value for value in n.all_input_nodes if self._is_rounded_for(n, value)]
        if rounded and isinstance(result, Tensor) and result.is_floating_point():
            activation = ACTIVATIONS[self._activation_after(n)]
            wanted = activation(result)
            power = float(wanted.square().sum()) or 1.0
            for value in rounded:
                representative = self.plan.representative(value)
                for i, qparams in enumerate(self.candidates[representative]):
                    found = activation(self._run_on(n, value, qparams))
                    self.errors[representative][i] += float((found - wanted).square().sum()) / power
        return result

    def _is_rounded_for(self, reader: fx.Node, value: fx.Node) -> bool:
        """True if candidates are tried for a value, and an operation computes with its rounded form."""
        if self.plan.representative(value) not in self.candidates or reader.op == "output":
            return False
        computes = not self.plan.derived(reader) and self.plan.roles.get(reader) is not Role.SHAPE
        return reader in self.heads or (value in self.plan.int8 and computes)

    def _activation_after(self, node: fx.Node) -> str:
        user = sole_user(node)
        name = activation_of(user, self.layers) if user is not None else None
        return name if name in ACTIVATIONS else "none"

    def _run_on(self, node: fx.Node, value: fx.Node, qparams: QParams) -> Any:
        """The result of an operation that reads a value in its rounded form."""
        exact = self.env[value]
        self.env[value] = dequantize(quantize(exact, qparams), qparams)
        try:
            return super().run_node(node)
        finally:
            self.env[value] = exact
