"""Biases of layers that are rounded one at a time, corrected as those of the whole network are."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from modelopt_cli.methods.batches import input_batches
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.quantize.calibration import calibrate
from modelopt_cli.methods.quantize.equalizing.bias_correction import SAMPLES
from modelopt_cli.methods.quantize.sensitivity.rounded_layer import RoundedCall
from modelopt_cli.methods.quantize.static import Calibrated
from modelopt_cli.program.calls import source
from modelopt_cli.program.quantization import quantize
from modelopt_cli.program.quantized import Weighted


@dataclass(frozen=True)
class _Correction:
    """Corrects the bias of a call's layer when it sees the call's input."""

    correct: Callable[..., None]
    module: nn.Module
    call: RoundedCall
    activation: str

    def update(self, x: Tensor) -> None:
        """Take the samples, all at once."""
        assert self.call.input is not None
        with torch.inference_mode(False), torch.no_grad():
            x = x.clone()
            self.correct(self.call.layer, self.module(x), quantize(x, self.call.input), self.activation)


def correct_calls(
    ready: Calibrated,
    calls: Mapping[fx.Node, Sequence[RoundedCall]],
    correct: Callable[..., None],
    context: Context,
) -> None:
    """Correct the biases of rounded layers, each for the case that it alone is rounded.

    Args:
        ready: the float network with its scales.
        calls: the rounded forms of layers that are called once, by their calls; their biases are changed.
        correct: changes the bias of one layer.
        context: calibration data.
    """
    activations = {
        unit.head: "none" if unit.residual else unit.activation for unit in ready.plan.layers.values()
    }
    watched: dict[fx.Node, list[_Correction]] = {}
    for node, forms in calls.items():
        module: Any = ready.program.get_submodule(str(node.target))
        for form in forms:
            corrected = isinstance(form.layer, Weighted) and form.input is not None
            if corrected and f"{node.target}.bias" not in ready.shared:
                correction = _Correction(correct, module, form, activations[node])
                watched.setdefault(source(node), []).append(correction)
    if watched:
        assert context.data is not None
        sample = context.data.sample(SAMPLES, context.seed)
        batch = next(iter(input_batches(sample, replace(context, batch_size=SAMPLES))))
        calibrate(ready.program, watched, [batch])
