"""Entries of a cache of logits, against NumPy."""

import numpy as np
import pytest
import torch
from distill_cases import normal

from modelopt_cli.methods.distill.cache_layout import Layout


def test_few_classes_come_back_bit_for_bit() -> None:
    logits = normal(6, 5).float()
    logits[0, 0], logits[1, 1], logits[2, 2] = -0.0, 1e-44, -3e38
    layout = Layout(100, 3, 5, 5)
    assert layout.exact
    assert layout.entry.itemsize == 4 + 5 * 4
    assert layout.size == 300 * 24
    found = layout.unpack(layout.pack(logits))
    assert found.dtype is torch.float32
    assert torch.equal(found.view(torch.int32), logits.view(torch.int32))


@pytest.mark.parametrize(
    ("classes", "top", "size"), [(12, 3, 4 + 4 + 12 + 6), (1 << 16, 2, 20), ((1 << 16) + 1, 2, 24)]
)
def test_of_many_classes_the_largest_are_kept_and_the_others_share_the_rest(
    classes: int, top: int, size: int
) -> None:
    layout = Layout(1, 1, classes, top)
    logits = normal(4, classes, scale=3.0).float()
    logits[3] += 1000.0
    logits[2, -1] = 50.0  # the last index, and next to no mass for the others
    assert not layout.exact
    assert layout.entry.itemsize == size
    found = layout.unpack(layout.pack(logits)).numpy()
    for row, given in zip(found, logits.numpy(), strict=True):
        kept = np.argsort(-given, kind="stable")[:top]
        others = np.setdiff1d(np.arange(classes), kept)
        wide = given[others].astype(np.float64)
        mass = np.log(np.exp(wide - wide.max()).sum()) + wide.max()
        np.testing.assert_array_equal(row[kept], given[kept])
        np.testing.assert_allclose(row[others], mass - np.log(len(others)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_error_is_what_the_page_says(temperature: float) -> None:
    classes, top = 40, 8
    rest = classes - top
    logits = normal(50, classes, scale=4.0).float()
    found = Layout(1, 1, classes, top).unpack(Layout(1, 1, classes, top).pack(logits))
    kept = torch.zeros(logits.shape, dtype=torch.bool).scatter(1, logits.topk(top, 1).indices, True)
    p, q = ((z.double() / temperature).softmax(1) for z in (logits, found))
    mass, read = (torch.where(kept, 0, each).sum(1) for each in (p, q))
    odds = (read / (1 - read)) / (mass / (1 - mass))
    assert bool((odds <= rest ** (1 - 1 / temperature) + 1e-6).all())
    assert bool((odds >= 1 - 1e-6).all())
    if temperature == 1:
        torch.testing.assert_close(torch.where(kept, p, 0), torch.where(kept, q, 0), rtol=1e-5, atol=1e-7)
        divergence = (p * (p / q).log()).sum(1)
        assert bool((divergence <= mass * np.log(rest) + 1e-6).all())
        assert float(divergence.max()) > 1e-3
