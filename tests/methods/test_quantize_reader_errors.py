"""Ranges chosen by what they cost the operations that read a value."""

import pytest
import torch
from quantize_networks import captured
from torch import Tensor, nn

from modelopt_cli.methods.quantize.conversion import values_to_observe
from modelopt_cli.methods.quantize.precision_plan import make_plan
from modelopt_cli.methods.quantize.reader_errors import LEAST_GAIN, least_errors
from modelopt_cli.methods.quantize.widths import INT8
from modelopt_cli.program.quantization import QParams

pytestmark = pytest.mark.usefixtures("one_thread")


def output_error(head: nn.Linear, hidden: Tensor, q: QParams) -> float:
    """Squared error of a layer's outputs of rounded inputs, by torch's own fake quantization."""
    rounded = torch.fake_quantize_per_tensor_affine(hidden, q.scale, q.zero_point, 0, 255)
    return float((torch.relu(head(rounded)) - torch.relu(head(hidden))).square().sum())


@pytest.mark.parametrize("outlier_counts", [True, False])
def test_a_range_is_chosen_by_the_outputs_of_the_layer_that_reads_the_value(outlier_counts: bool) -> None:
    torch.manual_seed(0)
    body, head = nn.Linear(4, 8), nn.Linear(8, 3)
    with torch.no_grad():
        body.weight[0], body.bias[0] = 40 * body.weight[1], 40 * body.bias[1].abs()
        if not outlier_counts:
            head.weight[:, 0] = 0  # nobody reads the channel that stretches the range
        program = captured(nn.Sequential(body, nn.ReLU(), head, nn.ReLU()), 4)
        plan, x = make_plan(program, {"0": INT8, "2": INT8}), torch.randn(64, 4)
        hidden = torch.relu(body(x))
        largest = float(hidden.max())
        tried = [QParams(part * largest / 255, 0) for part in (0.05, 0.5, 1.0)]
        value = next(node for node in values_to_observe(plan, program.graph) if node in plan.layers)
        chosen = least_errors(program, plan, {value: tried}, [x])[value]
        errors = [output_error(head, hidden, q) for q in tried]
    least = min(range(3), key=errors.__getitem__)
    assert chosen == tried[least]
    assert least == (2 if outlier_counts else 0)
    assert outlier_counts or errors[0] < LEAST_GAIN * errors[2]


def test_the_widest_range_stays_where_another_gains_little() -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        program = captured(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), 4)
        plan, x = make_plan(program, {"0": INT8, "2": INT8}), torch.randn(64, 4)
        value = next(node for node in values_to_observe(plan, program.graph) if node in plan.layers)
        largest = float(torch.relu(program.get_submodule("0")(x)).max())
        tried = [QParams(part * largest / 255, 0) for part in (0.99, 1.0)]
        assert least_errors(program, plan, {value: tried}, [x])[value] == tried[-1]
