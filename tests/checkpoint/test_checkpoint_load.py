"""Weights into a network: all of them or none."""

import pytest
import torch
from torch import nn

from modelopt_cli.checkpoint import Architecture, build_loaded, resolve
from modelopt_cli.checkpoint.build import check_finite
from modelopt_cli.errors import ArchitectureError, CheckpointError, ModeloptError

State = dict[str, torch.Tensor]


def trained(spec: str) -> State:
    """A state dict whose every tensor is distinct, statistics included."""
    torch.manual_seed(1)
    state = dict(resolve(spec).build().state_dict())
    return {k: torch.rand(t.shape) + 0.5 if t.is_floating_point() else t + 5 for k, t in state.items()}


def error_of(spec: str, state: State, kind: type[ModeloptError] = ArchitectureError) -> str:
    with pytest.raises(kind) as caught:
        build_loaded(resolve(spec), state, "f.pth")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "spec",
    [
        "builtin:resnet8",
        "torchvision:mnasnet0_5",
        "torchvision:densenet121",
        "torchvision:shufflenet_v2_x0_5",
    ],
)
def test_every_tensor_arrives(spec: str) -> None:
    state = trained(spec)
    module, notes = build_loaded(resolve(spec), state, "f.pth")
    assert notes == []
    assert not module.training
    loaded = module.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_the_files_tensors_are_copied_not_shared() -> None:
    state = trained("builtin:lenet300?width=0.1")
    module, _ = build_loaded(resolve("builtin:lenet300?width=0.1"), state, "f.pth")
    module.get_parameter("output.bias").data.zero_()
    assert state["output.bias"].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(dtype: torch.dtype) -> None:
    state = {
        k: t.to(dtype) for k, t in trained("builtin:resnet8").items()
    }  # counters too, as averaging leaves them
    module, notes = build_loaded(resolve("builtin:resnet8"), state, "f.pth")
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert torch.equal(module.get_parameter("conv1.weight"), state["conv1.weight"].float())
    assert notes == [f"weights are {str(dtype).removeprefix('torch.')} in the file, float32 here"]


def test_counters_may_be_missing() -> None:
    state = {k: t for k, t in trained("builtin:resnet8").items() if not k.endswith("num_batches_tracked")}
    module, _ = build_loaded(resolve("builtin:resnet8"), state, "f.pth")
    assert torch.equal(module.state_dict()["bn1.running_var"], state["bn1.running_var"])


def test_a_lightning_prefix_is_taken_off_where_that_fits() -> None:
    state = {f"model.{k}": t for k, t in trained("builtin:resnet8").items()}
    module, notes = build_loaded(
        resolve("builtin:resnet8"), {**state, "loss.weight": torch.ones(10)}, "f.pth"
    )
    assert torch.equal(module.get_parameter("fc.weight"), state["model.fc.weight"])
    assert notes == ["1 tensor outside the network left aside"]


def test_a_networks_own_renaming_is_used() -> None:
    class Renames(nn.Linear):
        def _load_from_state_dict(self, state_dict: State, prefix: str, *rest: object) -> None:
            state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}old_weight")
            super()._load_from_state_dict(state_dict, prefix, *rest)  # type: ignore[misc,arg-type]

    state = {"old_weight": torch.ones(2, 3), "bias": torch.zeros(2)}
    module, _ = build_loaded(Architecture("n.py:f", lambda: Renames(3, 2), None), state, "f.pth")
    assert module.get_parameter("weight").sum() == 6


class TestMisfits:
    def test_a_wrong_class_count_names_the_option(self) -> None:
        assert error_of("torchvision:resnet18", trained("torchvision:resnet18?num_classes=10")) == (
            "f.pth: 'fc.weight' is (10, 512) in the file, (1000, 512) in the network; add ?num_classes=10"
        )

    def test_an_option_that_is_there_is_changed_not_added(self) -> None:
        state = trained("builtin:resnet8?num_classes=3&in_channels=1")
        assert "write num_classes=3" in error_of("builtin:resnet8?num_classes=4&in_channels=1", state)
        assert "add &num_classes=3" in error_of("builtin:resnet8?in_channels=1", state)

    def test_wrong_channels(self) -> None:
        assert "add ?in_channels=1" in error_of("builtin:resnet8", trained("builtin:resnet8?in_channels=1"))

    def test_a_wrong_architecture_counts_and_names(self) -> None:
        line = error_of("builtin:resnet20", trained("builtin:resnet8"))
        assert (
            "60 missing (layer1.1.conv1.weight, layer1.1.bn1.weight, layer1.1.bn1.bias and 57 more)" in line
        )
        assert "unexpected" not in line
        line = error_of("builtin:resnet8", trained("builtin:resnet20"))
        assert "60 unexpected (layer1.1.conv1.weight, layer1.1.bn1.weight" in line

    def test_integers_where_floats_belong(self) -> None:
        state = trained("builtin:lenet300?width=0.1")
        state["hidden1.weight"] = state["hidden1.weight"].to(torch.int8)
        assert "'hidden1.weight' is int8" in error_of("builtin:lenet300?width=0.1", state)

    def test_a_name_from_the_file_is_escaped(self) -> None:
        line = error_of("builtin:resnet8", {**trained("builtin:resnet8"), "\x1b[2J": torch.ones(1)})
        assert "\\x1b[2J" in line


class TestFinite:
    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_a_bad_weight_is_named_and_counted(self, bad: float) -> None:
        state = trained("builtin:resnet8")
        state["layer2.0.conv1.weight"][0, 0, :2] = bad
        line = error_of("builtin:resnet8", state, CheckpointError)
        assert "'layer2.0.conv1.weight' has 6 values that are NaN or infinite" in line

    def test_what_float32_cannot_hold(self) -> None:
        state = trained("builtin:lenet300?width=0.1")
        state["output.bias"] = torch.full((10,), 1e300, dtype=torch.float64)
        line = error_of("builtin:lenet300?width=0.1", state, CheckpointError)
        assert "'output.bias' has values up to 1e+300" in line

    def test_large_but_finite_values_pass(self) -> None:
        check_finite({"w": torch.full((100,), 3e38), "h": torch.full((9,), 6e4, dtype=torch.float16)}, "f")

    def test_an_attention_mask_passes_in_a_network_only(self) -> None:
        mask = torch.full((4, 4), -torch.inf).triu(1)
        check_finite({"mask": mask}, "f", masks=True)
        with pytest.raises(CheckpointError):
            check_finite({"mask": mask}, "f")
        with pytest.raises(CheckpointError):
            check_finite({"mask": mask + 1}, "f", masks=True)

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
    def test_eight_bit_floats(self, dtype: torch.dtype) -> None:
        check_finite({"w": torch.ones(4).to(dtype)}, "f")
        with pytest.raises(CheckpointError):
            check_finite({"w": torch.full((4,), torch.nan).to(dtype)}, "f")


def test_skipping_initialisation_changes_nothing_but_time() -> None:
    spec = "torchvision:vit_b_32?num_classes=2"  # sets parameters by every means torchvision uses
    state = dict(resolve(spec).build().state_dict())
    module, _ = build_loaded(resolve(spec), state, "f.pth")
    loaded = module.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_buffers_that_no_file_holds_keep_their_values() -> None:
    """maxvit and swin compute index tables in their constructors; skipping must not touch them."""
    architecture = resolve("torchvision:swin_t")
    fresh = architecture.build()
    module, _ = build_loaded(architecture, dict(fresh.state_dict()), "f.pth")
    assert all(
        torch.equal(a, b)
        for (_, a), (_, b) in zip(fresh.named_buffers(), module.named_buffers(), strict=True)
    )


class Positions(nn.Module):
    """Makes a table that it does not save, as BERT does since transformers 4.31."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("position_ids", torch.arange(4)[None], persistent=False)


def test_a_table_that_the_network_makes_itself_may_be_in_the_file() -> None:
    architecture = Architecture("net.py:Positions", Positions, None)
    weights = dict(Positions().state_dict())
    module, notes = build_loaded(architecture, {**weights, "position_ids": torch.arange(4)[None]}, "f.pth")
    assert torch.equal(module.state_dict()["linear.weight"], weights["linear.weight"])
    assert notes == ["1 tensor outside the network left aside"]
    for other in (torch.arange(5)[None], torch.tensor([[3, 2, 1, 0]])):
        with pytest.raises(ArchitectureError, match=r"1 unexpected \(position_ids\)"):
            build_loaded(architecture, {**weights, "position_ids": other}, "f.pth")
