"""The Program: the one representation every method works on."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from typing import Any, Self, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import PythonCode

from modelopt_cli.errors import ModeloptError
from modelopt_cli.program.input_spec import InputSpec
from modelopt_cli.program.pickling import graph_of, plain_nodes
from modelopt_cli.program.quantization import keep_float32
from modelopt_cli.program.quantized import Quantized
from modelopt_cli.program.refused_inputs import refused
from modelopt_cli.program.spelling import canonicalize

_MODULE = ("training", "_parameters", "_buffers", "_non_persistent_buffers_set", "_modules")
_HEADER = ("input", "labels", "history", "encodings", "arch", "kernel")
SHARED = frozenset({"preprocess"})
"""Names of a Program's own that a layer may have, too, and then has."""


@dataclass(frozen=True)
class Encoding:
    """Form in which one parameter is to be stored, where that is not its plain values.

    A method that puts a parameter onto a smaller set of values (int8 steps, a codebook) leaves the
    float values in the Program and records here what the writer needs to store them exactly.

    Attributes:
        codec: name of a codec in ``artifact/codecs``.
        params: its JSON-able settings.
        parts: its tensors, e.g. ``{"scale": ...}``.
        integers: that stand for exactly these values, where a method hands them on to the writer, which else
            recovers them.
    """

    codec: str
    params: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, torch.Tensor] = field(default_factory=dict)
    integers: torch.Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """True if the values are stored as they are."""
        return self.codec == "raw"


def _once(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function for ``Module._apply`` that keeps one a buffer that several layers share."""
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def apply(tensor: Tensor) -> Tensor:
        if isinstance(tensor, nn.Parameter):
            return fn(tensor)
        if id(tensor) not in made:
            made[id(tensor)] = tensor, fn(tensor)
        return made[id(tensor)][1]

    return apply


def _bounded(input_spec: InputSpec, network: fx.GraphModule) -> InputSpec:
    """The inputs with the bounds of those that embeddings look up."""
    rows = {node.name: _rows(node, network) for node in network.graph.find_nodes(op="placeholder")}
    first, *others = (replace(each, below=rows.get(each.name)) for each in input_spec.tensors)
    return replace(first, others=tuple(others))


def _rows(placeholder: fx.Node, network: fx.GraphModule) -> int | None:
    """Rows of the smallest embedding that looks an input up; None where there is none."""
    users = (node for node in placeholder.users if node.op == "call_module")
    layers: Iterator[Any] = (network.get_submodule(str(node.target)) for node in users)
    rows = (getattr(layer, "num_embeddings", None) for layer in layers)
    return min((each for each in rows if isinstance(each, int)), default=None)


class Program(fx.GraphModule):
    """An fx graph of allow-listed modules and functions, and what is needed to use it.

    An ordinary ``nn.Module`` in every respect: ``train()``, ``eval()``, ``state_dict()`` and
    autograd work. Call it with a float tensor ``(N, *input.shape)``.

    Attributes:
        input: shape and preprocessing of one sample.
        labels: class names in logit order, or None.
        history: one JSON-able entry for each method that was applied, oldest first.
        encodings: how parameters are stored, by parameter name; absent means plain.
        arch: the spec the network was built from, for information only.
        kernel: what gives the Program that computes a call of this one; set by ``kernels.prepare``. Copies
            keep it, Programs with another graph do not.

    ``preprocess(image)`` makes an image the input of the network, as ``eval`` does with an image file; see
    ``data.single_image.preprocess_image``.
    """

    input: InputSpec
    labels: tuple[str, ...] | None
    history: tuple[dict[str, Any], ...]
    encodings: dict[str, Encoding]
    arch: str | None
    kernel: "Callable[[Program], Program] | None" = None
    _pickled: tuple[str, ...] = (*_MODULE, *_HEADER)

    def __init__(
        self,
        root: nn.Module | dict[str, Any],
        graph: fx.Graph,
        *,
        input_spec: InputSpec,
        labels: tuple[str, ...] | None = None,
        history: tuple[dict[str, Any], ...] = (),
        encodings: dict[str, Encoding] | None = None,
        arch: str | None = None,
    ) -> None:
        super().__init__(root, graph, class_name="Program")
        self.input = _bounded(input_spec, self)
        self.labels = labels
        self.history = history
        self.encodings = dict(encodings or {})
        self.arch = arch

    def with_graph(self, root: nn.Module | dict[str, Any], graph: fx.Graph) -> "Program":
        """A Program with another graph over ``root`` and everything else kept."""
        return Program(
            root,
            graph,
            input_spec=self.input,
            labels=self.labels,
            history=self.history,
            encodings=self.encodings,
            arch=self.arch,
        )

    @property
    def preprocess(self) -> Any:
        """The function that makes an image the network's input, or the layer or tensor of that name."""
        for parts in (self._modules, self._parameters, self._buffers):
            if "preprocess" in parts:
                return parts["preprocess"]
        images = import_module(
            "modelopt_cli.data.single_image"
        )  # reads files, so it stands above this module
        return partial(images.preprocess_image, self.input)

    def recompile(self) -> PythonCode:
        """Bring every call into its one spelling and make the code of the forward pass.

        fx's own ``__call__``, which prints a traceback of whatever a layer raises, is left out.
        """
        canonicalize(self.graph, self)
        code = super().recompile()
        if "__call__" in vars(type(self)):
            del type(self).__call__
        return code

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if any(isinstance(module, Quantized) for module in self.modules()):
            keep_float32(fn)  # before anything is converted
        return cast(Self, super()._apply(_once(fn), recurse))  # type: ignore[no-untyped-call]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network, whose inputs go by place or by name.

        Raises:
            InputError: it fails on inputs of other names, number or shape than it takes, or of a size that
                it cannot take, as an odd one.
            Exception: whatever a layer raises.
        """
        try:
            return super(Program, self._computing()).__call__(*args, **kwargs)
        except Exception as error:
            if isinstance(error, ModeloptError):
                raise
            refusal = refused(self.input, args, kwargs, error, self._runs)
            if refusal is None:
                raise
            raise refusal from error

    def _computing(self) -> "Program":
        """The Program that computes a call: this one, or its form that ``kernel`` gives."""
        return self if self.kernel is None else self.kernel(self)

    def _runs(self, inputs: Mapping[str, Tensor]) -> bool:
        """True if it runs on inputs by name; never in training, which would change its batch norms."""
        if self.training:
            return False
        try:
            with torch.no_grad():
                self.forward(**inputs)
        except Exception:  # whatever a layer raises
            return False
        return True

    def __copy__(self) -> Self:
        return self._copied(self, copy.deepcopy(self.graph))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the graph as it is; fx would pickle its source, and lose what makes it a Program."""
        own = {name: value for name, value in vars(self).items() if name in self._pickled}
        _, kind, *_ = type(self).__mro__  # fx makes a class for each object
        return _unpickle, (kind, own, plain_nodes(self.graph))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        root = nn.Module()
        root.__dict__ = copy.deepcopy(self.__dict__, memo)
        return self._copied(root, root.__dict__["_graph"])

    def _copied(self, root: nn.Module, graph: fx.Graph) -> Self:
        """The same Program over a copy of its layers and graph."""
        copied = self.with_graph(root, graph)
        copied.kernel = copy.copy(self.kernel)
        return cast(Self, copied)


def _unpickle(kind: type[Program], own: dict[str, Any], nodes: list[tuple[Any, ...]]) -> Program:
    shell = kind.__new__(kind)
    vars(shell).update(own)
    return shell._copied(shell, graph_of(nodes))
