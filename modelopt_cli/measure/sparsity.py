"""A note on zeros among the weights, so that nobody takes them for a speedup."""

from collections import Counter

import torch

from modelopt_cli.artifact.encodings import pruned_names
from modelopt_cli.kernels import sparse24
from modelopt_cli.program.program import Program

_WITHOUT = "only 2:4 weights of linear layers in half precision and of int8 layers have sparse kernels"


def sparsity_note(program: Program, device: str = "cpu") -> str | None:
    """Say how much of a pruned Program is zero, and if that makes it faster on a device.

    Args:
        program: after ``kernels.prepare`` for the device.
        device: ``cpu``, ``cuda`` or ``cuda:N``.

    Returns:
        One line without the Program's name, or None where no parameter was pruned to zeros.
    """
    state = program.state_dict()
    weights = {name: state[name] for name in pruned_names(program.encodings) if name in state}
    total = sum(weight.numel() for weight in weights.values())
    zeros = total - sum(int(torch.count_nonzero(weight)) for weight in weights.values())
    if not zeros:
        return None
    layers_named = f"{len(weights)} pruned layer{'s' if len(weights) > 1 else ''}"
    digits = 0 if zeros < 0.99 * total else 2  # 99.6 % is not all
    share = f"{100 * zeros / total:.{digits}f} % of the weights in its {layers_named} are zero"
    if torch.device(device).type != "cuda":
        return f"{share}; that makes the file smaller, not the network faster: a CPU multiplies zeros, too"
    layers = [program.get_submodule(name.rpartition(".")[0]) for name in weights]
    reasons = Counter(sparse24.reason(layer) or _WITHOUT for layer in layers)
    fast = reasons.pop(sparse24.SPARSE, 0)
    without_kernel = "; ".join(f"{count} not: {why}" for why, count in sorted(reasons.items()))
    if not fast:
        return f"{share}; that makes none of them faster: {'; '.join(sorted(reasons))}"
    return f"{share}; {fast} of them run through 2:4 kernels{', ' + without_kernel if without_kernel else ''}"
