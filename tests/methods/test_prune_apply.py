"""prune from end to end: what is zero, what is gone, what is said of it, and what is refused."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from prune_cases import Net, captured, context, net, smooth
from torch import Tensor, nn

from modelopt_cli.artifact import predicted_bytes, read_program, write_program
from modelopt_cli.errors import NothingCompressed, UsageError
from modelopt_cli.measure.coverage import coverage
from modelopt_cli.methods.context import Context, MethodResult
from modelopt_cli.methods.prune.apply import apply
from modelopt_cli.methods.prune.config import PruneConfig
from modelopt_cli.methods.quantize.apply import apply as quantize
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.program import Program

IMAGES = smooth(40, 3, 12, 12)


def pruned(program: Program, within: Context | None = None, **settings: object) -> MethodResult:
    return apply(program, PruneConfig(**settings), within or Context())  # type: ignore[arg-type]


def test_prune_removes_the_smallest_weights_of_all_layers_and_touches_nothing_else() -> None:
    program = net()
    before = copy.deepcopy(program.state_dict())
    result = pruned(program, structure="unstructured", criterion="l1", sparsity=0.6).program.state_dict()
    names = [name for name, tensor in before.items() if tensor.dim() > 1]
    every = np.concatenate([before[name].numpy().ravel() for name in names])
    threshold = np.sort(np.abs(every))[round(0.6 * len(every)) - 1]
    for name, tensor in before.items():
        values = tensor.numpy()
        expected = np.where(np.abs(values) <= threshold, 0, values) if name in names else values
        np.testing.assert_array_equal(result[name].numpy(), expected, err_msg=name)
    assert all(torch.equal(tensor, before[name]) for name, tensor in program.state_dict().items())


@pytest.mark.parametrize("structure", ["unstructured", "2:4", "block"])
def test_prune_makes_a_smaller_file_that_answers_alike(structure: str, tmp_path: Path) -> None:
    program = net()
    target = {} if structure == "2:4" else {"sparsity": 0.8}
    result = pruned(program, structure=structure, **target).program
    written = write_program(result, tmp_path / "a.safetensors")
    again = read_program(written.path)
    assert written.file_bytes == predicted_bytes(result)
    assert sum(t.numel() for t in program.parameters()) == sum(t.numel() for t in again.parameters())
    assert torch.equal(again(IMAGES), result(IMAGES))
    entry = again.history[-1]
    assert {name for name, e in again.encodings.items() if e.codec == "sparse"} == {
        f"{layer}.weight" for layer, zeros in entry["sparsity"].items() if zeros
    }
    dense = write_program(program, tmp_path / "b.safetensors")
    assert written.file_bytes < dense.file_bytes


def test_prune_gives_the_same_bytes_for_the_same_seed(tmp_path: Path) -> None:
    settings = {"criterion": "random", "sparsity": 0.5}
    hashes = []
    for i, seed in enumerate((1, 1, 2)):
        result = pruned(net(), context(IMAGES, seed=seed), structure="unstructured", **settings).program
        hashes.append(write_program(result, tmp_path / f"{i}.safetensors").sha256)
    assert hashes[0] == hashes[1] != hashes[2]


def test_prune_tells_the_history_what_it_did() -> None:
    origin = {"source_sha256": "abc"}
    result = pruned(net(), Context(seed=3, origin=origin), structure="block", sparsity=0.5, exclude=("fc",))
    (entry,) = result.program.history
    assert entry["method"] == "prune"
    assert entry["config"] == PruneConfig(structure="block", sparsity=0.5, exclude=("fc",)).as_dict()
    assert (entry["seed"], entry["torch"], entry["source_sha256"]) == (3, str(torch.__version__), "abc")
    assert entry["skipped"] == result.skipped == {"fc": "matched by --exclude"}
    weight = result.program.get_parameter("body.weight")
    assert entry["sparsity"]["body"] == round(float((weight == 0).double().mean()), 4)
    assert entry["coverage"] == {"compressed": 4, "total": 5}
    assert entry["target"] == {"metric": "sparsity", "wanted": 0.5, "reached": pytest.approx(0.5, abs=0.01)}
    assert "calibration" not in entry
    assert "training" not in entry


def test_prune_keeps_the_zeros_of_an_earlier_pruning() -> None:
    first = pruned(net(), structure="unstructured", sparsity=0.5, criterion="random").program
    second = pruned(first, structure="2:4").program
    third = pruned(second, structure="unstructured", sparsity=0.9).program
    for earlier, later in ((first, second), (second, third)):
        for name, weight in earlier.named_parameters():
            assert not bool(later.get_parameter(name)[weight == 0].any()) or weight.dim() == 1
    assert [entry["method"] for entry in third.history] == ["prune"] * 3


def test_prune_channels_of_a_sparse_network_keeps_it_sparse(tmp_path: Path) -> None:
    sparse = pruned(net(), structure="unstructured", sparsity=0.7).program
    smaller = pruned(sparse, sparsity=0.5, round_to=1).program
    for name, encoding in smaller.encodings.items():
        assert encoding.codec == "sparse"
        assert int((smaller.get_parameter(name) == 0).sum()) > 0
    assert set(smaller.encodings) == set(sparse.encodings)
    write_program(smaller, tmp_path / "x.safetensors")  # compares every tensor with what was meant


def test_prune_channels_leaves_what_the_network_computes_without_them() -> None:
    """Against the dense network with the same channels put to zero by hand."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 16, 3), nn.Flatten(), nn.Linear(1024, 5)
    )
    program = captured(model, 3, 12, 12)
    result = pruned(program, sparsity=0.4, round_to=1).program
    masked = copy.deepcopy(model)
    for name in ("0", "2"):
        dense, small = model.get_submodule(name), result.get_submodule(name)
        assert isinstance(dense, nn.Conv2d)
        assert isinstance(small, nn.Conv2d)
        # Biases are random numbers, all different, and so name the channels.
        gone = ~torch.isin(dense.bias, small.bias)
        layer = masked.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        with torch.no_grad():
            layer.weight[gone] = 0
            layer.bias[gone] = 0  # type: ignore[index]
        assert int(gone.sum()) == dense.out_channels - small.out_channels
    torch.testing.assert_close(result(IMAGES), masked(IMAGES), rtol=1e-4, atol=1e-5)


def test_prune_layers_takes_out_residual_branches() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
            self.out = nn.Linear(6, 3)
            with torch.no_grad():
                self.blocks[2].weight.mul_(1e-3)  # type: ignore[operator, union-attr]

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + torch.tanh(block(x))
            result: Tensor = self.out(x)
            return result

    torch.manual_seed(0)
    program = captured(Residual(), 6)
    result = pruned(program, structure="layers", sparsity=0.25, criterion="l1")
    assert result.program.history[-1]["removed"] == ["blocks.2"]
    assert set(result.skipped) == {"blocks.0", "blocks.1", "blocks.3", "out"}
    x = torch.randn(5, 6)
    expected = x
    for i in (0, 1, 3):
        expected = expected + torch.tanh(program.get_submodule(f"blocks.{i}")(expected))
    torch.testing.assert_close(result.program(x), program.get_submodule("out")(expected))
    assert [(layer.name, layer.scheme) for layer in coverage(result.program).layers if layer.compressed] == [
        ("blocks.2", "removed")
    ]


def test_prune_says_of_every_layer_how_it_is_compressed_or_why_not() -> None:
    result = pruned(net(), structure="2:4")
    layers = {layer.name: layer for layer in coverage(result.program).layers}
    assert (layers["body"].scheme, layers["fc"].scheme) == ("sparse 50 %", "sparse 50 %")
    assert layers["stem"].reason == "3 input channels, fewer than 4"
    assert layers["dw"].reason == "1 input channels, fewer than 4"
    small = pruned(net(), sparsity=0.3, round_to=1)
    whole = net()
    for layer in coverage(small.program).layers:
        before, after = (p.get_submodule(layer.name) for p in (whole, small.program))
        left = sum(t.numel() for t in after.parameters()) / sum(t.numel() for t in before.parameters())
        assert layer.compressed == (left < 1)
        assert layer.scheme == (f"pruned {100 * (1 - left):.0f} %" if left < 1 else "")
        assert bool(layer.reason) == (left == 1) == (layer.name in small.skipped)


def test_prune_twice_multiplies_what_is_left() -> None:
    whole = net()
    once = pruned(whole, sparsity=0.3, round_to=1, allocation="uniform").program
    twice = pruned(once, sparsity=3 / 7, round_to=1, allocation="uniform").program
    layer = next(layer for layer in coverage(twice).layers if layer.name == "body")
    left = twice.get_submodule("body"), whole.get_submodule("body")
    fraction = 1 - np.divide(*(sum(t.numel() for t in m.parameters()) for m in left))
    assert layer.scheme == f"pruned {100 * fraction:.0f} %"


def test_prune_recalibrates_batch_norms_after_channels_went() -> None:
    settings = {"sparsity": 0.5, "round_to": 1}
    fresh = pruned(net(), context(IMAGES, batch_size=40), **settings)
    stem = fresh.program.get_submodule("stem")(IMAGES)
    norm = fresh.program.get_submodule("bn")
    torch.testing.assert_close(norm.running_mean, stem.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert fresh.program.history[-1]["calibration"] == "tensor"
    kept = pruned(net(), context(IMAGES), bn_recalibration=False, **settings)
    assert torch.equal(kept.program.get_submodule("bn").running_mean, torch.zeros_like(norm.running_mean))  # type: ignore[arg-type]
    assert "calibration" not in kept.program.history[-1]
    blind = pruned(net(), **settings)
    assert [note for note in blind.notes if "batch norms keep" in note]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"criterion": "taylor", "sparsity": 0.5}, "needs data"),
        ({"criterion": "wanda", "structure": "2:4"}, "needs data"),
        ({"allocation": "sensitivity", "sparsity": 0.5}, "measured on data"),
        ({"schedule": "iterative", "sparsity": 0.5}, "give train"),
        ({"structure": "unstructured", "schedule": "gradual", "sparsity": 0.5}, "give train"),
        ({"sparsity": 0.5, "include": ("nothing*",)}, "matches no layer"),
        ({"structure": "layers", "sparsity": 0.5, "exclude": ("nothing*",)}, "matches no layer"),
        ({}, "how much to prune"),
    ],
    ids=str,
)
def test_prune_refuses_what_it_cannot_do(settings: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        pruned(net(), **settings)


def test_prune_refuses_quantized_networks_and_says_which_comes_first() -> None:
    for scheme in ("int8", "int8-weight"):
        quantized = quantize(net(), QuantizeConfig(scheme=scheme), context(IMAGES)).program
        for structure in ("unstructured", "channels", "layers"):
            with pytest.raises(UsageError, match="prune first, then quantize"):
                pruned(quantized, structure=structure, sparsity=0.5)


@pytest.mark.parametrize("structure", ["unstructured", "channels", "layers"])
def test_prune_of_what_has_nothing_to_prune_is_an_error(structure: str) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.scale(x)
            return result

    with pytest.raises(NothingCompressed):
        pruned(captured(Bare(), 4), structure=structure, sparsity=0.5)


def test_prune_leaves_excluded_channels_and_what_is_coupled_with_them() -> None:
    result = pruned(net(), sparsity=1 / 3, round_to=1, exclude=("body",))
    assert result.skipped["body"] == "matched by --exclude"
    assert result.skipped["stem"] == "coupled with body: matched by --exclude"
    assert result.program.get_parameter("body.weight").shape == Net().body.weight.shape


@pytest.mark.parametrize("structure", ["unstructured", "2:4", "block"])
def test_prune_by_obs_leaves_a_smaller_error_than_by_magnitude(structure: str) -> None:
    program, errors = net(), {}
    target = {} if structure == "2:4" else {"sparsity": 0.5}
    for criterion in ("l2", "obs"):
        within = context(IMAGES)
        result = pruned(
            program, within, structure=structure, criterion=criterion, bn_recalibration=False,
            allocation="uniform", include=("body",), **target,
        )  # fmt: skip
        with torch.no_grad():
            errors[criterion] = float((result.program(IMAGES) - program(IMAGES)).square().mean())
        assert float((result.program.get_parameter("body.weight") == 0).double().mean()) == 0.5
    assert errors["obs"] < 0.8 * errors["l2"]
