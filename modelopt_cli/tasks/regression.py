"""Numbers: one or several for each sample."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modelopt_cli.data.raw_inputs import require_finite
from modelopt_cli.data.targets import RawTarget, TargetFormat, Targets, UnlikeOthers
from modelopt_cli.errors import DataError
from modelopt_cli.tasks.draws import Counts, Values, sums
from modelopt_cli.tasks.task import Misfit
from modelopt_cli.tasks.task_output import finite, require


class NumberTargets(TargetFormat):
    """Finite numbers, float32 ``(N, D)``; a single number is one of one."""

    def check(self, raw: RawTarget, inputs: Any, classes: int | None) -> Tensor:
        """The numbers of one sample; see :class:`TargetFormat`."""
        if isinstance(raw, bool) or not isinstance(raw, int | float | Tensor):
            raise DataError(f"target is {type(raw).__name__}, not numbers")
        return finite_target(torch.as_tensor(raw, dtype=torch.float32)).flatten()

    def collate(self, targets: Sequence[Tensor]) -> Tensor:
        """Numbers ``(N, D)``."""
        return stacked(targets)


def finite_target(target: Tensor) -> Tensor:
    """The target itself; raises DataError where it holds NaN or infinity."""
    require_finite(target, "target ")
    return target


def stacked(targets: Sequence[Tensor]) -> Tensor:
    """Targets of one shape, ``(N, ...)``; raises UnlikeOthers where they have several."""
    shapes = [tuple(target.shape) for target in targets]
    usual, count = Counter(shapes).most_common(1)[0]
    if count < len(shapes):
        place = next(place for place, shape in enumerate(shapes) if shape != usual)
        raise UnlikeOthers(f"target has shape {shapes[place]}, where others have {usual}", place)
    return torch.stack(list(targets))


def targets(names: tuple[str, ...] | None = None) -> NumberTargets:
    """The format of the targets."""
    return NumberTargets()


def judged(output: Any, numbers: Targets, inputs: Any) -> Tensor:
    """Outputs ``(N, D)``, float32, whatever shape they have beyond the batch.

    Raises:
        InputError: the network returns another form, or NaN.
        Misfit: there are more or fewer numbers than targets.
    """
    fits = isinstance(output, Tensor) and output.dim() > 0 and len(output) == len(numbers)
    require(fits, output, len(numbers), "a network for regression", "numbers", "give one")
    rows = finite(output).flatten(1) if output.dim() > 1 else finite(output).unsqueeze(1)
    if not isinstance(numbers, Tensor) or rows.shape != numbers.shape:
        count = numbers.shape[1] if isinstance(numbers, Tensor) and numbers.dim() == 2 else None
        known = "other targets" if count is None else f"{count} number{'s' * (count != 1)}"
        raise Misfit(0, f"target has {known}, the network returns {rows.shape[1]}")
    return rows


def absolute_error(output: Tensor, numbers: Tensor) -> Tensor:
    """Mean absolute error of each sample, ``(N,)``."""
    return (output.double() - numbers.double()).abs().mean(1)


def moments(output: Tensor, numbers: Tensor) -> Tensor:
    """Sums that R2 takes of each sample: 1, target, its square, the squared error, ``(N, 4, D)``, float64."""
    actual, error = numbers.double(), (output.double() - numbers.double()).square()
    return torch.stack([torch.ones_like(actual), actual, actual.square(), error], 1)


def r_squared(kept: NDArray[np.float64], counts: Counts) -> Values:
    """Coefficient of determination, the mean over the outputs: 1 is perfect, 0 is what their mean has.

    As scikit-learn's ``r2_score``. Outputs whose targets are all the same are left out.
    """
    # Around the mean of all samples, so that large targets lose no digits.
    centre = kept[:, 1].mean(0)
    own = kept[:, 1] - centre
    parts = np.stack([kept[:, 0], own, own * own, kept[:, 3]], 1)
    n, total, square, error = sums(parts, counts)
    spread = square - total * total / n
    known = spread > 1e-12 * square
    each = np.where(known, 1 - error / np.where(known, spread, 1), 0.0)
    with np.errstate(invalid="ignore"):
        return each.sum(1) / known.sum(1)  # type: ignore[no-any-return]
