"""The verb ``distill``."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modelopt_cli import artifact
from modelopt_cli.api.evaluating import measure_pairs
from modelopt_cli.api.fine_tuning import context_of, given_to
from modelopt_cli.api.guard import Given
from modelopt_cli.api.judging import after_writing, rehearse
from modelopt_cli.api.opening import Note, noting_once, open_input, open_noting, sample_of
from modelopt_cli.api.planning import Plan, cost_of
from modelopt_cli.api.product import Product
from modelopt_cli.api.students import classes_of, open_student
from modelopt_cli.api.teachers import (
    Source,
    comparable,
    leave_out,
    members_of,
    require_same_classes,
    require_same_names,
)
from modelopt_cli.api.training import history_entry
from modelopt_cli.api.tuning import Surroundings, Trainer, TrainingRequest, names_of_classes, trainer
from modelopt_cli.artifact.coding import Code, require_code
from modelopt_cli.artifact.encodings import compact, compact_state, require_not_shared
from modelopt_cli.artifact.naming import scratch_beside
from modelopt_cli.checkpoint import Opened, require_network
from modelopt_cli.data import PreprocessOverrides
from modelopt_cli.errors import UsageError
from modelopt_cli.kernels import require_device
from modelopt_cli.measure import EvalOptions, Evaluation, Gates, StageProgress
from modelopt_cli.measure.latency import threads
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.distill.apply import learn, rate_settled
from modelopt_cli.methods.distill.cache import CacheRequest
from modelopt_cli.methods.distill.cacheable import layout_of, require_cacheable, told_apart
from modelopt_cli.methods.distill.config import DistillConfig
from modelopt_cli.methods.prune.masks import Masks
from modelopt_cli.methods.quantize import qat
from modelopt_cli.methods.stages import Stages
from modelopt_cli.methods.table import METHODS
from modelopt_cli.program import Program
from modelopt_cli.program.coverage import Coverage
from modelopt_cli.training import fit
from modelopt_cli.training.distributed import world

SCRATCH = "scratch"


@dataclass(frozen=True)
class Student:
    """What is to learn, and from whom beside the teacher.

    Attributes:
        spec: see ``students.open_student``.
        arch: the architecture of a checkpoint that is not recognised.
        also: more teachers, each with the weight of its answers; that of the first is 1.
        resize_for_teacher: whether images may be resized for a teacher of another input size.
        compare_scratch: whether the same student is trained without a teacher, too, for comparison.
        cache: folder to keep the teachers' answers in, for later epochs and other students, or None.
    """

    spec: str
    arch: str | None = None
    also: Sequence[tuple[str | Path, float]] = ()
    resize_for_teacher: bool = False
    compare_scratch: bool = False
    cache: Path | None = None


@dataclass(frozen=True)
class DistillOutcome:
    """What ``distill`` did.

    Attributes:
        entry: what the history says of it; after a dry run, of no step.
        written: the file; None after a dry run and in a process that is not the main one of several.
        scratch: that of the student without a teacher, if one was asked for.
        evaluation: teacher and students side by side, or None where nothing was measured.
        plan: what it would take, after a dry run alone.
    """

    entry: dict[str, Any]
    written: artifact.Written | None
    scratch: artifact.Written | None
    evaluation: Evaluation | None
    plan: Plan | None = None


def distill(
    teacher: str | Path,
    output: str | Path,
    *,
    student: Student,
    training: TrainingRequest,
    config: DistillConfig | None = None,
    arch: str | None = None,
    data: str | None = None,
    overrides: PreprocessOverrides | None = None,
    options: EvalOptions | None = None,
    gates: Gates | None = None,
    evaluate: bool = True,
    code: Code = "plain",
    force: bool = False,
    dry_run: bool = False,
    on_note: Note | None = None,
    progress: StageProgress | None = None,
) -> DistillOutcome:
    """Teach a student what a teacher knows, write its file, and measure the two side by side.

    Args:
        teacher: a checkpoint or an artifact of any kind.
        output: the file to write; an existing one only with ``force``.
        student: what learns.
        training: the data, how, and where to keep the state of an interrupted run.
        config: the loss, and what follows.
        arch: the teachers' architecture, where it is not recognised.
        data: what to evaluate on, and never to train or choose by.
        overrides: preprocessing the user wants instead of the implied one.
        options: how to measure, and the seed, threads, device and workers.
        gates: limits to apply to the student, compared with the teacher.
        evaluate: whether to measure.
        code: how the file is written, a key of ``artifact.coding.CODINGS``.
        force: replace an existing output, start over where an interrupted run is found, and delete other
            answers that the cache holds.
        dry_run: check everything, time a few steps, and write, train and measure nothing.
        on_note: called with one line for each thing worth knowing.
        progress: called with the stage, what is done and the total.

    Raises:
        InputError: a source, the data, an option or the output cannot be used; nothing is written.
        GateNotMet: a student made of the teacher cannot be made so.
        EnvironmentFailure: no space, no permission, an optional package.
    """
    options, gates, config = options or EvalOptions(), gates or Gates(), config or DistillConfig()
    on_note = noting_once(on_note)
    require_device(options.device)
    require_code(code)
    scratch = scratch_beside(output) if student.compare_scratch else None
    outputs: list[str | Path] = [output] if scratch is None else [scratch, output]
    sources = [teacher, *(path for path, _ in student.also), *_file_of(student)]
    if gates and not evaluate:
        raise UsageError("a gate needs the result to be measured", hint="leave out --no-eval or the gate")
    training.require_fair(data)
    if student.cache is not None:
        require_cacheable(config, training.config, drawn=training.config.augment != "none")
    for path in outputs:
        training.require_apart(path, sources)
        artifact.check_suffix(path)
        artifact.check_output(path, force, sources)
    wanted = open_input([teacher], arch, training.train, overrides)
    opened = open_noting(teacher, arch, wanted, on_note, overrides)
    others = [
        Source(path, open_noting(path, arch, wanted, on_note, overrides), weight)
        for path, weight in student.also
    ]
    teachers = [Source(teacher, opened), *others]
    how = Surroundings(overrides, options, force, progress, dry_run, on_note)
    with threads(options.threads):
        pupil = open_student(student.spec, student.arch, opened, Context(seed=options.seed), on_note)
        sample = sample_of(pupil, student.spec)
        if evaluate:
            if not (both := comparable(teachers[0], sample)):
                leave_out(teachers[0], gates, on_note)
            # That the student has the same classes is seen to below.
            rehearse([opened if both else pupil], data, overrides, options, gates)
        identity = _identity(teachers, pupil, student, config, arch, code)
        labels = require_same_names(teachers, pupil)
        with trainer(training, output, identity, sample, how, labels) as tools:
            if pupil.program is not None:
                learned = labels or names_of_classes(pupil.program, tools.training.train)
                pupil.program.labels = pupil.program.labels or learned
            seen = tools.training.train.input
            members = members_of(teachers, seen, resize=student.resize_for_teacher)
            require_same_classes(members, pupil, seen)
            context = context_of(pupil, None, tools, how, "distilling")
            context = replace(context, teachers=members, on_note=on_note)
            context = replace(context, origin=_origin(context.origin, teachers))
            if student.cache is not None:
                about = told_apart(members, context.origin["teacher_sha256"], arch)
                context = replace(context, cache=CacheRequest(student.cache, about, force, on_note, dry_run))
            given = given_to(pupil, context)
            entry, product = _distilled(pupil, config, context, given)
            compared = None
            if scratch is not None:
                compared = _without_teacher(pupil, config, context, tools, given)
            if dry_run:
                plan = _plan(pupil, student, config, context)
                # Coded, the size depends on weights that there are not yet.
                plan = replace(plan, predicted_bytes=product.predicted_bytes() if code == "plain" else None)
                return DistillOutcome(entry, None, None, None, plan)
            main = world(options.device).main
            written = product.write(output, force, code) if main else None
            beside = compared.write(scratch, force, code) if main and compared and scratch else None
            tools.run.close()
    outcome = DistillOutcome(entry, written, beside, None)
    if written is None or not evaluate:
        return outcome
    with after_writing(*outputs):
        pairs = [(path, open_noting(path, student.arch, sample, None)) for path in outputs]
        pairs = [(teacher, opened), *pairs] if comparable(teachers[0], sample) else pairs
        options, gates = replace(options, baseline=0), replace(gates, judged=len(pairs) - 1)
        evaluation = measure_pairs(pairs, arch, data, overrides, options, gates, on_note, progress)
    return replace(outcome, evaluation=evaluation)


def _file_of(student: Student) -> list[str]:
    return [student.spec] if Path(student.spec).exists() else []


def _identity(
    teachers: Sequence[Source],
    pupil: Opened,
    student: Student,
    config: DistillConfig,
    arch: str | None,
    code: Code,
) -> dict[str, Any]:
    return {
        "command": "distill",
        "source": teachers[0].opened.source_sha256,
        "arch": arch,
        "student": student.spec,
        "student_source": pupil.source_sha256,
        "student_arch": student.arch,
        "also": [[each.opened.source_sha256, each.weight] for each in teachers[1:]],
        "resize_for_teacher": student.resize_for_teacher,
        "compare_scratch": student.compare_scratch,
        "cache": student.cache is not None,
        "config": config.as_dict(),
        "code": code,
    }


def _plan(pupil: Opened, student: Student, config: DistillConfig, context: Context) -> Plan:
    """What was forecast, and what the networks cost."""
    training = context.training
    assert training is not None
    learner, input = require_network(pupil, "the student"), training.train.input
    networks = [cost_of("teacher", m.name, m.network, m.shape, m.dtype) for m in context.teachers]
    networks.append(cost_of("student", student.spec, learner, input.shape, input.dtype))
    classes = classes_of(learner, input.shape, dtype=input.dtype)
    kept = layout_of(config, training, classes).bytes if context.cache else None
    return Plan(networks, training.forecasts or (), cache_bytes=kept)


def _origin(origin: dict[str, Any], teachers: Sequence[Source]) -> dict[str, Any]:
    known = {name: value for name, value in origin.items() if value}
    return known | {"teacher_sha256": [each.opened.source_sha256 for each in teachers]}


def _distilled(
    pupil: Opened, config: DistillConfig, context: Context, given: Given
) -> tuple[dict[str, Any], Product]:
    if pupil.program is not None:
        program = METHODS["distill"].apply(pupil.program, config, context).program
        return dict(program.history[-1]), Product.of_program(program, given)
    if config.finetune_epochs:
        raise UsageError("needs a student that can be traced", where="--finetune-epochs")
    network = require_network(pupil, "the student")
    encodings = pupil.tensors.encodings if pupil.tensors else {}
    entry = learn(network, config, context, encodings)
    state = dict(network.state_dict())
    stored = compact_state(state, encodings)
    return entry, Product.of_tensors(pupil, state, stored, Coverage(()), entry, given)


def _without_teacher(
    pupil: Opened, config: DistillConfig, context: Context, tools: Trainer, given: Given
) -> Product:
    """The same student, trained as long on labels alone, from the same weights."""
    if pupil.program is None:
        raise UsageError("needs a student that can be traced", where="--compare-scratch")
    student, training = pupil.program, rate_settled(pupil.program, tools.training)
    epochs = training.config.epochs + config.finetune_epochs
    training = replace(training, config=replace(training.config, epochs=epochs))

    def trained() -> Program:
        network = qat.prepare(student)
        require_not_shared(network.encodings)
        masks = Masks.of_state(network.state_dict(), network.encodings)
        found = fit(network, training, seed=context.seed, stage=SCRATCH, companions=[masks])
        alone = qat.convert(network, student)
        alone.input = training.train.input
        alone.encodings = compact(alone)
        alone.history = (*student.history, history_entry(pupil, training, found, context.seed))
        return alone.eval()

    return Product.of_program(Stages(training).once(SCRATCH, trained), given)
