"""Measuring models side by side, by themselves or as the end of another command."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from modelopt_cli import measure
from modelopt_cli.api.choosing_task import ChosenTask, choose_common_task
from modelopt_cli.api.doubts import doubts, tell_unknown_length, with_same_classes
from modelopt_cli.api.lent_networks import with_network_among
from modelopt_cli.api.network_data import with_own_folder
from modelopt_cli.api.opening import ModelFile, file_length, known_input, without_graph
from modelopt_cli.api.preprocessing_notes import describe_input, origin
from modelopt_cli.api.request import EvalRequest, Measuring
from modelopt_cli.checkpoint import Opened
from modelopt_cli.data import Data, open_data
from modelopt_cli.data.data_spec import same_samples, shows_inputs
from modelopt_cli.data.source import Samples, name_of
from modelopt_cli.errors import ArchitectureError, UsageError
from modelopt_cli.kernels import prepare
from modelopt_cli.measure import EvaluatedModel, Evaluation
from modelopt_cli.measure import gates as measure_gates
from modelopt_cli.measure.conditions import Conditions
from modelopt_cli.measure.coverage import coverage
from modelopt_cli.measure.layer_status import Coverage
from modelopt_cli.methods.layer_selection import tensor_coverage
from modelopt_cli.settings import option


@dataclass(frozen=True)
class Compared:
    """Models that are open, in the order of the table.

    Attributes:
        models: each with the path it came from.
        calibrated_on: specs of the data that the result was made with; where it is measured on the same,
            a note says so.
        trained_on: spec of the data that the result learned from; likewise.
        named_by: index of the one whose classes count, whatever those of the others are called; None wants
            all to have the baseline's.
        task: what they are for, where that is known already.
        recorded_in: the file whose recorded input is that of the others.
    """

    models: Sequence[tuple[str | Path, Opened]]
    calibrated_on: Sequence[Samples | None] = ()
    trained_on: Samples | None = None
    named_by: int | None = None
    task: ChosenTask | None = None
    recorded_in: str | Path | None = None


def open_all(request: EvalRequest, *, graph: bool = True) -> list[tuple[str | Path, Opened]]:
    """The models of a request, each with its path.

    Raises:
        InputError: a file or the architecture cannot be used.
    """
    files = [ModelFile.of(path) for path in request.paths]
    known = known_input(files, request.arch, request.data, request.preprocessing)
    opened = [
        file.open(request.arch, known, request.on_note, request.preprocessing, graph=graph) for file in files
    ]
    return [
        (file.path, with_network_among(each, opened, request.on_note))
        for file, each in zip(files, opened, strict=True)
    ]


def require_all_run(models: Sequence[tuple[str | Path, Opened]], measuring: Measuring) -> None:
    """Refuse to compare a network with weights of an unknown one, unless only sizes are held against limits.

    Raises:
        ArchitectureError: names such weights.
    """
    if measuring.gates and measuring.data is None:
        return
    running = next((path for path, opened in models if opened.network is not None), None)
    for path, opened in models:
        if running is not None and opened.network is None:
            why = opened.unknown or "nothing says its architecture"
            raise ArchitectureError(
                f"{why}, so it cannot be run next to {running}",
                where=str(path),
                hint=f"give {option('arch')}, such as FILE.py:CALLABLE, or measure it alone",
            )


def evaluate_files(request: EvalRequest) -> Evaluation:
    """Measure checkpoints and artifacts side by side.

    Raises:
        InputError: a file, the architecture or the data cannot be used.
    """
    if not request.paths:
        raise UsageError("nothing to measure", hint="name at least one file")
    request = with_own_folder(request)
    request.options.require_baseline(len(request.paths))
    measure_gates.require_comparable(request.gates, len(request.paths), request.options.baseline)
    request = request.noting_once()
    models = open_all(request, graph=False)
    with ExitStack() as stack:
        for _, opened in models:
            stack.enter_context(without_graph(opened, request.on_note))
        recorded_in = next((path for path, opened in models if opened.is_artifact), None)
        return compare(Compared(models, recorded_in=recorded_in), request)


def compare(compared: Compared, measuring: Measuring) -> Evaluation:
    """Measure models that are open already, and hold them against the limits.

    Args:
        compared: the models.
        measuring: data, options and limits.

    Raises:
        InputError: the data cannot be used, or do not suit the models.
    """
    data, options = measuring.data, measuring.options
    models = [_evaluated(path, opened, measuring) for path, opened in compared.models]
    known = next((i for i, evaluated in enumerate(models) if evaluated.input is not None), 0)
    models, labels, notes = with_same_classes(models, options.baseline, compared.named_by)
    samples: Data | None = None
    if data is not None:
        samples = open_data(
            data,
            input_spec=models[known].input,
            overrides=measuring.preprocessing,
            seed=options.seed,
            labels=False,
        )
    task = compared.task or choose_common_task(
        measuring.task, measuring.output_name, [opened for _, opened in compared.models], [samples]
    )
    if samples is not None:
        samples = task.spec.read_targets(samples, labels)
        for note in samples.notes:
            measuring.note(note)
        tell_unknown_length(samples, measuring)
    measure_gates.require_reachable(measuring.gates, task.spec)
    means = Conditions(samples is not None and samples.labelled, options.runs)
    measure_gates.require_measurable(measuring.gates, models, options.baseline, means)
    require_all_run(compared.models, measuring)
    evaluation = measure.evaluate(models, samples, options, measuring.progress, task.spec)
    notes += doubts(evaluation, samples, [opened for _, opened in compared.models])
    if samples is not None and samples.labelled and _is_among(data, compared.calibrated_on):
        same = f"the result was calibrated on {name_of(data)} and is judged on the same samples"
        notes.append(f"{same}; give {option('calibration')}")
    if samples is not None and samples.labelled and _is_among(data, [compared.trained_on]):
        same = f"the result was trained on {name_of(data)} and is judged on the same samples"
        notes.append(f"warning: {same}, which says little of others; give other {option('data')}")
    if not all(each is None or shows_inputs(each) for each in compared.calibrated_on):
        notes.append("the result was calibrated without data, on samples learned from batch norms")
    input_spec = samples.input if samples is not None else models[known].input
    described = None
    if input_spec is not None:
        said_by = origin(compared.models[known][1], measuring.preprocessing, compared.recorded_in)
        described = f"{describe_input(input_spec)} ({said_by})"
    evaluation = replace(evaluation, input=described, task=task.described, notes=(*evaluation.notes, *notes))
    return measure_gates.apply(evaluation, measuring.gates) if measuring.gates else evaluation


def _is_among(data: Samples | None, samples_used: Sequence[Samples | None]) -> bool:
    return data is not None and any(
        samples is not None and same_samples(samples, data) for samples in samples_used
    )


def _evaluated(path: str | Path, opened: Opened, measuring: Measuring) -> EvaluatedModel:
    """An opened model, ready to be measured on a device."""
    network: nn.Module | None = opened.network
    if opened.program is not None:
        prepare(opened.program, measuring.options.device)
    elif network is not None:
        network.to(measuring.options.device)
    return EvaluatedModel(
        str(path),
        network,
        opened.program,
        file_length(path, opened),
        coverage=coverage_of(opened),
        input=opened.input,
        tensor_bytes=opened.tensor_bytes,
        state=None if network is not None else opened.state,
        arch=None if opened.holds_network else measuring.arch,
        unknown=opened.unknown,
    )


def coverage_of(opened: Opened) -> Coverage | None:
    """Compressed layers of an opened model, or None where nothing says so."""
    if opened.tensors is not None:
        return tensor_coverage(opened.tensors)
    return coverage(opened.program) if opened.program is not None else None
