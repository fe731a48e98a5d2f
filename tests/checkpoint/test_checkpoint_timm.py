"""timm's networks, recognised by names and shapes where timm is installed."""

import sys
from pathlib import Path

import pytest
import timm_fingerprints
import torch

from modelopt_cli.checkpoint import open_model, recognise
from modelopt_cli.checkpoint.timm_fingerprint import _table, known_networks
from modelopt_cli.errors import ArchitectureError

timm = pytest.importorskip("timm", reason="the optional package timm is not installed")

State = dict[str, torch.Tensor]


def weights(name: str, **options: int) -> State:
    """A network's state dict with one number behind each tensor."""
    with torch.device("meta"):
        state = timm.create_model(name, pretrained=False, **options).state_dict()
    return {key: torch.zeros(()).expand(tensor.shape) for key, tensor in state.items()}


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet", "test_mambaout"])
@pytest.mark.parametrize("classes", [None, 7])
def test_a_network_with_any_number_of_classes(name: str, classes: int | None) -> None:
    found = recognise(weights(name) if classes is None else weights(name, num_classes=classes))
    assert found is not None
    assert found.spec == (f"timm:{name}" if classes is None else f"timm:{name}?num_classes={classes}")


def test_what_torchvision_has_is_torchvisions() -> None:
    found = recognise(weights("resnet18"))
    assert found is not None
    assert found.spec == "torchvision:resnet18"


def test_several_that_fit_are_named_and_the_tensors_stay(tmp_path: Path) -> None:
    state = weights("test_vit")
    twins = [name for name, _ in known_networks({key: tuple(each.shape) for key, each in state.items()})]
    assert "test_vit" in twins
    shared = next(names for names in _table()["networks"].values() if len(names) > 1)
    state = weights(next(iter(shared)))
    with pytest.raises(ArchitectureError, match=f"the weights fit {len(shared)} networks: timm:"):
        recognise(state)


def test_without_timm_nothing_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    state = weights("test_resnet")
    monkeypatch.setitem(sys.modules, "timm", None)
    assert recognise(state) is None


def test_the_weights_are_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", pretrained=False, num_classes=3).eval()
    torch.save(network.state_dict(), tmp_path / "a.pth")
    opened = open_model(tmp_path / "a.pth")
    assert opened.program is not None, opened.untraced
    x = torch.rand(2, *opened.program.input.shape)
    with torch.no_grad():
        torch.testing.assert_close(opened.program(x), network(x))


def test_the_table_is_what_the_tool_makes() -> None:
    for name in ("test_resnet", "resnet18d"):
        made = timm_fingerprints.fingerprint(name)
        assert made is not None
        assert _table()["networks"][made[1]][name] == made[3]
