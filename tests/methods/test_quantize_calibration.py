"""Calibration data a few samples at a time, and checks of the values that they give."""

import pytest
import torch
from quantize_networks import Images, images, small

from modelopt_cli.errors import DataError
from modelopt_cli.methods import batches
from modelopt_cli.methods.batches import calibration_batches, numbers_of, require_finite
from modelopt_cli.methods.context import Context

pytestmark = pytest.mark.usefixtures("one_thread")


def test_samples_come_a_few_at_a_time_in_order_and_laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    x = images(7, 3, 12, 12)
    monkeypatch.setattr(batches, "LARGEST", 2 * x[0].numel() + 1)
    context = Context(data=Images(x), batch_size=5)  # type: ignore[arg-type]
    parts = list(calibration_batches(small(), Images(x), context))  # type: ignore[arg-type]
    assert [len(part) for part in parts] == [2, 2, 1, 2]
    assert all(part.is_contiguous(memory_format=torch.channels_last) for part in parts)  # type: ignore[union-attr]
    assert torch.equal(torch.cat(parts), x)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_one_number_that_is_not_finite_is_refused(bad: float, dtype: torch.dtype) -> None:
    x = torch.zeros(3, 5, 7, 9, dtype=dtype).to(memory_format=torch.channels_last)
    require_finite(x)
    x[2, 1, 3, 4] = bad
    with pytest.raises(DataError, match="NaN or infinity"):
        require_finite(x, "here")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_numbers_are_not_copied(layout: torch.memory_format) -> None:
    x = torch.randn(2, 3, 4, 5).to(memory_format=layout)
    numbers = numbers_of(x)
    assert numbers.data_ptr() == x.data_ptr()
    assert numbers.is_contiguous()
    assert torch.equal(numbers.sort().values, x.flatten().sort().values)
