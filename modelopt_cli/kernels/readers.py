"""Readers of values in a graph, as far as kernels depend on them: which layout they read, and who is last."""

from torch import fx

from modelopt_cli.program import Program
from modelopt_cli.program.quantized_convolutions import QuantizedConvolution
from modelopt_cli.program.quantized_linear import QuantizedLinear
from modelopt_cli.program.quantized_operations import QuantizedAdd, QuantizedAvgPool, QuantizedMaxPool


def read_as_rows(program: Program) -> set[str]:
    """Names of the layers whose outputs only linear layers read."""
    linear = {name for name, module in program.named_modules() if isinstance(module, QuantizedLinear)}
    calls = program.graph.find_nodes(op="call_module")
    readers = [(str(node.target), {str(user.target) for user in node.users}) for node in calls]
    return {name for name, users in readers if users <= linear} - {
        name for name, users in readers if not users <= linear
    }


# Modules whose output is a fresh tensor that shares no memory with their input.
_FRESH = (QuantizedConvolution, QuantizedAdd, QuantizedMaxPool, QuantizedAvgPool)


def overwritable_residuals(program: Program) -> set[str]:
    """Names of the convolutions whose residual nobody else can still read when they run.

    That holds where a fresh tensor is the residual and all its other readers run earlier and keep
    no view of it. A layer that is called more than once must satisfy it at every call.
    """
    modules = dict(program.named_modules())
    position = {node: i for i, node in enumerate(program.graph.nodes)}
    good: set[str] = set()
    bad: set[str] = set()

    def fresh(node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(modules[str(node.target)], _FRESH)

    for node in program.graph.nodes:
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, QuantizedConvolution) or layer.residual is None:
            continue
        first, residual = node.args
        safe = (
            residual is not first
            and fresh(residual)
            and all(
                user is node or (fresh(user) and position[user] < position[node]) for user in residual.users
            )
        )
        (good if safe else bad).add(str(node.target))
    return good - bad
