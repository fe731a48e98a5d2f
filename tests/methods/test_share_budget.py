"""``--bits auto``: files within their budget, and not far below."""

from typing import Any

import pytest
import torch
from prune_cases import captured, context, net, smooth
from torch import Tensor, nn

from modelopt_cli.artifact import predicted_bytes
from modelopt_cli.artifact.codecs import CODECS
from modelopt_cli.errors import GateNotMet, UsageError
from modelopt_cli.methods.context import MethodResult
from modelopt_cli.methods.share.apply import apply
from modelopt_cli.methods.share.bit_allocation import LARGEST_LEVEL, BitAllocation, LevelWeight, rounded_bias
from modelopt_cli.methods.share.budget import BudgetNotMet, largest_within, smallest_without_loss
from modelopt_cli.methods.share.config import ShareConfig
from modelopt_cli.methods.share.metric_drop import split_to_verify
from modelopt_cli.program import Program


class Wide(nn.Module):
    """Most of whose file are weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 24, 3, bias=False), nn.BatchNorm2d(24)
        self.one, self.two = nn.Linear(24 * 25, 64), nn.Linear(64, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        out: Tensor = self.two(torch.relu(self.one(nn.functional.avg_pool2d(x, 2).flatten(1))))
        return out


def wide() -> Program:
    torch.manual_seed(0)
    return captured(Wide(), 3, 12, 12)


IMAGES = smooth(128, 3, 12, 12)


def labels(program: Program) -> Tensor:
    with torch.no_grad():
        found: Tensor = program(IMAGES).argmax(1)
    return found


def within(program: Program, labelled: bool = False, code: Any = "entropy", **options: Any) -> MethodResult:
    known = labels(program) if labelled else None
    config = ShareConfig(bits="auto", **options)
    return apply(program, config, context(IMAGES, known, code=code))


@pytest.mark.slow
@pytest.mark.parametrize("code", ["entropy", "packed", "plain"])
@pytest.mark.parametrize(
    "options", [{"bytes": 0.15}, {"ratio": 10.0}, {"bytes": 0.2, "weighting": "none"}], ids=str
)
def test_the_file_is_within_the_budget_and_not_far_below(options: dict[str, Any], code: Any) -> None:
    program = wide()
    options = (
        options
        if code == "entropy"
        else {"bytes": 0.3, **({"weighting": "none"} if "weighting" in options else {})}
    )
    result = within(program, code=code, **options)
    full, size = predicted_bytes(program), predicted_bytes(result.program, code=code)
    budget = options.get("bytes", 1 / options.get("ratio", 1)) * full
    assert size <= budget
    if code == "entropy":
        assert size >= 0.93 * budget
    assert result.target is not None
    assert result.target.metric == "bytes"
    assert result.target.reached == pytest.approx(size / full, abs=2e-4)


@pytest.mark.slow
def test_more_bytes_lose_less() -> None:
    program = wide()
    away = []
    for fraction in (0.06, 0.12, 0.24):
        found = within(program, bytes=fraction).program
        with torch.no_grad():
            away.append(float((program(IMAGES) - found(IMAGES)).square().mean()))
    assert away[0] > 2 * away[1] > 4 * away[2]


@pytest.mark.slow
def test_a_budget_below_the_header_is_an_error_that_says_how_near_it_came() -> None:
    with pytest.raises(
        BudgetNotMet, match=r"the file does not get smaller than [\d,]+ bytes; [\d,]+ were asked"
    ) as caught:
        within(wide(), ratio=1000.0)
    assert isinstance(caught.value, GateNotMet)
    assert caught.value.exit_code == 1


MANY = smooth(240, 3, 12, 12)


@pytest.mark.slow
@pytest.mark.parametrize("labelled", [True, False], ids=["accuracy", "agreement"])
def test_no_more_is_lost_than_allowed(labelled: bool) -> None:
    program = wide()
    with torch.no_grad():
        right = program(MANY).argmax(1)
    sizes, held = [], slice(None, 120)  # as the samples of the tests are split
    for most in (5.0, 20.0):
        config = ShareConfig(bits="auto", max_drop=most)
        result = apply(program, config, context(MANY, right if labelled else None))
        with torch.no_grad():
            lost = int((result.program(MANY[held]).argmax(1) != right[held]).sum())
        # All answers are right before, so that nothing is gained: Wilson's interval is Tango's.
        share, square = lost / 120, 1.959964**2 / 120
        half = (share * (1 - share) * square + square * square / 4) ** 0.5
        upper = 100 * (share + square / 2 + half) / (1 + square)
        assert upper <= most
        assert result.target is not None
        assert (result.target.metric, result.target.wanted) == ("max_drop", most)
        assert result.target.reached == pytest.approx(upper, abs=0.2 if labelled else 1e-3)
        sizes.append(predicted_bytes(result.program, code="entropy"))
    assert sizes[1] < sizes[0] < 0.2 * predicted_bytes(program)


def test_too_few_samples_to_tell_a_drop_are_refused_with_the_number_it_takes() -> None:
    # z^2 / (n + z^2) is the upper end where nothing was lost: at most 5 % from n = 73 on.
    for samples, enough in ((2 * 72, False), (2 * 73, True)):
        held = context(smooth(samples, 3, 12, 12))
        if enough:
            assert [part.size for part in split_to_verify(held, 5.0)] == [73, 73]
        else:
            with pytest.raises(UsageError, match="72 samples cannot tell a drop of 5 points: it takes 73"):
                split_to_verify(held, 5.0)


class Steps:
    """Stands for weights whose network at a price is that price."""

    count = 1000

    def bits(self, price: float) -> float:
        return 4 - torch.tensor(price).log2().item()


def test_the_search_ends_at_the_largest_file_within_the_budget() -> None:
    seen: list[int] = []

    def size(made: Any) -> int:
        seen.append(round(300 + 1000 / 8 * Steps().bits(made)))
        return seen[-1]

    price: Any = largest_within(Steps(), lambda price: price, size, 800)  # type: ignore[arg-type, return-value]
    assert 0.985 * 800 <= round(300 + 1000 / 8 * Steps().bits(price)) <= 800
    assert len(seen) <= 6
    with pytest.raises(BudgetNotMet):
        largest_within(Steps(), lambda price: price, lambda made: 900, 800)  # type: ignore[arg-type, return-value]


def test_the_search_for_a_drop_ends_just_below_it() -> None:
    def drop(made: Any) -> float:
        return 10 / Steps().bits(made)

    def search(verified: Any, most: float) -> Any:
        return smallest_without_loss(Steps(), lambda price: price, drop, verified, most)  # type: ignore[arg-type, return-value]

    assert 2.5 <= Steps().bits(search(drop, 4.0)) <= 2.7
    with pytest.raises(BudgetNotMet, match=r"at 8 bits a weight up to 1\.25 points may be lost; 1 were"):
        search(drop, 1.0)
    # On other samples twice as much is lost: of those that passed, the smallest that passes there too.
    found = Steps().bits(search(lambda made: 2 * drop(made), 4.0))
    assert 5 <= found <= 8


# --- levels ------------------------------------------------------------------------------------------------


def test_levels_are_what_the_codec_computes() -> None:
    from modelopt_cli.artifact.codecs import CODECS

    generator = torch.Generator().manual_seed(0)
    for step in (torch.tensor(0.013), torch.rand(6, generator=generator)):
        levels = torch.randint(-LARGEST_LEVEL, LARGEST_LEVEL + 1, (6, 5), generator=generator)
        weight = LevelWeight(levels, step)
        parts = CODECS["affine"].encode(weight.values(), weight.encoding())
        assert torch.equal(parts["values"].long(), levels)


@pytest.mark.parametrize(
    "bias",
    [torch.randn(40), torch.zeros(3), torch.full((4,), 1e-38), 10.0 ** torch.arange(-6, 7)],
    ids=["random", "zeros", "tiny", "powers of ten"],
)
def test_a_bias_is_rounded_to_levels_of_its_neighbours(bias: Tensor) -> None:
    values, encoding = rounded_bias(bias)
    for start in range(0, len(bias), 8):
        old, new = bias[start : start + 8], values[start : start + 8]
        # Half the distance of levels, which two bytes hold to less than two percent.
        assert ((new - old).abs() <= max(float(old.abs().max()) / LARGEST_LEVEL * 0.51, 1e-30)).all()
    parts = CODECS["affine"].encode(values, encoding)
    decoded = CODECS["affine"].decode(parts, encoding.params, values.dtype, tuple(values.shape))
    assert torch.equal(decoded, values)


@pytest.mark.parametrize("data", [True, False], ids=["data", "no data"])
def test_a_dearer_bit_leaves_fewer(data: bool) -> None:
    program = net()
    names = {f"{layer}.weight": layer for layer in ("stem", "body", "fc")}
    surroundings = context(smooth(96, 3, 12, 12))
    allocation = BitAllocation(program, names, surroundings if data else type(surroundings)(), 96)
    assert allocation.count == sum(program.get_parameter(name).numel() for name in names)
    assert all(value > 0 for value in allocation.sensitivities.values())
    bits = [allocation.bits(price) for price in (1e-9, 1e-7, 1e-5, 1e-3)]
    assert bits == sorted(bits, reverse=True)
    assert bits[0] > 2 * bits[-1]
    spread = []
    for price in (1e-8, 1e-5):
        made, found = allocation.at(price)
        assert found.keys() == names.keys()
        for name, weight in found.items():
            torch.testing.assert_close(made.get_parameter(name).detach(), weight.values(), rtol=0, atol=0)
        spread.append(sum(len(weight.levels.unique()) for weight in found.values()))
    assert spread[0] > spread[1]


def test_what_the_answers_mind_more_gets_more_levels() -> None:
    """A layer whose outputs are made smaller by the next one may be coarser."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(27, 16), nn.ReLU(), nn.Linear(16, 5))
    with torch.no_grad():
        model[3].weight[:, :8] *= 0.02
    program = captured(model, 3, 3, 3)
    images = torch.randn(128, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    both = BitAllocation(program, {"1.weight": "1", "3.weight": "3"}, context(images), 128)
    quiet = captured(nn.Sequential(*model), 3, 3, 3)
    with torch.no_grad():
        quiet.get_parameter("3.weight").mul_(0.1)
    less = BitAllocation(quiet, {"1.weight": "1", "3.weight": "3"}, context(images), 128)
    assert less.sensitivities["1.weight"] < 0.1 * both.sensitivities["1.weight"]
