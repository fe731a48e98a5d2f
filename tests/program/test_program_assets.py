"""Networks of other people, as `make assets` fetches them."""

from pathlib import Path

import pytest
import torch

from modelopt_cli.program import InputSpec
from modelopt_cli.program.capture import capture
from modelopt_cli.program.fold import fold_batch_norms, inference_form
from modelopt_cli.program.serialization import from_data, state_of, to_data

PYTHON = Path(__file__).parents[2] / "assets" / "python"

pytestmark = pytest.mark.assets


@pytest.fixture(autouse=True)
def on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    if not PYTHON.is_dir():
        pytest.skip("needs the files that `make assets` fetches")
    monkeypatch.syspath_prepend(str(PYTHON))


@pytest.mark.parametrize("size", [224, 97])
def test_efficientnet_lite0(size: int) -> None:
    network = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet
    torch.manual_seed(0)
    model = network.from_name("efficientnet-lite0").eval()
    program = capture(model, InputSpec((3, size, size)))
    again = from_data(to_data(program), state_of(program))
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    assert set(program.state_dict()) == set(model.state_dict())
    kinds = [type(m).__name__ for m in program.modules()]
    assert kinds.count("Conv2d") == 49
    assert kinds.count("Linear") == 1
    folded = fold_batch_norms(inference_form(program))
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())


@pytest.mark.parametrize(
    ("name", "channels", "size"), [("MNISTNet", 1, 28), ("USPSNet", 1, 16), ("SVHNNet", 3, 32)]
)
def test_ccexam(name: str, channels: int, size: int) -> None:
    models = pytest.importorskip("ccexam.models")
    model = getattr(models, name)(size).eval()
    program = capture(model, InputSpec((channels, size, size)))
    x = torch.randn(5, channels, size, size)
    with torch.no_grad():
        assert torch.equal(program(x), model(x))
