"""Weights that are only stored: any bits, groups of input features, zero points, and files of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantize_networks import images, on_state
from test_quantize_qat import everything
from torch import Tensor, nn

from modelopt_cli.artifact import predicted_bytes, read_program, write_program
from modelopt_cli.artifact.encodings import compact, is_pruned
from modelopt_cli.errors import UsageError
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.quantize.apply import apply
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.learning import qat
from modelopt_cli.methods.quantize.stored_weights import WeightSteps, encode_weight, quantize_asymmetric
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.capture import capture

pytestmark = pytest.mark.usefixtures("one_thread")


class Rows(nn.Module):
    """Linear layers whose inputs divide into groups, or do not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.even = nn.Linear(40, 64), nn.Linear(64, 50)
        self.odd, self.last = nn.Linear(50, 48), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.odd(self.even(self.first(x).relu()).relu()).relu())  # type: ignore[no-any-return]


def rows() -> Program:
    torch.manual_seed(0)
    return capture(Rows().eval(), InputSpec((40,)), verify=False)


def stored(program: Program, **options: Any) -> Program:
    return apply(program, QuantizeConfig("int8-weight", **options), Context()).program


def by_hand(encoding: Any, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """The weight that integers, scales and zero points stand for, group by group."""
    integers, scale = encoding.integers.numpy().astype(np.int64), encoding.parts["scale"].numpy()
    zero = encoding.parts["zero_point"].numpy() if "zero_point" in encoding.parts else np.zeros(1, np.int64)
    zero = np.broadcast_to(zero, scale.shape).astype(np.int64)
    group = encoding.params["group"]
    weight = np.empty(shape, np.float32)
    for row in range(shape[0]):
        for start in range(0, shape[1], group or shape[1]):
            some = slice(start, start + (group or shape[1]))
            at = (row, start // group) if group else (row,)
            weight[row, some] = (integers[row, some] - zero[at]).astype(np.float32) * scale[at]
    return weight


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", [None, 8, 16, 64])
@pytest.mark.parametrize("bits", range(2, 9))
def test_a_weight_is_what_its_integers_scales_and_zero_points_say(
    bits: int, group: int | None, asymmetric: bool
) -> None:
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) + 0.5
    rounded, encoding = encode_weight(weight, WeightSteps(bits, group, asymmetric))
    used = group if group is not None and group < 40 else None
    assert encoding.params == {"bits": bits, "axis": 0 if used is None else None, "group": used}
    assert tuple(encoding.parts["scale"].shape) == ((6,) if used is None else (6, -(-40 // used)))
    assert ("zero_point" in encoding.parts) is asymmetric
    assert np.array_equal(rounded.numpy(), by_hand(encoding, (6, 40)))
    assert encoding.integers is not None
    assert -(1 << bits - 1) <= int(encoding.integers.min()) < int(encoding.integers.max()) < 1 << bits - 1


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_groups_and_zero_points_lose_less(bits: int) -> None:
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(16, 128, generator=g) * (1 + 3 * torch.rand(1, 128, generator=g)) + 0.4

    def error(**options: Any) -> float:
        return float((encode_weight(weight, WeightSteps(bits, **options))[0] - weight).square().sum())

    assert error(group=16) < 0.85 * error()
    assert error(group=16, asymmetric=True) < 0.95 * error(group=16)


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_a_range_with_a_zero_point_is_the_best_of_a_fine_search(bits: int) -> None:
    weight = torch.randn(5, 60, generator=torch.Generator().manual_seed(2)).exp()
    values, scale, zero = quantize_asymmetric(weight, bits)
    w = weight.double().numpy()
    got = np.square((values.numpy() - zero.numpy()[:, None]) * scale.double().numpy()[:, None] - w).sum(1)
    top = 2**bits - 1
    for row in range(5):
        tried = w[row].max() / top * np.linspace(0.05, 1, 400)
        best = min(np.square(np.clip(np.rint(w[row] / s), 0, top) * s - w[row]).sum() for s in tried)
        assert got[row] <= 1.12 * best


def test_zero_stays_zero_and_rows_of_zeros_are_harmless() -> None:
    weight = torch.randn(4, 12, generator=torch.Generator().manual_seed(3))
    weight[:, ::3], weight[1] = 0, 0
    for steps in (WeightSteps(4, 4), WeightSteps(4, 4, True), WeightSteps(3, None, True)):
        rounded, encoding = encode_weight(weight, steps)
        assert bool((rounded[weight == 0] == 0).all())
        assert bool((encoding.parts["scale"] > 0).all())


@pytest.mark.parametrize("options", [{}, {"group_size": 16}, {"group_size": 16, "asymmetric": True}], ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_files_hold_them_in_their_bits(bits: int, options: dict[str, Any], tmp_path: Path) -> None:
    program = rows()
    made = stored(program, weight_bits=bits, **options)
    assert made.encodings["first.weight"].params["bits"] == made.encodings["last.weight"].params["bits"] == 8
    for name in ("even", "odd"):
        encoding = made.encodings[f"{name}.weight"]
        assert encoding.params["group"] == options.get("group_size")
        assert encoding.params["bits"] == bits
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(4))
    sizes = {}
    for code in ("plain", "packed"):
        written = write_program(made, tmp_path / code, code=code)
        assert written.file_bytes == predicted_bytes(made, code=code)
        sizes[code] = written.file_bytes
        back = read_program(tmp_path / code)
        assert torch.equal(back(x), made(x))
        assert back.encodings["odd.weight"].params == made.encodings["odd.weight"].params
    saved = (64 * 50 + 50 * 48) * (8 - bits) // 8
    assert bits == 8 or abs(sizes["plain"] - sizes["packed"] - saved) < 400


def test_convolutions_have_one_scale_for_each_output() -> None:
    made = stored(everything(), weight_bits=4, group_size=4)
    assert made.encodings["gated.weight"].params == {"bits": 4, "axis": 0, "group": None}
    assert made.encodings["fc.weight"].params == {"bits": 4, "axis": None, "group": 4}


def test_a_state_dict_gets_the_same_weights() -> None:
    net, config = Rows(), QuantizeConfig("int8-weight", weight_bits=4, group_size=16, asymmetric=True)
    done = on_state(net.state_dict(), config)
    assert done.widths == {"first": [8, None], "last": [8, None]}
    for name in ("first", "even", "odd", "last"):
        weight = net.get_parameter(f"{name}.weight").detach()
        expected, _ = encode_weight(weight, WeightSteps(4 if name in ("even", "odd") else 8, 16, True))
        assert torch.equal(done.state[f"{name}.weight"], expected)


def test_pruned_weights_have_no_zero_points_and_keep_their_zeros() -> None:
    program = rows()
    weight = program.odd.weight.detach()
    weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.8] = 0
    program.encodings = compact(program, ["odd.weight"])
    made = stored(program, weight_bits=4, group_size=16, asymmetric=True)
    assert is_pruned(made.encodings["odd.weight"])
    assert bool((made.odd.weight[weight == 0] == 0).all())
    assert "zero_point" in made.encodings["even.weight"].parts


@pytest.mark.parametrize("asymmetric", [False, True], ids=["symmetric", "asymmetric"])
def test_training_stays_on_the_steps(asymmetric: bool, tmp_path: Path) -> None:
    options = {"weight_bits": 4, "group_size": 16, "asymmetric": asymmetric}
    made = stored(rows(), **options)
    network, x = qat.prepare(made), torch.randn(8, 40, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        assert torch.equal(network.eval()(x), made(x))
    network.train()(x).square().mean().backward()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(("weight", "bias")):
                assert parameter.grad is not None
                parameter.sub_(10 * parameter.grad)
    back = qat.convert(network, made)
    assert not torch.equal(back.odd.weight, made.odd.weight)
    write_program(back, tmp_path / "file", code="packed")  # refuses what is on no step
    with torch.no_grad():
        assert torch.equal(read_program(tmp_path / "file")(x), network.eval()(x))


@pytest.mark.parametrize("options", [{"group_size": 8}, {"asymmetric": True}], ids=str)
@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic"])
def test_integer_arithmetic_takes_one_scale_for_each_output(scheme: str, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="one scale for each output; use scheme='int8-weight'"):
        QuantizeConfig(scheme, **options)


def test_an_image_network_keeps_most_of_its_signal() -> None:
    program, x = everything(), images(8, 3, 16, 16, seed=3)
    made = stored(program, weight_bits=4, group_size=8, asymmetric=True)
    with torch.no_grad():
        expected, got = program(x), made(x)
    assert float((expected - got).square().sum() / expected.square().sum()) < 1e-3
