"""Channel pruning by Torch-Pruning 1.6 and by us, on the same network and by the same rule, to be compared."""

import contextlib
import warnings
from collections.abc import Iterator

import torch
import torch_pruning
from torch import Tensor, nn
from torchvision.models import VisionTransformer

CLASSES = 1000
Shapes = dict[str, tuple[int, ...]]


def kept(units: int, ratio: float, multiple: int = 1) -> int:
    """How many of so many units stay: Torch-Pruning's rule, rounded down."""
    count = int(units * (1 - ratio))
    return count - count % multiple


def importance(units: int) -> Tensor:
    """Scores that scatter what is removed over a layer, the same in every run; the smallest are removed."""
    return torch.arange(units, dtype=torch.float64).mul(0.6180339887498949).frac()


def multiple_of(model: nn.Module) -> int:
    """What Torch-Pruning's documentation has channel counts rounded to: the heads of a ViT, otherwise 1."""
    return model.encoder.layers[0].num_heads if isinstance(model, VisionTransformer) else 1


def classifiers(model: nn.Module) -> list[nn.Module]:
    """The layers that give the logits, which are not pruned; auxiliary heads have their own."""
    found = (m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    return [m for m in found if m.weight.shape[0] == CLASSES]


def prune_theirs(model: nn.Module, example: Tensor, ratio: float) -> nn.Module:
    """Prune in place with Torch-Pruning, with the options its examples give these networks.

    Raises:
        Exception: whatever it fails with.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(True)  # it follows autograd's graph
    with _quiet():
        pruner = torch_pruning.pruner.BasePruner(
            model,
            example,
            importance=lambda group: importance(len(group[0].idxs)),
            pruning_ratio=ratio,
            global_pruning=False,
            ignored_layers=classifiers(model),
            round_to=multiple_of(model) if multiple_of(model) > 1 else None,
            in_channel_groups={},  # its defaults are shared between instances
            out_channel_groups={},
            num_heads={},
        )
        pruner.step()
    if isinstance(model, VisionTransformer):
        model.hidden_dim = model.conv_proj.out_channels  # as its example does; the forward pass reads it
    return model.eval()


def shapes_of(model: nn.Module) -> Shapes:
    """Shapes of all parameters, by name."""
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Unwrapped parameters detected": the default is what is wanted
        yield
