"""A pruned network that is quantized: every zero survives, and the file is smaller than either alone."""

import tempfile
from pathlib import Path

import pytest
import torch
from quantize_networks import captured, context, images, on_state, quantized, small, sqnr, torchvision_program
from torch import Tensor, nn

from modelopt_cli.artifact import (
    predicted_bytes,
    read_program,
    read_safetensors,
    write_program,
    write_tensors,
)
from modelopt_cli.artifact.encodings import compact, pruned_names
from modelopt_cli.artifact.reader import read_tensors
from modelopt_cli.checkpoint.integer_layers import restore_integer_layers
from modelopt_cli.errors import ModeloptError
from modelopt_cli.kernels import prepare
from modelopt_cli.measure.coverage import coverage
from modelopt_cli.measure.evaluated_model import EvaluatedModel
from modelopt_cli.measure.size import measure_size
from modelopt_cli.methods.quantize.apply import apply
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.program import Encoding, Program
from modelopt_cli.program.quantized import Weighted
from modelopt_cli.program.quantized_convolutions import QuantizedConv2d
from modelopt_cli.program.quantized_linear import DynamicLinear

SCHEMES = ("int8", "int8-dynamic", "int8-weight")


def pruned(program: Program, density: float = 0.2, n_of_m: tuple[int, int] | None = None) -> Program:
    """The Program with most of every weight zeroed, the smallest first, and marked as pruned."""
    names = []
    for name, weight in program.named_parameters():
        if weight.dim() < 2 or not name.endswith("weight") or weight[0].numel() < 4:
            continue
        names.append(name)
        with torch.no_grad():
            rows = weight.movedim(1, -1)
            if n_of_m and rows.shape[-1] % n_of_m[1] == 0:
                groups = rows.unflatten(-1, (-1, n_of_m[1])).abs()
                rank = groups.argsort(-1, descending=True).argsort(-1)
                weight.mul_((rank < n_of_m[0]).flatten(-2).movedim(-1, 1))
            else:
                weight.mul_(weight.abs() > weight.abs().flatten().quantile(1 - density))
    program.encodings = compact(program, names, ":".join(map(str, n_of_m)) if n_of_m else None)
    return program


def weights(program: Program) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in program.state_dict().items() if name.endswith("weight")}


class Normed(nn.Module):
    """Convolutions under batch norms of either sign, odd and depthwise channels, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.body, self.norm2 = nn.Conv2d(16, 24, 3, bias=False), nn.BatchNorm2d(24)
        self.deep = nn.Conv2d(24, 24, 3, groups=24)
        self.fc = nn.Linear(24, 40)
        self.head = nn.Linear(40, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = self.deep(torch.relu(self.norm2(self.body(x)))).mean((2, 3))
        result: Tensor = self.head(torch.relu(self.fc(x)))
        return result


def normed() -> Program:
    torch.manual_seed(0)
    net = Normed()
    for norm in (net.norm, net.norm2):
        nn.init.normal_(norm.weight)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.1, 4.0)
    return captured(net, 3, 12, 12)


def bytes_of(program: Program) -> int:
    """Bytes of tensors alone: in networks this small the JSON around them is most of the file."""
    with tempfile.TemporaryDirectory() as folder:
        stored = read_safetensors(write_program(program, Path(folder) / "net").path)
    return sum(tensor.nbytes for tensor in stored.values())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("pattern", [None, (2, 4)], ids=["unstructured", "2:4"])
def test_every_zero_survives_and_both_gains_stay(
    scheme: str, pattern: tuple[int, int] | None, tmp_path: Path
) -> None:
    source = pruned(normed(), n_of_m=pattern)
    before, promised = source.state_dict(), pruned_names(source.encodings)
    assert len(promised) == 5
    made = quantized(source, scheme)
    after = made.state_dict()
    assert pruned_names(made.encodings) == promised
    for name in promised:
        assert not after[name][before[name] == 0].any(), name
        assert after[name].any(), name
    path = tmp_path / "net.safetensors"
    written = write_program(made, path)
    assert written.file_bytes == predicted_bytes(made)
    found = read_program(path)
    assert found.encodings.keys() == made.encodings.keys()
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in after.items())
    assert found.history[-1]["method"] == "quantize"
    if scheme != "int8-dynamic":  # which leaves the convolutions
        assert bytes_of(made) < bytes_of(source)
    assert bytes_of(made) < bytes_of(quantized(normed(), scheme))
    x = images(4, 3, 12, 12, seed=3)
    with torch.inference_mode():
        expected, got = source(x), prepare(found)(x)
        assert sqnr(expected, got) > 15
        assert torch.equal(prepare(made)(x), got)


def test_int8_values_are_stored_without_zeros(tmp_path: Path) -> None:
    made = quantized(pruned(normed(), n_of_m=(2, 4)), "int8")
    body = made.get_submodule("body")
    assert isinstance(body, QuantizedConv2d)
    assert body.weight.dtype == torch.int8
    encoding = made.encodings["body.weight"]
    assert encoding.params == {
        "form": "n:m", "axis": 1, "n": 2, "m": 4, "count": body.weight.numel() // 2, "values": None,
    }  # fmt: skip
    path = tmp_path / "net.safetensors"
    write_program(made, path)
    size = measure_size(EvaluatedModel(str(path), made, made, path.stat().st_size))
    assert size.parameters == sum(
        tensor.numel() for name, tensor in made.state_dict().items() if name.endswith(("weight", "bias"))
    )
    nonzero = sum(
        int(tensor.count_nonzero())
        for name, tensor in made.state_dict().items()
        if name.endswith(("weight", "bias"))
    )
    assert size.nonzero == nonzero
    assert size.bits_per_weight == pytest.approx(8 * bytes_of(made) / size.parameters)
    plain = quantized(normed(), "int8")
    assert size.bits_per_weight < 8 * bytes_of(plain) / size.parameters


def test_stored_int8_weights_are_sparse_over_affine() -> None:
    made = quantized(pruned(small()), "int8-weight")
    encoding = made.encodings["body.weight"]
    assert encoding.codec == "sparse"
    assert encoding.params["values"] == {"bits": 8, "axis": 0, "group": None}
    assert encoding.parts["scale"].shape == (8,)
    with pytest.raises(ModeloptError, match="no layer can be quantized"):
        quantized(made, "int8-weight")  # all of it is int8 already


def test_a_few_zeros_stay_marked() -> None:
    program = small()
    with torch.no_grad():
        program.get_parameter("body.weight")[0, 0] = 0
    program.encodings = compact(program, ["body.weight"])
    for scheme in ("int8", "int8-weight"):
        made = quantized(program, scheme)
        assert pruned_names(made.encodings) == {"body.weight"}
        assert made.encodings["body.weight"].params["form"] == "dense"
        assert not made.state_dict()["body.weight"][0, 0].any()


def test_layers_left_in_float_stay_pruned() -> None:
    source = pruned(normed())
    made = quantized(source, "int8", exclude=("body", "fc"))
    assert isinstance(made.get_submodule("body"), nn.Conv2d)
    folded = made.get_parameter("body.weight")
    assert torch.equal(folded == 0, source.get_parameter("body.weight") == 0)
    assert {"body.weight", "fc.weight", "head.weight"} <= pruned_names(made.encodings)
    assert made.encodings["body.weight"].params["values"] is None


@pytest.mark.parametrize("scheme", SCHEMES)
def test_attention_keeps_its_zeros_when_it_is_taken_apart(scheme: str) -> None:
    source = pruned(torchvision_program("vit_b_16"))
    before = source.state_dict()
    attention = next(name for name in source.encodings if name.endswith("in_proj_weight"))
    made = quantized(source, scheme, observer="minmax") if scheme == "int8" else quantized(source, scheme)
    name = attention if scheme == "int8-weight" else attention.replace("in_proj_weight", "in_proj.weight")
    assert name in pruned_names(made.encodings)
    assert not made.state_dict()[name][before[attention] == 0].any()
    assert len(pruned_names(made.encodings)) == len(pruned_names(source.encodings))
    assert bytes_of(made) < bytes_of(source)


def test_a_lost_zero_is_an_error_and_not_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    from modelopt_cli.methods.quantize import conversion

    real = conversion.quantize_weight

    def careless(weight: Tensor, groups: int = 1, **options: bool) -> tuple[Tensor, Tensor]:
        values, scale = real(weight, groups, **options)
        return values.where(values != 0, 1), scale

    monkeypatch.setattr(conversion, "quantize_weight", careless)
    with pytest.raises(ModeloptError, match="not zero any more") as caught:
        quantized(pruned(normed()), "int8")
    assert caught.value.exit_code == 4


def test_the_pair_bound_moves_no_zero() -> None:
    """Weights of the largest size next to zeros, where the bound on pairs pulls neighbours back."""
    program = captured(nn.Sequential(nn.Flatten(), nn.Linear(64, 32)), 1, 8, 8)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        weight = program.get_parameter("1.weight")
        weight.copy_(torch.randn(32, 64, generator=generator).sign())
        weight[torch.rand(32, 64, generator=generator) < 0.5] = 0
    zeros = weight == 0
    program.encodings = compact(program, ["1.weight"])
    for scheme in SCHEMES:
        after = apply(program, QuantizeConfig(scheme), context(program)).program.state_dict()["1.weight"]
        assert torch.equal(after == 0, zeros)
    assert int(after.abs().max()) > 0


def test_coverage_counts_what_is_stored() -> None:
    covered = coverage(quantized(pruned(normed()), "int8"))
    assert covered.fraction == 1.0
    assert all(layer.scheme.startswith("int8") for layer in covered.layers)


# --- without a graph -----------------------------------------------------------------------------------


def state_of(program: Program) -> tuple[dict[str, Tensor], dict[str, Encoding]]:
    return dict(program.state_dict()), dict(program.encodings)


def test_a_bare_state_dict(tmp_path: Path) -> None:
    state, encodings = state_of(pruned(normed()))
    done = on_state(state, QuantizeConfig("int8-weight", exclude=("fc",)), None, encodings)
    assert pruned_names(done.encodings) == pruned_names(encodings)
    for name in pruned_names(encodings):
        assert not done.state[name][state[name] == 0].any()
        assert (done.encodings[name].params["values"] is None) == (name == "fc.weight")
    assert done.skipped == {"fc": "matched by --exclude"}
    left = next(layer for layer in done.coverage.layers if layer.name == "fc")
    assert (left.compressed, left.reason, left.before) == (False, "matched by --exclude", "sparse")
    path = tmp_path / "net.safetensors"
    written = write_tensors(done.state, done.encodings, path)
    found = read_tensors(path)
    assert all(torch.equal(found.state[name], tensor) for name, tensor in done.state.items())
    whole, _ = state_of(normed())
    alone = on_state(whole, QuantizeConfig("int8-weight"))
    assert written.file_bytes < predicted_bytes(state, encodings)
    assert written.file_bytes < predicted_bytes(alone.state, alone.encodings)


def test_dynamic_layers_of_an_untraced_network_are_put_back() -> None:
    state, encodings = state_of(pruned(normed()))
    config = QuantizeConfig("int8-dynamic", exclude=("head",))
    done = on_state(state, config, {"fc": nn.Linear(1, 1), "head": nn.Linear(1, 1)}, encodings)
    entry = {"method": "quantize", "config": config.as_dict(), "skipped": done.skipped}
    rebuilt = Normed().eval()
    rebuilt.load_state_dict(done.state)
    restore_integer_layers(rebuilt, (entry,), done.encodings)
    assert isinstance(rebuilt.fc, DynamicLinear)
    assert isinstance(rebuilt.head, nn.Linear)
    assert torch.equal(rebuilt.fc.weight == 0, done.state["fc.weight"] == 0)
    assert not rebuilt.fc.weight[state["fc.weight"] == 0].any()


def test_layers_stored_as_int8_before_stay_so_and_become_no_dynamic_ones() -> None:
    state, encodings = state_of(pruned(normed()))
    first = on_state(state, QuantizeConfig("int8-weight", include=("head",)), None, encodings)
    config = QuantizeConfig("int8-dynamic", exclude=("head",))
    done = on_state(first.state, config, {"fc": nn.Linear(1, 1), "head": nn.Linear(1, 1)}, first.encodings)
    assert torch.equal(done.state["head.weight"], first.state["head.weight"])
    assert done.encodings["head.weight"].params == first.encodings["head.weight"].params
    assert done.encodings["head.weight"].params["values"] is not None
    entry = {"method": "quantize", "config": config.as_dict(), "skipped": done.skipped}
    rebuilt = Normed().eval()
    rebuilt.load_state_dict(done.state)
    restore_integer_layers(rebuilt, (entry,), done.encodings)
    assert isinstance(rebuilt.fc, DynamicLinear)
    assert isinstance(rebuilt.head, nn.Linear)


def test_a_whole_network_gets_smaller_twice(tmp_path: Path) -> None:
    dense = torchvision_program("squeezenet1_1")
    sizes = {"dense": predicted_bytes(dense), "int8": predicted_bytes(quantized(dense, observer="minmax"))}
    sparse = pruned(dense, density=0.1)
    sizes["pruned"] = write_program(sparse, tmp_path / "pruned").file_bytes
    both = quantized(read_program(tmp_path / "pruned"), observer="minmax")
    sizes["both"] = write_program(both, tmp_path / "both").file_bytes
    assert sizes["both"] < 0.3 * sizes["int8"] < 0.3 * 0.3 * sizes["dense"]
    assert sizes["both"] < 0.6 * sizes["pruned"] < 0.6 * 0.15 * sizes["dense"]
    found = prepare(read_program(tmp_path / "both"))
    layers = [module for module in found.modules() if isinstance(module, Weighted)]
    assert layers
    assert all(layer.kernel is not None for layer in layers)
    x = images(2, 3, 64, 64, seed=5)
    with torch.inference_mode():
        assert sqnr(sparse(x), found(x)) > 12
