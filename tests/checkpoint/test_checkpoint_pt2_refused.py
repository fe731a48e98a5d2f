"""What is not read of ``torch.export`` archives: named in one line, and never run."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pt2_networks import Small, exported, image
from torch import Tensor, nn

import modelopt_cli as mo
from modelopt_cli.cli.main import main
from modelopt_cli.errors import ArchitectureError, CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore")


def test_unknown_operators_are_named(tmp_path: Path) -> None:
    with torch.library._scoped_library("hidden", "DEF") as library:
        library.define("secret(Tensor x) -> Tensor")
        library.impl("secret", torch.clone, "CompositeExplicitAutograd")
        torch.library.register_fake("hidden::secret", torch.empty_like, lib=library)

        class Net(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fc = nn.Linear(3, 3)

            def forward(self, x: Tensor) -> Tensor:
                return torch.ops.hidden.secret(self.fc(x))  # type: ignore[no-any-return]

        path = exported(Net(), (torch.rand(2, 3),), tmp_path / "a.pt2")
    with pytest.raises(ArchitectureError, match=r"calls torch.ops.hidden.secret.default, .* arch") as caught:
        mo.load(path)
    assert "\n" not in str(caught.value)
    assert (
        main(
            [
                "quantize",
                str(path),
                "--scheme",
                "int8-weight",
                "--no-eval",
                "-o",
                str(tmp_path / "b.safetensors"),
            ]
        )
        == 0
    )


def test_branches_are_refused(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x)
            return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))  # type: ignore[no-any-return]

    with pytest.raises((ArchitectureError, CheckpointError), match="cond"):
        mo.load(exported(Net(), (torch.rand(2, 3),), tmp_path / "a.pt2"))


def test_samples_that_depend_on_each_other(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x)
            return x - x.mean(0, keepdim=True)

    path = exported(Net(), (torch.rand(2, 3),), tmp_path / "a.pt2", free=False)
    with pytest.raises(
        ArchitectureError, match=r"computes 2 at a time, which depend on each other; .*dynamic_shapes"
    ):
        mo.load(path)


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("unpickled")

    path = exported(Small(), image(2), tmp_path / "a.pt2")
    source = io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            is_pickle = "sample_inputs" in entry.filename
            new.writestr(entry.filename, b"cos\nsystem\n(S'false'\ntR." if is_pickle else old.read(entry))
    for module, name in ((pickle, "loads"), (pickle, "load"), (torch, "load"), (torch.export, "load")):
        monkeypatch.setattr(module, name, forbidden)
    assert mo.load(path)(torch.rand(2, 3, 12, 12)).shape == (2, 5)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(Small(), image(2), tmp_path_factory.mktemp("pt2") / "small.pt2")


def rewritten(path: Path, change: Callable[[dict[str, Any]], object], target: Path) -> Path:
    """A copy of a file with another graph."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            if entry.filename.endswith("models/model.json"):
                parsed = json.loads(data)
                change(parsed)
                data = json.dumps(parsed).encode()
            new.writestr(entry.filename, data)
    return target


DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no version": (lambda data: data.pop("schema_version"), "there is no field 'schema_version'"),
    "no outputs": (
        lambda data: data["graph_module"]["graph"].update(outputs=[]),
        "its graph has outputs and output_specs of different lengths, 0 and 1",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_a_damaged_graph_lacks_is_named(name: str, small: Path, tmp_path: Path) -> None:
    change, said = DAMAGED[name]
    with pytest.raises(CheckpointError, match=said):
        mo.load(rewritten(small, change, tmp_path / "a.pt2"))


def test_inspect_shows_the_input_and_the_graph(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(small)]) == 0
    shown = capsys.readouterr().out
    assert "the file holds the network's graph" in shown
    assert "shape 3x12x12" in shown
    damaged = rewritten(small, lambda data: data.pop("schema_version"), tmp_path / "a.pt2")
    assert main(["inspect", str(damaged), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["graph"], facts["input"], len(facts["tensors"]) > 0) == (False, None, True)
