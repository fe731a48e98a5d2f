"""Networks of ``torch.export`` archives, read as data: against the networks that were exported."""

from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from pt2_networks import NETWORKS, Residual, document, exported, image
from torch import Tensor, nn
from torch.export import Dim, export, save
from torch.utils import _pytree as pytree

import modelopt_cli as mo
from modelopt_cli.checkpoint import open_model
from modelopt_cli.cli.main import main
from modelopt_cli.program import InputSpec
from modelopt_cli.program.capture import capture

pytestmark = pytest.mark.filterwarnings("ignore")


FORMS: dict[str, tuple[int, bool, bool]] = {
    "free batch": (2, True, False),
    "core operators": (2, True, True),
    "one sample": (1, False, False),
    "two samples": (2, False, False),
    "one sample, core operators": (1, False, True),
}
"""Samples at export, whether their number is free, whether operators are decomposed."""


def close(actual: Any, expected: Any) -> None:
    mine, theirs = pytree.tree_flatten(actual), pytree.tree_flatten(expected)
    assert str(mine[1]) == str(theirs[1])
    for a, b in zip(mine[0], theirs[0], strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


CASES = [(kind, form) for kind in NETWORKS for form in FORMS]
CASES.remove(("recurrent", "one sample, core operators"))  # steps are unrolled, with the batch in the middle
SLOW = [case for case in CASES if case[0] == "recurrent" or ("transformer" in case and "core" in case[1])]


@pytest.mark.parametrize(
    ("kind", "form"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (case in SLOW), id=", ".join(case)) for case in CASES],
)
def test_outputs_and_names_are_the_networks(kind: str, form: str, tmp_path: Path) -> None:
    make, inputs = NETWORKS[kind]
    batch, free, core = FORMS[form]
    torch.manual_seed(1)
    network = make()
    program = mo.load(exported(network, inputs(batch), tmp_path / "net.pt2", free=free, core=core))
    assert isinstance(program, mo.Program)
    for samples in (1, 2, 5):
        batch_of = inputs(samples)
        with torch.no_grad():
            close(program(*batch_of), network(*batch_of))
    state, own = program.state_dict(), {**network.state_dict(), **dict(network.named_buffers())}
    added = [name for name in state if name not in own]
    assert all(name.startswith("constant_") for name in added)
    assert all(torch.equal(state[name], own[name]) for name in state if name in own)
    assert not set(dict(network.named_parameters())) - set(state)


@pytest.mark.parametrize("core", [False, True], ids=["operators", "core operators"])
@pytest.mark.parametrize("kind", ["batch norm", "residual"])
def test_layers_are_those_of_a_network_that_was_traced(kind: str, core: bool, tmp_path: Path) -> None:
    make, inputs = NETWORKS[kind]
    network = make().eval()
    live = capture(network, InputSpec((3, 12, 12)))
    read = mo.load(exported(network, inputs(2), tmp_path / "net.pt2", core=core))

    def layers(program: nn.Module) -> dict[str, str]:
        weighted = {path: module for path, module in program.named_modules() if path and module.state_dict()}
        return {path: repr(module) for path, module in weighted.items() if not list(module.children())}

    assert layers(read) == layers(live)
    assert len(layers(read)) >= 5


def test_inputs_are_described_by_the_file(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(1))

        def forward(self, tokens: Tensor, *, mask: Tensor) -> Tensor:
            return (tokens.float() * mask * self.gain).cumsum(1)

    sizes = {0: Dim("batch"), 1: Dim("length", max=50)}
    args, kwargs = (torch.randint(9, (2, 6), dtype=torch.int32),), {"mask": torch.ones(2, 6)}
    save(export(Net(), args, kwargs, dynamic_shapes={"tokens": sizes, "mask": sizes}), tmp_path / "a.pt2")
    program = mo.load(tmp_path / "a.pt2")
    first, second = program.input.tensors
    assert (first.name, first.dtype, first.shape) == ("tokens", "int32", (6,))
    assert (second.name, second.dtype, second.shape) == ("mask", "float32", (6,))
    assert first.free == second.free == (0,)
    assert program(torch.ones(3, 9, dtype=torch.int32), mask=torch.ones(3, 9))[0, -1] == 9


def test_sizes_that_the_file_fixes_are_not_free(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert capture(network.eval(), InputSpec((3, 64, 64))).input.free == (1, 2)
    path = exported(network, (torch.rand(2, 3, 64, 64),), tmp_path / "a.pt2")
    assert mo.load(path).input.free == ()


def test_named_outputs_become_dictionaries(tmp_path: Path) -> None:
    pair = namedtuple("pair", ["low", "high"])
    pytree._register_namedtuple(pair, serialized_type_name="tests.pair")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Any:
            return pair(self.fc(x), (x + 1, x))

    network = Net()
    program = mo.load(exported(network, (torch.rand(2, 3),), tmp_path / "a.pt2"))
    x = torch.rand(4, 3)
    close(program(x), network(x)._asdict())


def test_exported_in_training_mode(tmp_path: Path) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(400, 2)
    )
    program = export(network.train(), (torch.rand(2, 3, 12, 12),), dynamic_shapes=({0: Dim("batch", min=2)},))
    save(program, tmp_path / "a.pt2")
    opened = open_model(tmp_path / "a.pt2")
    assert "exported in training mode: dropout and batch norm are as in eval()" in opened.notes
    x = torch.rand(3, 3, 12, 12)
    with torch.no_grad():
        close(opened.program(x), network.eval()(x))  # type: ignore[misc]


def test_gradients_switched_off_in_a_block(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                y = self.a(x).relu()
            return self.b(y)

    network = Net()
    path = exported(network, (torch.rand(2, 3),), tmp_path / "a.pt2")
    assert "set_grad_enabled" in document(path)["graph_module"]["graph"]["nodes"][0]["target"]
    x = torch.rand(4, 3)
    close(mo.load(path)(x), network(x))


def test_tied_weights_stay_one(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids))

    network = Net()
    program = mo.load(exported(network, (torch.randint(9, (2, 5)),), tmp_path / "a.pt2"))
    assert len({p.data_ptr() for p in program.parameters()}) == 1
    assert {name: type(layer) for name, layer in program.named_children()} == {
        "table": nn.Embedding,
        "head": nn.Linear,
    }
    ids = torch.randint(9, (3, 5))
    close(program(ids), network(ids))


def test_weight_norm_becomes_the_weight_that_it_makes(tmp_path: Path) -> None:
    network = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv1d(3, 4, 3), dim=2), nn.Flatten())
    program = mo.load(exported(network, (torch.rand(2, 3, 7),), tmp_path / "a.pt2"))
    assert type(program.get_submodule("0")) is nn.Conv1d
    x = torch.rand(3, 3, 7)
    with torch.no_grad():
        close(program(x), network(x))


def test_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    network = Residual().eval()
    path = exported(network, image(2), tmp_path / "net.pt2")
    result = tmp_path / "int8.safetensors"
    calibration = ["--calibration", "synthetic:3x12x12?n=32", "--no-eval"]
    assert main(["quantize", str(path), *calibration, "-o", str(result)]) == 0
    said = capsys.readouterr()
    assert "read from its own graph" in said.err
    assert "compressed 4 of 4 layers" in said.out + said.err
    x = torch.randn(8, 3, 12, 12)
    with torch.no_grad():
        expected = network(x)
    error = mo.load(result)(x) - expected
    assert 10 * torch.log10(expected.square().sum() / error.square().sum()) > 25


@pytest.mark.slow
def test_torchvision_network_has_its_preprocessing(tmp_path: Path) -> None:
    import torchvision

    network = torchvision.models.squeezenet1_1(num_classes=1000).eval()
    path = exported(network, (torch.rand(2, 3, 224, 224),), tmp_path / "a.pt2")
    opened = open_model(path)
    assert opened.notes == ["read from its own graph", "recognised as torchvision:squeezenet1_1"]
    assert opened.program is not None
    assert opened.program.input.preprocess is not None
    assert opened.program.labels is not None
    x = torch.rand(3, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(opened.program(x), network(x))
