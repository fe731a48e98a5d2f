"""The evaluation at the end of a command: rehearsed before the work, reported apart from the file."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from modelopt_cli import measure
from modelopt_cli.api.choosing_task import ChosenTask, choose_common_task, choose_task
from modelopt_cli.api.doubts import tell_unknown_length
from modelopt_cli.api.evaluating import coverage_of, open_all, require_all_run
from modelopt_cli.api.guard import SAMPLES
from modelopt_cli.api.network_as_run import as_run
from modelopt_cli.api.network_data import with_own_folder
from modelopt_cli.api.request import EvalRequest, Measuring
from modelopt_cli.checkpoint import Opened
from modelopt_cli.data import open_data
from modelopt_cli.data.data_spec import parse_spec, same_samples, shows_inputs
from modelopt_cli.data.source import Samples, name_of
from modelopt_cli.errors import UsageError
from modelopt_cli.measure import EvaluatedModel, Evaluation
from modelopt_cli.measure import gates as measure_gates
from modelopt_cli.measure.conditions import Conditions
from modelopt_cli.measure.layer_status import Coverage
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.settings import option

_MORE = 8
"""How many times more samples are looked at where a metric has no value on those before."""


def rehearse(
    networks: Sequence[Opened],
    measuring: Measuring,
    labels: tuple[str, ...] | None = None,
    task: ChosenTask | None = None,
) -> None:
    """Send a few samples through the evaluation, to know before long work what cannot be judged.

    Args:
        networks: that stand for what will be measured, one alone for what is made of it, too; they are
            not changed. Without any, there is none yet: only the limits are held against the data.
        measuring: data, options and limits; without data only the limits are looked at.
        labels: names of the classes, where they are not those of the first network that has some.
        task: what they are for, where that is known already.

    Raises:
        InputError: the data cannot be opened or do not suit, or a network does not run or is no classifier.
        UsageError: nothing will be measured that a limit could be held against.
    """
    data, options = measuring.data, measuring.options
    if data is None and not measuring.gates:
        return
    if not networks:
        measure_gates.require_conditions(measuring.gates, Conditions(_has_labels(measuring), options.runs))
        return
    models = [_evaluated(each, options.device) for each in networks]
    if data is None:
        _require_measurable(measuring, models, labelled=False)
        return
    known = next(
        (evaluated.input for evaluated in models if evaluated.input is not None),
        None,
    )
    names = labels or next((each.labels for each in networks if each.labels), None)
    samples = open_data(
        data, input_spec=known, overrides=measuring.preprocessing, seed=options.seed, labels=False
    )
    task = task or choose_common_task(measuring.task, measuring.output_name, networks, [samples])
    measure_gates.require_reachable(measuring.gates, task.spec)
    samples = task.spec.read_targets(samples, names)
    tell_unknown_length(samples, measuring)
    _require_measurable(measuring, models, labelled=samples.labelled)
    few = samples if options.limit else samples.sample(SAMPLES, options.seed)
    limit = min(SAMPLES, options.limit or SAMPLES)
    quick = replace(options, baseline=0, runs=0, memory=False, workers=0, limit=limit)
    # Next to itself a network shows whether its outputs can be compared with those of what is made of it.
    both = models * 2 if measuring.gates and len(models) == 1 else models
    evaluation = measure.evaluate(both, few, quick, task=task.spec)
    for comparison in evaluation.comparisons:
        conditions = Conditions(samples.labelled, options.runs, incomparable=comparison.incomparable)
        measure_gates.require_conditions(measuring.gates, conditions)
    for model in evaluation.models:
        if options.limit is None and model.accuracy is not None and model.accuracy.classes is not None:
            samples.fits(model.accuracy.classes)
    if samples.labelled:
        _require_defined(
            measuring,
            evaluation,
            lambda most: measure.evaluate(models, samples, replace(quick, limit=most), task=task.spec),
        )


def _require_defined(
    measuring: Measuring, evaluation: Evaluation, again: Callable[[int], Evaluation]
) -> None:
    """Refuse limits on a main metric of which no drop can be seen, however many samples are looked at.

    Args:
        measuring: data, options and limits.
        evaluation: of a few samples.
        again: the same of more, the first ones.
    """
    looked_at = SAMPLES
    while (reason := _undefined(evaluation)) is not None:
        try:
            conditions = Conditions(labelled=True, runs=measuring.options.runs, undefined=reason)
            return measure_gates.require_conditions(measuring.gates, conditions)
        except UsageError:
            accuracy = evaluation.models[0].accuracy
            if accuracy is None or accuracy.samples < looked_at:  # there are no more
                raise
        looked_at *= _MORE
        evaluation = again(min(looked_at, measuring.options.limit or looked_at))


def _undefined(evaluation: Evaluation) -> str | None:
    """The reason why no drop of the first model's main metric can be seen, or None where it can."""
    name, metric = next(iter(evaluation.rows.items()))
    accuracy = evaluation.models[0].accuracy
    if accuracy is None:
        return None
    value = accuracy.metrics[name]
    if metric.has_nothing_to_lose(value):
        return (
            f"{metric.title} of {evaluation.models[0].path} is {metric.text(0.0)}, so it has nothing to lose"
        )
    return metric.undefined if value is None else None


def _has_labels(measuring: Measuring) -> bool:
    """True if there are data with labels; of some kinds that is known before they can be opened."""
    data = measuring.data
    if data is None or (isinstance(data, str) and not parse_spec(data).row.labelled):
        return False
    opened = open_data(data, overrides=measuring.preprocessing, seed=measuring.options.seed, labels=False)
    task = choose_task(measuring.task, measuring.output_name, [], [opened]).spec
    return task.read_targets(opened).labelled


def _require_measurable(measuring: Measuring, models: Sequence[EvaluatedModel], *, labelled: bool) -> None:
    """Refuse what ``measure.gates.require_measurable`` does; a file to be made says what is compressed."""
    baseline, means = measuring.options.baseline, Conditions(labelled, measuring.options.runs)
    if len(models) == 1:
        baseline, models = (
            0,
            [*models, replace(models[0], coverage=Coverage(()))],
        )
    measure_gates.require_measurable(measuring.gates, models, baseline, means)


def rehearse_files(request: EvalRequest) -> None:
    """Rehearse, as :func:`rehearse` does, with files that ``evaluate`` will be given, or that stand for them.

    Raises:
        InputError: a file cannot be opened, or as there.
    """
    request = with_own_folder(request)
    models = open_all(request)
    rehearse([opened for _, opened in models], request)
    require_all_run(models, request)


def require_other_samples(
    calibration: Samples | None, data: Samples | None, reading: str, sample: InputSpec | None
) -> None:
    """Refuse to choose by the labels of the samples that the result is judged on.

    Args:
        calibration: spec of the data that is chosen by.
        data: spec of the data that the result is judged on.
        reading: what reads the labels, for the message.
        sample: shape and preprocessing that the network takes.

    Raises:
        UsageError: they are the same samples, and have labels.
    """
    if calibration is None or data is None or not same_samples(calibration, data):
        return
    if open_data(data, input_spec=sample, labels=False).labelled:
        calibration_option, left_out = option("calibration"), option("evaluate", False)
        hint = f"give other samples with {calibration_option}, or leave the judging out with {left_out}"
        raise UsageError(
            f"{reading} the samples that the result is judged on", where=name_of(data), hint=hint
        )


def require_labels(calibration: Samples | None, reading: str | None) -> None:
    """Refuse to choose by labels of samples that are made for the network, which have none.

    Args:
        calibration: spec of the data that is chosen by.
        reading: what reads the labels, for the message; None where nothing does.

    Raises:
        UsageError: something does, of such samples.
    """
    if reading is not None and calibration is not None and not shows_inputs(calibration):
        made = option("calibration", name_of(calibration))
        hint = f"give samples with {option('calibration')}"
        raise UsageError(f"{reading} samples, and {made} has none", hint=hint)


def seen_in_training(opened: Opened, calibration: Samples | None) -> str | None:
    """A warning where the history says that the network was trained on its calibration data."""
    history = opened.program.history if opened.program is not None else ()
    trained = {entry["data"] for entry in history if "data" in entry}
    if calibration not in trained:
        return None
    where = f"the network was trained on {name_of(calibration)}"
    return f"{where}, where less is lost than on other samples; give others"


@contextmanager
def after_writing(*outputs: str | Path) -> Iterator[None]:
    """Around what follows once files are written: whatever ends it says that they are there."""
    try:
        yield
    except BaseException as error:  # Ctrl-C and SIGTERM included
        if not outputs:
            raise
        names = " and ".join(map(str, outputs))
        error.add_note(f"before that {names} {'were' if len(outputs) > 1 else 'was'} written, whole")
        raise


def _evaluated(opened: Opened, device: str) -> EvaluatedModel:
    """A stand-in for what will be measured, of which size and time do not matter yet."""
    network = opened.network
    if isinstance(network, Program) or (network is not None and device != "cpu"):
        network = as_run(network, device)
    program = network if isinstance(network, Program) else None
    where, state = opened.path or "the network", None if network is not None else opened.state
    covered = coverage_of(opened)
    return EvaluatedModel(
        where, network, program, 0, covered, input=opened.input, tensor_bytes=0, state=state
    )
