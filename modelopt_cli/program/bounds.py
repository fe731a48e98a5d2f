"""Bounds on the work that a graph out of a file may ask for, checked before any of it is done.

A file of a kilobyte can ask for terabytes: ``repeat``, ``pad``, a chain of ``cat`` that doubles each time,
``size ** 10**9``. So the graph is first run on the meta device, where nothing is allocated, and every value
in it is held to a limit: the elements of a tensor, those of all tensors together, floating-point operations,
integers, and the length of lists.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.flop_counter import flop_registry

from modelopt_cli.errors import ArtifactError
from modelopt_cli.program.input_batch import tensors_of
from modelopt_cli.program.input_spec import InputSpec
from modelopt_cli.program.quickshapes import quick_result
from modelopt_cli.program.samples import zeros
from modelopt_cli.program.shapes import follows_values

MAX_ELEMENTS = 2**30
"""Elements of one tensor, for each sample."""
MAX_TOTAL = 2**35
"""Elements of all tensors together, for each sample."""
MAX_FLOPS = 2**46
"""Floating-point operations for each sample."""
MAX_NUMBER = 2**63
MAX_EXPONENT = 63
MAX_LENGTH = 2**16
"""Length of a list or tuple, and number of the parts that a tensor is split into."""

# Sizes that follow from the batch show at a batch above one; a network for one sample only is tried with one.
BATCHES = (64, 1)
_SMALL = 2**24
_SIZED_BY_VALUES = ("one_hot", "repeat_interleave")


def check_bounds(
    graph: fx.Graph,
    modules: Mapping[str, nn.Module],
    tensors: Mapping[str, Tensor],
    input_spec: InputSpec,
    batches: Sequence[int] = BATCHES,
) -> None:
    """Run a graph on the meta device and refuse what would take more than the limits.

    Args:
        graph: of a file, each of its calls on the allow-list.
        modules: its layers by path, on the meta device.
        tensors: those it fetches, by path.
        input_spec: what one sample is.
        batches: batch sizes to try; one at which it runs is enough.

    Raises:
        ArtifactError: a limit is exceeded, or the graph cannot run; names the node.
    """
    for batch in batches:
        run = _Run(modules, tensors, batch)
        try:
            with torch.no_grad(), torch.device("meta"), run.budget:
                run.all(graph, tensors_of(zeros(input_spec, batch, "meta")))
            return
        except ArtifactError as error:
            raise ArtifactError(error.message, where=f"node {run.node}", hint=error.hint) from None
        except Exception as error:  # whatever an operator makes of arguments that do not fit
            failure = error
    reason = next(iter(str(failure).splitlines()), type(failure).__name__)
    raise ArtifactError(f"cannot run: {reason[:200]}", where=f"node {run.node}") from failure


class _Run:
    """One run of a graph on the meta device.

    Attributes:
        node: the name of the node that is being computed.
        budget: what counts its tensors; to be entered around :meth:`all`.
    """

    def __init__(self, modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor], batch: int) -> None:
        self.modules, self.tensors = modules, tensors
        self.node = ""
        self.budget = _Budget(batch)
        self._values: dict[fx.Node, Any] = {}
        self._last = 0

    def all(self, graph: fx.Graph, inputs: Sequence[Tensor]) -> None:
        """Compute every node; only what a later one reads is kept."""
        tensors = iter(inputs)
        for node in graph.nodes:
            self.node = node.name
            if node.op == "placeholder":
                self._values[node] = next(tensors)
            elif node.op == "get_attr":
                self._values[node] = self._fetched(str(node.target))
            elif node.op != "output":
                args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), self._argument)
                check_arguments(_name(node), args, kwargs)
                self._values[node] = value = self._call(node, args, kwargs)
                check_value(value)

    def _argument(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self._values[value]
        return torch.device("meta") if isinstance(value, torch.device) or value == "cpu" else value

    def _fetched(self, path: str) -> Any:
        tensor = self.tensors.get(path)
        if tensor is None:
            leaf = next(name for name in self.modules if path.startswith(f"{name}."))
            tensor = self.modules[leaf].state_dict()[path[len(leaf) + 1 :]]
        return _described(tensor)

    def _callable(self, node: fx.Node, args: tuple[Any, ...]) -> Callable[..., Any]:
        if node.op == "call_module":
            return self.modules[str(node.target)]
        if node.op == "call_method":
            method: Callable[..., Any] = getattr(type(args[0]), str(node.target))
            return method
        return node.target  # type: ignore[return-value]

    def _call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        call = self._callable(node, args)
        quick = quick_result(call, _name(node), args, kwargs)
        if quick is not None:
            self.budget.count(quick, call)
            return quick
        try:
            return call(*args, **kwargs)
        except (NotImplementedError, RuntimeError) as error:
            if not follows_values(error):
                raise
        # The shape follows from values: of a mask, say. It is then at most what ones give.
        if _name(node) in _SIZED_BY_VALUES:
            raise ArtifactError("the size of its result is bounded by nothing in the graph")
        if sum(t.numel() for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)) > _SMALL:
            raise ArtifactError("the size of its result depends on too many values")
        with torch.device("cpu"):
            args, kwargs = tree_map(_ones, (args, kwargs))
            return tree_map(_described, call(*args, **kwargs))


class _Budget(TorchDispatchMode):
    """Counts the elements of all tensors that are made, those inside of layers and functions included."""

    def __init__(self, batch: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._batch, self._elements, self._flops = batch, 0, 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Do without torch's guard against its compiler, which takes two seconds to import."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute, then hold the result to the limits."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.numel())
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self._work(formula(*args, **(kwargs or {}), out_val=result))
        return result

    def count(self, result: Tensor, by: Callable[..., Any]) -> None:
        """Hold a tensor to the limits that no operator made, but a rule that knows its shape."""
        self._count(result.numel())
        weight = getattr(by, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() > 1:
            self._work(2 * result.numel() * weight[0].numel())

    def _work(self, flops: int) -> None:
        self._flops += flops
        _require(self._flops <= self._batch * MAX_FLOPS, f"would take {self._flops:.0e} operations")

    def _count(self, elements: int) -> None:
        self._elements += elements
        _require(elements <= self._batch * MAX_ELEMENTS, f"would make a tensor of {elements:,} elements")
        too_many = f"the graph would make {self._elements:,} elements up to here"
        _require(self._elements <= self._batch * MAX_TOTAL, too_many)


def check_arguments(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse a call whose result would be too long or too large to make, before it is made.

    Args:
        name: of the function or method.
        args: its arguments.
        kwargs: its keyword arguments.

    Raises:
        ArtifactError: a power of integers, a repeated list, or a tensor split into too many parts.
    """
    if name == "pow" and len(args) == 2 and all(isinstance(value, int) for value in args):
        _require(abs(args[1]) <= MAX_EXPONENT, f"raises a number to the power {args[1]}")
    if name == "mul":
        lengths = [len(value) for value in args if isinstance(value, tuple | list | str)]
        times = [value for value in args if isinstance(value, int)]
        _require(not lengths or not times or lengths[0] * times[0] <= MAX_LENGTH, "repeats a list too often")
    tensor, *settings = [*args, *kwargs.values()] or [None]
    if name in _SPLITTING and isinstance(tensor, Tensor):
        parts = max(tensor.shape, default=0)
        asked = [value for value in settings if isinstance(value, int)]
        if name == "split" and asked and asked[0] > 0:
            parts //= asked[0]
        _require(parts <= MAX_LENGTH, "splits a tensor into too many parts")


_SPLITTING = ("unbind", "split")


def check_value(value: Any) -> None:
    """Refuse a result that is a number or a list beyond the limits.

    Raises:
        ArtifactError: it is.
    """
    if isinstance(value, list | tuple | str):
        _require(len(value) <= MAX_LENGTH, f"makes a list of {len(value):,} items")
    if isinstance(value, list | tuple):
        for item in value:
            check_value(item)
    elif isinstance(value, int):
        _require(abs(value) < MAX_NUMBER, "makes a number of more than 63 bits")


def _name(node: fx.Node) -> str:
    if node.op == "call_module":
        return ""
    return str(getattr(node.target, "__name__", node.target)).partition(".")[0]  # without an overload


def _described(value: Any) -> Any:
    """A tensor on the meta device of the same shape; floats in float32, as the layers there are."""
    if not isinstance(value, Tensor) or value.is_meta:
        return value
    dtype = torch.float32 if value.is_floating_point() else value.dtype
    return torch.empty(value.shape, dtype=dtype, device="meta")


def _ones(value: Any) -> Any:
    return torch.ones(value.shape, dtype=value.dtype, device="cpu") if isinstance(value, Tensor) else value


def _require(condition: bool, limit: str) -> None:
    if not condition:
        raise ArtifactError(limit, hint="no network needs that; the file is damaged or forged")
