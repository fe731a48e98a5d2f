"""Sizes of the inputs that may be others: found at capture, recorded, and refused where they are fixed."""

import json
from typing import Any

import pytest
import torch
from program_inputs_networks import spec
from torch import Tensor, nn

from modelopt_cli.errors import InputError
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.capture import capture
from modelopt_cli.program.serialization import from_data, state_of, to_data

IMAGE = (3, 40, 40)


def conv(*more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), *more)


class Tokens(nn.Module):
    """Sums what two rows of the same length say, with a table of positions."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(9, 4), nn.Parameter(torch.randn(positions, 4))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        values = self.words(ids) + self.positions[: ids.shape[1]]
        return (values * mask.unsqueeze(-1)).sum(1)


class Fixed(nn.Module):
    """Needs the number of its rows, which becomes a literal."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, i] * i for i in range(x.shape[1])], 1).sum(1)


class Wide(nn.Module):
    """Takes any height, but one width."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(2) @ torch.ones(40, 2)


class Halved(nn.Module):
    """Halves its input a few times, and adds what it was when it has doubled it again: a U-Net."""

    def __init__(self, kind: Any, doubling: Any, depth: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(kind(3, 3, 3, stride=2, padding=1) for _ in range(depth))
        self.up = nn.ModuleList(doubling(3, 3, 2, stride=2) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for layer in self.down:
            values.append(layer(values[-1]).relu())
        x = values.pop()
        for layer in self.up:
            x = layer(x) + values.pop()
        return x


def halved(depth: int, rank: int = 2) -> nn.Module:
    kinds = {1: (nn.Conv1d, nn.ConvTranspose1d), 2: (nn.Conv2d, nn.ConvTranspose2d)}
    return Halved(*kinds[rank], depth).eval()


@pytest.mark.parametrize(
    ("rank", "depth", "inputs", "other"),
    [
        pytest.param(1, 1, (3, 50), (3, 22), id="even-length"),
        pytest.param(1, 5, (3, 96), (3, 32), id="length-halved-five-times"),
        pytest.param(2, 1, (3, 32, 32), (3, 48, 40), id="even-sides"),
        pytest.param(2, 3, (3, 40, 48), (3, 16, 24), id="sides-halved-three-times"),
        pytest.param(2, 5, (3, 32, 32), (3, 64, 96), id="sides-halved-five-times"),
    ],
)
def test_sizes_that_must_be_multiples_are_free(
    rank: int, depth: int, inputs: tuple[int, ...], other: tuple[int, ...]
) -> None:
    model = halved(depth, rank)
    program = capture(model, InputSpec(inputs))
    assert program.input.free == tuple(range(1, rank + 1))
    x = torch.randn(2, *other)
    with torch.no_grad():
        assert torch.equal(program(x), model(x))


@pytest.mark.parametrize(
    ("inputs", "given", "multiples"),
    [
        ((3, 48, 40), (3, 33, 31), "a multiple of 16 in dimension 2 and a multiple of 8 in dimension 3"),
        ((3, 32, 32), (3, 32, 31), "a multiple of 32 in dimension 3"),
    ],
)
def test_a_free_size_that_the_network_cannot_take_is_one_line(
    inputs: tuple[int, ...], given: tuple[int, ...], multiples: str
) -> None:
    program = capture(halved(1), InputSpec(inputs))
    with pytest.raises(InputError) as error:
        program(torch.zeros(1, *given))
    line = str(error.value)
    assert line.startswith(
        f"x has shape {(1, *given)}, a size that the network cannot take: The size of tensor"
    )
    assert line.endswith(f"; give {multiples}, as in {('N', *inputs)}".replace("'", ""))
    assert "\n" not in line


def test_an_error_that_every_size_gives_is_the_layers_own() -> None:
    program = capture(halved(1), InputSpec((3, 32, 32)))
    program.get_submodule("down.0").register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="of no size"):
        program(torch.zeros(1, 3, 33, 31))


def test_a_token_that_is_unknown_is_no_matter_of_size() -> None:
    with pytest.raises(IndexError):
        tokens(64)(torch.full((2, 7), 99), torch.ones(2, 7).bool())


def fail(*_: Any) -> None:
    raise RuntimeError("of no size")


@pytest.mark.parametrize(
    ("model", "inputs", "free"),
    [
        pytest.param(conv(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)), IMAGE, (1, 2), id="image"),
        pytest.param(conv(nn.Upsample(scale_factor=2)), IMAGE, (1, 2), id="image-to-image"),
        pytest.param(conv(nn.Flatten(), nn.Linear(1600, 2)), IMAGE, (), id="fixed-image"),
        pytest.param(Wide(), IMAGE, (1,), id="height-alone"),
        pytest.param(nn.Sequential(nn.Conv1d(3, 4, 5), nn.AdaptiveAvgPool1d(1)), (3, 50), (1,), id="time"),
        pytest.param(nn.GRU(3, 4, batch_first=True), (6, 3), (0,), id="sequence"),
        pytest.param(nn.Sequential(nn.Linear(3, 4)), (3,), (), id="features"),
        pytest.param(nn.Sequential(nn.Conv3d(3, 4, 3, padding=1)), (3, 4, 8, 8), (1, 2, 3), id="video"),
        pytest.param(Fixed(), (6,), (), id="literal"),
    ],
)
def test_what_may_vary_is_found_and_is_right_there(
    model: nn.Module, inputs: tuple[int, ...], free: tuple[int, ...]
) -> None:
    program = capture(model.eval(), InputSpec(inputs))
    assert program.input.free == free
    for more in (3, 17):
        shape = [size + more * (place in free) for place, size in enumerate(inputs)]
        x = torch.randn(2, *shape)
        with torch.no_grad():
            assert torch.equal(first(program(x)), first(model(x)))


def first(value: Any) -> Any:
    return value[0] if isinstance(value, tuple) else value


def tokens(positions: int) -> Program:
    rows = InputSpec((12,), dtype="int64", name="ids"), InputSpec((12,), dtype="bool", name="mask")
    return capture(Tokens(positions), spec(*rows))


@pytest.mark.parametrize("positions", [64, 12])
def test_lengths_that_are_equal_vary_together(positions: int) -> None:
    """The table of positions may end where the sequence does: then shorter ones are free."""
    program = tokens(positions)
    assert [each.free for each in program.input.tensors] == [(0,), (0,)]
    again = from_data(json.loads(json.dumps(to_data(program))), state_of(program))
    assert again.input == program.input
    assert again(torch.ones(2, 7).long(), torch.ones(2, 7).bool()).shape == (2, 4)


def test_a_fixed_size_is_said_where_another_is_given() -> None:
    program = capture(conv(nn.Flatten(), nn.Linear(1600, 2)), InputSpec(IMAGE))
    with pytest.raises(InputError) as error:
        program(torch.zeros(2, 3, 48, 48))
    assert str(error.value).startswith(
        "x has shape (2, 3, 48, 48), and the Program takes (N, 3, 40, 40), a size that is fixed"
    )
    assert error.value.__cause__ is not None


def test_of_several_inputs_the_wrong_one_is_named() -> None:
    with pytest.raises(InputError, match=r"mask has shape \(2, 12, 1\), .* takes \(N, 12\), of which"):
        tokens(64)(torch.ones(2, 12).long(), torch.ones(2, 12, 1).bool())


@pytest.mark.parametrize(
    ("by_place", "by_name", "problem"),
    [
        pytest.param(("ids",), (), "mask missing", id="by-place"),
        pytest.param((), ("mask",), "ids missing", id="by-name"),
        pytest.param((), ("ids", "masks"), "mask missing and masks unknown", id="misspelt"),
        pytest.param(("ids", "mask"), ("more",), "more unknown", id="one-more-by-name"),
        pytest.param(("ids", "mask", "more"), (), "3 are given", id="one-more-by-place"),
    ],
)
def test_inputs_that_are_missing_or_unknown_are_named(
    by_place: tuple[str, ...], by_name: tuple[str, ...], problem: str
) -> None:
    value = {"ids": torch.ones(2, 12).long(), "mask": torch.ones(2, 12).bool()}
    ones = torch.ones(2, 12)
    with pytest.raises(InputError) as error:
        tokens(64)(*(value.get(name, ones) for name in by_place), **{n: value.get(n, ones) for n in by_name})
    assert error.value.message == f"the Program takes ids, mask: {problem}"
    assert "\n" not in str(error.value)


def test_an_error_at_the_right_size_is_the_layers_own() -> None:
    program = capture(conv(), InputSpec(IMAGE))
    with pytest.raises(RuntimeError, match="type"):
        program(torch.zeros(2, *IMAGE, dtype=torch.float64))


def test_a_file_of_before_takes_what_it_took() -> None:
    data = to_data(program := capture(conv(), InputSpec(IMAGE)))
    del data["input"]["free"]
    again = from_data(data, state_of(program))
    assert again.input.free == ()
    assert again(torch.zeros(1, 3, 48, 48)).shape == (1, 4, 24, 24)
