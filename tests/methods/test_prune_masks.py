"""Which weights go: counts, patterns and blocks against numpy, and zeros that hold."""

import copy
import math

import numpy as np
import pytest
import torch
from prune_cases import net, smooth
from torch import Tensor, nn

from modelopt_cli.errors import ModeloptError
from modelopt_cli.methods.prune.config import PruneConfig
from modelopt_cli.methods.prune.masks import Masks, lowest, mask_of, weight_masks
from modelopt_cli.methods.prune.structures import SparsityPattern
from modelopt_cli.program import Encoding
from modelopt_cli.training import Callback

PATTERN, BLOCK = SparsityPattern(keep=2, group=4), SparsityPattern(unit=4)


def _scores(*shape: int, seed: int = 0, levels: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=g) if not levels else torch.randint(levels, shape, generator=g).float()


@pytest.mark.parametrize("levels", [0, 3], ids=["distinct", "ties"])
@pytest.mark.parametrize("sparsity", [0.0, 0.013, 0.5, 0.77, 1.0])
def test_masks_unstructured_removes_the_lowest_first_of_equals_first(sparsity: float, levels: int) -> None:
    scores = _scores(7, 5, 3, 3, levels=levels)
    order = np.argsort(scores.numpy().ravel(), kind="stable")
    expected = np.ones(scores.numel(), dtype=bool)
    expected[order[: round(sparsity * scores.numel())]] = False
    mask = mask_of(scores, SparsityPattern(), sparsity)
    np.testing.assert_array_equal(mask.numpy().ravel(), expected)


def test_masks_a_count_over_a_size_comes_back_exactly() -> None:
    scores = _scores(97, 103)
    for count in (0, 1, 1234, 5001, 9990, 9991):
        mask = mask_of(scores, SparsityPattern(), count / scores.numel())
        assert int((~mask).sum()) == count


def test_masks_lowest_takes_infinite_scores_too() -> None:
    scores = torch.tensor([1.0, -math.inf, math.inf, -math.inf, 0.0])
    assert lowest(scores, 3).tolist() == [False, True, False, True, True]
    assert lowest(scores, 1).tolist() == [False, True, False, False, False]
    assert lowest(scores, 5).all()


@pytest.mark.parametrize("shape", [(6, 16), (6, 10), (5, 8, 3, 2), (3, 9, 2), (2, 4, 1, 1)], ids=str)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2), (3, 5)])
def test_masks_pattern_keeps_the_best_n_of_every_m_input_channels(
    shape: tuple[int, ...], n: int, m: int
) -> None:
    scores, structure = _scores(*shape, levels=4), SparsityPattern(keep=n, group=m)
    if structure.obstacle(shape):
        assert shape[1] < m
        return
    mask = mask_of(scores, structure, 0.0).numpy()
    for place in np.ndindex(shape[0], *shape[2:]):
        line = scores.numpy()[(place[0], slice(None), *place[1:])]
        kept = mask[(place[0], slice(None), *place[1:])]
        whole = shape[1] // m * m
        assert kept[whole:].all()
        for start in range(0, whole, m):
            lowest_first = np.argsort(line[start : start + m], kind="stable")
            expected = np.ones(m, dtype=bool)
            expected[lowest_first[: m - n]] = False
            np.testing.assert_array_equal(kept[start : start + m], expected)


def test_masks_pattern_is_what_torch_stores_as_semi_structured() -> None:
    """Groups of four neighbours in a row of the matrix, as torch.sparse.to_sparse_semi_structured wants."""
    mask = mask_of(_scores(32, 64), PATTERN, 0.0)
    assert (mask.view(-1, 4).sum(1) == 2).all()
    # A convolution's matrix in the kernels' layout: channels last.
    conv = mask_of(_scores(8, 16, 3, 3), PATTERN, 0.0).contiguous(memory_format=torch.channels_last)
    assert (conv.permute(0, 2, 3, 1).reshape(-1, 4).sum(1) == 2).all()


@pytest.mark.parametrize("shape", [(6, 16), (6, 10), (5, 3, 3, 3), (4, 1, 3, 3)], ids=str)
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
def test_masks_blocks_of_a_row_go_together(shape: tuple[int, ...], sparsity: float) -> None:
    scores = _scores(*shape)
    rows = scores.numpy().reshape(shape[0], -1).astype(np.float64)
    across = rows.shape[1] // 4
    sums = rows[:, : across * 4].reshape(-1, 4).sum(1)
    expected = np.ones_like(rows, dtype=bool)
    for block in np.argsort(sums, kind="stable")[: round(sparsity * sums.size)]:
        row, place = divmod(int(block), across)
        expected[row, place * 4 : place * 4 + 4] = False
    mask = mask_of(scores, BLOCK, sparsity)
    np.testing.assert_array_equal(mask.numpy().reshape(rows.shape), expected)
    assert BLOCK.units(scores).numel() == sums.size


STRUCTURES = [SparsityPattern(), PATTERN, BLOCK]


@pytest.mark.parametrize("structure", STRUCTURES, ids=["unstructured", "2:4", "block"])
def test_masks_what_is_gone_stays_gone_and_counts(structure: SparsityPattern) -> None:
    scores = _scores(8, 16)
    first = mask_of(scores, structure, 0.25)
    again = scores.masked_fill(~first, -math.inf)
    second = mask_of(again.masked_fill(first, 1.0), structure, 0.5)
    assert not (second & ~first).any()
    assert int((~second).sum()) == scores.numel() // 2
    assert torch.equal(mask_of(again, structure, 0.0), first)


def test_masks_blocks_over_scattered_zeros_keep_them() -> None:
    scores = _scores(4, 8)
    scattered = torch.rand(4, 8, generator=torch.Generator().manual_seed(1)) < 0.3
    mask = mask_of(scores.masked_fill(scattered, -math.inf), BLOCK, 0.25)
    assert not (mask & scattered).any()
    whole = (~mask).view(-1, 4).all(1)
    assert int(whole.sum()) >= 2
    assert int((~mask & ~scattered).sum()) <= 2 * 4


@pytest.mark.parametrize(
    ("structure", "shape", "why"),
    [
        (PATTERN, (8, 3, 7, 7), "3 input channels, fewer than 4"),
        (PATTERN, (8, 1, 3, 3), "1 input channels, fewer than 4"),
        (SparsityPattern(unit=16), (8, 1, 3, 3), "9 weights in a row, fewer than 16"),
        (BLOCK, (8, 1, 3, 3), None),
        (SparsityPattern(), (3, 1), None),
    ],
)
def test_masks_say_which_shapes_they_cannot_serve(
    structure: SparsityPattern, shape: tuple[int, ...], why: str | None
) -> None:
    assert structure.obstacle(shape) == why


def test_masks_structure_comes_from_the_config() -> None:
    assert PruneConfig(structure="2:4").pattern == PATTERN
    assert PruneConfig(structure="block", block=8, sparsity=0.5).pattern == SparsityPattern(unit=8)
    assert PruneConfig(structure="unstructured", sparsity=0.5).pattern == SparsityPattern()
    assert PruneConfig(sparsity=0.5).pattern is None


def test_masks_refuse_scores_that_are_not_numbers() -> None:
    with pytest.raises(ModeloptError, match=r"fc\.weight: scores are not numbers"):
        weight_masks({"fc.weight": torch.tensor([[1.0, math.nan]])}, SparsityPattern(), {"fc.weight": 0.5})


def test_masks_hold_through_training() -> None:
    program = net()
    masks = Masks(
        weight_masks({n: _scores(*program.get_parameter(n).shape) for n in ("stem.weight", "fc.weight")},
                     SparsityPattern(), {"stem.weight": 0.7, "fc.weight": 0.4})
    )  # fmt: skip
    callback: Callback = masks
    masks.apply_(program)
    optimizer = torch.optim.SGD(program.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    program.train()
    before = program.get_parameter("stem.weight").detach().clone()
    for step in range(3):
        callback.before_step(program, step, 3)
        optimizer.zero_grad()
        program(smooth(4, 3, 12, 12)).square().sum().backward()
        optimizer.step()
        callback.after_step(program, step, 3)
        for name, mask in masks.masks.items():
            assert not program.get_parameter(name)[~mask].any()
            assert program.get_parameter(name)[mask].all()
    assert not torch.equal(before, program.get_parameter("stem.weight"))


def test_masks_zero_infinite_weights_too() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.data[0, 0] = math.inf
    Masks({"weight": torch.tensor([[False, True], [True, True]])}).apply_(layer)
    assert layer.weight[0, 0] == 0


def test_masks_state_comes_back() -> None:
    masks = Masks({"weight": _scores(3, 3) > 0.5})
    other = Masks({})
    other.restore({name: mask.clone() for name, mask in masks.state().items()})
    assert torch.equal(other.masks["weight"], masks.masks["weight"])


def test_masks_of_a_program_are_what_earlier_pruning_promised() -> None:
    program = copy.deepcopy(net())
    for name in ("stem.weight", "fc.weight"):
        program.get_parameter(name).data[0] = 0
    program.encodings = {"stem.weight": Encoding("sparse", {"form": "mask"}), "body.weight": Encoding("raw")}
    masks = Masks.of(program).masks
    assert set(masks) == {"stem.weight"}
    assert torch.equal(masks["stem.weight"], program.get_parameter("stem.weight") != 0)
