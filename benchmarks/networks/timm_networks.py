"""Every module of timm's networks: the one with the fewest parameters."""

import sys
from pathlib import Path

import torch
from torch import nn

from benchmarks.networks.network import Network, images, prepared
from modelopt_cli.program import InputSpec

SIDES = (64, 112, 128, 126, 160, 192, 224)
"""Heights and widths to try, smallest first, before the network's own."""
REDUCED = {
    "deepseek_vit": ({"depth": 2}, "2 of its blocks"),
    "gemma4_vit": ({"depth": 2}, "2 of its blocks"),
}
"""Too large for the limits: fewer blocks of the same kind."""


def names() -> list[str]:
    """The modules."""
    import timm

    return sorted(timm.list_modules())


def smallest(module: str) -> str:
    """The network of a module with the fewest parameters, timm's own test networks left out."""
    import timm

    sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "program"))
    from program_networks import _no_initialisation

    sizes = {}
    for name in timm.list_models(module=module):
        if not name.startswith("test_"):
            with torch.device("meta"), _no_initialisation():
                sizes[name] = sum(p.numel() for p in timm.create_model(name).parameters())
    return min(sizes, key=lambda name: (sizes[name], name))


def build(module: str, kind: str | None) -> Network:
    """The smallest network, or that ``kind``, for the smallest images that it takes."""
    import timm

    kind = kind or smallest(module)
    config = timm.get_pretrained_cfg(kind)
    given, note = REDUCED.get(module, ({}, ""))
    native = config.input_size[-1]
    model: nn.Module | None = None
    for side in (*(s for s in SIDES if s < native), native):
        size = {"img_size": side} if config.fixed_input_size and side != native else {}
        try:
            if model is None or config.fixed_input_size:
                torch.manual_seed(0)
                model = timm.create_model(kind, **given, **size).eval()
            network = _on_images(kind, model, side, note)
            prepared(network).model(images(1, side))
        except (RuntimeError, AssertionError, ValueError, TypeError):  # a size that does not go through
            if side == native:
                raise
            continue
        return network
    raise AssertionError


def _on_images(kind: str, model: nn.Module, side: int, note: str) -> Network:
    spec = InputSpec((3, side, side))
    return Network(kind, model, spec, lambda count, seed: images(count, side, seed), note)
