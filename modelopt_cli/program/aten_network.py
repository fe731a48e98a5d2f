"""A network whose forward pass is a graph of ATen operators, as an archive of ``torch.export`` holds one.

It runs without any code of its own, so that it can be captured like other networks: what a Program computes
is compared with what the operators themselves do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch._ops import OpOverload

from modelopt_cli.errors import CaptureError
from modelopt_cli.program.placing import place
from modelopt_cli.program.safe_names import is_path

_BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
RANK = "rank"
"""Key in the metadata of nodes: number of dimensions of what they make, where that is known."""


@dataclass(frozen=True)
class GivenSize:
    """A size of an input that the graph was made for: place in the tensor, batch included, and bounds."""

    place: int
    least: int
    most: int


class AtenNetwork(nn.Module):
    """A graph of ATen operators, with its parameters and buffers at the paths that they had.

    Args:
        graph: placeholders, tensors that are fetched by name, calls of ATen's operators and of Python's on
            sizes, and a tuple of what it returns: one value, of any structure.
        tensors: parameters and buffers by path.
        constants: tensors that are fetched, too, but are no part of the network.
        sizes: of each input, by its name, those that may not be others.

    Raises:
        CaptureError: a path that no module can have.
    """

    def __init__(
        self,
        graph: fx.Graph,
        tensors: Mapping[str, Tensor],
        constants: Mapping[str, Tensor],
        sizes: Mapping[str, Sequence[GivenSize]],
    ) -> None:
        super().__init__()
        self.aten_graph, self.aten_constants, self.aten_sizes = graph, dict(constants), dict(sizes)
        owners = _owners(graph, tensors)
        for path, owner in owners.items():
            _place(self, path, owner)
        for path, tensor in tensors.items():
            _place(self, path, tensor)

    def forward(self, *args: Tensor, **inputs: Tensor) -> Any:
        """The outputs for a batch; inputs by place or by name.

        Raises:
            ValueError: a size that the graph was not made for.
        """
        given = {**dict(zip(self.aten_sizes, args, strict=False)), **inputs}
        for name, sizes in self.aten_sizes.items():
            for size in sizes:
                if not size.least <= given[name].shape[size.place] <= size.most:
                    raise ValueError(f"{name} has another size at {size.place} than the graph was made for")
        run = _Run(self.aten_graph, self.aten_tensors())
        return run.run(*(given[name] for name in self.aten_sizes))[0]

    def aten_tensors(self) -> dict[str, Tensor]:
        """All that the graph fetches, by name."""
        return {**self.aten_constants, **_named(self)}


def _named(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by each of their names."""
    parameters = dict(network.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(network.named_buffers(remove_duplicate=False))}


class _Table(nn.Module):
    """Has the weight of an embedding, and says how many tokens that knows."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.num_embeddings = count


class _Run(fx.Interpreter):
    """One run of a graph, whose tensors are looked up in a dictionary."""

    def __init__(self, graph: fx.Graph, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(nn.Module(), graph=graph)
        self.extra_traceback = False
        self._tensors = tensors

    def fetch_attr(self, target: str) -> Tensor:
        return self._tensors[target]


class AtenTracer:
    """Writes the graph of an ``AtenNetwork`` in the normal form's terms, as ``ExportTracer`` does.

    Attributes:
        constants: tensors that the graph fetches and the network does not have.
        failed_in: the module whose forward raised; there is none.
        exact: the Program computes the same to the last bit.
    """

    exact = False
    failed_in = None

    def __init__(self) -> None:
        self.constants: dict[str, Tensor] = {}

    def trace(self, root: nn.Module) -> fx.Graph:
        """The graph of a network's forward pass.

        Raises:
            CaptureError: an operator has no counterpart on the allow-list.
        """
        from modelopt_cli.program.translation import ConstantChanged  # imports torch's compiler, a second

        assert isinstance(root, AtenNetwork)
        try:
            return self._written(root, fold=True)
        except ConstantChanged:
            return self._written(root, fold=False)

    def _written(self, root: AtenNetwork, *, fold: bool) -> fx.Graph:
        from modelopt_cli.program.translation import Translation

        graph = fx.Graph()
        graph.output(graph.graph_copy(root.aten_graph, {}))
        names = dict(
            zip((node.name for node in graph.find_nodes(op="placeholder")), root.aten_sizes, strict=True)
        )
        given: dict[str, str | Tensor] = {**root.aten_constants, **{path: path for path in _named(root)}}
        written = Translation(given, names, [], fold=fold)
        (outputs,) = written.run(graph)
        written.graph.output(fx.node.map_aggregate(outputs, written.fetched))
        self.constants = written.constants
        return written.graph


def _owners(graph: fx.Graph, tensors: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """Modules that say more of their tensors than those do: batch norms, and the size of embeddings."""
    owners: dict[str, nn.Module] = {}
    for node in graph.nodes:
        if not isinstance(node.target, OpOverload):
            continue
        named = (
            dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False)) | node.kwargs
        )
        name = node.target._schema.name
        if name == "aten::embedding" and (path := _path(named["weight"])) is not None:
            owners[path.rpartition(".")[0]] = _Table(len(tensors[path]))
        path = _path(named.get("running_mean"))
        kind = _BATCH_NORMS.get(node.meta.get(RANK, 0))
        if "batch_norm" in name and kind is not None and path is not None:
            affine, momentum = named.get("weight") is not None, named.get("momentum", 0.1)
            owners[path.rpartition(".")[0]] = kind(len(tensors[path]), named["eps"], momentum, affine)
    return {path: owner for path, owner in owners.items() if path}


def _path(value: Any) -> str | None:
    fetched = isinstance(value, fx.Node) and value.op == "get_attr"
    return str(value.target) if fetched else None


def _place(root: nn.Module, path: str, value: Tensor | nn.Module) -> None:
    """Put a tensor or a module at a path below a network."""
    if not is_path(path):
        raise CaptureError(f"the name {path[:60]!r} is none that a layer can have")
    try:
        place(root, path, value)
    except (KeyError, AttributeError) as error:  # torch's own names: ``forward``, ``training``
        raise CaptureError(f"the name {path[:60]!r} is none that a layer can have") from error
