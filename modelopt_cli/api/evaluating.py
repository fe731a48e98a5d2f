"""Measuring files side by side, by themselves or as the end of another verb."""

from collections.abc import Sequence
from pathlib import Path

from modelopt_cli import measure
from modelopt_cli.api.opening import Note, as_subject, open_input, open_noting
from modelopt_cli.checkpoint import Opened
from modelopt_cli.data import Data, PreprocessOverrides, open_data
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
    wanted = open_input(paths, arch, data, overrides)
    opened = [open_noting(path, arch, wanted, on_note) for path in paths]
    pairs = list(zip(paths, opened, strict=True))
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
) -> Evaluation:
    """Measure models that are open already, each with the path it came from."""
    subjects = [as_subject(path, opened, arch, options.device) for path, opened in pairs]
    known = next((subject.input for subject in subjects if subject.input is not None), None)
    samples: Data | None = None
    if data is not None:
        samples = open_data(data, input=known, overrides=overrides, seed=options.seed)
    evaluation = measure.evaluate(subjects, samples, options, progress)
    if samples is not None and on_note is not None and (note := _missing_classes(samples, evaluation)):
        on_note(note)
    return measure_gates.apply(evaluation, gates) if gates else evaluation


def _missing_classes(samples: Data, evaluation: Evaluation) -> str | None:
    """A warning where labels, which count the classes that the data happens to hold, may mean others."""
    named = len(samples.class_names or ())
    outputs = max((m.accuracy.classes or 0 for m in evaluation.models if m.accuracy is not None), default=0)
    if not samples.labelled or not 0 < named < outputs:
        return None
    return (
        f"{samples.name} has {named} classes, the network has {outputs}: "
        f"class {named - 1} of the network is taken to be '{(samples.class_names or ())[-1]}'"
    )
