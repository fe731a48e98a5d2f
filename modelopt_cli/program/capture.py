"""From any ``nn.Module`` to a Program."""

import inspect
import sysconfig
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from modelopt_cli.errors import ArtifactError, CaptureError, a_or_an
from modelopt_cli.program.allowlist import ATTRIBUTES, METHODS, function_name, is_in_place
from modelopt_cli.program.calls import owner_of
from modelopt_cli.program.dropout import recover_dropout
from modelopt_cli.program.examples import ExampleTracer
from modelopt_cli.program.functional import allocating
from modelopt_cli.program.input_spec import InputSpec, place_names
from modelopt_cli.program.inputs import Inputs, call, clone, each_of, named, names_by_place, tensors_of, to
from modelopt_cli.program.kinds import share
from modelopt_cli.program.nodes import check_outputs
from modelopt_cli.program.normal import normalize
from modelopt_cli.program.outputs import flatten, leaves, plain
from modelopt_cli.program.patches import unchanged
from modelopt_cli.program.program import Program
from modelopt_cli.program.recover import recover_layers
from modelopt_cli.program.rewrite import copy_graph
from modelopt_cli.program.safe_names import is_input_name, is_node_name, is_path, is_reserved, shown
from modelopt_cli.program.samples import noise, tokens_of
from modelopt_cli.program.serialization import to_data
from modelopt_cli.program.shapes import evaluation_mode
from modelopt_cli.program.tracer import ProgramTracer

TRACED_BATCHES = (2, 3)
VERIFIED_BATCHES = (1, 3)
_SEED = 20240229
_LIBRARY = (sysconfig.get_path("stdlib"), str(Path(__file__).parent), str(Path(torch.__file__).parent))


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
    input_spec = _named_by(model, input_spec)
    examples = [named(random_input(model, input_spec, batch), input_spec) for batch in TRACED_BATCHES]
    with evaluation_mode(model), torch.no_grad():
        try:
            with unchanged(model):
                return _attempt(model, ProgramTracer(examples[0]), input_spec, labels, arch, verify)
        except CaptureError:
            with unchanged(model):
                return _attempt(model, ExampleTracer(examples), input_spec, labels, arch, verify)


def require_one_input(model: nn.Module) -> None:
    """Refuse a network that cannot be called with one tensor.

    Raises:
        CaptureError: names the inputs that its ``forward`` asks for.
    """
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # not written in Python
        return
    needed = [
        p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if len(needed) > 1:
        raise CaptureError(
            f"its forward needs {len(needed)} inputs ({', '.join(needed)}), and a sample is one",
            hint="wrap it in a module that makes the others",
        )


def require_runnable(model: nn.Module, batch: Inputs) -> None:
    """Refuse a batch that the network itself refuses.

    Args:
        model: is left as it was.
        batch: samples, on any device.

    Raises:
        CaptureError: names the shape, and the reason in the network's own words.
    """
    home = next(model.parameters(), tensors_of(batch)[0]).device
    with evaluation_mode(model), torch.no_grad(), unchanged(model):
        _expected(model, to(batch, home))


def random_input(model: nn.Module, input_spec: InputSpec, batch: int) -> Inputs:
    """A random batch on the model's device, floats in its dtype; always the same for one batch size."""
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    inputs = noise(input_spec, batch, seed=_SEED + batch, below=tokens_of(model.modules()))
    return each_of(inputs, lambda x: x.to(first.device, first.dtype if x.is_floating_point() else x.dtype))


def _named_by(model: nn.Module, input_spec: InputSpec) -> InputSpec:
    """The description of the inputs with the names that they have in ``forward``, where they have none yet.

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
    first, *others = (replace(each, name=name) for each, name in zip(inputs, names, strict=True))
    return replace(first, others=tuple(others))


def _attempt(
    model: nn.Module,
    tracer: ProgramTracer,
    input_spec: InputSpec,
    labels: Sequence[str] | None,
    arch: str | None,
    verify: bool,
) -> Program:
    with unchanged(model):
        graph = _trace(tracer, model)
    _check_output(graph)
    layers = dict(model.named_modules(remove_duplicate=False))
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or is_in_place(node, layers))
    _check_calls(graph)
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
        _verify(program, model, input_spec)
    return program


def _trace(tracer: ProgramTracer, model: nn.Module) -> fx.Graph:
    try:
        return tracer.trace(model)
    except CaptureError as error:
        raise CaptureError(error.message, where=_where(error, tracer, model), hint=error.hint) from error
    except Exception as error:  # whatever the user's forward raises
        called = f"{type(error).__name__} while following the forward pass: {_first_line(error)}"
        raise CaptureError(
            called,
            where=_where(error, tracer, model),
            hint="a Program needs a forward pass whose path depends on sizes only",
        ) from error


def _normalize(graph: fx.Graph, tracer: ProgramTracer, model: nn.Module, input_spec: InputSpec) -> None:
    try:
        normalize(graph, model, input_spec, tracer.constants)
    except CaptureError:
        raise
    except ArtifactError as error:
        raise CaptureError(error.message, where=error.where, hint=error.hint) from error
    except Exception as error:  # whatever the graph raises on an input of this shape
        _require_runnable(model, input_spec)
        raise CaptureError(f"the graph cannot be followed: {_first_line(error)}") from error


def _require_runnable(model: nn.Module, input_spec: InputSpec) -> None:
    """Refuse an input that the network itself refuses."""
    if any(p.is_meta for p in model.parameters()):
        return
    _expected(model, named(random_input(model, input_spec, VERIFIED_BATCHES[-1]), input_spec))


def _where(error: BaseException, tracer: ProgramTracer, model: nn.Module) -> str:
    layer = tracer.failed_in or type(model).__name__
    frames = [f for f in traceback.extract_tb(error.__traceback__) if _is_users(f.filename)]
    return f"{layer} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else layer


def _is_users(filename: str) -> bool:
    """True if code is neither torch's, nor ours, nor Python's own."""
    if filename.startswith(_LIBRARY[1:]) or filename.startswith("<"):
        return False
    return not filename.startswith(_LIBRARY[0]) or "site-packages" in filename


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


def _check_output(graph: fx.Graph) -> None:
    (output,) = graph.find_nodes(op="output")
    try:
        check_outputs(output.args[0])
    except ArtifactError as error:
        raise CaptureError(
            f"the network returns {error.message}", hint="wrap it in a module that returns tensors"
        ) from error


def _check_calls(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.op == "call_method" and node.target not in METHODS:
            raise _not_listed(node, f"Tensor.{node.target}")
        if node.op == "call_function" and function_name(node.target) is None:
            module = getattr(node.target, "__module__", None) or ""
            raise _not_listed(node, f"{module}.{getattr(node.target, '__name__', node.target)}".strip("."))
        if node.op == "call_function" and node.target is getattr and node.args[1] not in ATTRIBUTES:
            raise _not_listed(node, f"the attribute {node.args[1]}")


def _check_storable(program: Program) -> None:
    try:
        to_data(program)
    except ArtifactError as error:
        raise CaptureError(error.message, where=error.where, hint=error.hint) from error


def _not_listed(node: fx.Node, called: str) -> CaptureError:
    return CaptureError(
        f"calls {called}, which a Program cannot hold",
        where=owner_of(node),
        hint="put it into a form that uses ordinary torch functions",
    )


def _parts(graph: fx.Graph, model: nn.Module, made: dict[str, Any]) -> dict[str, Any]:
    """The leaves and tensors the graph refers to, by path."""
    parts: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op not in ("call_module", "get_attr"):
            continue
        path = str(node.target)
        if not is_path(path):
            why = "is what a Program itself uses" if is_reserved(path.split(".")[0]) else "has odd characters"
            raise CaptureError(f"the name {path!r} {why}", hint="rename the layer")
        if path in made:
            parts[path] = made[path]
        elif node.op == "get_attr":
            parts[path] = attrgetter(path)(model)
        elif path not in parts:
            parts[path] = _leaf(model.get_submodule(path), path)
    return parts


def _leaf(module: nn.Module, path: str) -> nn.Module:
    try:
        return allocating(share(module))
    except (ValueError, ArtifactError) as error:
        raise CaptureError(
            getattr(error, "message", str(error)),
            where=path,
            hint="undo weight_norm, spectral_norm or pruning masks first (remove_..., prune.remove)",
        ) from error


def _verify(program: Program, model: nn.Module, input_spec: InputSpec) -> None:
    for batch in VERIFIED_BATCHES:
        inputs = named(random_input(model, input_spec, batch), input_spec)
        expected = _expected(model, inputs)
        try:
            with redirect_stderr(StringIO()):  # where fx prints the line that fails
                actual = call(program, clone(inputs))
        except Exception as error:
            raise CaptureError(
                f"what was captured fails on {_shapes(inputs)}: {_first_line(error)}"
            ) from error
        if not _same_outputs(actual, expected):
            raise CaptureError(
                f"what was captured does not compute what the network does on {_shapes(inputs)}",
                hint="its forward pass depends on the batch size, on chance, or on state of its own",
            )


def _expected(model: nn.Module, inputs: Inputs) -> Any:
    """The network's plain outputs."""
    try:
        return plain(call(model, clone(inputs)))
    except Exception as error:
        raise CaptureError(
            f"the network cannot process {_shapes(inputs)}: {_first_line(error)}",
            hint="give the right input size",
        ) from error


def _shapes(inputs: Inputs) -> str:
    """An input of some shape, or several, for a message."""
    shapes = [str(tuple(tensor.shape)) for tensor in tensors_of(inputs)]
    return f"inputs of shapes {' and '.join(shapes)}" if shapes[1:] else f"an input of shape {shapes[0]}"


def _same_outputs(actual: Any, expected: Any) -> bool:
    """True if two outputs have one structure and the same numbers.

    Raises:
        CaptureError: what is expected holds something else than tensors and None.
    """
    for name, value in leaves(expected):
        if value is not None and not isinstance(value, Tensor):
            place = f" at {name!r}" if name else ""
            raise CaptureError(
                f"the network returns {a_or_an(type(value).__name__)}{place}, not a tensor",
                hint="wrap it in a module that returns tensors",
            )
    actual = plain(actual)
    if _form(actual) != _form(expected):
        return False
    one, other = flatten(actual), flatten(expected)
    return all(_same(one[name], other[name]) for name in other)


def _form(outputs: Any) -> Any:
    """The containers of plain outputs, with the type of what is in them."""
    if isinstance(outputs, dict):
        return {name: _form(value) for name, value in outputs.items()}
    if isinstance(outputs, list | tuple):
        return type(outputs), [_form(value) for value in outputs]
    return type(outputs) if outputs is None else Tensor


def _same(actual: Tensor, expected: Tensor) -> bool:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    if actual.device.type != "cpu":  # other devices may choose another algorithm for the same call
        return torch.allclose(actual, expected, rtol=1e-3, atol=1e-4, equal_nan=True)
    return bool(((actual == expected) | (actual.isnan() & expected.isnan())).all())
