"""Shape, type and structure of every value of a graph, without computing any."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from modelopt_cli.program.calls import owner_of
from modelopt_cli.program.input_batch import Inputs, each_of, tensors_of
from modelopt_cli.program.input_spec import InputSpec
from modelopt_cli.program.parted import code_of, graph_input
from modelopt_cli.program.program import Program
from modelopt_cli.program.refusals import SIZES
from modelopt_cli.program.samples import zeros


def infer(
    graph: fx.Graph, root: nn.Module, inputs: Inputs, constants: Mapping[str, Tensor] | None = None
) -> dict[fx.Node, Any]:
    """Every value of a graph as it would be, tensors on the meta device.

    Tensors that share memory when the graph runs share it here, too, at the same offsets and strides.

    Args:
        graph: any; it is not changed.
        root: where its layers and tensors are; not changed, and none of its tensors is read.
        inputs: on the meta device.
        constants: tensors that the graph fetches and ``root`` does not have.

    Returns:
        Tensors, numbers, and tuples of them, by node.

    Raises:
        CaptureError: a size follows from values of the input.
        Exception: whatever else the graph raises on an input of this shape; a note names the node.
    """
    recorder = _Recorder(root, graph, constants or {})
    with torch.no_grad(), torch.device("meta"):  # what is made without the input is made there, too
        recorder.run(*tensors_of(inputs))
    return recorder.values


_META = torch.device("meta")


class _Recorder(fx.Interpreter):
    """Runs a graph with every parameter and buffer replaced by an empty one on the meta device."""

    def __init__(self, root: nn.Module, graph: fx.Graph, constants: Mapping[str, Tensor]) -> None:
        super().__init__(root, garbage_collect_values=False, graph=graph)
        self.extra_traceback = False
        self.values: dict[fx.Node, Any] = {}
        self.empty: dict[int, Tensor] = {}
        self.constants = constants

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        """Arguments as in fx; whatever device is named is the meta device."""
        fetched = super().fetch_args_kwargs_from_env(n)
        return fx.node.map_aggregate(fetched, lambda a: _META if _is_device(a) else a)

    def run_node(self, n: fx.Node) -> Any:
        try:
            self.values[n] = value = super().run_node(n)
        except (NotImplementedError, RuntimeError) as error:
            if not follows_values(error):
                raise
            raise SIZES.error(owner_of(n)) from error
        return value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        layer = self.module.get_submodule(str(target))
        if len(args) == 1 and not kwargs and _is_elementwise(layer, args[0]):
            return torch.empty_like(args[0])
        tensors = {name: self._emptied(tensor) for name, tensor in _tensors(layer)}
        return (
            functional_call(layer, tensors, args, kwargs, tie_weights=False)
            if tensors
            else layer(*args, **kwargs)
        )

    def fetch_attr(self, target: str) -> Any:
        value = self.constants[target] if target in self.constants else super().fetch_attr(target)
        return self._emptied(value) if isinstance(value, Tensor) else value

    def _emptied(self, tensor: Tensor) -> Tensor:
        """The stand-in for a tensor, always the same one."""
        if id(tensor) not in self.empty:
            self.empty[id(tensor)] = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
            )
        return self.empty[id(tensor)]


_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus),
    *(nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh),
)
_BATCH_NORMS: dict[type, tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.BatchNorm3d: (5,),
}
"""Dimensions that their inputs have."""


def _is_elementwise(layer: nn.Module, x: Any) -> bool:
    """True if a layer certainly makes a new tensor like ``x``; torch takes 1 to 4 ms to find that out."""
    if not isinstance(x, Tensor) or not x.is_floating_point() or not x.is_contiguous():
        return False
    if type(layer) in _ACTIVATIONS:
        return not getattr(layer, "inplace", False)
    if type(layer) not in _BATCH_NORMS or layer.training or layer.running_mean is None:
        return False
    same_type = all(tensor.dtype == x.dtype for _, tensor in _tensors(layer) if tensor.dim())
    return same_type and x.dim() in _BATCH_NORMS[type(layer)] and x.shape[1] == layer.num_features


def follows_values(error: Exception) -> bool:
    """True if an operation cannot run on the meta device, as the size of its result follows from values."""
    return "meta" in str(error)


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.device) or (isinstance(value, str) and value in ("cpu", "cuda"))


def _tensors(layer: nn.Module) -> list[tuple[str, Tensor]]:
    return [*layer.named_parameters(remove_duplicate=False), *layer.named_buffers(remove_duplicate=False)]


def meta_input(root: nn.Module, input_spec: InputSpec, batch: int) -> Inputs:
    """An empty batch on the meta device; floats of the type of the network's weights."""
    dtype = next((p.dtype for p in root.parameters() if p.is_floating_point()), None)
    return each_of(
        zeros(input_spec, batch, "meta"), lambda x: x.to(dtype or x.dtype) if x.is_floating_point() else x
    )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards every module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def program_values(program: Program, batch: int, sample: InputSpec | None = None) -> dict[fx.Node, Any]:
    """Every value of a Program in evaluation mode, tensors on the meta device: shape, type and structure.

    Args:
        program: not changed; nothing is computed or copied.
        batch: size of the inputs' first dimension.
        sample: what its inputs are; None means what the Program was made for, as the parts of a network do.
    """
    inputs = graph_input(program) if sample is None or code_of(program) is not None else sample
    with evaluation_mode(program):
        return infer(program.graph, program, meta_input(program, inputs, batch))


def value_shapes(program: Program, batch: int, sample: InputSpec | None = None) -> dict[str, Any]:
    """Shapes of every value, by node name; what is no tensor is kept as it is. As ``program_values``."""
    return {node.name: _shape_of(value) for node, value in program_values(program, batch, sample).items()}


def _shape_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape
    if isinstance(value, dict):
        return {name: _shape_of(part) for name, part in value.items()}
    if isinstance(value, torch.Size) or not isinstance(value, tuple | list):
        return value
    return tuple(_shape_of(part) for part in value)
