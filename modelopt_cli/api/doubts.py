"""Signs that the figures of an evaluation mean something else: other classes, accuracies that do not fit."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from modelopt_cli.api.preprocessing_notes import preprocessing_options, published_for
from modelopt_cli.api.request import Measuring
from modelopt_cli.checkpoint import Opened
from modelopt_cli.checkpoint.sources import published_top1
from modelopt_cli.data import Data
from modelopt_cli.data.class_names import match_names
from modelopt_cli.errors import DataError
from modelopt_cli.measure import Accuracy, EvaluatedModel, Evaluation
from modelopt_cli.measure.statistics import proportion_interval
from modelopt_cli.program import Program
from modelopt_cli.program.shapes import program_values
from modelopt_cli.settings import option

FAR_BELOW = 10.0
"""Points below the published accuracy that are more than another choice of images takes."""


def with_same_classes(
    models: Sequence[EvaluatedModel], baseline: int, named_by: int | None
) -> tuple[list[EvaluatedModel], tuple[str, ...] | None, list[str]]:
    """Bring the logits of all models into the order of the baseline's classes, where two name them.

    Args:
        models: the models.
        baseline: index of the baseline.
        named_by: as for ``measure_pairs``.

    Returns:
        The models; the names in that order, or None where no model has names; notes.

    Raises:
        DataError: a model's classes are others.
    """
    first = [models[baseline], *models] if named_by is None else [models[named_by]]
    reference = next((each for each in first if _labels(each)), None)
    if reference is None:
        return list(models), None, []
    labels = _labels(reference) or ()
    same, notes = [], []
    for evaluated in models:
        own = _labels(evaluated)
        if own is None or own == labels:
            same.append(evaluated)
            continue
        try:
            positions = match_names(own, labels, evaluated.path).positions
        except DataError:
            positions = ()
        if sorted(positions) != list(range(len(labels))):
            problem = f"does not have the classes of {reference.path}"
            if named_by is not None:
                notes.append(f"{evaluated.path} {problem}")
                same.append(evaluated)
                continue
            raise DataError(problem, where=evaluated.path, hint="evaluate them in two commands")
        columns = tuple(positions.index(i) for i in range(len(labels)))
        if columns != tuple(range(len(labels))):
            notes.append(
                f"{evaluated.path} has the classes of {reference.path} in another order: matched by name"
            )
        same.append(replace(evaluated, columns=columns))
    return same, labels, notes


def _labels(evaluated: EvaluatedModel) -> tuple[str, ...] | None:
    return evaluated.program.labels if evaluated.program is not None else None


def doubts(evaluation: Evaluation, samples: Data | None, opened: Sequence[Opened]) -> list[str]:
    """Lines on a baseline whose accuracy says that something else is wrong, and on results that guess.

    Args:
        evaluation: what was measured.
        samples: on what, or None.
        opened: the files of its models.
    """
    lines = _baseline_doubts(evaluation, samples, opened[evaluation.baseline])
    for number, (model, each) in enumerate(zip(evaluation.models, opened, strict=True)):
        guesses, training = _no_better_than_chance(model.accuracy), _more_training(each)
        if number != evaluation.baseline and guesses and training:
            lines.append(f"{model.path}: {guesses}: {training}")
    return lines


def _baseline_doubts(evaluation: Evaluation, samples: Data | None, opened: Opened) -> list[str]:
    accuracy, path = (model := evaluation.models[evaluation.baseline]).accuracy, model.path
    if samples is None or accuracy is None:
        return []
    if accuracy.top1 is None or accuracy.classes is None:
        return _nothing_to_lose(evaluation, accuracy, path)
    _, high = _interval(accuracy)
    lines = [*_missing_classes(samples, accuracy)]
    if guesses := _no_better_than_chance(accuracy):
        checks = ["check the preprocessing, the order of the classes and the labels", _more_training(opened)]
        return [*lines, f"{path}: {guesses}: {'; '.join(filter(None, checks))}"]
    if (spec := published_for(opened)) is not None and opened.architecture is not None:
        published = published_top1(spec) if opened.architecture.labels else None
        if published is not None and high < published - FAR_BELOW:
            lines.append(
                f"{path}: top-1 of {accuracy.top1:.2f} % is far below the {published:.2f} % published for "
                f"{spec}: check {preprocessing_options()} and the order of the classes"
            )
    return lines


def _nothing_to_lose(evaluation: Evaluation, accuracy: Accuracy, path: str) -> list[str]:
    """A warning on a baseline that gets nothing right: a detector without a box that fits, say."""
    name, metric = next(iter(evaluation.rows.items()))
    if not metric.has_nothing_to_lose(accuracy.metrics[name]):
        return []
    checks = "check the preprocessing, the numbers of the classes and the labels"
    return [f"{path}: {metric.title} is {metric.text(0.0)}, of which nothing can be lost: {checks}"]


def other_classes(program: Program | None, samples: Data) -> str | None:
    """A note where a network that is to be trained gives another number of outputs than there are classes."""
    named = len(samples.class_names or ())
    if program is None or not named:
        return None
    (output,) = program.graph.find_nodes(op="output")
    value = program_values(program, 1)[output]
    outputs = value.shape[-1] if isinstance(value, Tensor) and value.dim() == 2 else named
    if outputs == named:
        return None
    hint = f"add ?num_classes={named} to {option('arch')}, or to a student's name, if that is not meant"
    return f"{samples.name} has {named} classes, the network to be trained has {outputs} outputs: {hint}"


def tell_unknown_length(samples: Data, measuring: Measuring) -> None:
    """Note that data that are to be evaluated on may never end, before they are read."""
    if samples.may_never_end and measuring.options.limit is None:
        stop = f"{option('limit')} ends it after so many samples"
        measuring.note(
            f"{samples.name} has no length: the evaluation goes on until it ends, if it does; {stop}"
        )


def _no_better_than_chance(accuracy: Accuracy | None) -> str | None:
    """A line on a classifier that is right no more often than by guessing; None for a better one."""
    if accuracy is None or accuracy.top1 is None or accuracy.classes is None:
        return None
    chance = 100 / accuracy.classes
    if _interval(accuracy)[0] > chance:
        return None
    return f"top-1 of {accuracy.top1:.2f} % is no better than chance ({chance:.2f} %)"


def _more_training(opened: Opened) -> str | None:
    """How long the last command trained a network, and what to change; None where it did not."""
    last = opened.history[-1] if opened.history else {}
    parts = [part for part in (last, last.get("finetuned"), last.get("training")) if isinstance(part, dict)]
    steps = sum(part["steps"] for part in parts if isinstance(part.get("steps"), int))
    epochs = sum(part["epochs"] for part in parts if isinstance(part.get("epochs"), int))
    if not (steps or epochs):
        return None
    length = f"{steps:,} step{'s' * (steps != 1)}" if steps else f"{epochs} epoch{'s' * (epochs != 1)}"
    return (
        f"it was trained for {length}: give more {option('epochs')}, a smaller {option('batch_size')} "
        f"or another {option('lr')}"
    )


def _interval(accuracy: Accuracy) -> tuple[float, float]:
    """95 % interval of top-1, in percent."""
    assert accuracy.top1 is not None
    low, high = proportion_interval(round(accuracy.samples * accuracy.top1 / 100), accuracy.samples)
    return 100 * low, 100 * high


def _missing_classes(samples: Data, accuracy: Accuracy) -> list[str]:
    """A warning where labels, which count the classes that the data happens to hold, may mean others."""
    named = samples.class_names or ()
    if samples.names is not None or not 0 < len(named) < (accuracy.classes or 0):
        return []
    return [
        f"{samples.name} has {len(named)} classes, the network has {accuracy.classes} and no names for them: "
        f"class {len(named) - 1} of the network is taken to be '{named[-1]}'"
    ]
