"""Faster variants of a float network: the fastest is timed, so that no speedup is one over a slow baseline.

Each variant is one row. It counts only if its outputs are those of the network itself.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modelopt_cli.kernels import half_layers
from modelopt_cli.kernels.fp32 import prepack
from modelopt_cli.measure.evaluated_model import is_quantized
from modelopt_cli.measure.latency import Call, time_interleaved
from modelopt_cli.program.input_batch import Inputs, any_images, call, clone, tensors_of
from modelopt_cli.program.output_structure import flatten
from modelopt_cli.program.program import Program

AS_LOADED, EAGER = "as loaded", "eager"
_WARMUP, _RUNS = 2, 7


@dataclass(frozen=True)
class Variant:
    """Another way to compute what a network computes.

    Attributes:
        help: one line for the documentation.
        applies: True for a network and a batch of inputs that it is meant for.
        make: makes it of the network, which it leaves alone; may raise whatever it likes.
    """

    help: str
    applies: Callable[[nn.Module, Inputs], bool]
    make: Callable[[nn.Module], Call]


def _channels_last(network: nn.Module) -> nn.Module:
    variant = copy.deepcopy(network).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert isinstance(variant, nn.Module)
    return variant.eval()


def _prepacked(network: nn.Module) -> Call:
    assert isinstance(network, Program)
    return prepack(network)


VARIANTS: dict[str, Variant] = {
    "channels-last": Variant(
        "weights in channels-last order, for batches of images",
        lambda network, inputs: any_images(inputs),
        _channels_last,
    ),
    "prepacked": Variant(
        "convolutions and linear layers packed and fused ahead of time, for a traced network on a CPU",
        lambda network, inputs: isinstance(network, Program) and tensors_of(inputs)[0].is_cpu,
        _prepacked,
    ),
}


def fastest_variant(network: nn.Module, inputs: Inputs, *, seed: int = 0) -> tuple[Call, str]:
    """Find the fastest variant of a network.

    A network with int8 layers, or with layers that compute in half precision, is taken as it was loaded: its
    kernels were chosen then.

    Args:
        network: in evaluation mode, on the device of its inputs; it is not changed.
        inputs: a batch.
        seed: of the order in which variants are timed.

    Returns:
        The variant and its name: one of ``VARIANTS``, ``EAGER`` or ``AS_LOADED``.
    """
    if is_quantized(network) or half_layers.computed_in_half(network):
        return network, AS_LOADED
    variants = equivalent_variants(network, inputs)
    if len(variants) == 1:
        return variants[0]
    times = time_interleaved(
        [(variant, inputs) for variant, _ in variants], warmup=_WARMUP, runs=_RUNS, seed=seed
    )
    # The fastest pass is the steadiest figure that so few runs can give.
    return min(zip(variants, times, strict=True), key=lambda pair: min(pair[1]))[0]


def equivalent_variants(network: nn.Module, inputs: Inputs) -> list[tuple[Call, str]]:
    """All variants with the network's outputs, and their names; the network itself comes first."""
    variants: list[tuple[Call, str]] = [(network, EAGER)]
    with torch.inference_mode():
        expected = call(network, clone(inputs))  # a network may change its inputs
    for name, row in VARIANTS.items():
        if row.applies(network, inputs):
            variant = equivalent(lambda make=row.make: make(network), inputs, expected)  # type: ignore[misc]
            if variant is not None:
                variants.append((variant, name))
    return variants


def equivalent(make: Callable[[], Call], inputs: Inputs, expected: object) -> Call | None:
    """Make a variant of a network; None if that fails, or if its outputs are not those of the network.

    Args:
        make: makes the variant.
        inputs: a batch.
        expected: outputs of the network itself.
    """
    try:
        variant = make()
        with torch.inference_mode():
            return variant if same_outputs(call(variant, clone(inputs)), expected) else None
    except Exception:  # whatever it is: the network itself remains
        return None


def same_outputs(outputs: object, expected: object) -> bool:
    """True if two outputs have the same tensors, and those are equal but for rounding."""
    tensors, references = flatten(outputs), flatten(expected)
    return tensors.keys() == references.keys() and all(
        _same(tensors[name], references[name]) for name in references
    )


def _same(outputs: Tensor, expected: Tensor) -> bool:
    if outputs.shape != expected.shape:
        return False
    scale = float(expected.abs().max()) if expected.numel() else 1.0
    return torch.allclose(outputs.float(), expected.float(), rtol=1e-3, atol=1e-3 * scale, equal_nan=True)
