"""Calibration data a few samples at a time, and checks of the values that they give."""

import pytest
import torch
from quantize_networks import Images, images, small
from torch import Tensor, fx, nn

from modelopt_cli.errors import DataError
from modelopt_cli.methods import batches
from modelopt_cli.methods.batches import calibration_batches, numbers_of, require_finite
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.quantize.calibration import calibrate
from modelopt_cli.program import InputSpec
from modelopt_cli.program.capture import capture
from modelopt_cli.program.channels import layered
from modelopt_cli.program.fold import fold_batch_norms, inference_form

pytestmark = pytest.mark.usefixtures("one_thread")


def test_samples_come_a_few_at_a_time_in_order_and_laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    x = images(7, 3, 12, 12)
    monkeypatch.setattr(batches, "LARGEST", 2 * x[0].numel() + 1)
    context = Context(data=Images(x), batch_size=5)  # type: ignore[arg-type]
    parts = list(calibration_batches(small(), Images(x), context))  # type: ignore[arg-type]
    assert [len(part) for part in parts] == [2, 2, 1, 2]
    assert all(part.is_contiguous(memory_format=torch.channels_last) for part in parts)  # type: ignore[union-attr]
    assert torch.equal(torch.cat(parts), x)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_one_number_that_is_not_finite_is_refused(bad: float, dtype: torch.dtype) -> None:
    x = torch.zeros(3, 5, 7, 9, dtype=dtype).to(memory_format=torch.channels_last)
    require_finite(x)
    x[2, 1, 3, 4] = bad
    with pytest.raises(DataError, match="NaN or infinity"):
        require_finite(x, "here")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_numbers_are_not_copied(layout: torch.memory_format) -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=layout)
    numbers = numbers_of(x)
    assert numbers.data_ptr() == x.data_ptr()
    assert numbers.is_contiguous()
    assert torch.equal(numbers.sort().values, x.flatten().sort().values)


def test_watched_values_are_those_of_the_graph_whatever_is_fused() -> None:
    torch.manual_seed(0)
    program = fold_batch_norms(layered(inference_form(capture(_Residual().eval(), InputSpec((3, 12, 12))))))
    x = images(4, 3, 12, 12)
    nodes = [node for node in program.graph.nodes if node.op not in ("placeholder", "output")]
    expected = Values(program)
    with torch.no_grad():
        expected.run(x)
    for node in nodes:
        kept = Kept()
        assert calibrate(program, {node: [kept]}, [x]) == 4
        torch.testing.assert_close(kept.value, expected.values[node], rtol=1e-4, atol=1e-5)


class _Residual(nn.Module):
    """Layers of which a fused form has no value: before an activation, and before an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.body, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.body(x) + x)
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class Kept:
    """Keeps the last value of an activation."""

    value = torch.zeros(())

    def update(self, x: Tensor) -> None:
        self.value = x.clone()


class Values(fx.Interpreter):
    """Keeps all values of a graph that runs without fused layers."""

    def __init__(self, program: fx.GraphModule) -> None:
        super().__init__(program)
        self.values: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Tensor:
        self.values[n] = value = super().run_node(n)
        return value
