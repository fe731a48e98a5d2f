"""Choosing a precision for each layer: ``--precision auto``.

What each layer loses, takes and saves is measured with that layer alone in a precision; the allocation of the
least bytes or time is found for every error (``precision_allocation``); and the one that keeps the budget is
found by trying them on data, the cheapest first that holds on samples that nothing was chosen by.
"""

import json
from collections import Counter
from collections.abc import Sequence
from functools import cached_property

from modelopt_cli.artifact import predicted_bytes
from modelopt_cli.errors import NothingCompressed
from modelopt_cli.methods.context import Context, MethodResult, Reached
from modelopt_cli.methods.quantize.apply import narrow_encodings
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.precision.precision_allocation import gap
from modelopt_cli.methods.quantize.precision.precision_choice import PrecisionChoice
from modelopt_cli.methods.quantize.sensitivity.layer_precisions import FLOAT32
from modelopt_cli.methods.quantize.sensitivity.layer_times import network_times
from modelopt_cli.methods.share.budget import BudgetNotMet
from modelopt_cli.methods.share.metric_drop import MetricDrop, main_metric, unit_of
from modelopt_cli.program import Program
from modelopt_cli.settings import option

_FEWEST_BITS = 2


def choose(program: Program, config: QuantizeConfig, context: Context) -> MethodResult:
    """Quantize a Program with a precision for each layer that keeps the budget.

    Args:
        program: any float Program; it is not changed.
        config: the budget, the preference, the layers and the least bits of a weight.
        context: calibration data; half of it verifies a largest drop.

    Raises:
        UsageError: there is no budget, there are no data, or too few to tell such a drop.
        BudgetNotMet: no allocation of precisions keeps the budget.
        NothingCompressed: no layer can be quantized, or all are best in float.
        DataError: the calibration data are empty or do not fit.
    """
    config.require_budget()
    choosing = PrecisionChoice(program, config, context)
    search = _Search(choosing)
    chosen = search.search()
    allocation, network = search.allocations[chosen], search.network(chosen)
    assert network is not None
    precisions = choosing.precisions(allocation)
    in_float = [layer for layer in choosing.found.layers if precisions[layer.name] is FLOAT32]
    floats = {layer.name: choosing.why_float(layer) for layer in in_float}
    return MethodResult(
        network,
        choosing.ready.skipped | floats,
        search.reached(chosen),
        (search.summary(chosen), *search.notes(chosen)),
        choosing.record(allocation),
        floats=choosing.ready.program,
    )


class _Search:
    """Allocations that were tried on data, and the search among them."""

    def __init__(self, choosing: PrecisionChoice) -> None:
        self.choosing, self.config = choosing, choosing.config
        # By rising error; behind them the one that times are compared with, should it be none of them.
        self.allocations = [*choosing.frontier, choosing.all_int8]
        self.refused: set[int] = set()
        self._networks: dict[int, Program | None] = {}

    def search(self) -> int:
        """The place in the frontier of the allocation that keeps the budget.

        Raises:
            BudgetNotMet: there is none.
            NothingCompressed: it is the one in which all layers are float.
        """
        last = len(self.choosing.frontier) - 1
        if self.config.max_drop is not None:
            chosen = self._cheapest_without_loss(last)
        elif self.config.min_ratio is not None or self.config.min_speedup is not None:
            chosen = self._least_error_within(last)
        else:
            chosen = last
        if self.config.preference.of_time and self.config.min_speedup is None:
            chosen = self._fastest(chosen)
        if self.network(chosen) is None:
            raise NothingCompressed("every layer is best in float", hint=self._more())
        self._require(chosen)
        return chosen

    def network(self, place: int) -> Program | None:
        """The network at a place; the last few are kept."""
        if place not in self._networks:
            if len(self._networks) > 2:
                self._networks.pop(next(iter(self._networks)))
            self._networks[place] = self.choosing.network(self.allocations[place])
        return self._networks[place]

    def _cheapest_without_loss(self, last: int) -> int:
        """The cheapest that loses no more than allowed: searched on some samples, verified on others."""
        by, on = self._drops
        low, high = 0, last  # what has no error at all holds
        if self._lost(last, by) > self._most:
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if self._lost(middle, by) <= self._most else (low, middle)
            self.refused.add(high)
        else:
            low = last
        step = 1
        while low > 0 and self._lost(low, on) > self._most:
            self.refused.add(low)
            # The one with the least error besides all float is tried before nothing is left.
            low, step = max(min(1, low - 1), low - step), 2 * step
        if low == 0 and self.network(0) is None:
            lost = self._lost(1, on)
            raise BudgetNotMet(
                f"with the least sensitive layer alone in integers up to {lost:.3g}{self._unit} may be lost; "
                f"{self._most:g} were allowed",
                hint=self._more(),
            )
        return low

    def _least_error_within(self, last: int) -> int:
        """The least error of those that are small and fast enough."""
        low, high = -1, last
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._is_within(middle) else (middle, high)
        return high

    def _fastest(self, chosen: int) -> int:
        """The faster, as measured, of an allocation and that of int8 alone, if it is faster than all float.

        The times of layers do not add up exactly to that of the network.
        """
        if self.network(chosen) is None:
            return chosen
        whole = len(self.allocations) - 1
        places = [chosen, whole] if self._loses_little(whole) else [chosen]
        networks = [network for place in places if (network := self.network(place)) is not None]
        in_float, *mixed = network_times(self.choosing.ready, networks)
        if min(mixed) < in_float:
            return places[mixed.index(min(mixed))]
        times = f"{min(mixed):.3f} ms for one sample, {in_float:.3f} in float"
        problem = f"no precision is faster than float32 here: {times}"
        raise BudgetNotMet(problem, hint=f"keep the float network, or use {option('prefer')} size")

    def _loses_little(self, place: int) -> bool:
        """True if nothing says how much may be lost, or no more is, on all samples."""
        return self.config.max_drop is None or all(
            self._lost(place, drop) <= self._most for drop in self._drops
        )

    def _require(self, chosen: int) -> None:
        """Raise BudgetNotMet where a file is too large or a network too slow."""
        if self.config.min_ratio is not None and (ratio := self.ratio(chosen)) < self.config.min_ratio:
            problem = f"the file gets {ratio:.2f} times smaller; {self.config.min_ratio:g} was asked for"
            raise BudgetNotMet(f"{problem}, and that is the most that was reached", hint=self._smaller())
        if self.config.min_speedup is not None and (gain := self._speedup(chosen)) < self.config.min_speedup:
            problem = f"it gets {gain:.2f} times as fast; {self.config.min_speedup:g} was asked for"
            raise BudgetNotMet(problem, hint=self._more())

    def _is_within(self, place: int) -> bool:
        small = self.config.min_ratio is None or self.ratio(place) >= self.config.min_ratio
        return small and (self.config.min_speedup is None or self._speedup(place) >= self.config.min_speedup)

    def ratio(self, place: int) -> float:
        """Ratio of the original file's size to this one's, history included."""
        network = self.network(place)
        full = predicted_bytes(self.choosing.program)
        if network is None:
            return 1.0
        network.encodings |= narrow_encodings(network)
        record = self.choosing.record(self.allocations[place])
        entry = len(json.dumps(self.config.as_dict() | record))
        return full / (predicted_bytes(network, code=self.choosing.context.code) + entry)

    def _speedup(self, place: int) -> float:
        network = self.network(place)
        if network is None:
            return 1.0
        in_float, mixed = network_times(self.choosing.ready, [network])
        return in_float / mixed

    @property
    def _most(self) -> float:
        assert self.config.max_drop is not None
        return self.config.max_drop

    @property
    def _unit(self) -> str:
        return unit_of(main_metric(self.choosing.context.task))

    @cached_property
    def _drops(self) -> tuple[MetricDrop, MetricDrop]:
        by, on = self.choosing.parts
        assert by is not None
        assert on is not None
        of = (self.choosing.program, self.choosing.context)
        return MetricDrop.of(of[0], by, of[1]), MetricDrop.of(of[0], on, of[1])

    def _lost(self, place: int, drop: MetricDrop) -> float:
        """The upper end of the interval of what is lost; nothing of the float network itself."""
        network = self.network(place)
        return 0.0 if network is None else drop.upper(network)

    def reached(self, chosen: int) -> Reached | None:
        """The budget and the figure reached, on samples that nothing was chosen by."""
        if self.config.max_drop is not None:
            lost = self._lost(chosen, self._drops[1])
            return Reached("max_drop", self.config.max_drop, lost, self._unit)
        if self.config.min_ratio is not None:
            return Reached("bytes", 1 / self.config.min_ratio, 1 / self.ratio(chosen))
        return None

    def summary(self, chosen: int) -> str:
        """A line on how many layers have which precision, and how good that is by the model."""
        allocation, unit = self.allocations[chosen], self.config.preference.unit
        counts = Counter(self.choosing.precisions(allocation).values())
        precisions = (precision for precision in self.choosing.choices if counts[precision])
        layers = ", ".join(f"{counts[precision]} in {precision.name}" for precision in precisions)
        refused = min((place for place in self.refused if place > chosen), default=None)
        saving = 100 * gap(allocation, None if refused is None else self.allocations[refused])
        best = "the least by the model" if not saving else f"within {saving:.2g} % of the least by the model"
        return f"layers: {layers}; together {allocation.cost:,.6g}{unit}, {best}"

    def notes(self, chosen: int) -> Sequence[str]:
        """A line on the measured time, where that decided."""
        if not self.choosing.timed:
            return ()
        network = self.network(chosen)
        assert network is not None
        in_float, mixed = network_times(self.choosing.ready, [network])
        return (f"one sample takes {mixed:.3f} ms, {in_float:.3f} in the fastest float32 form",)

    def _smaller(self) -> str:
        """Next step where the file is too large: what makes it smaller."""
        steps = [] if self.config.max_drop is None else [f"allow a larger {option('max_drop')}"]
        if self.config.weight_bits > _FEWEST_BITS:
            steps.append(f"take fewer {option('weight_bits')}")
        return " or ".join([*steps, f"ask for a smaller {option('min_ratio')}"])

    def _more(self) -> str:
        return f"allow more, give more samples with {option('calibration')}, or leave out layers"
