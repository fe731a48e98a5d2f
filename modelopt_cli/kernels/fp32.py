"""The best float32 that torch has on a CPU without compiling: prepacked, fused oneDNN layers.

This is what Inductor lowers convolutions and linears to when weights are frozen: batch norms folded,
weights laid out once for the shape at hand, activation and residual addition inside the operator,
channels-last throughout. A float network in this form is measured against, so that no speed-up is claimed
over an avoidably slow baseline; the layers that an int8 network leaves in float have it in every call.
"""

import copy
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from modelopt_cli.kernels.onednn import POST_OPS
from modelopt_cli.kernels.own_gradients import Mark, mark_of
from modelopt_cli.kernels.packed_layers import Packed, PackedConvolution, laid_out, packed_layer
from modelopt_cli.program import Program
from modelopt_cli.program.calls import source
from modelopt_cli.program.channels import layered
from modelopt_cli.program.fold import fold_batch_norms, inference_form
from modelopt_cli.program.patterns import activation_of, is_add, sole_user
from modelopt_cli.program.rewrite import copy_graph, parts_of, read_elsewhere


class Prepacked:
    """A Program of packed layers, called with its images laid out for them; float32 under autocast, too."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def __call__(self, *inputs: Tensor) -> Any:
        if not torch.is_autocast_enabled("cpu"):
            return self.program(*map(laid_out, inputs))
        with torch.autocast("cpu", enabled=False):
            return self.program(*map(laid_out, inputs))


def prepack(program: Program) -> Prepacked:
    """The Program's fastest float32 form on this CPU; layers without a packed form stay as they are.

    Args:
        program: a float Program; it is not changed.

    Returns:
        A callable on the inputs by place, to be used under ``torch.inference_mode``.
    """
    return Prepacked(packed(copy.deepcopy(fold_batch_norms(layered(inference_form(program))))))


class PackedForm:
    """The kernel of a Program of int8 and float layers: its form with the float ones packed.

    That form is made at the first call, and again once the graph, a layer or a float weight is another. It is
    not used in training, while something watches a layer, or where a compiler or a mode reads the operators.
    """

    _made: "_Made | None" = None

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __call__(self, program: Program) -> Program:
        if torch.compiler.is_compiling() or program.training or _is_watched(program):
            return program
        if is_in_torch_dispatch_mode() or torch.is_autocast_enabled("cpu"):
            return program
        if self._made is None or not self._made.serves(program):
            self._made = _Made.of(program)
        return program if any(_is_watched(layer) for _, _, layer in self._made.layers) else self._made.form


class _Made(NamedTuple):
    """A packed form, and what it was made of.

    Attributes:
        form: with the packed layers.
        code: of the Program.
        layers: holders of the layers, their names there, and the layers.
        weights: float layers, and the marks of their weights.
    """

    form: Program
    code: str
    layers: Sequence[tuple[dict[str, Any], str, nn.Module]]
    weights: Sequence[tuple[Any, Mark]]

    @classmethod
    def of(cls, program: Program) -> "_Made":
        form, layers = packed(program), []
        for name in dict.fromkeys(str(node.target) for node in program.graph.find_nodes(op="call_module")):
            parent, _, leaf = name.rpartition(".")
            held = vars(program.get_submodule(parent))["_modules"]
            layers.append((held, leaf, held[leaf]))
        floats = [module.layer for module in form.modules() if isinstance(module, Packed)]
        weights = [(layer, mark_of(layer.weight)) for layer in floats]
        return cls(form, program._code, layers, weights)

    def serves(self, program: Program) -> bool:
        """True if the Program is what it was."""
        return (
            program._code is self.code
            and all(held.get(leaf) is layer for held, leaf, layer in self.layers)
            and all(mark_of(layer.weight) == mark for layer, mark in self.weights)
        )


def _is_watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def packed(program: Program, kept: Collection[fx.Node] = ()) -> Program:
    """A Program that shares the layers of another, but for the float ones and what follows: packed layers.

    Args:
        program: any Program; it is not changed.
        kept: values that a node of the same name computes in the result, too.
    """
    names = {node.name for node in kept}
    modules = dict(program.named_modules())
    parts = parts_of(program, program.graph, modules.__getitem__)
    fused = program.with_graph(parts, copy_graph(program.graph))
    for name in packable(program):
        (node,) = (each for each in fused.graph.nodes if each.op == "call_module" and each.target == name)
        _pack(fused, node, modules, names)
    fused.graph.eliminate_dead_code()
    fused.recompile()
    fused.training = program.training  # that of the layers, which are shared, stays
    return fused


def packable(program: Program) -> list[str]:
    """Float layers that have a packed form: called once, and read by nothing else."""
    calls = [str(node.target) for node in program.graph.find_nodes(op="call_module")]
    elsewhere = read_elsewhere(program)
    return [
        name
        for name in dict.fromkeys(calls)
        if calls.count(name) == 1
        and name not in elsewhere
        and "forward" not in vars(layer := program.get_submodule(name))  # computes in another type
        and packed_layer(layer, "none") is not None
    ]


def _pack(program: Program, node: fx.Node, modules: dict[str, nn.Module], kept: Collection[str]) -> None:
    """Put a packed layer in place of a layer and of what follows it, up to a value that is kept."""
    last, activation = _activation_after(node, modules, kept)
    operands = [source(node)]
    replaced: list[fx.Node] = []
    add = None if node.name in kept else sole_user(node)
    layer = packed_layer(modules[str(node.target)], activation)
    if isinstance(layer, PackedConvolution) and last is node and add is not None and is_add(add):
        last, activation = _activation_after(add, modules, kept)
        if not POST_OPS[activation].conv_sum:
            last, activation = add, "none"
        operands.append(next(a for a in add.all_input_nodes if a is not node))
        replaced.append(add)
        layer = packed_layer(modules[str(node.target)], activation)
    assert layer is not None
    program.set_submodule(str(node.target), layer)
    with program.graph.inserting_before(last):
        call = program.graph.call_module(str(node.target), tuple(operands))
    last.replace_all_uses_with(call)
    # What the packed layer replaced, from the last reader back to the layer itself.
    for dead in dict.fromkeys((last, *replaced, node)):
        program.graph.erase_node(dead)
    call.name = last.name


def _activation_after(
    node: fx.Node, modules: dict[str, nn.Module], kept: Collection[str]
) -> tuple[fx.Node, str]:
    user = None if node.name in kept else sole_user(node)
    name = activation_of(user, modules) if user is not None else None
    return (user, name) if user is not None and name is not None else (node, "none")
