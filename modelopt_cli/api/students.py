"""Students: from ``--student`` to a network: an architecture, a file, or a part of the teacher."""

import dataclasses
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode

import torch
from torch import nn

from modelopt_cli.api.guard import Original
from modelopt_cli.api.opening import ModelFile, known_input, sample_of, tell_notes
from modelopt_cli.api.request import Note
from modelopt_cli.checkpoint import Opened, fresh_model, require_network
from modelopt_cli.checkpoint.sources import SOURCES, check_found_spec, parse_spec
from modelopt_cli.errors import ArchitectureError, DataError, InputError, UsageError
from modelopt_cli.measure.accuracy import failing_in_one_line
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.distill.cache_identity import PROBED
from modelopt_cli.methods.distill.derived_student import derived, is_derived
from modelopt_cli.methods.distill.teacher import channels_hint
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.input_batch import call
from modelopt_cli.program.samples import zeros
from modelopt_cli.program.shapes import evaluation_mode
from modelopt_cli.settings import option
from modelopt_cli.tasks import CLASSIFY, TaskSpec

SAME = "same"


def open_student(
    spec: str,
    arch: str | None,
    teacher: Opened,
    context: Context,
    on_note: Note | None,
) -> Opened:
    """The network that is to learn.

    Args:
        spec: ``width:F`` or ``depth:F`` of the teacher, ``same`` for its architecture with fresh weights, a
            checkpoint or artifact, or an architecture, which gets the teacher's classes and channels where
            it does not say others.
        arch: the architecture of a checkpoint that is not recognised.
        teacher: whom it will learn from.
        context: seed, and what pruning may look at.
        on_note: called with one line for each thing worth knowing.

    Raises:
        InputError: it cannot be made.
    """
    network = require_network(teacher, "the teacher")
    input_spec = sample_of(teacher, "the teacher")
    if is_derived(spec):
        if not isinstance(network, Program):
            hint = "name an architecture instead"
            raise UsageError(f"{spec} needs a teacher that can be traced", where=option("student"), hint=hint)
        original = Original.of(teacher, device=context.device)
        program = derived(spec, network, context)
        original.check(program)
        return dataclasses.replace(teacher, state=dict(program.state_dict()), program=program, notes=[])
    if not _is_arch(spec):
        with _naming_student_arch():
            file = ModelFile.of(spec)
            known = known_input([file], arch, None, None) or (input_spec if arch is not None else None)
            opened = file.open(arch, known, on_note)
            require_network(opened, spec)
            return opened
    if arch is not None:
        raise UsageError("has no meaning for a student that is no file", where=option("student_arch"))
    if spec == SAME:
        return _same(teacher, network, input_spec, context.seed)
    return _fresh(_fitted(spec, network, input_spec), input_spec, context.seed, on_note)


@contextmanager
def _naming_student_arch() -> Iterator[None]:
    """Errors about a student's file name the option for its architecture, not that for the teacher's."""
    try:
        yield
    except InputError as error:
        error.hint = error.hint and re.sub(rf"(?<!\w){option('arch')}\b", option("student_arch"), error.hint)
        raise


def learned_output(
    network: nn.Module, sample: InputSpec, where: str = "the network", task: TaskSpec = CLASSIFY
) -> torch.Tensor:
    """The output that another network could learn, for ``PROBED`` samples.

    Raises:
        DataError: it does not run on such samples.
        UsageError: it is to classify, and is no classifier, or returns no such output.
    """
    output = task.find(_outputs(network, sample, where))
    classifies = task.row.predicted is not None
    if not isinstance(output, torch.Tensor) or (classifies and output.dim() != 2):
        raise UsageError("is no classifier" if classifies else "returns no output to learn", where=where)
    return output


def _outputs(network: nn.Module, sample: InputSpec, where: str) -> object:
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    images = zeros(sample, PROBED, device)
    with evaluation_mode(network), torch.inference_mode(), failing_in_one_line(images, where):
        return call(network, images)


def _is_arch(spec: str) -> bool:
    return spec == SAME or (":" in spec and not Path(spec).exists())


def _fresh(spec: str, input_spec: InputSpec, seed: int, on_note: Note | None) -> Opened:
    """The student with the teacher's input, or with its own where it cannot take that."""
    opened = fresh_model(spec, input_spec, seed)
    try:
        _outputs(require_network(opened, spec), input_spec, spec)
    except DataError:
        opened = fresh_model(spec, None, seed)
        own = opened.architecture.input if opened.architecture else None
        if own is None:
            raise
        if own.shape[:-2] != input_spec.shape[:-2]:
            ours, theirs = ("x".join(map(str, each.shape)) for each in (own, input_spec))
            problem = f"takes {ours}, the teacher {theirs}"
            raise UsageError(problem, where=spec, hint=channels_hint()) from None
    tell_notes(opened, on_note)
    return opened


def _same(teacher: Opened, network: nn.Module, input_spec: InputSpec, seed: int) -> Opened:
    """The teacher's architecture with fresh weights."""
    spec = network.arch if isinstance(network, Program) else None
    if spec is None and teacher.architecture is not None:
        spec = teacher.architecture.spec
    if spec is None:
        raise ArchitectureError("nothing says what the teacher was built from", where=option("student"))
    if teacher.is_artifact and isinstance(network, Program):
        sides = [side for tensor in teacher.state.values() for side in tensor.shape]
        check_found_spec(spec, max(sides, default=0), option("student"))
    opened = fresh_model(spec, input_spec, seed)
    shapes = {name: tensor.shape for name, tensor in opened.state.items()}
    if shapes != {name: tensor.shape for name, tensor in network.state_dict().items()}:
        hint = "name an architecture, or give width:F or depth:F"
        raise UsageError(f"the teacher is not a whole {spec} any more", where=option("student"), hint=hint)
    return opened


def _fitted(spec: str, teacher: nn.Module, input_spec: InputSpec) -> str:
    """An architecture with the teacher's classes and channels where it says no others."""
    parsed = parse_spec(spec)
    more: dict[str, int] = {}
    source = SOURCES[parsed.source]
    if not source.code:
        logits = CLASSIFY.find(_outputs(teacher, input_spec, "the teacher"))
        if "num_classes" not in parsed.options and isinstance(logits, torch.Tensor) and logits.dim() > 1:
            more["num_classes"] = logits.shape[1]
        option = source.channels_option
        if option is not None and option not in parsed.options and len(input_spec.shape) == 3:
            more[option] = input_spec.shape[0]
    if not more:
        return spec
    return f"{spec}{'&' if '?' in spec else '?'}{urlencode(more)}"
