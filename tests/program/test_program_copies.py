"""Copies, pickles and saved Programs compute the same bits through the same kernels as the original."""

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modelopt_cli.errors import UsageError
from modelopt_cli.kernels import prepare
from modelopt_cli.kernels.dispatch import Kernel
from modelopt_cli.kernels.fp32 import prepack
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.quantize.apply import apply
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.capture import capture
from modelopt_cli.program.quantized import Weighted
from modelopt_cli.program.quantized_linear import DynamicLinear


class _Net(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.stem(x)))
        x = torch.nn.functional.max_pool2d(torch.relu(self.body(x) + x), 2)
        return self.fc(torch.flatten(x.mean((2, 3)), 1))


@torch.inference_mode(False)
def quantized(scheme: Any, seed: int = 0) -> Program:
    program = capture(_Net(seed).eval(), InputSpec((3, 12, 12)))
    from modelopt_cli.data import open_data

    data = open_data("synthetic:3x12x12?n=8", input_spec=program.input) if scheme == "int8" else None
    return apply(program, QuantizeConfig(scheme=scheme, observer="minmax"), Context(data=data)).program


def sample(seed: int = 5) -> Tensor:
    return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def saved_and_loaded(program: Any) -> Any:
    memory = io.BytesIO()
    torch.save(program, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda p: pickle.loads(pickle.dumps(p)),  # noqa: S301
    "torch.save": saved_and_loaded,
    "copy of a copy": lambda p: copy.deepcopy(copy.copy(pickle.loads(pickle.dumps(copy.deepcopy(p))))),  # noqa: S301
}


def weighted(program: Program) -> list[Weighted]:
    return [layer for layer in program.modules() if isinstance(layer, Weighted)]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic", "int8-weight"])
@pytest.mark.parametrize("form", ["plain", "prepared", "used"])
@pytest.mark.parametrize("how", COPIES)
@torch.inference_mode()
def test_copies_compute_the_same_bits(how: str, form: str, scheme: str) -> None:
    program, x = quantized(scheme), sample()
    if form != "plain":
        prepare(program)
    if form == "used":
        program(x)
    made = COPIES[how](program)
    assert isinstance(made, Program)
    assert made is not program
    for name in ("input", "labels", "history", "arch", "training"):
        assert getattr(made, name) == getattr(program, name)
    assert made.encodings.keys() == program.encodings.keys()
    assert [str(n) for n in made.graph.nodes] == [str(n) for n in program.graph.nodes]
    kept = [isinstance(layer.kernel, Kernel) for layer in weighted(made)]
    assert kept == [form != "plain"] * (0 if scheme == "int8-weight" else len(kept))
    assert torch.equal(made(x), program(x))


@torch.inference_mode()
def test_a_deep_copy_is_independent() -> None:
    program, x = prepare(quantized("int8")), sample()
    before = program(x)
    made = copy.deepcopy(program)
    for layer in weighted(made):
        layer.weight.zero_()
    assert not torch.equal(made(x), before)
    assert torch.equal(program(x), before)


@pytest.mark.slow
@torch.inference_mode()
def test_a_pickle_of_a_prepared_program_in_another_process(tmp_path: Path) -> None:
    program, x = prepare(quantized("int8")), sample()
    torch.save({"program": program, "x": x, "y": program(x)}, tmp_path / "a.pt")
    code = (
        "import sys, torch; a = torch.load(sys.argv[1], weights_only=False); p = a['program']\n"
        "assert torch.equal(p(a['x']), a['y'])\n"
        "assert all(m.kernel is not None for m in p.modules() if hasattr(m, 'float_weight'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a.pt"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@torch.inference_mode()
def test_prepacked_programs_are_copied() -> None:
    program, x = capture(_Net(0).eval(), InputSpec((3, 12, 12))), sample()
    fast = prepack(program)
    for used in (False, True):
        for how, make in COPIES.items():
            assert torch.equal(make(fast)(x), fast(x)) or used is None, how


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic"])
@torch.inference_mode()
def test_loaded_weights_are_used(scheme: str, assign: bool) -> None:
    program, other, x = prepare(quantized(scheme)), prepare(quantized(scheme, seed=1)), sample()
    program(x)
    with torch.inference_mode(False):  # writes to inference tensors leave no trace
        state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    program.load_state_dict(state, assign=assign)
    again = prepare(copy.deepcopy(program))
    assert torch.equal(program(x), again(x))
    if scheme == "int8-dynamic":
        assert torch.equal(program(x), other(x))
    weighted(program)[-1].weight.zero_()
    assert torch.equal(program(x), prepare(copy.deepcopy(program))(x))
    assert not torch.equal(program(x), again(x))


CASTS: dict[str, Callable[[Program], Any]] = {
    "float16": lambda p: p.half(),
    "bfloat16": lambda p: p.bfloat16(),
    "float64": lambda p: p.to(torch.float64),
}


@pytest.mark.parametrize("dtype", CASTS)
@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic"])
@torch.inference_mode()
def test_another_precision_is_refused_before_anything_changes(scheme: str, dtype: str) -> None:
    program, x = prepare(quantized(scheme)), sample()
    before = program(x)
    with pytest.raises(UsageError, match=f"cannot become {dtype}"):
        CASTS[dtype](program)
    with pytest.raises(UsageError, match=f"cannot become {dtype}"):
        CASTS[dtype](weighted(program)[0])  # type: ignore[arg-type]
    assert torch.equal(program(x), before)
    assert torch.equal(program.float().to("cpu")(x), before)
    if scheme == "int8":  # float32 convolutions may add up in another order
        assert torch.equal(program.to(memory_format=torch.channels_last)(x), before)


@torch.inference_mode()
def test_inputs_of_other_types() -> None:
    program = prepare(quantized("int8"))
    x = sample().half()
    expected = program(x.float())
    for other in (x, x.double()):
        got = program(other)
        assert got.dtype == torch.float32
        assert torch.equal(got, expected)
    with pytest.raises(UsageError, match="takes preprocessed floating-point input, not uint8"):
        program(torch.zeros(1, 3, 12, 12, dtype=torch.uint8))
    layer = DynamicLinear(4, 2, True)
    assert layer(torch.ones(1, 4, dtype=torch.bfloat16)).dtype == torch.float32
    with pytest.raises(UsageError, match="not int64"):
        layer(torch.ones(1, 4, dtype=torch.int64))
