"""Widths and steps of each layer of a network from a config, and what is said of them."""

from collections.abc import Collection, Iterable, Mapping

from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.stored_weights import WeightSteps
from modelopt_cli.methods.quantize.widths import Widths
from modelopt_cli.program import Program
from modelopt_cli.program.weighted import WEIGHTED_KINDS
from modelopt_cli.settings import option


def layer_widths(names: Iterable[str], edges: Collection[str], config: QuantizeConfig) -> dict[str, Widths]:
    """Widths of each layer as a config says: the same for all but those at the edges of the network.

    Args:
        names: of the layers to quantize.
        edges: the first and the last layers.
        config: with the widths.
    """
    return {name: config.edge_widths if name in edges else config.widths for name in names}


def weight_steps(
    widths: Widths, config: QuantizeConfig, *, pruned: bool, shared: bool = False
) -> WeightSteps:
    """Steps of a weight that is stored as integers; a pruned one has no zero points, which are not stored."""
    zero_points, bounded = config.asymmetric and not pruned, config.row.integer_arithmetic
    return WeightSteps(widths.weight, config.group_size, zero_points, bounded, shared, config.half_scales)


def edge_layers(program: Program) -> set[str]:
    """The first layers with weights, which none comes before, and the last, which none comes after."""
    modules = dict(program.named_modules())
    layers = {
        node
        for node in program.graph.find_nodes(op="call_module")
        if isinstance(modules[str(node.target)], WEIGHTED_KINDS)
    }
    behind, before = set(layers), set(layers)
    first, last = set(), set()
    for node in program.graph.nodes:
        if not any(value in behind for value in node.all_input_nodes):
            first |= {node} & layers
        else:
            behind.add(node)
    for node in reversed(program.graph.nodes):
        if not any(user in before for user in node.users):
            last |= {node} & layers
        else:
            before.add(node)
    return {str(node.target) for node in first | last}


def widths_note(widths: Mapping[str, Widths], config: QuantizeConfig) -> tuple[str, ...]:
    """Lines on layers that have other widths than was asked for, and on the arithmetic of few bits."""
    if not config.widths.narrow:
        return ()
    others = [name for name, each in widths.items() if each != config.widths]
    notes = []
    if others:
        named = ", ".join(others[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else "")
        why = f"the first and last layers; {option('edge_bits')} says other widths"
        notes.append(f"{named}: {config.edge_widths}, as {why}")
    if len(others) == len(widths):
        return (*notes, f"no layer has {config.widths}")
    if config.half_scales:
        computes = "in bfloat16 where the hardware has units for it, else in float32"
        notes.append(f"{config.widths} weights are multiplied {computes}")
    else:
        computes = "computed in float32" if config.widths.activation is None else "multiplied as bytes"
        notes.append(
            f"{config.widths} weights are {computes}, so that the network is no faster than at 8 bits"
        )
    return tuple(notes)
