"""torchvision's classification networks, built fast: no random initialisation, small inputs."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torchvision import models
from torchvision.models.regnet import BlockParams, RegNet

NAMES = models.list_models(models)

# Too large for a test's memory: same blocks, fewer or narrower of them.
_REDUCED = {
    "vit_l_16": "4 of 24 layers",
    "vit_l_32": "4 of 24 layers",
    "vit_h_14": "3 of 32 layers",
    "regnet_y_128gf": "a quarter of the width",
}
_SIDE = {"inception_v3": 96, "maxvit_t": 224, "vit_h_14": 56}
_GOLDEN = 0.6180339887498949


def side(name: str) -> int:
    """Height and width of a small input that the network can process."""
    return _SIDE.get(name, 64)


def _vit(**shape: int) -> nn.Module:
    return models.VisionTransformer(
        image_size=_SIDE.get("vit_h_14", 56) if shape["patch_size"] == 14 else 64, **shape
    )


def _make(name: str) -> nn.Module:
    if name in ("vit_l_16", "vit_l_32"):
        patch = int(name[-2:])
        return _vit(patch_size=patch, num_layers=4, num_heads=16, hidden_dim=1024, mlp_dim=4096)
    if name == "vit_h_14":
        return _vit(patch_size=14, num_layers=3, num_heads=16, hidden_dim=1280, mlp_dim=5120)
    if name == "regnet_y_128gf":
        return RegNet(BlockParams.from_init_params(27, 112, 40.2, 2.52, 64, se_ratio=0.25))
    extra: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        extra = {"init_weights": False}
    if name.startswith("vit"):
        extra = {"image_size": 64}
    return models.get_model(name, **extra)


def build(name: str) -> nn.Module:
    """The network in eval mode with finite weights that differ from one another, as if trained."""
    with _no_initialisation():
        model = _make(name)
    fill(model)
    return model.eval()


def fill(model: nn.Module) -> None:
    """Give every parameter and statistic a cheap, deterministic, sane value."""
    ramp = torch.arange(65_537, dtype=torch.float64).mul(_GOLDEN).frac().sub(0.5).float()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point():
                continue
            flat, start = tensor.view(-1), len(name) * 97
            pattern = ramp.roll(start)
            for begin in range(0, flat.numel(), len(ramp)):
                piece = flat[begin : begin + len(ramp)]
                piece.copy_(pattern[: len(piece)])
            if "running_var" in name or (tensor.dim() == 1 and name.endswith("weight")):
                tensor.mul_(0.4).add_(1.0)
            elif tensor.dim() > 1:
                tensor.mul_((12.0 / tensor[0].numel()) ** 0.5)
            else:
                tensor.mul_(0.1)


@contextmanager
def _no_initialisation() -> Iterator[None]:
    names = [name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")]
    saved = {name: getattr(nn.init, name) for name in names}

    def skip(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return tensor

    for name in names:
        setattr(nn.init, name, skip)
    try:
        yield
    finally:
        for name, function in saved.items():
            setattr(nn.init, name, function)
