"""Reasons why a layer loses so much when it is rounded, found in its weight, its input and their errors.

The noise of a layer's output comes from its weight or from its input, whichever is larger. That one has one
scale, for an output channel or for the whole input, which has to reach its largest value and has few steps:
so either values are cut off, or a few of them make the steps too wide for the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_cli.methods.quantize.sensitivity.rounded_layer import RoundedCall
from modelopt_cli.program.quantization import BITS, QParams, dequantize, levels_of, quantize, weight_limits
from modelopt_cli.program.quantized import Weighted
from modelopt_cli.text import listing

OUTLIER = 8.0
"""Times that a channel reaches further than the median one from which on it is an outlier: three bits."""
FEW_CHANNELS = 0.25
"""Largest share of the channels that are outliers; of more it is the range of all."""
MOST_VALUES, MOST_WEIGHTS = 0.99, 0.9
"""Shares of an input's values, and of an output channel's weights, whose steps are counted."""
STRETCHED = 1 / 8
"""Share of the steps on which those lie, below which a few values stretch the range."""
SAME = 1e-6
"""Relative difference up to which float32 values are the same."""
CUT_OFF = 0.5
"""Share of the squared error that comes from values beyond the range, from which on that is the reason."""
HARMLESS_DB = 30.0
"""Signal-to-noise above which a layer has no reason: it adds less than a thousandth of the outputs' power."""

REASONS = {
    "dead": "its output or its input is the same for all samples",
    "saturation": "values beyond the range, or pairs of weights beyond the bound of 16-bit sums, are cut off",
    "outlier channel": "one channel's values dwarf the others', which share its steps",
    "range": "a few values stretch the range, so that most share a few steps",
    "few levels": "the steps are too few for its values",
}
"""Reasons, and what each stands for."""


@dataclass(frozen=True)
class Reason:
    """Reason why a layer loses when it is rounded.

    Attributes:
        kind: a key of ``REASONS``.
        text: what was found, in words.
        channel: the outlier channel, of the layer's input.
        of_input: True where the input is rounded too coarsely, False where the weight is.
    """

    kind: str
    text: str
    channel: int | None = None
    of_input: bool = False


@dataclass
class _Spread:
    """Smallest and largest mean of each channel over the samples."""

    low: Tensor | None = None
    high: Tensor | None = None
    samples: int = 0

    def update(self, x: Tensor, axis: int) -> None:
        """Take in one batch, its channels on an axis."""
        means = x.double().movedim(axis, 1).flatten(2).mean(2) if x.dim() > 2 else x.double()
        low, high = torch.aminmax(means, dim=0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        self.samples += len(x)

    @property
    def varies(self) -> bool:
        """True if some channel is not the same for all samples, or if there is one sample alone."""
        if self.low is None or self.high is None or self.samples < 2:
            return True
        size = torch.maximum(self.low.abs(), self.high.abs())
        return bool((self.high - self.low > SAME * size).any())


@dataclass
class Watched:
    """Statistics of a layer over the data: its inputs, their errors and those of its output.

    Attributes:
        module: the float layer.
        call: the rounded one.
    """

    module: Any
    call: RoundedCall
    extremes: Tensor | None = None
    inputs: "_Spread" = field(default_factory=lambda: _Spread())
    outputs: "_Spread" = field(default_factory=lambda: _Spread())
    rounding: float = 0.0
    cutting: float = 0.0
    from_input: float = 0.0
    from_weight: float = 0.0
    steps: Tensor = field(default_factory=lambda: torch.zeros(levels_of(BITS), dtype=torch.float64))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the rounded layer, and look at what the float one gets."""
        layer, q = self.call.layer, self.call.input
        if isinstance(layer, Weighted) and q is not None:
            x = args[0] if args else next(iter(kwargs.values()))
            self._look(x.float(), layer, q)
        return self.call(*args, **kwargs)

    def _look(self, x: Tensor, layer: Weighted, q: QParams) -> None:
        y = self.module(x)
        with_input = self.module(dequantize(rounded := quantize(x, q), q))
        with_weight = _with_weight(self.module, layer, x)
        self.from_input += _squares(with_input - y)
        self.from_weight += _squares(with_weight - y)
        low, high = -q.zero_point * q.scale, (q.top - q.zero_point) * q.scale
        self.cutting += _squares(x - x.clamp(low, high))
        self.rounding += _squares(x - dequantize(rounded, q))
        self.steps += torch.bincount(rounded.flatten().long(), minlength=len(self.steps)).double()
        self.extremes = _larger(self.extremes, _by_channel(self.module, x.abs()))
        self.inputs.update(x, _channel_axis(self.module, x))
        self.outputs.update(y, _channel_axis(self.module, y))

    def reason(self, makers: Sequence[str] = ()) -> Reason | None:
        """The reason why the layer loses most; None where nothing was seen of it.

        Args:
            makers: layers that its input comes from, for the text.
        """
        layer = self.call.layer
        if self.extremes is None or not isinstance(layer, Weighted):
            return None
        if not self.inputs.varies:
            return Reason("dead", f"its input{_from(makers)} is the same for all samples", of_input=True)
        if not self.outputs.varies:
            return Reason("dead", "its output is the same for all samples")
        if self.from_input >= self.from_weight:
            assert self.call.input is not None
            return self._of_input(self.extremes, levels_of(self.call.input.bits), makers)
        return _of_weight(self.module, layer)

    def _of_input(self, extremes: Tensor, levels: int, makers: Sequence[str]) -> Reason:
        whose = f"its input{_from(makers)}"
        if self.cutting > CUT_OFF * (self.rounding or 1.0):
            share = 100 * self.cutting / self.rounding
            text = f"{share:.0f} % of the squared error of {whose} is of values beyond its range, cut off"
            return Reason("saturation", text, of_input=True)
        found = _outlier(extremes)
        if found is not None:
            channel, times = found
            text = f"channel {channel} of {whose} reaches {times:,.0f} times as far as the median channel"
            return Reason("outlier channel", text, channel, of_input=True)
        used = _steps_of_most(self.steps)
        text = f"{100 * MOST_VALUES:.0f} % of the values of {whose} lie on {used} of {levels} steps"
        return Reason("range" if used < STRETCHED * levels else "few levels", text, of_input=True)


def _of_weight(module: Any, layer: Weighted) -> Reason:
    """The reason in a weight, which has a scale for each output channel."""
    weight = layer.turned(module.weight.detach().float())
    integers = layer.turned(layer.weight).float()
    steps = weight / layer.scale.view(-1, *[1] * (weight.dim() - 1))
    nearest = steps.round()
    if _squares(integers - nearest) > CUT_OFF * (_squares(integers - steps) or 1.0):
        moved = 100 * float((integers != nearest).float().mean())
        text = f"{moved:.0f} % of its weights are pulled back, for the bound of pairs or the range"
        return Reason("saturation", text)
    by_input = weight.abs().flatten(2).amax(2).amax(0) if weight.dim() > 2 else weight.abs().amax(0)
    found = _outlier(by_input)
    if found is not None:
        channel, times = found
        text = f"the weights of input channel {channel} are {times:,.0f} times those of the median channel"
        return Reason("outlier channel", text, channel)
    rows = integers.abs().flatten(1)
    middle = float(rows.quantile(MOST_WEIGHTS, dim=1).median()) if rows.shape[1] > 1 else float(rows.median())
    used, top = int(rows.max()), weight_limits(layer.weight_bits)[1]
    text = f"nine of ten weights of an output channel lie within {middle:.0f} of {used} steps from zero"
    if used < top:
        text += f", all that the bound of pairs leaves of {top}"
    return Reason("range" if middle < STRETCHED * used else "few levels", text)


def _with_weight(module: Any, layer: Weighted, x: Tensor) -> Tensor:
    """The output of a float layer with the rounded weight."""
    kept = module.weight
    rounded = nn.Parameter(layer.float_weight(), requires_grad=False)
    try:
        module.weight = rounded
        y: Tensor = module(x)
    finally:
        module.weight = kept
    return y


def _by_channel(module: nn.Module, x: Tensor) -> Tensor:
    """The largest value of each channel, float32 ``(C,)``."""
    return x.movedim(_channel_axis(module, x), 0).flatten(1).amax(1)


def _channel_axis(module: Any, x: Tensor) -> int:
    return x.dim() - 1 - (0 if isinstance(module, nn.Linear) else len(module.kernel_size))


def _larger(kept: Tensor | None, new: Tensor) -> Tensor:
    return new if kept is None else torch.maximum(kept, new)


def _squares(x: Tensor) -> float:
    return float(x.double().square().sum())


def _outlier(extremes: Tensor) -> tuple[int, float] | None:
    """The channel that reaches furthest and how many times as far as the median one, if few reach so far."""
    alive = extremes[extremes > 0]
    if len(alive) < 3:
        return None
    median = float(alive.median())
    times = float(extremes.max()) / median
    many = float((extremes > OUTLIER * median).float().mean())
    return (int(extremes.argmax()), times) if times > OUTLIER and many <= FEW_CHANNELS else None


def _steps_of_most(counts: Tensor) -> int:
    """Number of steps, the fullest first, that hold most of the values."""
    share = counts.sort(descending=True).values.cumsum(0) / counts.sum().clamp(min=1)
    return min(int((share < MOST_VALUES).sum()) + 1, len(counts))


def _from(makers: Sequence[str]) -> str:
    return f" (made by {listing(makers, 2)})" if makers else ""
