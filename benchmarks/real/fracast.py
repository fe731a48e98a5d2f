"""Fracast, which continues a time series by one block called ten times, and made-up series."""

import json
import math

import torch
from torch import Tensor, nn

from benchmarks.real import ASSETS, Samples, source

CONTEXT, HORIZON = 2048, 48
MEDIAN = 4


def make() -> nn.Module:
    """Of 2,048 values ``(N, 2048)`` from 0 to 1, nine quantiles of the 48 that follow, ``(N, 48, 9)``."""
    module = source("fracast._core.model")

    class Forecast(module.Model):
        def forward(self, values: Tensor) -> Tensor:
            seen = torch.ones_like(values, dtype=torch.bool)
            hidden = self.core(values[:, None], seen[:, None], torch.ones_like(values)[:, None])
            return self.head.forward_horizon(hidden, last_obs=values[:, -1:], ctx=values, ctx_mask=seen)

    config = json.loads((ASSETS / "fracast" / "config.json").read_text())
    return Forecast(module.as_configs({key: config[key] for key in ("model", "pyramid")}))


def series(n: int = 64, seed: int = 0) -> Samples:
    """Series of two periods, a drift and noise, and how they go on."""
    draw = torch.Generator().manual_seed(seed)
    time = torch.arange(CONTEXT + HORIZON)
    period = torch.tensor([24.0, 48.0, 96.0, 168.0])[torch.randint(4, (n, 2), generator=draw)]
    height, phase, drift, noise = (torch.rand(n, 2, generator=draw) for _ in range(4))
    waves = height[..., None] * torch.sin(2 * math.pi * (time / period[..., None] + phase[..., None]))
    walk = torch.randn(n, len(time), generator=draw).cumsum(1) / 100 * drift[:, :1]
    values = waves.sum(1) + walk + noise[:, :1] / 2 * torch.randn(n, len(time), generator=draw)
    context = values[:, :CONTEXT]
    low, high = context.amin(1, keepdim=True), context.amax(1, keepdim=True)
    values = (values - low) / (high - low)
    unit = values[:, :CONTEXT].std(1)
    ahead = [{"values": v, "unit": u} for v, u in zip(values[:, CONTEXT:], unit, strict=True)]
    return Samples(list(values[:, :CONTEXT]), ahead)


def error(outputs: Tensor, ahead: dict[str, Tensor]) -> Tensor:
    """Mean absolute error of the median, in standard deviations of what is known of the series."""
    return (outputs[..., MEDIAN] - ahead["values"]).abs().mean(1) / ahead["unit"]


def loss(outputs: Tensor, ahead: dict[str, Tensor]) -> Tensor:
    """Quantile loss of all nine quantiles (Koenker and Bassett 1978), in the same unit."""
    quantiles = torch.arange(1, 10) / 10
    above = (ahead["values"][..., None] - outputs) / ahead["unit"][:, None, None]
    return torch.maximum(quantiles * above, (quantiles - 1) * above).mean()


error.higher_is_better, error.loss = False, loss
