"""From a path to the most that can be made of it."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from modelopt_cli import artifact
from modelopt_cli.checkpoint import open_model, require_network, resolve
from modelopt_cli.errors import ArchitectureError, CheckpointError
from modelopt_cli.program import InputSpec, Program

UNTRACEABLE = """
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)
    def forward(self, x):
        y = self.fc(x) if x.sum() > 0 else -self.fc(x)
        return y + 0 * sum(p.sum() for p in self.parameters())
"""


@pytest.fixture
def resnet8(tmp_path: Path) -> tuple[Path, torch.nn.Module]:
    torch.manual_seed(0)
    module = resolve("builtin:resnet8?width=0.5&num_classes=7").build().eval()
    torch.save({"state_dict": module.state_dict()}, tmp_path / "a.pth")
    return tmp_path / "a.pth", module


def test_a_recognised_checkpoint_becomes_a_program(resnet8: tuple[Path, torch.nn.Module]) -> None:
    path, module = resnet8
    opened = open_model(path)
    assert isinstance(opened.program, Program)
    assert opened.module is None
    assert not opened.is_artifact
    assert opened.architecture is not None
    assert opened.program.arch == "builtin:resnet8?num_classes=7&width=0.5"
    assert "recognised as builtin:resnet8?num_classes=7&width=0.5" in opened.notes
    assert opened.source_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(opened.program(images), module(images))
    assert require_network(opened, path) is opened.program


def test_a_named_architecture_and_input_win(resnet8: tuple[Path, torch.nn.Module]) -> None:
    mine = InputSpec((3, 48, 48), name="images", free=(1, 2))  # as its forward calls it, of any size
    opened = open_model(resnet8[0], "builtin:resnet8?width=0.5&num_classes=7", mine)
    assert opened.program is not None
    assert opened.program.input == mine
    recognised = open_model(resnet8[0], input_spec=mine)
    assert recognised.program is not None
    assert recognised.program.input == mine


def test_labels_come_along(tmp_path: Path) -> None:
    torch.save(resolve("torchvision:squeezenet1_1").build().state_dict(), tmp_path / "a.pth")
    opened = open_model(tmp_path / "a.pth")
    assert opened.program is not None
    assert opened.program.labels is not None
    assert opened.program.labels[1] == "goldfish"


def test_an_unrecognised_checkpoint_gives_its_tensors(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    opened = open_model(tmp_path / "a.safetensors")
    assert (opened.program, opened.module, opened.architecture) == (None, None, None)
    assert list(opened.state) == ["w"]
    with pytest.raises(ArchitectureError, match="no known network comes close; name it with arch"):
        require_network(opened, "a")


def test_bare_tensors_must_be_finite_too(tmp_path: Path) -> None:
    save_file({"w": torch.tensor([1.0, torch.nan])}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="'w' has 1 values"):
        open_model(tmp_path / "a.safetensors")


def test_a_network_that_cannot_be_traced_is_a_module_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(UNTRACEABLE)
    torch.save({"fc.weight": torch.ones(2, 4), "fc.bias": torch.zeros(2)}, tmp_path / "a.pth")
    opened = open_model(tmp_path / "a.pth", f"{tmp_path}/net.py:Net", InputSpec((4,)))
    assert opened.program is None
    assert opened.module is not None
    assert opened.untraced is not None
    assert "cannot be traced" in opened.untraced
    assert "\n" not in opened.untraced
    assert opened.module(torch.ones(1, 4)).tolist() == [[4.0, 4.0]]


def test_an_architecture_file_without_an_input_is_a_module(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(UNTRACEABLE)
    torch.save({"fc.weight": torch.ones(2, 4), "fc.bias": torch.zeros(2)}, tmp_path / "a.pth")
    opened = open_model(tmp_path / "a.pth", f"{tmp_path}/net.py:Net")
    assert opened.module is not None
    assert "add input_shape=" in (opened.untraced or "")


class TestArtifacts:
    def test_a_program_comes_back_whole(self, resnet8: tuple[Path, torch.nn.Module], tmp_path: Path) -> None:
        first = open_model(resnet8[0]).program
        assert first is not None
        artifact.write_program(first, tmp_path / "a.safetensors")
        opened = open_model(tmp_path / "a.safetensors")
        assert opened.is_artifact
        assert opened.program is not None
        assert opened.source_sha256 == hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
        images = torch.rand(2, 3, 32, 32)
        assert torch.equal(opened.program(images), first(images))
        with pytest.raises(ArchitectureError, match="leave arch out"):
            open_model(tmp_path / "a.safetensors", "builtin:resnet8")

    def test_tensors_with_a_known_architecture_are_rebuilt(self, tmp_path: Path) -> None:
        module = resolve("builtin:lenet5?width=0.1").build().eval()
        self.write(dict(module.state_dict()), "builtin:lenet5?width=0.1", tmp_path)
        opened = open_model(tmp_path / "a.safetensors")
        assert opened.program is not None
        images = torch.rand(1, 1, 28, 28)
        assert torch.equal(opened.program(images), module(images))

    def test_a_spec_in_a_file_never_imports_code(self, tmp_path: Path) -> None:
        (tmp_path / "net.py").write_text("open(__file__ + '.ran', 'w')")
        self.write({"w": torch.ones(3)}, f"{tmp_path}/net.py:make", tmp_path)
        opened = open_model(tmp_path / "a.safetensors")
        assert opened.module is None
        assert not (tmp_path / "net.py.ran").exists()
        assert any("made with arch=" in note for note in opened.notes)

    def test_options_in_a_file_never_reach_a_library_unfiltered(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("modelopt_cli.checkpoint.open_path.resolve", lambda *_: pytest.fail("was built"))
        self.write({"w": torch.ones(3)}, "timm:resnet18?checkpoint_path=/etc/passwd", tmp_path)
        with pytest.raises(ArchitectureError, match="'checkpoint_path', which is not taken from a file"):
            open_model(tmp_path / "a.safetensors")

    @staticmethod
    def write(state: dict[str, torch.Tensor], arch: str, folder: Path) -> None:
        artifact.write_tensors(state, {}, folder / "a.safetensors", history=(), arch=arch, input_spec=None)


ASSETS = Path(__file__).parents[2] / "assets"
REAL = {
    "efficientnet-lite0": ("efficientnet-lite0.pth", "efficientnet_lite0.py:make", (3, 224, 224), 1000),
    "ccexam mnist": ("ccexam/mnist.pth", "ccexam_nets.py:mnist", (1, 28, 28), 10),
    "ccexam usps": ("ccexam/usps.pth", "ccexam_nets.py:usps", (1, 16, 16), 10),
    "ccexam svhn": ("ccexam/svhn.pth", "ccexam_nets.py:svhn", (3, 32, 32), 10),
}


@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_a_real_checkpoint_with_its_own_code(name: str) -> None:
    weights, arch, shape, classes = REAL[name]
    if not (ASSETS / weights).exists():
        pytest.skip(f"{weights} is not there; run: make assets")
    opened = open_model(ASSETS / weights, str(ASSETS / arch), InputSpec(shape))
    assert opened.program is not None
    images = torch.rand(2, *shape)
    original = resolve(str(ASSETS / arch)).build().eval()
    original.load_state_dict(opened.state, strict=False)
    logits = opened.program(images)
    assert logits.shape == (2, classes)
    assert torch.equal(logits, original(images))
