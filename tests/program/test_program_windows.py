"""Windowed attention written out computes what torchvision's function computes."""

import copy
from pathlib import Path

import pytest
import torch
from program_networks import fill
from torch import nn
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)

from modelopt_cli import artifact
from modelopt_cli.program import InputSpec
from modelopt_cli.program.capture import capture
from modelopt_cli.program.channels import Group, analyse, layered, remove
from modelopt_cli.program.windows import split_windows


def swin(version: int) -> nn.Module:
    second = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2} if version == 2 else {}
    model = SwinTransformer([2, 2], 12, [2, 2], [2, 4], [3, 3], num_classes=5, **second)
    fill(model)
    return model.double().eval()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size", [(12, 12), (18, 26), (6, 8)], ids=str)
def test_equals_the_function(version: int, size: tuple[int, int]) -> None:
    """Maps of 6x6, 9x13 and 3x4 patches: whole windows, padded ones, and a side without any shift."""
    model = swin(version)
    program = capture(model, InputSpec((3, *size)), verify=False)
    split = split_windows(program)
    assert not any("shifted_window_attention" in str(node.target) for node in split.graph.nodes)
    assert set(program.state_dict()) <= set(split.state_dict())
    x = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(x)
        assert expected.std() > 1e-3
        torch.testing.assert_close(split(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_the_network_stays_as_it_was(tmp_path: Path) -> None:
    model = swin(2)
    before = copy.deepcopy(model.state_dict())
    program = capture(model, InputSpec((3, 12, 12)), verify=False)
    split = layered(program)
    with torch.no_grad():
        for tensor in split.parameters():
            tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert layered(split) is split
    artifact.write_program(split, tmp_path / "net.safetensors")
    artifact.read_program(tmp_path / "net.safetensors")


def test_programs_without_windows_pass() -> None:
    program = capture(nn.Sequential(nn.Linear(3, 2)), InputSpec((3,)))
    assert split_windows(program) is program


def makers(group: Group) -> list[str]:
    return [member.parameter.rpartition(".")[0] for member in group.members if member.makes_channels]


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_heads_can_go(version: int) -> None:
    """Without a head, the network equals the one whose output projection ignores it."""
    program = layered(capture(swin(version), InputSpec((3, 12, 12)), verify=False))
    found = analyse(program)
    heads = [group for group in found.groups if any(layer.endswith("attn.qkv") for layer in makers(group))]
    assert [group.units for group in heads] == [2, 2, 4, 4]
    keep = {group.name: list(range(1, group.units)) for group in heads}
    whole = copy.deepcopy(program)
    for group in heads:
        (path,) = [layer for layer in makers(group) if layer.endswith("attn.qkv")]
        proj = whole.get_submodule(path.replace("qkv", "proj"))
        with torch.no_grad():
            proj.weight[:, : proj.in_features // group.units] = 0.0
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(remove(program, keep)(x), whole(x), rtol=1e-10, atol=1e-10)
