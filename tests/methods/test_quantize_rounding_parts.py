"""Rounding of networks that were captured in parts, whose own code decides what the parts see."""

import pytest
import torch
from test_quantize_rounding import WITH_DATA
from torch import Tensor, nn

from modelopt_cli.data import open_data
from modelopt_cli.errors import CaptureError
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.quantize.apply import apply
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.weight_rounding.block_learning import BlockLearner, BlockValues
from modelopt_cli.program import InputSpec
from modelopt_cli.program.partition import capture_parts

SAMPLE = InputSpec((3, 8, 8))


class Chooser(nn.Module):
    """A head that sees the cells whose score is above zero: how many depends on rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 1))
        self.head = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, images: Tensor) -> Tensor:
        cells = self.backbone(images).flatten(2).movedim(1, 2).flatten(0, 1)
        result: Tensor = self.head(cells[cells[:, 0] > 0])
        return result


@pytest.mark.parametrize("name", WITH_DATA)
def test_parts_of_both_networks_see_the_calls_of_the_float_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn = BlockLearner.learn

    def watched(self: BlockLearner, values: BlockValues, *rest: int) -> dict[str, Tensor]:
        assert len({len(value) for value in (*values.rounded, *values.real, values.target)}) == 1
        return learn(self, values, *rest)

    monkeypatch.setattr(BlockLearner, "learn", watched)
    data = open_data("synthetic:3x8x8?n=8", input_spec=SAMPLE, labels=False)
    torch.manual_seed(0)
    program = capture_parts(Chooser().eval(), SAMPLE, CaptureError("values"))
    assert program is not None
    steps = {} if name == "gptq" else {"rounding_steps": 2}
    config = QuantizeConfig(weight_bits=2, edge_bits=2, rounding=name, **steps)
    made = apply(program, config, Context(data=data, batch_size=4)).program
    with torch.no_grad():
        assert made(torch.rand(2, 3, 8, 8)).isfinite().all()
