"""Layers of a Program that a scheme can quantize, and the reasons why the others cannot."""

from collections.abc import Callable

from torch import fx, nn

from modelopt_cli.artifact.encodings import is_shared
from modelopt_cli.errors import NothingCompressed
from modelopt_cli.methods.layer_selection import nothing_done, select_layers
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.layer_forms import LAYER_FORMS
from modelopt_cli.program import Program
from modelopt_cli.program.attention import split_names, undivided
from modelopt_cli.program.calls import arguments
from modelopt_cli.program.quantized import Weighted
from modelopt_cli.program.rewrite import read_elsewhere
from modelopt_cli.program.weighted import WEIGHTED_KINDS


def select_candidates(
    program: Program, config: QuantizeConfig, obstacle: Callable[[nn.Module], str | None]
) -> tuple[list[str], dict[str, str]]:
    """Layers to quantize, in the order of the graph, and the reason for each other one.

    Args:
        program: any.
        config: the globs and switches.
        obstacle: the reason why a scheme cannot take a layer, or None where it can.

    Raises:
        UsageError: a glob matches no layer.
        NothingCompressed: no layer is left.
    """
    calls: dict[str, list[fx.Node]] = {}
    for node in program.graph.find_nodes(op="call_module"):
        calls.setdefault(str(node.target), []).append(node)
    elsewhere, unsplit = read_elsewhere(program), undivided(program)
    reasons: dict[str, str] = {}
    able: list[str] = []
    for name in calls:
        module = program.get_submodule(name)
        if not isinstance(module, WEIGHTED_KINDS):
            continue
        reason = f"attention {unsplit[name]}" if name in unsplit else obstacle(module)
        if reason is None and (further := _further_arguments(calls[name], module)):
            reason = f"called with {further}"
        if reason is None and name in elsewhere:
            reason = f"its {elsewhere[name]} is also read outside of it"
        if reason:
            reasons[name] = reason
        else:
            able.append(name)
    if not able:
        done = {name: "int8 already" for name in calls if isinstance(program.get_submodule(name), Weighted)}
        raise nothing_compressed(reasons | done)
    selected, skipped = select_layers(able, config)
    if not selected:
        raise nothing_compressed(skipped | reasons)
    return selected, reasons | skipped


def _further_arguments(calls: list[fx.Node], module: nn.Module) -> str:
    """Arguments that a layer is called with besides its input, as transposed convolutions may be."""
    named = (list(arguments(call, module).items())[1:] for call in calls)
    ranges = dict.fromkeys(name for pairs in named for name, value in pairs if value is not None)
    allowed = LAYER_FORMS[type(module)].further if type(module) in LAYER_FORMS else ()
    return " and ".join(name for name in ranges if name not in allowed)


def nothing_compressed(reasons: dict[str, str]) -> NothingCompressed:
    """The error that says why not one layer could be quantized."""
    return nothing_done("quantized", reasons, "scheme")


def shared_weights(program: Program, split: Program) -> set[str]:
    """Parameters that are shared, by the names that they have once attention is taken apart."""
    renamed = split_names(program, split)
    return {renamed.get(name, name) for name, e in program.encodings.items() if is_shared(e)}
