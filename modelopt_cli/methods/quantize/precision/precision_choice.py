"""The precisions that the layers of a network may have: what each costs, and the networks that they make."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import fx

from modelopt_cli.data import Data
from modelopt_cli.kernels import prepare
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.conversion import values_to_observe
from modelopt_cli.methods.quantize.equalizing.bias_corrections import BIAS_CORRECTIONS
from modelopt_cli.methods.quantize.precision.precision_allocation import Allocation, AllocationProblem, Option
from modelopt_cli.methods.quantize.precision_plan import PrecisionPlan, make_plan
from modelopt_cli.methods.quantize.schemes import SCHEMES
from modelopt_cli.methods.quantize.sensitivity.layer_conversions import conversions_between
from modelopt_cli.methods.quantize.sensitivity.layer_precisions import FLOAT32, INT8, LayerPrecision
from modelopt_cli.methods.quantize.sensitivity.layer_sensitivity import (
    LayerSensitivity,
    Loss,
    QuantizeSensitivity,
)
from modelopt_cli.methods.quantize.sensitivity.rounding_sensitivity import in_history, measure, precisions_of
from modelopt_cli.methods.quantize.static import (
    Calibrated,
    calibrated,
    integer_network,
    observed_qparams,
)
from modelopt_cli.methods.quantize.widths import BYTE
from modelopt_cli.methods.share.metric_drop import split_to_verify
from modelopt_cli.program import Program
from modelopt_cli.program.quantization import QParams


@dataclass
class PrecisionChoice:
    """The allocations of a network, and those of them that were tried."""

    program: Program
    config: QuantizeConfig
    context: Context

    @cached_property
    def parts(self) -> tuple[Data | None, Data | None]:
        """Samples to choose by, and those to verify a drop on."""
        if self.config.max_drop is None or self.context.data is None:
            return self.context.data, None
        return split_to_verify(self.context, self.config.max_drop)

    @cached_property
    def choosing(self) -> Context:
        """The context with the samples to choose by alone."""
        return replace(self.context, data=self.parts[0])

    @cached_property
    def ready(self) -> Calibrated:
        """The network with the scales of its integer form."""
        return calibrated(self.program, replace(self.config, weight_bits=BYTE), self.choosing)

    @property
    def choices(self) -> tuple[LayerPrecision, ...]:
        """Precisions that a layer may have."""
        return (FLOAT32, *precisions_of(self.config))

    @property
    def timed(self) -> bool:
        """True if times decide: they differ from run to run, so that nothing else looks at them."""
        return self.config.preference.of_time or self.config.min_speedup is not None

    @cached_property
    def found(self) -> QuantizeSensitivity:
        """Loss of each layer alone at each precision."""
        least = SCHEMES[self.config.scheme].least_snr_db
        correct = BIAS_CORRECTIONS[self.config.bias_correction].correct_layer
        of = (self.ready, self.program, self.choosing, least, self.choices[1:])
        return measure(*of, timed=self.timed, correct=correct)

    @property
    def frontier(self) -> list[Allocation]:
        """The allocations to choose from, by rising error; the first of them all float."""
        return self._problem[1]

    @property
    def all_int8(self) -> Allocation:
        """The allocation of int8 to all layers."""
        return self._problem[0].allocation([self.choices.index(INT8)] * len(self.found.layers))

    @cached_property
    def _problem(self) -> tuple[AllocationProblem, list[Allocation]]:
        cost = self.config.preference.cost
        options = [
            [
                Option(cost(loss), _error(loss), precision.integer)
                for loss, precision in zip(layer.losses, self.choices, strict=True)
            ]
            for layer in self.found.layers
        ]
        between = conversions_between(self.ready) if self.config.preference.of_time else {}
        problem = AllocationProblem(options, between)
        return problem, problem.frontier()

    def precisions(self, allocation: Allocation) -> dict[str, LayerPrecision]:
        """The precision of each layer."""
        pairs = zip(self.found.layers, allocation.chosen, strict=True)
        return {layer.name: self.choices[i] for layer, i in pairs}

    def network(self, allocation: Allocation) -> Program | None:
        """The network with these precisions and its kernels; None where all is float."""
        chosen = self.precisions(allocation).items()
        widths = {name: precision.widths for name, precision in chosen if precision.widths is not None}
        cast = {name: precision.float_type for name, precision in chosen if precision.float_type is not None}
        if not (widths or cast):
            return None
        plan = make_plan(self.ready.program, widths)
        known = self._qparams(plan)
        kept = tuple(name for name in self.ready.selected if name in widths)
        mixed = replace(self.ready, selected=kept, plan=plan, qparams=known, cast=cast)
        return prepare(integer_network(mixed, self.config, self.choosing), "cpu")

    def _qparams(self, plan: PrecisionPlan) -> dict[fx.Node, QParams]:
        """Scales of the values that a plan rounds; those that the full plan does not round are found now.

        An addition, say, is part of a convolution, whose own sums nobody sees, until one of both is float.
        """
        values, full = values_to_observe(plan, self.ready.program.graph), self.ready.plan
        known = {value: self.ready.qparams.get(full.representative(value)) for value in values}
        found = {value: q for value, q in known.items() if q is not None}
        if len(found) == len(known):
            return found
        return observed_qparams(self.ready.program, plan, self.config, self.choosing)

    def record(self, allocation: Allocation) -> dict[str, Any]:
        """Entry of the history: each layer's precision, and its sensitivity."""
        chosen = self.precisions(allocation).items()
        return {
            "precisions": {name: precision.name for name, precision in chosen},
            **in_history(self.found),
        }

    def why_float(self, layer: LayerSensitivity) -> str:
        """The measured reason why a layer stays in float."""
        in_int8, in_float = layer.int8.milliseconds, layer.losses[0].milliseconds
        if self.config.preference.of_time and in_int8 and in_float:
            times = f"{in_int8:.3f} ms in int8, {in_float:.3f} in float"
            slower = in_int8 >= in_float
            return f"slower in int8: {times}" if slower else f"not worth the conversions next to it: {times}"
        kind = "" if layer.reason is None else f", {layer.reason.kind}"
        pairs = zip(layer.losses, self.choices, strict=True)
        least = min((loss for loss, precision in pairs if precision.integer), key=_error)
        return f"best kept in float: {least.precision} alone leaves {least.snr_db:.1f} dB{kind}"


def _error(loss: Loss) -> float:
    """The error of the outputs as it adds up: of logits their divergence, of others noise over signal."""
    if loss.divergence is not None:
        return loss.divergence
    return float(10 ** (-loss.snr_db / 10)) if loss.snr_db < 200 else 0.0
