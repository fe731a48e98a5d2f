"""The table of builtin networks, which a shell completes names from. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from modelopt_cli.lazy_names import deferred


@dataclass(frozen=True)
class Builtin:
    """One builtin network and what is needed to read its options back from a state dict.

    Attributes:
        make: builds it from ``num_classes``, ``in_channels`` and ``width``.
        size: height and width of its input in pixels.
        channels: default ``in_channels``.
        hidden: weights in order, with their rows at width 1; the first is the stem.
        last: name of its last weight, which has one row per class.
        pixels: columns of the stem for one input channel.
    """

    make: Callable[..., Any]
    size: int
    channels: int
    hidden: dict[str, int]
    last: str
    pixels: int = 1


_LENET300 = {"hidden1.weight": 300, "hidden2.weight": 100}
_LENET5 = {"features.conv1.weight": 20, "features.conv2.weight": 50, "hidden.weight": 500}
_CNN2 = {"features.conv1.weight": 64, "features.conv2.weight": 128, "hidden.weight": 1024}
_RESNET = {"conv1.weight": 16, "layer2.0.conv1.weight": 32, "layer3.0.conv1.weight": 64}

_network = partial(deferred, "modelopt_cli.checkpoint.builtin")

BUILTINS: dict[str, Builtin] = {
    "lenet300": Builtin(_network("LeNet300"), 28, 1, _LENET300, "output.weight", pixels=28 * 28),
    "lenet5": Builtin(_network("LeNet5"), 28, 1, _LENET5, "output.weight"),
    "cnn2": Builtin(_network("Cnn2"), 28, 3, _CNN2, "output.weight"),
    "resnet8": Builtin(_network("resnet8"), 32, 3, _RESNET, "fc.weight"),
    "resnet20": Builtin(_network("resnet20"), 32, 3, _RESNET, "fc.weight"),
    "resnet56": Builtin(_network("resnet56"), 32, 3, _RESNET, "fc.weight"),
}
"""Name of a network, as in ``builtin:NAME``, to its row."""
