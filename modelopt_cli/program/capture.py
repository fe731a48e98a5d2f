"""Capture: from any ``nn.Module`` to a Program."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from modelopt_cli.errors import ArtifactError, CaptureError
from modelopt_cli.program.allowlist import is_in_place
from modelopt_cli.program.aten_network import AtenNetwork, AtenTracer
from modelopt_cli.program.dropout import recover_dropout
from modelopt_cli.program.examples import ExampleTracer
from modelopt_cli.program.fixed_sizes import fix_sizes
from modelopt_cli.program.free_sizes import free_sizes
from modelopt_cli.program.functional import allocating
from modelopt_cli.program.input_batch import named, names_by_place, parameters_of, takes_names
from modelopt_cli.program.input_spec import InputSpec, place_names
from modelopt_cli.program.layer_kinds import share
from modelopt_cli.program.nodes import check_outputs
from modelopt_cli.program.normal import normalize
from modelopt_cli.program.patches import unchanged
from modelopt_cli.program.plain_weights import plain_weights
from modelopt_cli.program.program import Program
from modelopt_cli.program.recover import recover_layers
from modelopt_cli.program.refusals import Unfollowed, refuse_calls_not_listed, unfollowed
from modelopt_cli.program.rewrite import copy_graph
from modelopt_cli.program.safe_names import is_input_name, is_node_name, is_path, path_in_program, shown
from modelopt_cli.program.serialization import require_readable, to_data
from modelopt_cli.program.shapes import evaluation_mode
from modelopt_cli.program.tracer import ProgramTracer
from modelopt_cli.program.user_lines import line_raised
from modelopt_cli.program.verification import agree_on, compare, random_input, require_random_runnable
from modelopt_cli.settings import did_you_mean, option
from modelopt_cli.text import first_line

if TYPE_CHECKING:  # it imports torch's compiler, which takes a second
    from modelopt_cli.program.exported import ExportTracer

    Tracer = ProgramTracer | AtenTracer | ExportTracer
    Tracers = tuple[Callable[[], Tracer], ...]

TRACED_BATCHES = (2, 3)
_SEQUENCE = 3
"""Dimensions, at most, of a batch of sequences: samples, channels and time."""


def capture(
    model: nn.Module,
    input_spec: InputSpec,
    *,
    labels: Sequence[str] | None = None,
    arch: str | None = None,
    verify: bool = True,
) -> Program:
    """The Program that computes what ``model`` computes in eval mode.

    Sizes stay symbolic where the forward pass allows it. Where Python itself needs a number, the sizes
    that follow from ``input_spec`` become literals; the batch size never does. The Program shares the
    model's tensors, not its modules. The model is left as it was.

    Args:
        model: a network that takes tensors ``(N, *shape)``, one for each of ``input_spec.tensors``, and
            returns tensors: one, or tuples, lists and dictionaries of them. Other arguments keep their
            defaults.
        input_spec: what one sample looks like. The name of a single input may be left to the network.
        labels: class names in logit order.
        arch: what the network was built from, kept for information.
        verify: run both on random inputs at two batch sizes and demand equal outputs.

    Raises:
        CaptureError: control flow that depends on the data or the batch size, a function or layer that is
            not on the allow-list, or an exception of the network's own.
    """
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError("TorchScript cannot be captured", hint="give the nn.Module it was made from")
    input_spec = named_inputs(model, input_spec)
    require_inputs(model, input_spec)
    examples = _examples(model, input_spec)
    failures: list[CaptureError] = []
    with evaluation_mode(model), torch.no_grad():
        for tracer in _tracers(model, examples):
            try:
                with unchanged(model), plain_weights(model):
                    return _attempt(model, tracer(), input_spec, labels, arch, verify)
            except CaptureError as error:
                failures.append(error)
    raise _most_telling(failures)


def _tracers(model: nn.Module, examples: Sequence[Mapping[str, Tensor]]) -> "Tracers":
    """The tracers to try, in order.

    fx on examples makes all sizes but the batch's literals. Sequences come in many lengths, so for those
    ``torch.export``, which takes longer, is tried first.
    """
    if isinstance(model, AtenNetwork):  # a graph already
        return (AtenTracer,)

    def exported(*, free: bool = True) -> "Tracer":
        from modelopt_cli.program.exported import ExportTracer

        return ExportTracer(examples[-1], free=free)

    def followed() -> "Tracer":
        return ExampleTracer(examples)

    short = all(tensor.dim() <= _SEQUENCE for tensor in examples[0].values())
    order = (exported, followed) if short else (followed, exported)
    return (lambda: ProgramTracer(examples[0])), *order, (lambda: exported(free=False))


def _most_telling(failures: Sequence[CaptureError]) -> CaptureError:
    """The failure that says most: one with a reason of ours, one that names a line, the last one.

    The last tracer goes furthest. Where none has a reason, the exception that fx met is the network's own.
    """

    def telling(place: int) -> tuple[bool, bool, int]:
        own = not isinstance(failures[place], Unfollowed)
        return own, "(" in (failures[place].where or ""), place if own else -place

    return failures[max(range(len(failures)), key=telling)]


def require_names(model: nn.Module, input_spec: InputSpec) -> None:
    """Refuse inputs described by names that a network's ``forward`` does not have.

    Raises:
        CaptureError: names them.
    """
    names, parameters = tuple(each.name for each in input_spec.tensors), parameters_of(type(model).forward)
    known = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    unknown = [name for name in names if name not in known]
    if known and len(known) == len(parameters) and unknown and names != place_names(len(names)):
        steps = did_you_mean(unknown[0], known), f"forward takes {', '.join(known)}"
        hint = "; ".join(filter(None, steps))
        raise CaptureError(f"the network has no input {' or '.join(map(repr, unknown))}", hint=hint)


def require_inputs(model: nn.Module, input_spec: InputSpec) -> None:
    """Refuse a network whose ``forward`` asks for other inputs than are described.

    Raises:
        CaptureError: names the inputs that it asks for, or the one that it does not know.
    """
    require_names(model, input_spec)
    forward, names = type(model).forward, tuple(each.name for each in input_spec.tensors)
    parameters = parameters_of(forward)
    variable = [p for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    needed = [p.name for p in parameters if p.default is p.empty and p not in variable]
    by_name = takes_names(forward, names)
    if (set(needed) <= set(names)) if by_name else (len(needed) <= len(names)):
        return
    count = f"{len(needed)} input{'s' * (len(needed) != 1)} ({', '.join(needed)})"
    given = f"{len(names)} {'are' if len(names) > 1 else 'is'} described"
    described = option("input_shape", ",".join(f"{name}=SHAPE" for name in needed))
    raise CaptureError(f"the network needs {count}, and {given}", hint=f"describe all of them: {described}")


def named_inputs(model: nn.Module, input_spec: InputSpec) -> InputSpec:
    """The description of the inputs in the order and with the names that they have in ``forward``.

    Raises:
        CaptureError: a name cannot be an argument's.
    """
    inputs = input_spec.tensors
    names = tuple(each.name for each in inputs)
    if names == place_names(len(inputs)):
        own = names_by_place(type(model).forward, len(inputs))
        names = own if all(map(is_node_name, own)) and len(set(own)) == len(own) else names
    for name in names:
        if not is_input_name(name):
            raise CaptureError(f"no input can be called {shown(name)}", hint="rename the argument")
    by_name = {name: replace(each, name=name, others=()) for each, name in zip(inputs, names, strict=True)}
    known = [p.name for p in parameters_of(type(model).forward) if p.name in by_name]
    first, *others = (by_name[name] for name in (*known, *(n for n in names if n not in known)))
    return replace(first, others=tuple(others))


def _examples(model: nn.Module, input_spec: InputSpec) -> list[Mapping[str, Tensor]]:
    return [named(random_input(model, input_spec, batch), input_spec) for batch in TRACED_BATCHES]


def _attempt(
    model: nn.Module,
    tracer: "Tracer",
    input_spec: InputSpec,
    labels: Sequence[str] | None,
    arch: str | None,
    verify: bool,
) -> Program:
    with unchanged(model):
        graph = _trace(tracer, model)
    _check_output(graph)
    fix_sizes(graph, model, tracer.constants, partial(_examples, model, input_spec))
    layers = dict(model.named_modules(remove_duplicate=False))
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or is_in_place(node, layers))
    refuse_calls_not_listed(graph)
    _normalize(graph, tracer, model, input_spec)
    recovered = recover_layers(graph, model)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    recovered |= recover_dropout(graph, recovered)
    parts = _parts(graph, model, {**tracer.constants, **recovered})
    program = Program(
        parts, copy_graph(graph), input_spec=input_spec, labels=tuple(labels) if labels else None, arch=arch
    )
    program.eval()
    _check_storable(program)
    if verify and not any(p.is_meta for p in model.parameters()):
        compare(program, model, input_spec, exact=tracer.exact)
        agree = partial(agree_on, program, model, exact=tracer.exact)
        program.input = free_sizes(program.input, agree)
    return program


def _trace(tracer: "Tracer", model: nn.Module) -> fx.Graph:
    try:
        return tracer.trace(model)
    except CaptureError as error:
        where = error.where or _where(error, tracer, model)
        raise type(error)(error.message, where=where, hint=error.hint) from error
    except Exception as error:  # whatever the user's forward raises
        raise unfollowed(error, _where(error, tracer, model)) from error


def _normalize(graph: fx.Graph, tracer: "Tracer", model: nn.Module, input_spec: InputSpec) -> None:
    try:
        normalize(graph, model, input_spec, tracer.constants)
    except CaptureError:
        raise
    except ArtifactError as error:
        raise CaptureError(error.message, where=error.where, hint=error.hint) from error
    except Exception as error:  # whatever the graph raises on an input of this shape
        require_random_runnable(model, input_spec)
        raise CaptureError(f"the graph cannot be followed: {first_line(error)}") from error


def _where(error: BaseException, tracer: "Tracer", model: nn.Module) -> str:
    layer, line = tracer.failed_in or type(model).__name__, line_raised(error.__cause__ or error)
    return f"{layer} ({line})" if line else layer


def _check_output(graph: fx.Graph) -> None:
    (output,) = graph.find_nodes(op="output")
    try:
        check_outputs(output.args[0])
    except ArtifactError as error:
        raise CaptureError(
            f"the network returns {error.message}", hint="wrap it in a module that returns tensors"
        ) from error


def _check_storable(program: Program) -> None:
    try:
        to_data(program)
    except ArtifactError as error:
        raise CaptureError(error.message, where=error.where, hint=error.hint) from error
    try:
        require_readable(program)
    except ArtifactError as error:
        hint = "a file may not ask for so much" if error.hint else None
        message = f"cannot be kept in a file: {error.message}"
        raise CaptureError(message, where=error.where, hint=hint) from error


def _parts(graph: fx.Graph, model: nn.Module, made: dict[str, Any]) -> dict[str, Any]:
    """The leaves and tensors the graph refers to, by path."""
    parts: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op not in ("call_module", "get_attr"):
            continue
        path = str(node.target)
        node.target = own = path_in_program(path)
        if not is_path(own):
            raise CaptureError(f"the name {path!r} has odd characters", hint="rename the layer")
        if path in made:
            parts[own] = made[path]
        elif node.op == "get_attr":
            parts[own] = attrgetter(path)(model)
        elif own not in parts:
            parts[own] = _leaf(model.get_submodule(path), path)
    return parts


def _leaf(module: nn.Module, path: str) -> nn.Module:
    try:
        return allocating(share(module))
    except (ValueError, ArtifactError) as error:
        raise CaptureError(
            getattr(error, "message", str(error)),
            where=path,
            hint="give the layer the parameters that its class has, or make it a class of its own",
        ) from error
