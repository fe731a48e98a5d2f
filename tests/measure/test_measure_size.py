"""Sizes against hand counts and against files that safetensors itself wrote."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from modelopt_cli.checkpoint.state_file import state_bytes
from modelopt_cli.measure.evaluated_model import EvaluatedModel
from modelopt_cli.measure.size import (
    Size,
    logical_parameters,
    measure_size,
    safetensors_bytes,
    times_smaller,
)
from modelopt_cli.program.quantization import QParams
from modelopt_cli.program.quantized_convolutions import QuantizedConv2d
from modelopt_cli.program.quantized_linear import DynamicLinear


def evaluated(model: nn.Module | None, path: str = "net.pth", **extra: object) -> EvaluatedModel:
    return EvaluatedModel(path=path, model=model, program=None, file_bytes=1000, **extra)  # type: ignore[arg-type]


def test_norm_counts_its_weights_but_not_its_statistics() -> None:
    size = measure_size(evaluated(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))))
    assert size.parameters == 4 * 27 + 4 + 8
    # The tensors hold the statistics too: 2 x 4 floats and one int64.
    assert size.bits_per_weight == pytest.approx(8 * (4 * 120 + 4 * 8 + 8) / 120)
    assert size.file_bytes == 1000
    assert size.tensor_bytes == 4 * 120 + 4 * 8 + 8


def test_int8_layers_count_as_the_layers_they_replace() -> None:
    q = QParams(0.1, 0)
    conv = QuantizedConv2d(3, 4, (3, 3), (1, 1), (0, 0), (1, 1), 1, True, q, None)
    linear = DynamicLinear(4, 2, False)
    conv.weight.fill_(1)
    conv.weight[0] = 0
    size = measure_size(evaluated(nn.Sequential(conv, linear)))
    assert size.parameters == 4 * 27 + 4 + 8
    assert size.nonzero == 3 * 27


def test_shared_tensors_count_once() -> None:
    layer = nn.Linear(4, 4, bias=False)
    other = nn.Linear(4, 4, bias=False)
    other.weight = layer.weight
    model = nn.Sequential(layer, other)
    assert sum(t.numel() for t in logical_parameters(model)) == 16
    assert state_bytes(model.state_dict()) == 64


def test_zeros_are_not_counted_as_non_zero() -> None:
    model = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(4))
    assert measure_size(evaluated(model)).nonzero == 4


def test_bare_state_dict_is_measured_without_a_network() -> None:
    state = {"a.weight": torch.ones(10), "a.running_mean": torch.ones(5), "b": torch.zeros(2)}
    size = measure_size(evaluated(None, state=state))
    assert (size.parameters, size.nonzero) == (12, 10)
    assert size.bits_per_weight == pytest.approx(8 * 68 / 12)


def test_stored_bytes_come_from_the_file_where_it_is_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_file({"w": torch.zeros(16, dtype=torch.int8), "s": torch.zeros(4)}, path, metadata={"k": "v"})
    assert safetensors_bytes(path) == 32
    model = nn.Linear(16, 1, bias=False)
    assert measure_size(evaluated(model, str(path))).bits_per_weight == 16.0


def test_what_the_caller_knows_about_the_file_wins(tmp_path: Path) -> None:
    assert measure_size(evaluated(nn.Linear(4, 2, bias=False), tensor_bytes=4)).bits_per_weight == 4.0


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x02}q\x00.", b"\x10" + b"\0" * 7 + b"{}", b"\xff" * 16], ids=repr
)
def test_other_files_are_not_mistaken_for_safetensors(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert safetensors_bytes(path) is None


def test_missing_file_and_no_parameters(tmp_path: Path) -> None:
    assert safetensors_bytes(tmp_path / "none") is None
    assert measure_size(evaluated(nn.ReLU())).bits_per_weight is None


@pytest.mark.parametrize(
    ("base", "size", "expected"),
    [
        pytest.param((800, 300), (100, 75), 4.0, id="an optimizer in the baseline is no gain"),
        pytest.param((110, 100), (100, 25), 1.1, id="a header in the result is a loss"),
        pytest.param((100, None), (50, 10), 2.0, id="without tensors the files count"),
        pytest.param((100, 100), (50, 0), 2.0, id="nothing left"),
        pytest.param((100, 100), (0, 0), None, id="empty"),
    ],
)
def test_times_smaller(
    base: tuple[int, int | None], size: tuple[int, int | None], expected: float | None
) -> None:
    made, given = (Size(file, 1, 1, None, tensors) for file, tensors in (size, base))
    assert times_smaller(made, given) == expected
