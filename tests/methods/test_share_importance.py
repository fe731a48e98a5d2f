"""The diagonal Fisher information, against sums over all labels."""

import pytest
import torch
import torch.nn.functional as F
from prune_cases import captured, context
from torch import Tensor, nn

from modelopt_cli.errors import DataError, UsageError
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.share.fisher import fisher
from modelopt_cli.program import Program


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def regression() -> Program:
    torch.manual_seed(0)
    return captured(nn.Sequential(nn.Linear(6, 4)), 6)


def small() -> Program:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 4, 4))
    return captured(net, 2, 4, 4)


def over_all_labels(program: Program, names: list[str], images: Tensor) -> dict[str, Tensor]:
    """Squared gradients of the log-likelihood of every label, weighted by its probability."""
    parameters = [program.get_parameter(name).requires_grad_() for name in names]
    sums = [torch.zeros_like(p) for p in parameters]
    for image in images:
        logs = F.log_softmax(program(image.unsqueeze(0)), 1)[0]
        for log in logs:
            gradients = torch.autograd.grad(log, parameters, retain_graph=True)
            for total, gradient in zip(sums, gradients, strict=True):
                total += log.detach().exp() * gradient.square()
    return {name: total / len(images) for name, total in zip(names, sums, strict=True)}


def test_of_a_softmax_regression_it_has_a_closed_form() -> None:
    program, images = regression(), random(8, 6)
    p = program(images).softmax(1).detach()
    closed = torch.einsum("nk,ni->ki", p * (1 - p), images.square()) / 8
    torch.testing.assert_close(over_all_labels(program, ["0.weight"], images)["0.weight"], closed)
    found = fisher(program, ["0.weight"], context(images.repeat(500, 1), batch_size=1), 4000)["0.weight"]
    torch.testing.assert_close(found, closed, rtol=0.15, atol=0.01)
    assert float(found.sum() / closed.sum()) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("batch", [1, 16])
def test_a_batch_costs_one_pass_and_changes_the_expectation_of_nothing(batch: int) -> None:
    program, images, names = small(), random(6, 2, 4, 4), ["0.weight", "3.weight"]
    expected = over_all_labels(program, names, images)
    found = fisher(program, names, context(images.repeat(batch * 150, 1, 1, 1), batch_size=batch), 1 << 20)
    for name in names:
        assert float(found[name].sum() / expected[name].sum()) == pytest.approx(1, abs=0.1)
        joint = torch.stack([found[name].flatten(), expected[name].flatten()])
        assert float(torch.corrcoef(joint)[0, 1]) > 0.95


def test_the_seed_draws_and_nothing_else_changes() -> None:
    program, images = small(), random(6, 2, 4, 4)
    before = {name: tensor.clone() for name, tensor in program.state_dict().items()}
    first, again, other = (
        fisher(program, ["0.weight"], context(images, seed=seed), 6)["0.weight"] for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in program.state_dict().items())
    assert all(p.grad is None for p in program.parameters())


def test_frozen_parameters_count_too() -> None:
    program = regression()
    program.requires_grad_(False)
    assert fisher(program, ["0.weight"], context(random(8, 6)), 8)["0.weight"].any()


def test_without_data_or_samples_it_is_said() -> None:
    with pytest.raises(UsageError, match="the Fisher information needs data"):
        fisher(regression(), ["0.weight"], Context(), 8)
    with pytest.raises(DataError, match="no samples"):
        fisher(regression(), ["0.weight"], context(torch.zeros(0, 6)), 8)
    with pytest.raises(DataError, match="NaN or infinity"):
        fisher(regression(), ["0.weight"], context(torch.full((2, 6), torch.inf)), 8)
