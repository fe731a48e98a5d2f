"""Channel pruning next to Torch-Pruning 1.6, on torchvision's networks, and to the dense one, masked.

`python -m benchmarks.channels` does the same for all eighty.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from channels_oracle import Shapes, compare, masked, multiple_of, prune_ours, prune_theirs, shapes_of
from program_networks import build, fill, side
from quick_cases import quick
from torch import nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

from modelopt_cli import artifact
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.capture import capture

RATIO = 0.3


pytestmark = pytest.mark.usefixtures("one_thread")


def _convnext() -> nn.Module:
    return ConvNeXt([CNBlockConfig(24, 48, 2), CNBlockConfig(48, None, 1)], stochastic_depth_prob=0.1)


def _vit() -> nn.Module:
    return models.VisionTransformer(
        image_size=64, patch_size=16, num_layers=2, num_heads=6, hidden_dim=96, mlp_dim=200
    )


def _swin(**extra: type[nn.Module]) -> nn.Module:
    return models.SwinTransformer([4, 4], 48, [2, 2], [3, 6], [7, 7], **extra)


def _swin_v2() -> nn.Module:
    return _swin(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2)


def _maxvit() -> nn.Module:
    return models.MaxVit((64, 64), 16, 4, [16, 32], [1, 1], 8, 0.1)


def _filled(make: Callable[[], nn.Module]) -> nn.Module:
    model = make()
    fill(model)
    return model.eval()


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    name: lambda name=name: build(name)  # type: ignore[misc]
    for name in (
        *("resnet18", "squeezenet1_1", "mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5", "googlenet"),
        "regnet_y_400mf",
    )
}
NETWORKS["a ConvNeXt"] = lambda: _filled(_convnext)
NETWORKS["a ViT"] = lambda: _filled(_vit)
# Torch-Pruning fails on the first and is not done with the others after minutes. The most that may be left.
BEYOND: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "shufflenet_v2_x0_5": (lambda: build("shufflenet_v2_x0_5"), 0.65),
    "a Swin": (lambda: _filled(_swin), 0.55),
    "a Swin v2": (lambda: _filled(_swin_v2), 0.55),
    "a MaxViT": (lambda: _filled(_maxvit), 0.57),
}


def captured(model: nn.Module, name: str) -> Program:
    return capture(model, InputSpec((3, side(name), side(name))), verify=False)


def check_ours(program: Program, multiple: int, folder: Path) -> Shapes:
    """It runs, equals the dense network with those channels zeroed, and comes back from its file."""
    pruned, found, keep = prune_ours(program, RATIO, multiple)
    x = torch.randn(2, *program.input.shape, generator=torch.Generator().manual_seed(0))
    artifact.write_program(pruned, folder / "pruned.safetensors")
    with torch.no_grad():
        assert torch.equal(artifact.read_program(folder / "pruned.safetensors")(x), pruned(x))
        expected = masked(found, keep).double()(x.double())
        torch.testing.assert_close(pruned.double()(x.double()), expected, rtol=1e-9, atol=1e-12)
    return shapes_of(pruned)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_ours_has_the_oracle_s_shapes_or_smaller_ones(name: str, tmp_path: Path) -> None:
    model = NETWORKS[name]()
    program, dense = captured(model, name), shapes_of(model)
    ours = check_ours(program, multiple_of(model), tmp_path)

    example = torch.randn(1, *program.input.shape)
    theirs = shapes_of(prune_theirs(model, example, RATIO))
    with torch.no_grad():
        assert model(example).isfinite().all()
    found = compare(ours, theirs)
    assert not found.larger
    assert found.same + found.smaller == len(ours)
    assert sum(theirs[n] != dense[n] for n in theirs) > len(theirs) / 2
    assert found.smaller == 0 or name == "a ViT"


@pytest.mark.slow
@pytest.mark.parametrize("name", quick(BEYOND, ("shufflenet_v2_x0_5",)))
def test_ours_prunes_what_the_oracle_cannot(name: str, tmp_path: Path) -> None:
    make, most = BEYOND[name]
    model = make()
    program = captured(model, name)
    dense = sum(p.numel() for p in program.parameters())
    ours = check_ours(program, 1, tmp_path)
    assert sum(torch.Size(shape).numel() for shape in ours.values()) < most * dense


def test_the_oracle_fails_on_channel_shuffles() -> None:
    with pytest.raises(ZeroDivisionError):
        prune_theirs(build("shufflenet_v2_x0_5"), torch.randn(1, 3, 64, 64), RATIO)
