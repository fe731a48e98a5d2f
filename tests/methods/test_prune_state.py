"""Pruning tensors without a graph, against plain numpy."""

import numpy as np
import pytest
import torch

from modelopt_cli.artifact import predicted_bytes, write_tensors
from modelopt_cli.errors import NothingCompressed, UsageError
from modelopt_cli.methods.prune.config import PruneConfig
from modelopt_cli.methods.prune.state_pruner import apply_to_state
from modelopt_cli.methods.prune.target_figures import TargetNotReached
from modelopt_cli.program import Encoding


@pytest.fixture
def state():
    """Two weights of very different size, a bias, statistics of a norm, and a counter."""
    generator = torch.Generator().manual_seed(0)
    return {
        "small.weight": 0.01 * torch.randn(16, 8, 3, 3, generator=generator),
        "large.weight": torch.randn(10, 64, generator=generator),
        "large.bias": torch.randn(10, generator=generator),
        "norm.weight": torch.ones(16),
        "norm.running_mean": torch.randn(16, generator=generator),
        "norm.num_batches_tracked": torch.tensor(7),
    }


def config(**options):
    return PruneConfig(**{"structure": "unstructured", **options})


def test_globally_the_smallest_of_all_weights_go(state):
    result = apply_to_state(state, {}, config(sparsity=0.6))
    weights = ("small.weight", "large.weight")
    magnitudes = np.concatenate([np.abs(state[name].numpy()).ravel() for name in weights])
    order = np.argsort(magnitudes, kind="stable")
    gone = np.zeros(magnitudes.size, bool)
    gone[order[: round(0.6 * gone.size)]] = True
    found = np.concatenate([result.state[name].numpy().ravel() == 0 for name in weights])
    # A layer keeps one weight at least, whatever the others are worth.
    assert (found != gone).sum() <= 2
    assert result.target.reached == pytest.approx(0.6, abs=0.001)
    for name in state:
        kept = result.state[name] != 0
        assert torch.equal(result.state[name][kept], state[name][kept])
        if name not in weights:
            assert torch.equal(result.state[name], state[name])
    assert set(result.encodings) == set(weights)
    assert result.coverage.compressed == 2


@pytest.mark.parametrize("allocation", ["uniform", "erk", "lamp"])
def test_within_a_layer_the_smallest_go(allocation, state):
    result = apply_to_state(state, {}, config(sparsity=0.6, allocation=allocation))
    for name in ("small.weight", "large.weight"):
        before, after = np.abs(state[name].numpy()), result.state[name].numpy()
        assert before[after == 0].max() < before[after != 0].min()
        if allocation == "uniform":
            assert (after == 0).mean() == pytest.approx(0.6, abs=0.002)


def test_a_pattern_keeps_the_two_largest_of_four_input_channels(state):
    result = apply_to_state(state, {}, config(structure="2:4"))
    for name in ("small.weight", "large.weight"):
        before = np.moveaxis(state[name].numpy(), 1, -1).reshape(-1, 4)
        after = np.moveaxis(result.state[name].numpy(), 1, -1).reshape(-1, 4)
        largest = np.argsort(-np.abs(before), axis=1)[:, :2]
        expected = np.zeros_like(before)
        np.put_along_axis(expected, largest, np.take_along_axis(before, largest, 1), 1)
        assert np.array_equal(after, expected)


def test_blocks_of_the_smallest_norm_go(state):
    result = apply_to_state(state, {}, config(structure="block", sparsity=0.5, allocation="uniform"))
    for name in ("small.weight", "large.weight"):
        before = state[name].double().numpy().reshape(-1, 4)
        after = result.state[name].numpy().reshape(-1, 4)
        norms, gone = (before**2).sum(1), (after == 0).all(1)
        assert gone.mean() == pytest.approx(0.5, abs=0.01)
        assert norms[gone].max() <= norms[~gone].min()
        assert (after[~gone] != 0).all()


@pytest.mark.parametrize(("metric", "wanted"), [("params", 0.3), ("bytes", 0.5)])
def test_targets_that_count_everything(metric, wanted, state):
    result = apply_to_state(state, {}, config(**{metric: wanted}))
    if metric == "params":
        learned = [name for name in state if "running" not in name and "num" not in name]
        left, full = (
            sum(int(torch.count_nonzero(tensors[name])) for name in learned)
            for tensors in (result.state, state)
        )
    else:
        # As the file will be, history included.
        left = predicted_bytes(result.state, result.encodings, history=[result.entry])
        full = predicted_bytes(state)
    assert left / full == pytest.approx(wanted, abs=0.01)
    assert result.target.reached == pytest.approx(left / full)


def test_what_was_pruned_stays_pruned_and_counts(state):
    once = apply_to_state(state, {}, config(sparsity=0.5, criterion="random", allocation="uniform"))
    twice = apply_to_state(once.state, once.encodings, config(sparsity=0.7))
    for name in ("small.weight", "large.weight"):
        assert bool((twice.state[name][once.state[name] == 0] == 0).all())
    assert twice.target.reached == pytest.approx(0.7, abs=0.001)


def test_shared_weights_stay_shared(state):
    state["again.weight"] = state["large.weight"]
    result = apply_to_state(state, {}, config(sparsity=0.5, criterion="random"))
    assert torch.equal(result.state["again.weight"], result.state["large.weight"])
    assert set(result.encodings) == {"small.weight", "large.weight", "again.weight"}
    assert [layer.name for layer in result.coverage.layers] == ["small", "large"]


def test_the_seed_decides_at_random(state):
    first, again, other = (
        apply_to_state(state, {}, config(sparsity=0.5, criterion="random"), seed).state["large.weight"]
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_layers_left_whole_are_listed_with_reasons(state):
    state["odd.weight"] = torch.randn(4, 3)
    result = apply_to_state(state, {}, config(structure="2:4", exclude=("small",)))
    reasons = {layer.name: layer.reason for layer in result.coverage.layers if not layer.compressed}
    assert reasons == {"small": "matched by --exclude", "odd": "3 input channels, fewer than 4"}
    assert result.entry["skipped"] == reasons
    assert result.entry["coverage"] == {"compressed": 1, "total": 3}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"structure": "channels", "sparsity": 0.5}, "structure channels needs"),
        ({"sparsity": 0.5, "criterion": "wanda"}, "wanda needs"),
        ({"sparsity": 0.5, "allocation": "sensitivity"}, "allocation sensitivity needs"),
        ({"sparsity": 0.5, "schedule": "iterative"}, "schedule iterative needs"),
        ({"sparsity": 0.5, "include": ("conv*",)}, "conv"),
        ({}, "nothing says how much"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_needs_a_graph_is_refused(options, says, state):
    with pytest.raises(UsageError, match=says):
        apply_to_state(state, {}, config(**options))


def test_int8_steps_are_refused(state):
    encodings = {"large.weight": Encoding("affine", {"bits": 8, "axis": 0, "group": None})}
    with pytest.raises(UsageError, match=r"large.weight: is stored as affine values"):
        apply_to_state(state, encodings, config(sparsity=0.5))


def test_nothing_to_prune(state):
    with pytest.raises(NothingCompressed):
        apply_to_state({"a.bias": torch.ones(3)}, {}, config(sparsity=0.5))
    with pytest.raises(NothingCompressed, match="matched by --exclude"):
        apply_to_state(state, {}, config(sparsity=0.5, exclude=("*",)))


def test_a_target_beyond_what_can_go(state):
    with pytest.raises(TargetNotReached, match=r"params 0\.1 is not reached"):
        apply_to_state(state, {}, config(params=0.1, include=("small",)))


def test_the_bytes_reached_are_those_of_the_file(tmp_path):
    """The history is a good part of a small file."""
    generator = torch.Generator().manual_seed(0)
    state = {f"l{i}.weight": torch.randn(24, 24, generator=generator) for i in range(4)}
    plain = write_tensors(state, {}, tmp_path / "plain").file_bytes
    result = apply_to_state(state, {}, config(bytes=0.5), origin={"source_sha256": "0" * 64})
    written = write_tensors(result.state, result.encodings, tmp_path / "pruned", history=[result.entry])
    assert written.file_bytes / plain == pytest.approx(result.target.reached, abs=1e-6)
    assert result.target.reached == pytest.approx(0.5, abs=0.01)


def test_recurrent_weights_are_pruned_and_what_has_no_weights_name_is_listed():
    module = torch.nn.LSTM(8, 16)
    state = {f"l.{name}": tensor.detach() for name, tensor in module.named_parameters()}
    state["position"] = torch.randn(5, 16)
    result = apply_to_state(state, {}, config(sparsity=0.5))
    zeros = {name: int((tensor == 0).sum()) for name, tensor in result.state.items()}
    assert zeros["l.weight_ih_l0"] + zeros["l.weight_hh_l0"] == (64 * 8 + 64 * 16) // 2
    assert zeros["position"] == 0
    reasons = {layer.name: layer.reason for layer in result.coverage.layers if not layer.compressed}
    assert reasons == {"position": "not called a weight"}


def test_types_that_torch_cannot_count_are_listed(state):
    state["tiny.weight"] = torch.ones(8, 8).to(torch.float8_e4m3fn)
    for options in ({"sparsity": 0.5}, {"params": 0.5}):
        result = apply_to_state(state, {}, config(**options))
        assert result.entry["skipped"] == {"tiny": "its type is float8_e4m3fn"}
    # 64 ones are among the parameters: bias and norm are, too.
    learned = [name for name in state if "running" not in name and "num" not in name]
    left, full = (
        sum(int((tensors[name].float() != 0).sum()) for name in learned) for tensors in (result.state, state)
    )
    assert left / full == pytest.approx(0.5, abs=0.001)
