"""Channels brought to one size before they are rounded, by factors that weights take in.

The uint8 form of a value has one scale, that of its largest channel; a channel of a tenth of that size has a
tenth of the levels. So the weights that compute a channel are divided by a factor and those that read it are
multiplied by it. The float network computes the same, and the int8 network has the same operations.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, fx, nn

from modelopt_cli.methods.batches import calibration_batches
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.quantize.calibration import calibrate
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.equalizing.channel_factors import ChannelRange, Channels, Reader
from modelopt_cli.methods.quantize.equalizing.channel_links import Link, find_links
from modelopt_cli.methods.quantize.equalizing.equalizations import EQUALIZATIONS
from modelopt_cli.methods.quantize.widths import Widths
from modelopt_cli.program import Program
from modelopt_cli.program.layer_kinds import build, config_of, kind_of
from modelopt_cli.program.rewrite import copy_graph, rebuild

SAMPLES = 64
"""Calibration samples that show the sizes of channels."""
ROUNDS = 20
"""Times that all links are gone through; a layer between two of them makes them depend on one another."""
SETTLED = 1e-4
"""Change of a factor below which there is nothing more to do."""


def equalized(
    program: Program,
    widths: Mapping[str, Widths],
    shared: Collection[str],
    config: QuantizeConfig,
    context: Context,
) -> Program:
    """The Program with the channels of its values brought closer to one size, as ``config.equalize`` says.

    Args:
        program: in inference form with batch norms folded; it is not changed.
        widths: of the layers that become integers.
        shared: parameters whose equal values stay equal: nothing is done to their layers.
        config: the rule, and how many samples it sees.
        context: calibration data.
    """
    rule = EQUALIZATIONS[config.equalize]
    links = find_links(program, shared) if rule.factors is not None else []
    links = [link for link in links if any(name in widths for name, _ in link.readers)]
    if rule.factors is None or not links:
        return program
    shown = {node for link in links for node in (*link.clipped, *(node for _, node in link.readers))}
    ranges = {node: ChannelRange() for node in shown} if rule.needs_data else {}
    if ranges:
        assert context.data is not None
        sample = context.data.sample(min(SAMPLES, config.calibration_samples), context.seed)
        watched = {node: [seen] for node, seen in ranges.items()}
        batches = calibration_batches(program, sample, context)
        calibrate(program, watched, batches, context.progress, sample.size)
    equalizing = _Equalizing(program, widths, ranges)
    for _ in range(1 if rule.needs_data else ROUNDS):
        changes = [equalizing.step(link, rule.factors) for link in links]
        if max(changes) < SETTLED:
            break
    return equalizing.result()


class _Equalizing:
    """The weights of a Program as they are being scaled, in float64."""

    def __init__(
        self, program: Program, widths: Mapping[str, Widths], ranges: Mapping[fx.Node, ChannelRange]
    ) -> None:
        self.program, self.widths, self.ranges = program, widths, ranges
        self.weights: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor] = {}

    def step(self, link: Link, rule: Callable[[Channels], Tensor | None]) -> float:
        """Scale the channels of a link. Returns by how much at most a factor differs from 1."""
        factors = rule(self._channels(link))
        if factors is None:
            return 0.0
        for name in link.writers:
            weight = self._weight(name)
            self.weights[name] = weight / factors.view(-1, *([1] * (weight.dim() - 1)))
            bias: Tensor | None = getattr(self.program.get_submodule(name), "bias", None)
            if bias is not None:
                self.biases[name] = self.biases.get(name, bias.detach().double()) / factors
        for name, _ in link.readers:
            reader = self._reader(name)
            self.weights[name] = reader.scaled(factors).reshape(self._weight(name).shape)
        return float((factors - 1).abs().max())

    def result(self) -> Program:
        """The Program with these weights."""
        layers = {name: self._layer(name) for name in self.weights}
        return rebuild(self.program, copy_graph(self.program.graph), layers)

    def _weight(self, name: str) -> Tensor:
        layer: Any = self.program.get_submodule(name)
        return self.weights[name] if name in self.weights else layer.weight.detach().double()

    def _reader(self, name: str, seen: ChannelRange | None = None) -> Reader:
        weight, groups = self._weight(name), getattr(self.program.get_submodule(name), "groups", 1)
        parts = weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)
        return Reader(parts, seen, self.widths.get(name))

    def _channels(self, link: Link) -> Channels:
        readers = [self._reader(name, self.ranges.get(node)) for name, node in link.readers]
        clipped = [self.ranges[node] for node in link.clipped if node in self.ranges]
        shown = {id(seen): seen for reader in readers if (seen := reader.seen) is not None}
        shown |= {id(seen): seen for seen in clipped}
        weights = [self._weight(name) for name in link.writers]
        return Channels(weights, readers, [*shown.values()], clipped, bool(link.clipped))

    def _layer(self, name: str) -> nn.Module:
        layer: Any = self.program.get_submodule(name)
        scaled: Any = build(kind_of(layer) or "", config_of(layer))
        trained = layer.weight.requires_grad
        scaled.weight = nn.Parameter(self.weights[name].to(layer.weight.dtype), requires_grad=trained)
        bias = self.biases.get(name)
        scaled.bias = layer.bias if bias is None else nn.Parameter(bias.to(layer.bias.dtype), trained)
        result: nn.Module = scaled
        return result
