"""Programs in files: the file is enough, and gives the very same numbers."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modelopt_cli.artifact import (
    predicted_bytes,
    read_header,
    read_program,
    read_tensors,
    write_program,
    write_tensors,
)
from modelopt_cli.errors import ArtifactError
from modelopt_cli.program import Encoding, InputSpec, Preprocess
from modelopt_cli.program.capture import capture

REPO = Path(__file__).resolve().parents[2]
NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.bias = nn.Parameter(torch.tensor([0.25]))

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x))).mean((2, 3))
        return self.two(self.one(x)) + self.bias
"""
INPUT = InputSpec((3, 8, 8), Preprocess(resize=8, mean=(0.5, 0.5, 0.5), std=(0.1, 0.2, 0.3)))
IMAGES = torch.linspace(-2, 2, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


def make_program():
    torch.manual_seed(0)
    namespace = {"__name__": "user_network"}
    exec(compile(NETWORK, "user_network.py", "exec"), namespace)  # noqa: S102
    model = namespace["Net"]().eval()
    weight = model.conv.weight.data
    scale = weight.abs().amax((1, 2, 3)) / 127
    model.conv.weight.data = (weight / scale.reshape(-1, 1, 1, 1)).round() * scale.reshape(-1, 1, 1, 1)
    program = capture(model, INPUT, labels=tuple("abcdefgh"), arch="net.py:Net")
    program.encodings["conv.weight"] = Encoding(
        "affine", {"bits": 8, "axis": 0, "group": None}, {"scale": scale}
    )
    program.history = ({"method": "quantize", "config": {"scheme": "int8-weight"}},)
    return program


@pytest.fixture(scope="module")
def program():
    return make_program()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.safetensors"


def test_read_program_gives_bit_equal_logits_and_everything_else(program, path):
    written = write_program(program, path)
    found = read_program(path)
    with torch.no_grad():
        assert torch.equal(found(IMAGES), program(IMAGES))
    assert not found.training
    assert found.input == program.input
    assert found.labels == program.labels
    assert found.history == program.history
    assert found.arch == program.arch
    assert found.encodings.keys() == program.encodings.keys()
    assert list(found.state_dict()) == list(program.state_dict())
    assert written.file_bytes == os.path.getsize(path) == predicted_bytes(program)
    assert written.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_header_says_things_once(program, path):
    write_program(program, path)
    header = read_header(path)
    assert header["network"] == "net.py:Net"
    assert header["history"] == [*program.history]
    assert not header["program"].keys() & {"arch", "history", "input", "labels"}


@pytest.mark.slow
def test_fresh_process_without_the_architecture_gives_bit_equal_logits(program, path, tmp_path):
    write_program(program, path)
    with torch.no_grad():
        torch.save(program(IMAGES), tmp_path / "logits")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch\n"
        "from modelopt_cli.artifact import read_program\n"
        "program = read_program(sys.argv[2])\n"
        "images = torch.linspace(-2, 2, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)\n"
        "with torch.no_grad(): logits = program(images)\n"
        "assert torch.equal(logits, torch.load(sys.argv[3], weights_only=True))\n"
        "assert 'torchvision' not in sys.modules\n"
        "print('equal')"
    )
    command = [sys.executable, "-c", script, str(REPO), str(path), str(tmp_path / "logits")]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert run.stdout == "equal\n", run.stderr


def test_written_again_it_is_the_same_file(program, path, tmp_path):
    write_program(program, path)
    write_program(read_program(path), tmp_path / "again")
    assert path.read_bytes() == (tmp_path / "again").read_bytes()


def test_shared_weights_stay_shared(program, path):
    write_program(program, path)
    found = read_program(path)
    assert found.get_submodule("one").weight is found.get_submodule("two").weight
    assert read_header(path)["tied"] == {"two.weight": "one.weight"}


def test_read_program_can_be_trained(program, path):
    write_program(program, path)
    found = read_program(path).train()
    found(IMAGES).sum().backward()
    assert all(parameter.grad is not None for parameter in found.parameters())


def test_tensors_of_a_program_can_be_read_alone(program, path):
    write_program(program, path)
    found = read_tensors(path)
    assert found.state.keys() == program.state_dict().keys()
    assert all(torch.equal(found.state[name], value) for name, value in program.state_dict().items())


def test_file_without_a_network_says_how_to_rebuild_it(path):
    write_tensors({"a": torch.zeros(1)}, {}, path, arch="builtin:lenet5")
    with pytest.raises(ArtifactError, match="without their network; rebuild it with arch='builtin:lenet5'"):
        read_program(path)


def forge(path, change):
    """Rewrite the program data after ``change``, with a digest that fits."""
    from test_artifact_header import forge as rewrite

    rewrite(path, lambda document: change(document["program"]))


FORGED = {
    "function off the list": lambda p: p["nodes"][1].update(op="call_function", target="os.system"),
    "node name that is code": lambda p: p["nodes"][0].update(name="x=__import__('os')"),
    "module kind off the list": lambda p: p["modules"]["conv"].update(kind="subprocess.Popen"),
    "hyperparameter of another size": lambda p: p["modules"]["conv"]["config"].update(out_channels=9),
    "tensor of another shape": lambda p: p["tensors"]["conv.weight"].update(shape=[1]),
    "no nodes": lambda p: p.update(nodes=[]),
    "unknown key": lambda p: p.update(exec="x"),
    "header field smuggled in": lambda p: p.update(history=[]),
}


@pytest.mark.parametrize("change", FORGED.values(), ids=FORGED.keys())
def test_forged_program_gets_one_line_with_the_file(program, path, change):
    write_program(program, path)
    forge(path, lambda data: (change(data), None)[1])
    with pytest.raises(ArtifactError) as caught:
        read_program(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_program_bytes_do_not_depend_on_the_process(tmp_path):
    script = (
        "import sys; sys.path[:0] = sys.argv[1:3]\n"
        "from test_artifact_program import make_program\n"
        "from modelopt_cli.artifact import write_program\n"
        "print(write_program(make_program(), sys.argv[3]).sha256)"
    )
    hashes = set()
    for seed in ("0", "77"):
        command = [sys.executable, "-c", script, str(REPO), str(Path(__file__).parent), str(tmp_path / seed)]
        run = subprocess.run(
            command, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        )
        hashes.add(run.stdout)
    assert len(hashes) == 1
