"""Gradient criteria, Fisher information and the budget of ``share`` for every task, against formulas."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from task_cases import CASES, Case, program_of
from torch import Tensor, nn

from modelopt_cli.data import open_data
from modelopt_cli.data.in_memory import as_samples
from modelopt_cli.errors import DataError, UsageError
from modelopt_cli.measure.metrics import METRICS
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.prune.criterion_statistics import squared_gradients
from modelopt_cli.methods.share.apply import apply as share
from modelopt_cli.methods.share.config import ShareConfig
from modelopt_cli.methods.share.fisher import fisher
from modelopt_cli.methods.share.metric_drop import MetricDrop, require_enough
from modelopt_cli.program import Program
from modelopt_cli.tasks import parse_task


def program(case: Case) -> Program:
    network = case.made()
    assert isinstance(network, Program)
    return network


def context(case: Case, batch_size: int = 16) -> Context:
    return Context(data=case.data(), batch_size=batch_size, task=case.spec)


def segment_loss(network: nn.Module, inputs: Tensor, targets: tuple[Tensor, ...]) -> Tensor:
    masks = torch.stack(targets)
    logs = network(inputs).log_softmax(1).gather(1, masks.clamp(max=2).unsqueeze(1)).squeeze(1)
    return -logs[masks != 255].mean()


LOSSES = {
    "multilabel": lambda net, x, y: F.softplus(net(x) * (1 - 2 * torch.stack(y))).mean(),
    "regress": lambda net, x, y: (net(x) - torch.stack(y)).square().mean(),
    "regress?loss=l1": lambda net, x, y: (net(x) - torch.stack(y)).abs().mean(),
    "restore": lambda net, x, y: (net(x) - torch.stack(y)).abs().mean(),
    "segment": segment_loss,
    "language": lambda net, x, y: F.cross_entropy(net(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten()),
}


@pytest.mark.parametrize("task", LOSSES)
def test_the_first_order_change_is_that_of_the_task_s_loss(task: str) -> None:
    case = replace(CASES[task.partition("?")[0]], task=task)
    network = program(case)
    found = squared_gradients(network, case.data(), context(case))
    inputs, targets = zip(*case.samples(), strict=True)
    wanted = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    for start in range(0, len(inputs), 16):
        batch = slice(start, start + 16)
        network.zero_grad()
        LOSSES[task](network, torch.stack(inputs[batch]), targets[batch]).backward()
        for name, parameter in network.named_parameters():
            if parameter.grad is not None:
                wanted[name] += (parameter.detach() * parameter.grad).square() / 3
    for name, each in wanted.items():
        torch.testing.assert_close(found[name], each, rtol=1e-3, atol=1e-9)
    assert sum(float(each.sum()) for each in found.values()) > 0


@pytest.mark.parametrize("name", ["embed", "sequence", "text"])
def test_every_task_with_a_loss_has_one(name: str) -> None:
    case = CASES[name]
    found = squared_gradients(program(case), case.data(), context(case))
    assert sum(float(each.sum()) for each in found.values()) > 0


def test_a_network_that_computes_its_loss_itself_has_none() -> None:
    case = replace(CASES["regress"], task="detect")
    with pytest.raises(UsageError, match="criterion: needs a loss of outputs and targets, and a network to"):
        squared_gradients(program(CASES["regress"]), CASES["regress"].data(), Context(task=case.spec))


def test_targets_that_do_not_go_with_the_network_name_the_sample() -> None:
    case = CASES["segment"]
    wrong = [(x, torch.full_like(mask, 3) if i == 5 else mask) for i, (x, mask) in enumerate(case.samples())]
    wrong_case = replace(case, samples=lambda: wrong)
    with pytest.raises(DataError, match="5: mask holds class 3, which is not among the network's 3"):
        squared_gradients(program(case), wrong_case.data(), context(wrong_case, batch_size=4))


def unlabelled(inputs: Tensor, task: str, repeats: int) -> Context:
    data = open_data(as_samples([inputs] * repeats, "data"), labels=False)
    return Context(data=data, batch_size=len(inputs), task=parse_task(task))


def information(task: str, layer: nn.Module, inputs: Tensor) -> Tensor:
    network = program_of(layer.eval(), inputs[0])
    some = unlabelled(inputs, task, 500)
    return fisher(network, ["weight"], some, 1 << 20)["weight"]


def test_the_information_on_numbers_is_that_of_a_normal_distribution() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(4, 3)
    found = information("regress", nn.Linear(3, 2, bias=False), inputs)
    closed = inputs.square().mean(0).expand(2, 3)
    torch.testing.assert_close(found, closed, rtol=0.1, atol=0.02)


@pytest.mark.slow
def test_the_information_on_classes_by_themselves_and_on_pixels_has_a_closed_form() -> None:
    torch.manual_seed(0)
    inputs, linear = torch.randn(4, 3), nn.Linear(3, 2, bias=False)
    p = linear(inputs).sigmoid().detach()
    closed = torch.einsum("nk,ni->ki", p * (1 - p), inputs.square()) / 4
    torch.testing.assert_close(information("multilabel", linear, inputs), closed, rtol=0.15, atol=0.02)
    images, conv = torch.randn(4, 3, 2, 2), nn.Conv2d(3, 2, 1, bias=False)
    p = conv(images).softmax(1).detach()
    closed = torch.einsum("nkhw,nihw->ki", p * (1 - p), images.square())[:, :, None, None] / 4
    torch.testing.assert_close(information("segment", conv, images), closed, rtol=0.15, atol=0.05)


def off_by(network: Program, name: str, shift: float) -> Program:
    moved = program(CASES["regress"])
    moved.load_state_dict(network.state_dict())
    with torch.no_grad():
        moved.get_parameter(name).add_(shift)
    return moved


def test_the_drop_is_that_of_the_main_metric() -> None:
    case = CASES["regress"]
    network = program(case)
    inputs = torch.stack([x for x, _ in case.samples()])
    with torch.inference_mode():
        low = network(inputs).amin() - 10
    below = replace(case, samples=lambda: [(x, torch.full((2,), float(low))) for x in inputs])
    drop = MetricDrop.of(network, below.data(), context(below))
    # All outputs lie above their targets, so that every sample's error grows by the same.
    assert drop.upper(off_by(network, "2.bias", 0.25)) == pytest.approx(0.25, rel=1e-4)
    assert drop.upper(network) == 0


def test_too_few_samples_count_in_the_range_of_the_metric() -> None:
    require_enough(73, 5.0, "data", METRICS["miou"])
    with pytest.raises(UsageError, match="72 samples cannot tell a drop of 5 points: it takes 73"):
        require_enough(72, 5.0, "data", METRICS["miou"])
    with pytest.raises(UsageError, match=r"20 samples cannot tell a drop of 0\.1: it takes 73"):
        require_enough(20, 0.1, "data", METRICS["ssim"])  # of a range of 2
    require_enough(2, 0.01, "data", METRICS["psnr"])  # has no range


def test_a_drop_of_what_has_no_classes_needs_labels() -> None:
    network = program(CASES["regress"])
    some = unlabelled(torch.randn(4, 6), "regress", 1)
    assert some.data is not None
    with pytest.raises(UsageError, match="max_drop of mean absolute error needs labels"):
        MetricDrop.of(network, some.data, some)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "most"), [("regress", 0.05), ("restore", 0.5), ("segment", 15.0)])
def test_bits_are_chosen_by_the_drop_of_the_task(name: str, most: float) -> None:
    case = CASES[name]
    result = share(program(case), ShareConfig(bits="auto", max_drop=most), context(case))
    assert result.target is not None
    assert result.target.reached <= most
    assert result.target.unit == {"regress": "", "restore": " dB", "segment": " points"}[name]
