"""On a CUDA device: events instead of wall clock, the allocator's peak, and a whole evaluation."""

import pytest
import torch
from torch import fx, nn

from modelopt_cli.measure import EvalOptions, EvaluatedModel, evaluate
from modelopt_cli.measure.latency import sample_input, time_interleaved
from modelopt_cli.program import InputSpec, Program

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def program() -> Program:
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 62 * 62, 10)).eval()
    return Program(model, fx.symbolic_trace(model).graph, input_spec=InputSpec((3, 64, 64)))


def test_the_device_is_waited_for() -> None:
    x = torch.randn(4096, 4096, device="cuda")

    class Many(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(20):
                x = x @ x
            return x

    (times,) = time_interleaved([(Many(), x)], warmup=2, runs=3)
    # 20 products of 137 GFLOP each: no device does that in the microseconds it takes to ask for it.
    assert min(times) > 1.0


def test_evaluation() -> None:
    net = program()
    found = evaluate(
        [EvaluatedModel("net.pth", net, net, 1, input=net.input)],
        None,
        EvalOptions(device="cuda", runs=3, warmup=1, batch_size=4),
    )
    (model,) = found.models
    assert model.latency is not None
    assert model.latency.variant in ("eager", "channels-last")
    assert model.peak_bytes is not None
    assert model.peak_bytes > 4 * 64 * 62 * 62 * 10
    assert found.environment.device == "cuda"
    assert sample_input(InputSpec((3, 4, 4)), 1, device="cuda").is_cuda
