"""Sensitivities of layers: what the outputs lose with one of them alone in a precision, and why."""

from collections.abc import Mapping
from dataclasses import dataclass

from modelopt_cli.methods.quantize.sensitivity.rounding_reasons import Reason


@dataclass(frozen=True)
class Loss:
    """Loss of the outputs with one layer alone in a precision, and what the layer takes.

    Attributes:
        precision: name of the precision.
        snr_db: signal-to-noise of the outputs in dB, of the output that has the least; 200 stands for equal.
        divergence: of logits, KL(float || rounded) of their probabilities in nats; None of other outputs.
        bytes: of the layer's tensors.
        milliseconds: of the layer for one sample, where it stands in the network; None where not measured.
    """

    precision: str
    snr_db: float
    divergence: float | None
    bytes: int
    milliseconds: float | None


@dataclass(frozen=True)
class LayerSensitivity:
    """Sensitivity of one layer.

    Attributes:
        name: of the layer.
        kind: its class.
        losses: by precision, of which the first is float32.
        int8: the one of them with weights of 8 bits, and inputs of as many as they were calibrated to.
        reason: why ``int8`` loses what it does; None where it loses next to nothing, or nothing is known.
        makers: layers that its input comes from.
    """

    name: str
    kind: str
    losses: tuple[Loss, ...]
    int8: Loss
    reason: Reason | None
    makers: tuple[str, ...] = ()


@dataclass(frozen=True)
class QuantizeSensitivity:
    """Sensitivities of the layers of a network.

    Attributes:
        layers: in the order of the graph.
        samples: that the outputs were compared on.
        least_db: signal-to-noise in dB below which a layer alone breaks the network.
        skipped: layers that no precision takes, with the reason.
    """

    layers: tuple[LayerSensitivity, ...]
    samples: int
    least_db: float
    skipped: Mapping[str, str]

    @property
    def breaking(self) -> tuple[LayerSensitivity, ...]:
        """Layers that alone take the outputs below ``least_db``, in the order of the graph."""
        return tuple(layer for layer in self.layers if layer.int8.snr_db < self.least_db)

    @property
    def dead(self) -> tuple[LayerSensitivity, ...]:
        """Layers at which the samples begin to make no difference: what is behind them alone is left out."""
        dead = {layer.name: layer for layer in self.layers if layer.reason and layer.reason.kind == "dead"}
        return tuple(
            layer for layer in dead.values() if not layer.makers or not dead.keys() >= {*layer.makers}
        )
