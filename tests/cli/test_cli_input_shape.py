"""``--input-shape``: samples that are images, and samples that are not, in every command."""

import json
import textwrap
from typing import get_args

import numpy as np
import pytest
import torch

import modelopt_cli
from modelopt_cli import artifact
from modelopt_cli.cli import main as command_line
from modelopt_cli.data.config import parse_inputs
from modelopt_cli.errors import ArtifactError
from modelopt_cli.program import InputSpec
from modelopt_cli.program.input_spec import InputType
from modelopt_cli.program.metadata import input_from_data, input_to_data
from modelopt_cli.program.samples import DTYPES, noise, tokens_of, zeros

NETS = """
    from torch import nn

    def video():
        return nn.Sequential(
            nn.Conv3d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 5)
        )

    def audio():
        return nn.Sequential(
            nn.Conv1d(1, 4, 5), nn.ReLU(), nn.AdaptiveAvgPool1d(4), nn.Flatten(), nn.Linear(16, 5)
        )

    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.body, self.head = nn.Embedding(7, 16), nn.Linear(16, 16), nn.Linear(16, 5)

        def forward(self, tokens):
            return self.head(self.body(self.embed(tokens)).relu().mean(1))

    def image():
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
        )
"""
SHAPES = {"video": "3x4x8x8", "audio": "1x50", "Text": "12:int64", "image": "3x8x8"}


@pytest.fixture
def nets(tmp_path, monkeypatch):
    """A folder with the networks' source and checkpoints as the current directory."""
    (tmp_path / "nets.py").write_text(textwrap.dedent(NETS))
    monkeypatch.chdir(tmp_path)
    scope = {}
    exec(compile(textwrap.dedent(NETS), "nets.py", "exec"), scope)  # noqa: S102 -- our own text
    for name in SHAPES:
        torch.manual_seed(0)
        torch.save(scope[name]().state_dict(), f"{name}.pth")
    return scope


@pytest.mark.parametrize(
    ("text", "shape", "dtype"),
    [
        ("3x224x224", (3, 224, 224), "float32"),
        ("3x8x56x56", (3, 8, 56, 56), "float32"),
        ("128:int64", (128,), "int64"),
        ("1x16000:float32", (1, 16000), "float32"),
        ("2x3:bool", (2, 3), "bool"),
    ],
)
def test_shapes(text, shape, dtype):
    assert parse_inputs([text]) == InputSpec(shape, dtype=dtype)


@pytest.mark.parametrize(
    "texts",
    [["image=3x8x8,ids=77:int64,n=scalar:int64"], ["image=3x8x8", "ids=77:int64", "n=scalar:int64"]],
    ids=["commas", "repeated"],
)
def test_shapes_of_several_inputs(texts):
    found = parse_inputs(texts).tensors
    assert [(each.name, each.shape, each.dtype) for each in found] == [
        ("image", (3, 8, 8), "float32"),
        ("ids", (77,), "int64"),
        ("n", (), "int64"),
    ]


def test_inputs_without_names_go_by_place():
    assert [each.name for each in parse_inputs(["3x8x8,4,y=5"]).tensors] == ["x", "x1", "y"]


def test_no_two_inputs_have_one_name():
    with pytest.raises(ValueError, match="two inputs 'a'"):
        parse_inputs(["a=3,a=4"])


@pytest.mark.parametrize(
    "text",
    ["", "x", "0", "3x", "3x0", "-1", "3,", "a b=3", "1a=3", "3x4:int63", "3x4:", ":int64", "1x" * 8 + "1"],
)
def test_what_is_no_shape(text):
    with pytest.raises(ValueError, match=r"is not (the shape|one of)"):
        parse_inputs([text])


def test_the_types_are_declared_alike():
    assert get_args(InputType) == tuple(DTYPES)


@pytest.mark.parametrize("name", SHAPES)
def test_a_graph_is_made_with_the_shape_and_computes_what_the_network_does(name, nets, modelopt):
    how = ["--arch", f"nets.py:{name}", "--input-shape", SHAPES[name]]
    outcome = modelopt("prune", f"{name}.pth", *how, "--structure", "unstructured", "--sparsity", "0.25",
                       "--latency-runs", "2", "--latency-warmup", "1", "-o", "o.safetensors")  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "works without a graph" not in outcome.err
    assert "latency" in outcome.out
    assert "not run" not in outcome.out
    program = artifact.read_program("o.safetensors")  # needs no architecture
    network = nets[name]().eval()
    network.load_state_dict(modelopt_cli.load_state_dict("o.safetensors"))
    sample = parse_inputs([SHAPES[name]])
    assert (program.input.shape, program.input.dtype) == (sample.shape, sample.dtype)
    x = noise(sample, 3, seed=5, below=7)
    with torch.no_grad():
        assert torch.allclose(program(x), network(x), atol=1e-6)


def test_tokens_are_calibrated_on_and_measured(nets, modelopt):
    np.savez("t.npz", x=np.arange(96).reshape(8, 12) % 7, y=np.arange(8) % 5)
    how = ["--arch", "nets.py:Text", "--input-shape", "12:int64"]
    outcome = modelopt("quantize", "Text.pth", *how, "--data", "npz:t.npz", "--json", "--latency-runs", "1")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["evaluation"]["models"][1]["samples"] == 8
    again = modelopt("eval", "Text.pth", "Text-int8.safetensors", *how[:2], *how[2:], "--data",
                     "synthetic:12:int64?n=4&below=7", "--latency-runs", "0")  # fmt: skip
    assert again.code == 0, again.err


@pytest.mark.parametrize("size", [["--input-shape", "3x9x9"], ["--input-size", "9", "--channels", "3"]])
def test_an_images_shape_is_its_size_and_channels(size, nets, modelopt):
    outcome = modelopt("inspect", "image.pth", "--layers", "--arch", "nets.py:image", *size, "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["layers"][0]["shape"] == [8, 7, 7]


def test_layers_of_what_is_no_image(nets, modelopt):
    how = ["--layers", "--arch", "nets.py:video", "--input-shape", "3x4x8x8"]
    outcome = modelopt("inspect", "video.pth", *how, "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["layers"][0]["shape"] == [4, 4, 8, 8]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--input-shape", "224"], None),
        (["--input-shape", "a=3,a=4"], "--input-shape: there are two inputs 'a'"),
        (["--input-shape", "3x8x8,4", "--mean", "1,1,1"], "--mean: is for images"),
        (["--input-shape", "3x8x"], "--input-shape: '3x8x' is not the shape of a sample"),
        (["--input-shape", "8:int"], "--input-shape: 'int' is not one of float32, int64"),
        (["--input-shape", "3x8x8", "--input-size", "8"], "--input-size: is a part of --input-shape"),
        (["--input-shape", "3x8x8", "--channels", "3"], "--channels: is a part of --input-shape"),
        (["--input-shape", "3x4x8x8", "--mean", "1,1,1"], "--mean: is for images"),
    ],
)
def test_what_does_not_go_together(more, message, modelopt):
    outcome = modelopt("eval", "none.pth", *more)
    assert outcome.code == 2
    assert message is None or message in outcome.err


def test_every_command_that_takes_an_input_takes_its_shape():
    commands = command_line.build().commands
    takes = {name: {o for p in c.params for o in p.opts} for name, c in commands.items()}
    assert all(("--input-shape" in options) == ("--input-size" in options) for options in takes.values())
    assert sum("--input-shape" in options for options in takes.values()) == 7


@pytest.mark.parametrize("dtype", get_args(InputType))
def test_the_type_is_in_the_file_where_it_is_not_float32(dtype):
    spec = InputSpec((5, 4, 3, 2, 1), dtype=dtype)
    data = input_to_data(spec)
    assert ("dtype" in data) == (dtype != "float32")  # files of float networks have the bytes they had
    assert input_from_data(json.loads(json.dumps(data))) == spec
    with pytest.raises(ArtifactError, match="element type"):
        input_from_data({**data, "dtype": "float16"})


@pytest.mark.parametrize("dtype", get_args(InputType))
def test_noise_is_seeded_of_the_type_and_within_range(dtype):
    spec = InputSpec((64,), dtype=dtype)
    x, again, other = (noise(spec, 8, seed=seed, below=7) for seed in (1, 1, 2))
    assert torch.equal(x, again)
    assert not torch.equal(x, other)
    assert x.dtype == zeros(spec, 1).dtype == DTYPES[dtype]
    if dtype != "float32":
        end = {"bool": 2, "uint8": 256}.get(dtype, 7)
        assert 0 <= x.int().min() <= x.int().max() < end
    assert tokens_of([torch.nn.Linear(1, 1), torch.nn.Embedding(30, 2), torch.nn.Embedding(9, 2)]) == 9


def test_whole_numbers_are_trained_on_and_taught_with(nets, modelopt):
    torch.manual_seed(0)
    tokens = torch.randint(7, (96, 12))
    np.savez("t.npz", x=tokens.numpy(), y=(tokens[:, 0] % 5).numpy())
    how = ["--arch", "nets.py:Text", "--input-shape", "12:int64", "--train", "npz:t.npz", "--epochs", "1"]
    quick = ["--batch-size", "16", "--no-eval", "-q"]
    for verb, more in (("train", []), ("distill", ["--student", "same", "--cache", "kept"])):
        outcome = modelopt(verb, "Text.pth", *how, *quick, *more, "-o", f"{verb}.safetensors")
        assert outcome.code == 0, outcome.err
        program = artifact.read_program(f"{verb}.safetensors")
        assert program.input == InputSpec((12,), dtype="int64", name="tokens", free=(0,))
        assert program(tokens).shape == (96, 5)
    outcome = modelopt("inspect", "Text.pth", *how[:4], "--layers", "--json")
    assert [layer["name"] for layer in json.loads(outcome.out)["layers"][:2]] == ["embed", "body"]


def test_what_cannot_be_run_for_want_of_a_shape_is_compressed_and_says_so(nets, modelopt):
    how = ["Text.pth", "--arch", "nets.py:Text", "-o", "o.safetensors"]
    outcome = modelopt("quantize", *how, "--scheme", "int8-weight")
    assert outcome.code == 0, outcome.err
    assert "nothing says what its input is (give --input-shape), so it is not run" in outcome.out
    outcome = modelopt("quantize", *how, "--scheme", "int8-weight", "--input-shape", "12:int64", "--force")
    assert outcome.code == 0, outcome.err
    assert "not run" not in outcome.out
