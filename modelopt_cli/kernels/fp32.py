"""The best float32 that torch has on a CPU without compiling: prepacked, fused oneDNN layers.

This is what Inductor lowers convolutions and linears to when weights are frozen: batch norms folded,
weights laid out once for the shape at hand, activation and residual addition inside the operator,
channels-last throughout. It exists to be measured against, so that no speed-up is claimed over an
avoidably slow baseline.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from modelopt_cli.kernels.im2col import output_size
from modelopt_cli.kernels.onednn import POST_OPS
from modelopt_cli.program import Program
from modelopt_cli.program.calls import source
from modelopt_cli.program.channels import layered
from modelopt_cli.program.fold import fold_batch_norms, inference_form
from modelopt_cli.program.patterns import activation_of, is_add, sole_user
from modelopt_cli.program.quantization import ACTIVATIONS
from modelopt_cli.program.rewrite import read_elsewhere

_conv = torch.ops.mkldnn._convolution_pointwise.default
_conv_add = torch.ops.mkldnn._convolution_pointwise.binary
_linear = torch.ops.mkldnn._linear_pointwise.default


class _Packed(nn.Module):
    """A layer whose weight is packed at the first call; a copied or pickled one packs its own."""

    packed: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "packed": None}


class PackedConvolution(_Packed):
    """A convolution with its activation, and with an addition before that if called with two inputs.

    Rows are images of height 1, which oneDNN's operator takes.
    """

    def __init__(self, conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, activation: str) -> None:
        super().__init__()
        self.conv = conv
        self.activation = activation
        self.post_op = POST_OPS[activation].arguments
        self.of_rows = isinstance(conv, nn.Conv1d)
        rank = conv.weight[0, 0].dim()
        padding = [0] * rank if isinstance(conv.padding, str) else list(conv.padding)
        high = [1] if self.of_rows else []
        self.kernel_size = (*high, *conv.kernel_size)
        self.geometry = (
            [0] * len(high) + padding,
            [*high, *conv.stride],
            [*high, *conv.dilation],
            conv.groups,
        )

    def _weight(self, x: Tensor) -> Tensor:
        if self.packed is None:
            weight = self.conv.weight.detach()
            self.packed = torch.ops.mkldnn._reorder_convolution_weight(
                weight.unsqueeze(2) if self.of_rows else weight, *self.geometry, list(x.shape)
            )
        return self.packed

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        if not self.of_rows:
            return self._convolve(x, other)
        return self._convolve(x.unsqueeze(-2), None if other is None else other.unsqueeze(-2)).squeeze(-2)

    def _convolve(self, x: Tensor, other: Tensor | None) -> Tensor:
        y: Tensor
        weight, bias = self._weight(x), self.conv.bias
        if other is None:
            y = _conv(x, weight, bias, *self.geometry, *self.post_op)
        elif other.shape == self._output_shape(x):
            unary = None if ACTIVATIONS[self.activation].idle else self.post_op[0]
            y = _conv_add(x, other, weight, bias, *self.geometry, "add", None, unary, [], None)
        else:
            y = _conv(x, weight, bias, *self.geometry, *POST_OPS["none"].arguments) + other
            y = ACTIVATIONS[self.activation](y)
        return y

    def _output_shape(self, x: Tensor) -> tuple[int, ...]:
        padding, stride, dilation, _ = self.geometry
        windows = zip(x.shape[2:], self.kernel_size, stride, padding, dilation, strict=True)
        sides = (output_size(*side) for side in windows)
        return (x.shape[0], self.conv.out_channels, *sides)


class PackedLinear(_Packed):
    """A linear layer with its activation."""

    def __init__(self, linear: nn.Linear, activation: str) -> None:
        super().__init__()
        self.linear = linear
        self.post_op = POST_OPS[activation].arguments

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is None:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.linear.weight.detach(), None)
        y: Tensor = _linear(x, self.packed, self.linear.bias, *self.post_op)
        return y


class Prepacked:
    """A Program of packed layers, called with its images laid out for them."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def __call__(self, *inputs: Tensor) -> Any:
        return self.program(*map(_laid_out, inputs))


_LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


def _laid_out(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=_LAYOUTS.get(x.dim(), torch.contiguous_format))


def prepack(program: Program) -> Callable[..., Any]:
    """The Program's fastest float32 form on this CPU; layers without a packed form stay as they are.

    Args:
        program: a float Program; it is not changed.

    Returns:
        A callable on the inputs by place, to be used under ``torch.inference_mode``.
    """
    fused = copy.deepcopy(fold_batch_norms(layered(inference_form(program))))
    calls: dict[str, int] = {}
    for node in fused.graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    elsewhere = read_elsewhere(fused)
    for node in list(fused.graph.nodes):
        if node.op == "call_module" and calls[str(node.target)] == 1 and node.target not in elsewhere:
            _pack(fused, node)
    fused.graph.eliminate_dead_code()
    fused.recompile()
    return Prepacked(fused)


def _pack(program: Program, node: fx.Node) -> None:
    """Put a packed layer in place of a layer and of what follows it."""
    modules = dict(program.named_modules())
    module = modules[str(node.target)]
    last, activation = _activation_after(node, modules)
    operands = [source(node)]
    replaced: list[fx.Node] = []
    packed: nn.Module
    if isinstance(module, nn.Linear):
        packed = PackedLinear(module, activation)
    elif (
        isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        and module.padding_mode == "zeros"
        and module.padding != "same"
    ):
        add = sole_user(node)
        if last is node and add is not None and is_add(add):
            last, activation = _activation_after(add, modules)
            if not POST_OPS[activation].conv_sum:
                last, activation = add, "none"
            operands.append(next(a for a in add.all_input_nodes if a is not node))
            replaced.append(add)
        packed = PackedConvolution(module, activation)
    else:
        return
    program.set_submodule(str(node.target), packed)
    with program.graph.inserting_before(last):
        call = program.graph.call_module(str(node.target), tuple(operands))
    last.replace_all_uses_with(call)
    # What the packed layer replaced, from the last reader back to the layer itself.
    for dead in dict.fromkeys((last, *replaced, node)):
        program.graph.erase_node(dead)


def _activation_after(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[fx.Node, str]:
    user = sole_user(node)
    name = activation_of(user, modules) if user is not None else None
    return (user, name) if user is not None and name is not None else (node, "none")
