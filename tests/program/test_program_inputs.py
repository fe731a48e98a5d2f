"""Programs with several inputs and outputs of every form compute what the original does."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from program_inputs_networks import FORMS, IDS, IMAGE, MASK, WORDS, Captioned, Keywords, spec
from torch import Tensor, nn

from modelopt_cli.artifact import write_program
from modelopt_cli.errors import CaptureError, InputError
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.capture import capture
from modelopt_cli.program.output_structure import flatten, plain
from modelopt_cli.program.serialization import from_data, state_of, to_data


def batch(size: int = 4, *, masked: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(size)
    inputs = {
        "image": torch.randn(size, 3, 8, 8, generator=generator),
        "ids": torch.randint(WORDS, (size, 5), generator=generator),
    }
    return inputs | ({"mask": torch.rand(size, 5, generator=generator) < 0.5} if masked else {})


def same(found: Any, expected: Any) -> None:
    """Equal to the last bit, in containers of the same kind."""
    expected = plain(expected)
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for name, value in expected.items():
            same(found[name], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    elif isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    else:
        assert found is None
        assert expected is None


def again(program: Program) -> Program:
    return from_data(json.loads(json.dumps(to_data(program), sort_keys=True)), state_of(program))


@pytest.mark.parametrize("form", FORMS)
def test_outputs_keep_their_form(form: str) -> None:
    model = Captioned(FORMS[form])
    program = capture(model, spec(IMAGE, IDS))
    for made in (program, again(program)):
        same(made(**batch()), model(**batch()))


def test_inputs_go_by_place_and_by_name() -> None:
    model = Captioned()
    program = capture(model, spec(IMAGE, IDS, MASK))
    inputs = batch(masked=True)
    image, ids, mask = inputs.values()
    expected = model(image, ids, mask)
    for found in (
        program(image, ids, mask),
        program(mask=mask, image=image, ids=ids),
        program(image, mask=mask, ids=ids),
    ):
        assert torch.equal(found, expected)
    with pytest.raises(InputError, match="takes image, ids, mask: mask missing"):
        program(image, ids)


def test_arguments_that_are_no_inputs_keep_their_defaults() -> None:
    model = Captioned()
    program = capture(model, spec(IMAGE, IDS))
    assert torch.equal(program(**batch()), model(**batch(), mask=None, scale=1.5))
    with pytest.raises(InputError, match="takes image, ids: scale unknown"):
        program(**batch(), scale=2.0)


@pytest.mark.parametrize("described", [(IMAGE, IDS), (IDS, IMAGE)])
@pytest.mark.parametrize(("make", "order"), [(Keywords, ["ids", "image"]), (Captioned, ["image", "ids"])])
def test_inputs_come_in_the_networks_own_order(described: Any, make: Any, order: list[str]) -> None:
    model = make()
    program = capture(model, spec(*described))
    assert [each.name for each in program.input.tensors] == order
    assert [node.target for node in program.graph.find_nodes(op="placeholder")] == order
    assert torch.equal(program(**batch()), model(**batch()))


def test_any_batch_size_is_right() -> None:
    model = Captioned(FORMS["dict"])
    program = capture(model, spec(IMAGE, IDS, MASK))
    for size in (1, 2, 7):
        same(program(**batch(size, masked=True)), model(**batch(size, masked=True)))


def test_a_single_input_is_called_as_the_network_calls_it() -> None:
    class Vision(nn.Module):
        def forward(self, pixel_values: Tensor) -> Tensor:
            return pixel_values * 2

    program = capture(Vision(), InputSpec((3,)))
    assert program.input.name == "pixel_values"
    assert torch.equal(again(program)(pixel_values=torch.ones(1, 3)), torch.full((1, 3), 2.0))


def test_an_input_may_be_called_as_a_function_of_python() -> None:
    class Scaled(nn.Module):
        def forward(self, input: Tensor, type: Tensor) -> Tensor:
            return input + type.sum()

    model = Scaled()
    program = capture(model, spec(InputSpec((3,), name="input"), InputSpec((2,), name="type")))
    inputs = {"input": torch.ones(2, 3), "type": torch.ones(2, 2)}
    assert torch.equal(again(program)(**inputs), model(**inputs))


class CountsPositions(nn.Module):
    """Places of the tokens that a mask leaves in, as OPT looks them up."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(7, 4)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Any:
        return x + self.places(attention_mask.cumsum(1) * attention_mask)


def test_a_mask_is_tried_with_zeros_and_ones() -> None:
    mask = InputSpec((6,), dtype="int64", name="attention_mask")
    program = capture(CountsPositions(), InputSpec((6, 4), others=(mask,)))
    x, lengths = torch.randn(2, 6, 4), torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    same(program(x, lengths), CountsPositions.forward(program, x, lengths))


def test_a_name_that_code_refers_to_is_refused() -> None:
    with pytest.raises(CaptureError, match="torch"):
        capture(Captioned(), spec(IMAGE, InputSpec((5,), dtype="int64", name="torch")))


@pytest.mark.slow
def test_a_recurrent_layer_returns_its_state_in_parts() -> None:
    lstm = nn.LSTM(3, 4, batch_first=True).eval()
    program = capture(lstm, InputSpec((6, 3)))
    x = torch.randn(2, 6, 3)
    same(again(program)(x), lstm(x))
    assert flatten(program(x)).keys() == {"0", "1.0", "1.1"}


def test_what_the_data_form_says_of_inputs() -> None:
    data = to_data(capture(Captioned(FORMS["none"]), spec(IMAGE, IDS, MASK)))
    assert data["input"] == {
        "shape": [3, 8, 8],
        "preprocess": None,
        "name": "image",
        "free": [1, 2],
        "others": [
            {"shape": [5], "preprocess": None, "dtype": "int64", "name": "ids", "free": [0]},
            {"shape": [5], "preprocess": None, "dtype": "bool", "name": "mask", "free": [0]},
        ],
    }
    (returned,) = data["nodes"][-1]["args"]
    first, nothing, rest = returned["tuple"]
    assert (list(first), nothing) == (["node"], None)
    assert [name for name, _ in rest["dict"]] == ["features", "nothing"]
    assert rest["dict"][1] == ["nothing", None]


def test_a_single_input_named_x_is_written_as_ever() -> None:
    data = to_data(capture(nn.Sequential(nn.Linear(3, 2)), InputSpec((3,))))
    assert data["input"] == {"shape": [3], "preprocess": None}
    assert data["nodes"][0]["name"] == "x"
    assert data["nodes"][-1]["args"] == [{"node": data["nodes"][-2]["name"]}]


@pytest.mark.slow
def test_a_file_runs_in_a_process_without_the_source(tmp_path: Path) -> None:
    model, inputs = Captioned(FORMS["model-output"]), batch(masked=True)
    path = tmp_path / "net.safetensors"
    write_program(capture(model, spec(IMAGE, IDS, MASK)), path)
    torch.save((inputs, plain(model(**inputs))), tmp_path / "expected.pt")
    script = """
import sys, torch, modelopt_cli
inputs, expected = torch.load(sys.argv[2])
found = modelopt_cli.load(sys.argv[1])(**inputs)
assert list(found) == list(expected) == ["logits", "hidden"]
assert all(torch.equal(found[name], expected[name]) for name in found)
"""
    command = [sys.executable, "-c", script, str(path), str(tmp_path / "expected.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
