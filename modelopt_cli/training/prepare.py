"""Preparation of a network for training, and of the trained one for use."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modelopt_cli.errors import InputError, UsageError
from modelopt_cli.measure import accuracy
from modelopt_cli.measure.evaluated_model import is_quantized
from modelopt_cli.program.input_batch import Inputs, any_images, call
from modelopt_cli.program.input_spec import InputSpec
from modelopt_cli.program.samples import zeros
from modelopt_cli.program.shapes import evaluation_mode
from modelopt_cli.tasks import CLASSIFY, TaskSpec

_WHERE = "the network"
_PROBED = 2
_BLOCK = 16


@dataclass(frozen=True)
class Prepared:
    """Properties of a network that is ready to be trained.

    Attributes:
        classes: number of logits; None where the outputs stand for no probabilities.
        channels_last: True if its images are laid out with the channels innermost, which most convolutions
            are faster with.
        sole_output: True if it returns one tensor in evaluation, so that it must in training, too.
    """

    classes: int | None
    channels_last: bool
    sole_output: bool


@contextlib.contextmanager
def prepared(
    network: nn.Module, sample: InputSpec, device: str, task: TaskSpec = CLASSIFY
) -> Iterator[Prepared]:
    """Inside the context the network is on ``device``, in the faster memory format of those it runs in.

    Afterwards it is in evaluation mode, contiguous, without gradients, and back where it was. The parameters
    stay the same objects. The generators of random numbers are as they were, too.

    Raises:
        UsageError: nothing in the network learns.
        DataError: the network does not take such samples.
        InputError: it is to classify, and is no classifier.
    """
    if is_quantized(network):
        raise UsageError("int8 layers cannot be trained", where=_WHERE, hint="train before quantize")
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UsageError("has no weights that learn", where=_WHERE)
    if any(isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.sparse for m in network.modules()):
        hint = "make its embeddings with sparse=False"
        raise UsageError("has sparse gradients, which optimizers cannot decay", where=_WHERE, hint=hint)
    home = next(network.parameters()).device
    with _own_randomness(device), torch.inference_mode(False), torch.enable_grad():
        try:
            network.to(device)
            images = zeros(sample, _PROBED, device)
            with evaluation_mode(network):
                outputs = accuracy.run(network, images, _WHERE)
                classes = _classes(outputs, task)
                channels_last = _lay_out(network, images)
            yield Prepared(classes, channels_last, isinstance(outputs, Tensor))
        finally:
            network.eval().zero_grad(set_to_none=True)
            network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            network.to(home)


def _classes(outputs: object, task: TaskSpec) -> int | None:
    logits = task.find(outputs)
    if task.row.predicted is None:
        return task.classes(outputs)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != _PROBED:
        form = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(
            f"returned {form} for {_PROBED} samples where a classifier returns ({_PROBED}, classes)",
            where=_WHERE,
            hint="give a classification network",
        )
    return logits.shape[1]


def _lay_out(network: nn.Module, images: Inputs) -> bool:
    """Channels last, unless torch cannot train the network so."""
    if any(_overruns(module) for module in network.modules() if isinstance(module, nn.Conv2d)):
        return False
    return to_channels_last(network, images)


def to_channels_last(network: nn.Module, images: Inputs) -> bool:
    """Lay out the weights with the channels innermost, which most convolutions are faster with.

    Args:
        network: in evaluation mode.
        images: some that it takes.

    Returns:
        True if it is laid out so now: it has convolutions, and nothing in it insists on the other order.
    """
    if not any_images(images) or not any(isinstance(module, nn.Conv2d) for module in network.modules()):
        return False
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        with torch.no_grad():
            call(network, images)
    except RuntimeError:  # a view() of what is not contiguous now
        network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        return False
    return True


def _overruns(module: nn.Conv2d) -> bool:
    """True if oneDNN overruns its memory for the gradient of the weight with the channels innermost.

    It does for 1x1 kernels that skip positions and have fewer input channels than a block, 8 on AVX2 and 16
    on AVX-512 (uxlfoundation/oneDNN#6035, seen in torch 2.13): the process crashes, sooner or later.
    """
    narrow = module.in_channels // module.groups < _BLOCK
    return narrow and set(module.kernel_size) == {1} and max(module.stride) > 1


@contextlib.contextmanager
def _own_randomness(device: str) -> Iterator[None]:
    gpus = [torch.device(device)] if device.startswith("cuda") else []
    deterministic = (
        torch.backends.cudnn.flags(
            enabled=torch.backends.cudnn.enabled,
            benchmark=False,
            deterministic=True,
            allow_tf32=torch.backends.cudnn.allow_tf32,
        )
        if gpus
        else contextlib.nullcontext()
    )
    with torch.random.fork_rng(devices=gpus), deterministic:
        yield
