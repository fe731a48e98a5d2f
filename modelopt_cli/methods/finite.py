"""Refusal of networks whose values are no numbers on the data that a method looks at."""

import torch
from torch import Tensor

from modelopt_cli.errors import DataError


def require_finite(value: Tensor, where: str | None = None, otherwise: str = "") -> None:
    """Refuse values of a network that hold NaN or infinity.

    Args:
        value: of a layer, or the network's logits, on calibration data.
        where: the layer or the data.
        otherwise: another next step than to check the inputs.

    Raises:
        DataError: they do.
    """
    if not torch.isfinite(value).all():
        hint = "check the checkpoint and the preprocessing" + (f", or {otherwise}" if otherwise else "")
        raise DataError("the network gives NaN or infinity on the calibration data", where=where, hint=hint)
