"""Small networks and calibration data for the tests of quantize."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision import models
from torchvision.models.efficientnet import FusedMBConvConfig, MBConvConfig
from torchvision.models.resnet import Bottleneck

from modelopt_cli.measure.layer_status import Coverage
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.quantize.apply import apply
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.state_dict import apply_to_state
from modelopt_cli.program import Encoding, InputSpec, Program
from modelopt_cli.program.capture import capture


@dataclass
class Made:
    """A quantized state dict in memory, whole."""

    state: dict[str, Tensor]
    encodings: dict[str, Encoding]
    coverage: Coverage
    skipped: dict[str, str]
    widths: Mapping[str, list[int | None]]


def on_state(state: Mapping[str, Tensor], config: QuantizeConfig, *more: Any) -> Made:
    """``apply_to_state``, with its stream run to its end."""
    result = apply_to_state(state, config, *more)
    items = list(result.stream.items())
    made = {name: tensor for name, tensor, _ in items}
    made |= {name: made[owner] for name, owner in result.stream.tied.items()}
    encodings = {name: encoding for name, _, encoding in items if encoding.codec != "raw"}
    return Made(made, encodings, result.coverage, result.skipped, result.widths)


SIDES = {"inception_v3": 96, "vit_b_16": 32}


def _vit() -> nn.Module:
    model = models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=20
    )
    for p in model.parameters():
        if p.dim() < 2 or not p.any():
            nn.init.normal_(p, mean=float(p.dim() < 2 and p.mean() > 0.5), std=0.1)
    return model


def _maxvit() -> nn.Module:
    return models.MaxVit(
        input_size=(64, 64),
        stem_channels=16,
        partition_size=4,
        block_channels=[16, 32],
        block_layers=[1, 1],
        head_dim=8,
        stochastic_depth_prob=0.0,
    )


def _efficientnet_v2() -> nn.Module:
    blocks = [FusedMBConvConfig(4, 3, 2, 24, 32, 1), MBConvConfig(4, 3, 2, 32, 48, 2)]
    return models.EfficientNet(blocks, dropout=0.2, last_channel=96)


SMALLER: dict[str, Callable[[], nn.Module]] = {
    "efficientnet_v2_s": _efficientnet_v2,
    "maxvit_t": _maxvit,
    "resnext50_32x4d": lambda: models.ResNet(Bottleneck, [1, 1, 1, 1], groups=32, width_per_group=4),
    "vit_b_16": _vit,
}
"""With the layers of the whole network, but fewer and narrower ones: those take minutes."""


@dataclass
class Images:
    """Calibration data out of a tensor, with what ``quantize`` uses of ``Data``."""

    images: Tensor
    name: str = "tensor"

    @property
    def size(self) -> int:
        return len(self.images)

    def sample(self, n: int, seed: int = 0) -> "Images":
        return Images(self.images[:n])

    def batches(
        self, size: int, *, limit: int | None = None, workers: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.images.split(size):
            yield batch, torch.zeros(len(batch), dtype=torch.int64)


def images(n: int, *shape: int, seed: int = 0) -> Tensor:
    """Smooth random images whose colours differ, so that a network tells them apart."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, shape[0], 4, 4, generator=g) + torch.randn(n, shape[0], 1, 1, generator=g)
    return F.interpolate(coarse, size=shape[1:], mode="bilinear")


def context(program: Program, n: int = 8, **options: Any) -> Context:
    return Context(data=Images(images(n, *program.input.shape, seed=1)), **options)  # type: ignore[arg-type]


def captured(model: nn.Module, *shape: int) -> Program:
    return capture(model.eval(), InputSpec(shape), verify=False)


def torchvision_program(name: str) -> Program:
    """A torchvision network whose batch norms have seen data."""
    torch.manual_seed(0)
    side = SIDES.get(name, 64)
    if name in SMALLER:
        model = SMALLER[name]()
    else:
        extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
        model = models.get_model(name, **extra)
    model.eval()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
        norm.train()
    if norms:
        with torch.no_grad():
            model(images(8, 3, side, side, seed=7))
    return captured(model, 3, side, side)


def quantized(program: Program, scheme: str = "int8", **options: Any) -> Program:
    return apply(program, QuantizeConfig(scheme, **options), context(program)).program


def sqnr(expected: Tensor, got: Tensor) -> float:
    """Signal to quantization noise, in dB."""
    noise = (expected - got).double().square().sum().clamp(min=1e-30)
    return float(10 * torch.log10(expected.double().square().sum().clamp(min=1e-30) / noise))


def count(program: Program, kind: str) -> int:
    return sum(
        type(program.get_submodule(str(n.target))).__name__ == kind
        for n in program.graph.nodes
        if n.op == "call_module"
    )


class Small(nn.Module):
    """Convolutions, a residual, pooling, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.dw = nn.Conv2d(8, 8, 3, groups=8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.body(x) + x)
        result: Tensor = self.fc(F.relu6(self.dw(x)).mean((2, 3)))
        return result


def small() -> Program:
    torch.manual_seed(0)
    return captured(Small(), 3, 12, 12)
