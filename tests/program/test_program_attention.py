"""``nn.MultiheadAttention`` as linear layers and a scaled dot product, compared with the module itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from channels_attention import ATTENTION, TRANSFORMERS
from channels_networks import Case
from channels_oracle import masked, prune_ours
from torch import Tensor, nn

from modelopt_cli import artifact
from modelopt_cli.program import Encoding, InputSpec, Program
from modelopt_cli.program.attention import split_attention, split_names, undivided
from modelopt_cli.program.capture import capture

SHAPE = (5, 12)
CAUSAL = torch.ones(5, 5).triu(1).bool()


class Masked(nn.Module):
    """Attention with the masks that ``options`` makes of the input; no query is left without a key."""

    def __init__(self, options: Callable[[Any, Tensor], dict[str, Any]]) -> None:
        super().__init__()
        self.a, self.attention, self.fc = (
            nn.Linear(12, 12),
            nn.MultiheadAttention(12, 3, batch_first=True),
            nn.Linear(12, 4),
        )
        self.register_buffer("causal", CAUSAL)
        self.register_buffer("scores", torch.randn(5, 5))
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        result: Tensor = self.fc(self.attention(y, y, y, need_weights=False, **self.options(self, x))[0])
        return result


def keys(x: Tensor) -> Tensor:
    """The first key of each sample stays, the others by chance."""
    return (x[..., 0] > 0) & (torch.arange(5) > 0)


def added(flags: Tensor) -> Tensor:
    return torch.zeros(flags.shape).masked_fill(flags, float("-inf"))


MASKS: dict[str, Callable[[Any, Tensor], dict[str, Any]]] = {
    "pairs": lambda n, x: {"attn_mask": n.causal},
    "scores": lambda n, x: {"attn_mask": n.scores},
    "causal": lambda n, x: {"attn_mask": n.causal, "is_causal": True},
    "keys": lambda n, x: {"key_padding_mask": keys(x)},
    "key scores": lambda n, x: {"key_padding_mask": x[..., 0] * 2},
    "pairs and keys": lambda n, x: {"attn_mask": n.causal, "key_padding_mask": keys(x)},
    "scores and keys": lambda n, x: {"attn_mask": n.scores, "key_padding_mask": keys(x)},
    "pairs and key scores": lambda n, x: {"attn_mask": n.causal, "key_padding_mask": x[..., 0] * 2},
    "scores and key scores": lambda n, x: {"attn_mask": n.scores, "key_padding_mask": x[..., 0] * 2},
}


def samples(*shape: int) -> Tensor:
    return torch.randn(3, *shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Masked(MASKS[name]).eval()
    program = capture(model, InputSpec(SHAPE), verify=False)
    x = samples(*SHAPE)
    split = split_attention(program)
    assert type(split.get_submodule("attention.in_proj")) is nn.Linear
    pruned, found, keep = prune_ours(program, 0.4)
    assert found["attention.in_proj"].units == 3
    artifact.write_program(pruned, tmp_path / "net.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(split(x), model(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(pruned(x), masked(found, keep)(x), rtol=1e-5, atol=1e-6)
        assert torch.equal(artifact.read_program(tmp_path / "net.safetensors")(x), pruned(x))


def captured(case: Case) -> Program:
    torch.manual_seed(0)
    return capture(case.make().double().eval(), InputSpec(case.shape), verify=False)


@pytest.mark.parametrize(
    "case", [*ATTENTION.values(), *TRANSFORMERS.values()], ids=[*ATTENTION, *TRANSFORMERS]
)
def test_taken_apart_it_computes_the_same(case: Case) -> None:
    program = captured(case)
    split, x = split_attention(program), samples(*case.shape).double()
    assert not [m for m in split.modules() if isinstance(m, nn.MultiheadAttention)]
    with torch.no_grad():
        torch.testing.assert_close(split(x), program(x), rtol=1e-10, atol=1e-10)
    before, after = program.state_dict(), split.state_dict()
    for old, new in split_names(program, split).items():
        assert torch.equal(before[old], after[new])
    assert sum(t.numel() for t in before.values()) == sum(t.numel() for t in after.values())


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_layers_of_a_transformer(name: str) -> None:
    case = TRANSFORMERS[name]
    pruned, found, keep = prune_ours(captured(case), 0.4)
    assert {group.name: group.units for group in found.groups} == case.groups
    assert found.frozen == case.frozen
    x = samples(*case.shape).double()
    with torch.no_grad():
        torch.testing.assert_close(pruned(x), masked(found, keep)(x), rtol=1e-10, atol=1e-10)


def test_the_weights_of_several_inputs_stay_as_they_are_compressed() -> None:
    program = captured(ATTENTION["keys and values of another layer"])
    program.encodings = {"attention.in_proj_weight": Encoding("sparse", {}, {})}
    assert undivided(program) == {"attention": "whose weights for several inputs are compressed as one"}
    assert split_attention(program) is program
    program.encodings = {"attention.out_proj.weight": Encoding("sparse", {}, {})}
    assert not undivided(program)


def test_a_mask_for_each_head_keeps_the_module() -> None:
    model = Masked(lambda n, x: {"attn_mask": n.causal.expand(3 * x.shape[0], -1, -1)}).eval()
    program = capture(model, InputSpec(SHAPE))
    assert undivided(program) == {"attention": "whose mask differs between heads"}
