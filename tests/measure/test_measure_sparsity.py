"""eval on a pruned file: its non-zeros, its bits per weight, and one line about speed."""

from pathlib import Path

import pytest
import torch
from torch import nn

from modelopt_cli.artifact import read_program, write_program
from modelopt_cli.artifact.container import read_safetensors
from modelopt_cli.artifact.encodings import compact
from modelopt_cli.kernels import prepare
from modelopt_cli.measure import EvalOptions, EvaluatedModel, evaluate
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.capture import capture


def pruned() -> Program:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(16 * 36, 10)).eval()
    with torch.no_grad():
        net[2].weight[torch.rand(10, 16 * 36) < 0.9] = 0
    program = capture(net, InputSpec((3, 8, 8)))
    program.encodings = compact(program, ["2.weight"])
    return program


def test_zeros_are_counted_and_not_called_faster(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    source = pruned()
    write_program(source, path)
    program = prepare(read_program(path))
    evaluated = EvaluatedModel(str(path), program, program, path.stat().st_size, input=program.input)
    found = evaluate([evaluated], None, EvalOptions(runs=0, memory=False))
    size = found.models[0].size
    parameters = 16 * 27 + 16 + 10 * 16 * 36 + 10
    kept = int((source.get_parameter("2.weight") != 0).sum())
    assert (size.parameters, size.nonzero) == (parameters, parameters - 10 * 16 * 36 + kept)
    stored = sum(tensor.nbytes for tensor in read_safetensors(path).values())
    positions = read_safetensors(path)["2.positions"].nbytes
    assert stored == 4 * (parameters - 10 * 16 * 36 + kept) + positions
    assert size.bits_per_weight == pytest.approx(8 * stored / parameters)
    assert found.notes == (
        f"{path}: 90 % of the weights in its 1 pruned layer are zero; that makes the file smaller, not the "
        "network faster: a CPU multiplies zeros, too",
    )
