"""How far a changed network is: by probabilities, or by noise where outputs stand for none."""

import copy

import pytest
import torch
import torch.nn.functional as F
from task_cases import CASES

from modelopt_cli.methods import reference_outputs
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.reference_outputs import ReferenceOutputs, compare_outputs
from modelopt_cli.methods.share.bit_allocation import BitAllocation


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
    assert (len(outputs.inputs), outputs.original.shape) == (1, (10 * 64, 3))


@pytest.mark.parametrize("name", ["regress", "restore", "segment"])
def test_bits_follow_the_yardstick_of_the_task(name: str) -> None:
    case = CASES[name]
    network = case.made()
    names = {each: each for each, p in network.named_parameters() if p.dim() > 1}
    context = Context(data=case.data(), batch_size=16, task=case.spec)
    allocation = BitAllocation(network, names, context, 48)  # type: ignore[arg-type]
    assert all(0 < value < float("inf") for value in allocation.sensitivities.values())
