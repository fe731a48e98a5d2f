"""Small reference networks, built from nothing but a few numbers.

All trace with ``torch.fx``. ``width`` scales the hidden layers (rounded, at least one unit), so that a
network of any size can be made for a test or a demonstration.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from modelopt_cli.checkpoint.arch import (
    Architecture,
    ArchitectureSource,
    ArchSpec,
    class_count,
    construct,
    join_options,
    require_known,
)
from modelopt_cli.checkpoint.builtin_table import BUILTINS as BUILTINS
from modelopt_cli.checkpoint.builtin_table import Builtin
from modelopt_cli.checkpoint.tensor_names import Shape, shapes_of
from modelopt_cli.errors import ArchitectureError
from modelopt_cli.program.input_spec import InputSpec, Preprocess
from modelopt_cli.text import short


def scaled(units: int, width: float) -> int:
    """Units of a hidden layer at a width."""
    return max(1, round(units * width))


class LeNet300(nn.Module):
    """LeNet-300-100 (LeCun et al. 1998): input-300-100-classes, ReLU. Input 28x28; 266,610 parameters."""

    def __init__(self, num_classes: int = 10, in_channels: int = 1, width: float = 1.0) -> None:
        super().__init__()
        first, second = scaled(300, width), scaled(100, width)
        self.hidden1 = nn.Linear(in_channels * 28 * 28, first)
        self.hidden2 = nn.Linear(first, second)
        self.output = nn.Linear(second, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` for images ``(N, in_channels, 28, 28)``."""
        x = torch.flatten(images, 1)
        x = torch.relu(self.hidden1(x))
        x = torch.relu(self.hidden2(x))
        return self.output(x)  # type: ignore[no-any-return]


class LeNet5(nn.Module):
    """LeNet-5 as in Caffe and in Deep Compression (Han et al. 2016): 20-50-500-classes.

    5x5 convolutions without activation, each followed by a 2x2 max-pool. Input 28x28; 431,080 parameters.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, width: float = 1.0) -> None:
        super().__init__()
        first, second, hidden = scaled(20, width), scaled(50, width), scaled(500, width)
        self.features = nn.Sequential()
        self.features.add_module("conv1", nn.Conv2d(in_channels, first, 5))
        self.features.add_module("pool1", nn.MaxPool2d(2))
        self.features.add_module("conv2", nn.Conv2d(first, second, 5))
        self.features.add_module("pool2", nn.MaxPool2d(2))
        self.hidden = nn.Linear(second * 4 * 4, hidden)
        self.output = nn.Linear(hidden, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` for images ``(N, in_channels, 28, 28)``."""
        x = torch.flatten(self.features(images), 1)
        return self.output(torch.relu(self.hidden(x)))  # type: ignore[no-any-return]


class Cnn2(nn.Module):
    """Two 3x3 convolutions (64, 128), each with ReLU and a 2x2 max-pool, then 128*7*7-1024-classes.

    Input 28x28 with 3 channels. Weights are Xavier-uniform (Glorot and Bengio 2010), biases zero.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> None:
        super().__init__()
        first, second, hidden = scaled(64, width), scaled(128, width), scaled(1024, width)
        self.features = nn.Sequential()
        self.features.add_module("conv1", nn.Conv2d(in_channels, first, 3, padding=1))
        self.features.add_module("relu1", nn.ReLU())
        self.features.add_module("pool1", nn.MaxPool2d(2))
        self.features.add_module("conv2", nn.Conv2d(first, second, 3, padding=1))
        self.features.add_module("relu2", nn.ReLU())
        self.features.add_module("pool2", nn.MaxPool2d(2))
        self.hidden = nn.Linear(second * 7 * 7, hidden)
        self.output = nn.Linear(hidden, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.constant_(module.get_parameter("bias"), 0.0)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` for images ``(N, in_channels, 28, 28)``."""
        x = torch.flatten(self.features(images), 1)
        return self.output(torch.relu(self.hidden(x)))  # type: ignore[no-any-return]


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; a 1x1 convolution on it where the shape changes."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU()
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """``(N, channels, H, W)`` to ``(N, out, H / stride, W / stride)``."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)) + shortcut)  # type: ignore[no-any-return]


class CifarResNet(nn.Module):
    """ResNet of 6 n + 2 layers for small images (He et al. 2016, section 4.2): 16, 32, 64 channels.

    Shortcuts that change the shape are projections (their option B, a 1x1 convolution with batch norm),
    not padded identities (option A): they quantize and prune like any other convolution, and the layer
    names are then those of the widely used CIFAR checkpoints. Global pooling, so any image size works.
    """

    def __init__(self, blocks: int, num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> None:
        super().__init__()
        channels = [scaled(units, width) for units in (16, 32, 64)]
        self.conv1 = nn.Conv2d(in_channels, channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.relu = nn.ReLU()
        self.layer1 = _stage(channels[0], channels[0], blocks, 1)
        self.layer2 = _stage(channels[0], channels[1], blocks, 2)
        self.layer3 = _stage(channels[1], channels[2], blocks, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(N, num_classes)`` for images ``(N, in_channels, H, W)``."""
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))  # type: ignore[no-any-return]


def _stage(channels: int, out: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(_Block(channels, out, stride), *(_Block(out, out, 1) for _ in range(blocks - 1)))


def resnet8(num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> CifarResNet:
    """CIFAR ResNet with one block to a stage."""
    return CifarResNet(1, num_classes, in_channels, width)


def resnet20(num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> CifarResNet:
    """CIFAR ResNet with three blocks to a stage."""
    return CifarResNet(3, num_classes, in_channels, width)


def resnet56(num_classes: int = 10, in_channels: int = 3, width: float = 1.0) -> CifarResNet:
    """CIFAR ResNet with nine blocks to a stage."""
    return CifarResNet(9, num_classes, in_channels, width)


def _resolve(spec: ArchSpec) -> Architecture:
    require_known(spec, BUILTINS)
    builtin = BUILTINS[spec.name]
    for name, value in spec.options.items():
        kinds: tuple[type, ...] = (int, float) if name == "width" else (int,)
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < 1 << 20:  # type: ignore[operator]
            raise ArchitectureError(f"{name} must be a positive number", where=short(spec.text))
    channels = spec.options.get("in_channels", builtin.channels)
    assert isinstance(channels, int)
    preprocess = None
    if channels in (1, 3):
        size = (builtin.size, builtin.size)
        preprocess = Preprocess(resize=size, mean=(0.0,) * channels, std=(1.0,) * channels, channels=channels)
    return Architecture(
        spec.text,
        lambda: construct(spec, lambda: builtin.make(**spec.options)),
        InputSpec((channels, builtin.size, builtin.size), preprocess),
        own=True,
        num_classes=class_count(spec, 10),
    )


def _recognise(shapes: Mapping[str, Shape]) -> list[str]:
    return [spec for name, builtin in BUILTINS.items() if (spec := _match(name, builtin, shapes))]


def _match(name: str, builtin: Builtin, shapes: Mapping[str, Shape]) -> str | None:
    last, hidden = shapes.get(builtin.last), [shapes.get(weight) for weight in builtin.hidden]
    if last is None or len(last) != 2 or not all(shape and len(shape) > 1 for shape in hidden):
        return None
    rows = [shape[0] for shape in hidden if shape]
    stem = shapes[next(iter(builtin.hidden))]
    width = _width(list(zip(rows, builtin.hidden.values(), strict=True)))
    channels, excess = divmod(stem[1], builtin.pixels)
    if width is None or excess or not channels or not last[0]:
        return None
    options: dict[str, float] = {}
    if last[0] != 10:
        options["num_classes"] = last[0]
    if channels != builtin.channels:
        options["in_channels"] = channels
    if width != 1:
        options["width"] = width
    with torch.device("meta"):
        expected = shapes_of(builtin.make(**options).state_dict())
    return join_options(f"builtin:{name}", options) if expected == shapes else None


def _width(layers: list[tuple[int, int]]) -> float | None:
    """The factor with the fewest digits that scales each layer's units to its rows."""
    low = max((rows - 0.5) / units if rows > 1 else 0 for rows, units in layers)
    for digits in range(8):
        width = max(math.ceil(low * 10**digits), 1) / 10**digits
        for candidate in (width, width + 10**-digits):  # the bound itself may round the other way
            if all(scaled(units, candidate) == rows for rows, units in layers):
                return float(round(candidate, digits))
    return None


BUILTIN = ArchitectureSource(
    "builtin:NAME",
    _resolve,
    names=lambda: BUILTINS,
    recognise=_recognise,
    channels_option="in_channels",
)
