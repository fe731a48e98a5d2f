"""How far a changed network is: by probabilities, or by noise where outputs stand for none."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from task_cases import CASES, program_of
from torch import nn

from modelopt_cli.data import open_data
from modelopt_cli.data.in_memory import as_samples
from modelopt_cli.methods import reference_outputs
from modelopt_cli.methods.batches import comparable
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.prune.layer_pruner import _change
from modelopt_cli.methods.reference_outputs import ReferenceOutputs, compare_outputs
from modelopt_cli.methods.share.bit_allocation import BitAllocation
from modelopt_cli.program.output_structure import flatten
from modelopt_cli.tasks import parse_task


def compared(name: str) -> tuple[tuple[float, float], torch.Tensor, torch.Tensor]:
    """What the yardstick says, and the outputs of the original and of the changed network."""
    case = CASES[name]
    original = case.made()
    changed = copy.deepcopy(original)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    context = Context(data=case.data(), batch_size=10, task=case.spec)
    found = ReferenceOutputs.of(original, case.data(), context, 48).compare(changed)  # type: ignore[arg-type]
    inputs = torch.stack([x for x, _ in case.samples()])
    with torch.inference_mode():
        return found, original(inputs), changed(inputs)


@pytest.mark.parametrize("name", ["classify", "segment", "language", "sequence"])
def test_logits_by_the_divergence_of_each_sample_pixel_or_token(name: str) -> None:
    (nats, same), one, other = compared(name)
    axis = 1 if name in ("classify", "segment") else 2
    logs = one.double().log_softmax(axis), other.double().log_softmax(axis)
    wanted = (logs[0].exp() * (logs[0] - logs[1])).sum(axis).mean()
    assert nats == pytest.approx(float(wanted), rel=1e-5)
    assert same == pytest.approx(float((one.argmax(axis) == other.argmax(axis)).double().mean()))


@pytest.mark.parametrize("name", ["regress", "restore", "embed", "multilabel"])
def test_other_outputs_by_their_noise(name: str) -> None:
    (noise, cosine), one, other = compared(name)
    assert noise == pytest.approx(float((one - other).square().sum() / one.square().sum()), rel=1e-5)
    assert cosine == pytest.approx(
        float(F.cosine_similarity(one.flatten(1), other.flatten(1)).mean()), rel=1e-5
    )


class Queries(nn.Module):
    """A detector that finds a set, and a network for one number."""

    def __init__(self, *, one: bool) -> None:
        super().__init__()
        self.layer, self.one = nn.Linear(6, 8), one

    def forward(self, x: torch.Tensor) -> Any:
        y = self.layer(x)
        return y[:, 0] if self.one else {"logits": y.view(-1, 2, 4), "pred_boxes": y.sigmoid().view(-1, 2, 4)}


@pytest.mark.parametrize("one", [True, False])
def test_of_outputs_that_count_together_the_mean_and_of_a_single_number_too(one: bool) -> None:
    inputs = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    original = program_of(Queries(one=one).eval(), inputs[0])
    changed = copy.deepcopy(original)
    with torch.no_grad():
        changed.get_parameter("layer.bias").add_(0.1)
    task = parse_task("regress" if one else "detect")
    data = open_data(as_samples([inputs], "data"), labels=False)
    context = Context(data=data, batch_size=5, task=task)
    found, _ = ReferenceOutputs.of(original, data, context, 48).compare(changed)
    with torch.inference_mode():
        a, b = (list(flatten(network(inputs)).values()) for network in (original, changed))
    ratios = [float((x - y).square().sum() / x.square().sum()) for x, y in zip(a, b, strict=True)]
    assert found == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)


def test_a_single_logit_of_a_pixel_is_that_of_a_class() -> None:
    logits = torch.tensor([[[[-1.0, 2.0]]]])
    rows = parse_task("segment").logits(logits)
    assert rows is not None
    assert torch.equal(rows, torch.tensor([[0.0, -1.0], [0.0, 2.0]]))
    torch.testing.assert_close(rows.softmax(1)[:, 1], logits.sigmoid().flatten())


def test_blocks_go_by_the_divergence_of_pixels() -> None:
    case = CASES["segment"]
    one, other = case.made(), case.made(1)
    inputs = torch.stack([x for x, _ in case.samples()[:4]])
    with torch.inference_mode():
        expected, actual = (comparable(network(inputs), inputs, case.spec) for network in (one, other))
        logs = [network(inputs).log_softmax(1) for network in (one, other)]
    nats = (logs[0].exp() * (logs[0] - logs[1])).sum()
    assert _change(actual, expected) == pytest.approx(float(nats), rel=1e-4)


def test_outputs_that_are_nothing_or_no_numbers() -> None:
    zeros = torch.zeros(2, 3).double()
    assert compare_outputs(zeros, zeros) == (0.0, 1.0)
    assert compare_outputs(zeros, zeros + 1)[0] == float("inf")
    assert compare_outputs(zeros + 1, torch.full((2, 3), torch.nan).double())[0] == float("inf")


def test_of_large_outputs_a_few_batches_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_outputs, "LARGEST", 1)
    case = CASES["segment"]
    context = Context(data=case.data(), batch_size=10, task=case.spec)
    outputs = ReferenceOutputs.of(case.made(), case.data(), context, 48)  # type: ignore[arg-type]
    assert (len(outputs.inputs), outputs.original[0].shape) == (1, (10 * 64, 3))


@pytest.mark.parametrize("name", ["regress", "restore", "segment"])
def test_bits_follow_the_yardstick_of_the_task(name: str) -> None:
    case = CASES[name]
    network = case.made()
    names = {each: each for each, p in network.named_parameters() if p.dim() > 1}
    context = Context(data=case.data(), batch_size=16, task=case.spec)
    allocation = BitAllocation(network, names, context, 48)  # type: ignore[arg-type]
    assert all(0 < value < float("inf") for value in allocation.sensitivities.values())
