"""A note on layers whose weights are stored for half precision: which of them compute in it."""

from collections import Counter

import torch

from modelopt_cli.kernels import half_layers
from modelopt_cli.program.program import Program


def half_note(program: Program, device: str = "cpu") -> str | None:
    """Say how many layers compute in half precision on a device, or why none does.

    Args:
        program: after ``kernels.prepare`` for the device.
        device: ``cpu``, ``cuda`` or ``cuda:N``.

    Returns:
        One line without the Program's name, or None where no weight is stored for half precision.
    """
    layers = dict(program.named_modules())
    wanted = {
        name: dtype
        for name, layer in layers.items()
        if (dtype := half_layers.wanted_type(layer, program.encodings.get(f"{name}.weight"))) is not None
    }
    if not wanted:
        return None
    computing = Counter(str(dtype).removeprefix("torch.") for dtype in wanted.values())
    kind = " and ".join(computing)
    count = half_layers.computed_in_half(program)
    if not count:
        reasons = {half_layers.obstacle(dtype, torch.device(device)) for dtype in wanted.values()}
        why = "; ".join(sorted(filter(None, reasons))) or "its products differ here"
        return f"stored for {kind}, and computed in float32: {why}"
    few = half_layers.has_int4(program)
    line = f"{count} of its layers compute in {kind}"
    return line + (f", {few} of them through int4 operators for few rows" if few else "")
