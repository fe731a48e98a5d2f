"""Every choice of share, run end to end from its row: what the row claims holds in the result."""

from dataclasses import replace

import pytest
import torch
from prune_cases import context, net, smooth
from share_cases import CONFIG, pruned_network

from modelopt_cli.artifact import predicted_bytes
from modelopt_cli.data import open_data
from modelopt_cli.errors import UsageError
from modelopt_cli.methods.context import Context, MethodResult
from modelopt_cli.methods.matrices import weights_of
from modelopt_cli.methods.share.apply import apply, apply_to_state
from modelopt_cli.methods.share.choices import BUDGETS, INITS, SCOPES, TUNINGS, WEIGHTINGS
from modelopt_cli.methods.share.config import AUTO, ShareConfig
from modelopt_cli.training import Training

IMAGES = smooth(160, 3, 12, 12)


def shared(config: ShareConfig, data: bool = True) -> MethodResult:
    return apply(net(), config, context(IMAGES, code="entropy") if data else Context())


def values(result: MethodResult) -> dict[str, torch.Tensor]:
    return {name: weight.detach().unique() for name, weight in weights_of(result.program).items()}


@pytest.mark.parametrize("name", INITS)
def test_an_init_is_no_worse_than_even_spacing_before_the_search(name: str) -> None:
    program = net()
    result = shared(ShareConfig(bits=3, init=name), data=False)
    for parameter, weight in weights_of(program).items():
        weight = weight.detach()
        clustered = result.program.get_parameter(parameter).detach()
        assert 1 < len(clustered.unique()) <= 8
        even = torch.linspace(float(weight.min()), float(weight.max()), 8)
        rounded = even[(weight.unsqueeze(-1) - even).abs().argmin(-1)]
        errors = [float((weight - each).square().sum()) for each in (clustered, rounded)]
        assert errors[0] < errors[1], (parameter, errors)


def test_the_best_of_all_inits_is_the_best() -> None:
    def error(name: str) -> float:
        clustered = shared(ShareConfig(bits=2, init=name), data=False).program
        pairs = zip(weights_of(net()).values(), weights_of(clustered).values(), strict=True)
        return sum(float((a - b).detach().square().sum()) for a, b in pairs)

    best = [error(name) for name, row in INITS.items() if row.best_of_all]
    assert max(best) <= min(error(name) for name in INITS) * (1 + 1e-6)


@pytest.mark.parametrize("name", SCOPES)
def test_a_scope_has_the_codebooks_that_it_claims(name: str) -> None:
    row = SCOPES[name]
    config = ShareConfig(bits=2, scope=name, **({"group": 4} if row.grouped else {}))  # type: ignore[arg-type]
    result = shared(config, data=False)
    for parameter, weight in weights_of(result.program).items():
        rows = row.rows(len(weight), config.group)
        assert all(len(part.unique()) <= 4 for part in weight.detach().split(rows)), parameter
    together = torch.cat(list(values(result).values())).unique()
    assert (len(together) <= 4) is row.whole_network
    if row.grouped:
        assert row.rows(12, 5) == 4
    state = net().state_dict()
    if row.whole_network:
        with pytest.raises(UsageError, match="needs a network"):
            apply_to_state(state, config)
    else:
        assert len(list(apply_to_state(state, config).stream.items())) == len(state)


@pytest.mark.slow
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_weighting_needs_the_data_that_it_claims(name: str) -> None:
    row = WEIGHTINGS[name]
    plain = shared(ShareConfig(bits=2), data=False)
    result = shared(ShareConfig(bits=2, weighting=name))
    differs = any(
        not torch.equal(a, b) for a, b in zip(values(plain).values(), values(result).values(), strict=True)
    )
    assert differs is row.needs_data
    biases = [each.program.get_parameter("fc.bias") for each in (plain, result)]
    assert torch.equal(*biases) is not row.compensates
    if row.needs_data:
        with pytest.raises(UsageError, match=f"weighting {name} needs data"):
            shared(ShareConfig(bits=2, weighting=name), data=False)
    if row.suits_auto:
        assert shared(ShareConfig(bits=AUTO, bytes=0.75, weighting=name)).target
    else:
        with pytest.raises(UsageError, match=f"excludes weighting {name}"):
            ShareConfig(bits=AUTO, bytes=0.75, weighting=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", TUNINGS)
def test_a_tuning_learns_and_keeps_the_assignments_that_it_claims(name: str) -> None:
    digits = open_data("digits?split=train").sample(320)
    network, training = pruned_network(digits), Training(digits, config=replace(CONFIG, epochs=6, lr=0.2))
    before = apply(network, ShareConfig(bits=3), Context()).program
    after = apply(network, ShareConfig(bits=3, tune=name), Context(training=training)).program
    old_state, moved = before.state_dict(), 0
    assert not all(torch.equal(old_state[name], tensor) for name, tensor in after.state_dict().items())
    for parameter, weight in weights_of(after).items():
        old = old_state[parameter]
        assert len(weight.unique()) <= 8
        moved += sum(len(weight.detach()[old == value].unique()) > 1 for value in old.unique())
    assert (moved == 0) is TUNINGS[name].keeps_assignments


@pytest.mark.parametrize("name", BUDGETS)
def test_a_budget_is_met_by_its_own_measure(name: str) -> None:
    row, value = BUDGETS[name], {"bytes": 0.7, "ratio": 1.4, "max_drop": 20.0}.get(name, 0.7)
    config = ShareConfig(bits=AUTO, **{name: value})  # type: ignore[arg-type]
    result = shared(config)
    target = result.target
    assert target is not None
    assert (target.metric, target.wanted) == (row.metric, row.limit(value))
    assert target.reached <= target.wanted
    assert config.chooses_on_data is row.on_data
    if row.on_data:
        with pytest.raises(UsageError, match="is measured on data"):
            shared(config, data=False)
    else:
        size = predicted_bytes(result.program, code="entropy")
        assert size <= row.limit(value) * predicted_bytes(net())
