"""Measuring files side by side, by themselves or as the end of another verb."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from modelopt_cli import measure
from modelopt_cli.api.doubts import doubts, with_same_classes
from modelopt_cli.api.inputs import describe_input, origin
from modelopt_cli.api.opening import Note, as_subject, noting_once, open_input, open_noting, without_graph
from modelopt_cli.checkpoint import Opened
from modelopt_cli.data import Data, PreprocessOverrides, open_data
from modelopt_cli.data.spec import same_samples
from modelopt_cli.errors import UsageError
from modelopt_cli.measure import EvalOptions, Evaluation, Gates, StageProgress
from modelopt_cli.measure import gates as measure_gates


def evaluate(
    paths: Sequence[str | Path],
    *,
    arch: str | None = None,
    data: str | None = None,
    overrides: PreprocessOverrides | None = None,
    options: EvalOptions | None = None,
    gates: Gates | None = None,
    on_note: Note | None = None,
    progress: StageProgress | None = None,
) -> Evaluation:
    """Measure checkpoints and artifacts side by side.

    Args:
        paths: files, in the order of the table.
        arch: the architecture of those that are not artifacts and are not recognised.
        data: a data spec; without it, accuracy is not measured.
        overrides: preprocessing the user wants instead of the recorded one.
        options: what to measure and how; ``options.baseline`` is an index into ``paths``.
        gates: limits to apply; see ``measure.gates.require``.
        on_note: called with one line for each thing worth knowing.
        progress: called with the stage, what is done and the total.

    Raises:
        InputError: a file, the architecture or the data cannot be used.
    """
    options, gates = options or EvalOptions(), gates or Gates()
    if not paths:
        raise UsageError("nothing to measure", hint="name at least one file")
    measure_gates.require_comparable(gates, len(paths), options.baseline)
    on_note = noting_once(on_note)
    wanted = open_input(paths, arch, data, overrides)
    opened = [open_noting(path, arch, wanted, on_note, overrides, graph=False) for path in paths]
    pairs = list(zip(paths, opened, strict=True))
    with ExitStack() as stack:
        for each in opened:
            stack.enter_context(without_graph(each, on_note))
        return measure_pairs(pairs, arch, data, overrides, options, gates, on_note, progress)


def measure_pairs(
    pairs: Sequence[tuple[str | Path, Opened]],
    arch: str | None,
    data: str | None,
    overrides: PreprocessOverrides | None,
    options: EvalOptions,
    gates: Gates,
    on_note: Note | None,
    progress: StageProgress | None,
    looked_at: Sequence[str | None] = (),
    named_by: int | None = None,
) -> Evaluation:
    """Measure models that are open already, each with the path it came from.

    Args:
        pairs: paths and what was opened.
        arch: the architecture, as it was given.
        data: a data spec; without it, accuracy is not measured.
        overrides: preprocessing the user wants instead.
        options: what to measure and how.
        gates: limits to apply.
        on_note: called with one line for each thing worth knowing.
        progress: called with the stage, what is done and the total.
        looked_at: data specs that the result was made with; those that are ``data`` are said to be.
        named_by: the one whose classes count, whatever those of the others are called; None wants all to
            have the baseline's.
    """
    subjects = [as_subject(path, opened, arch, options.device) for path, opened in pairs]
    known = next((i for i, subject in enumerate(subjects) if subject.input is not None), 0)
    subjects, labels, notes = with_same_classes(subjects, options.baseline, named_by)
    samples: Data | None = None
    if data is not None:
        seen = subjects[known].input
        samples = open_data(data, input=seen, overrides=overrides, seed=options.seed).with_labels(labels)
        for note in samples.notes:
            if on_note is not None:
                on_note(note)
    means = measure_gates.Means(samples is not None and samples.labelled, options.runs)
    measure_gates.require_measurable(gates, subjects, options.baseline, means)
    evaluation = measure.evaluate(subjects, samples, options, progress)
    notes += doubts(evaluation, samples, pairs[options.baseline][1])
    if (
        samples is not None
        and samples.labelled
        and any(s and same_samples(s, samples.name) for s in looked_at)
    ):
        notes.append(f"the result was calibrated on {data} and is judged on the same samples; give --calib")
    found = samples.input if samples is not None else subjects[known].input
    described = None
    if found is not None:
        described = f"{describe_input(found)} ({origin(pairs[known][1], overrides)})"
    evaluation = replace(evaluation, input=described, notes=(*evaluation.notes, *notes))
    return measure_gates.apply(evaluation, gates) if gates else evaluation
