"""Settings of measuring, and limits on what was measured."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, get_type_hints

from modelopt_cli.errors import UsageError
from modelopt_cli.measure.conditions import Conditions, Obstacle, without_comparison, without_labels
from modelopt_cli.measure.speedup import least_rounds, rounds_needed
from modelopt_cli.settings import Config, Setting, fields_of, fraction, option, parse_device

if TYPE_CHECKING:
    from modelopt_cli.measure.evaluated_model import EvaluatedModel

    Hindrance = tuple[EvaluatedModel, Obstacle]
    from modelopt_cli.measure.evaluation import Comparison, ModelReport

_RUNNING = "Running"
GATES_TITLE = "Gates (exit code 1 if not met)"


@dataclass(frozen=True)
class EvalOptions(Config, title="Measuring"):
    """Settings of an evaluation.

    Attributes:
        baseline: index of the reference among the models.
        memory: measure peak memory and the time to load next to latency, which starts one process for each
            model.
    """

    baseline: Annotated[int, "Index of the model that the others are compared with."] = 0
    batch_size: Annotated[
        int,
        Setting(
            "Samples in one pass when latency is measured.",
            least=1,
            flags=("--latency-batch-size",),
            older=("--batch-size",),
        ),
    ] = 1
    warmup: Annotated[
        int,
        Setting(
            "Passes before those that are timed.",
            least=0,
            flags=("--latency-warmup",),
            older=("--warmup",),
            advanced=True,
        ),
    ] = 5
    runs: Annotated[
        int,
        Setting(
            "Timed passes (0: measure no latency, memory and loading).",
            least=0,
            flags=("--latency-runs",),
            older=("--runs",),
        ),
    ] = 30
    threads: Annotated[
        int | None,
        Setting("CPU threads.", least=1, default="torch's own choice", title=_RUNNING, shared=True),
    ] = None
    data_batch_size: Annotated[
        int, Setting("Samples in one pass when accuracy is measured.", least=1, advanced=True)
    ] = 64
    limit: Annotated[int | None, Setting("Evaluate on at most this many samples of --data.", least=1)] = None
    workers: Annotated[
        int,
        Setting(
            "Processes that load data next to this one.", least=0, title=_RUNNING, shared=True, advanced=True
        ),
    ] = 0
    seed: Annotated[
        int, Setting("Seed of everything random.", least=0, most=2**32 - 1, title=_RUNNING, shared=True)
    ] = 0
    device: Annotated[
        str,
        Setting(
            "Device to run on.", metavar="cpu|cuda|cuda:N", parse=parse_device, title=_RUNNING, shared=True
        ),
    ] = "cpu"
    memory: Annotated[
        bool, "Measure peak memory and the time to load next to latency, in one process for each model."
    ] = True

    def require_baseline(self, models: int) -> None:
        """Raise UsageError unless the baseline is one of so many models."""
        if not 0 <= self.baseline < models:
            hint = f"count from 0 to {models - 1}"
            raise UsageError(
                f"there is no model {self.baseline} among {models}", where=option("baseline"), hint=hint
            )


@dataclass(frozen=True)
class Gate:
    """A limit on a figure of a model: the row of a gate, next to the setting on a field of :class:`Gates`.

    Attributes:
        judged: what is held against the limit, in one line for the documentation.
        figure: from the report of a model and its comparison with the baseline; None if it was not measured.
        at_most: True if the limit is the largest value allowed, False if it is the smallest.
        unit: of the figure and the limit.
        unit_of: the same where it depends on the task.
        bound: the end of the figure's 95 % interval that speaks against the model; None where it is exact.
        is_cautious: True if ``bound`` is held against the limit instead of ``figure``.
        lacking: what an evaluation under these conditions lacks to measure the figure.
        obstacle: what keeps the figure of a model from being measured: the baseline or the model, and why.
        unresolved: a note where the interval cannot tell if the limit is kept: what would resolve it.
    """

    judged: str
    figure: "Callable[[ModelReport, Comparison], float | None]"
    at_most: bool
    unit: str = ""
    unit_of: "Callable[[Comparison], str] | None" = None
    bound: "Callable[[Comparison], float | None] | None" = None
    is_cautious: "Callable[[Gates], bool]" = lambda gates: False
    lacking: "Callable[[Conditions], Obstacle | None]" = lambda conditions: None
    obstacle: "Callable[[EvaluatedModel, EvaluatedModel], tuple[EvaluatedModel, Obstacle] | None]" = (
        lambda baseline, model: None
    )
    unresolved: "Callable[[Comparison, float], str | None]" = lambda comparison, limit: None


def _rounds(conditions: Conditions) -> Obstacle | None:
    least, runs = least_rounds(), next(field for field in fields_of(EvalOptions) if field.name == "runs")
    if conditions.runs >= least:
        return None
    return Obstacle(f"{conditions.runs} runs give no 95 % interval", f"give {runs.label} {least} or more")


def _not_run(*models: "EvaluatedModel") -> "Hindrance | None":
    """The first of two models that cannot be run."""
    return next(((model, model.obstacle) for model in models if model.obstacle is not None), None)


def _not_covered(baseline: "EvaluatedModel", model: "EvaluatedModel") -> "Hindrance | None":
    if model.coverage is not None:
        return None
    hint = f"give {option('arch')}" if model.model is None else "hold a file that modelopt wrote against it"
    return model, Obstacle("nothing says which of its layers are compressed", hint)


def _more_samples(comparison: "Comparison", limit: float) -> str | None:
    from modelopt_cli.measure.statistics import samples_needed

    difference = comparison.difference
    if difference is None or not difference.low <= limit <= difference.high < math.inf:
        return None
    if not 0 < limit < difference.high - difference.drop:
        return None
    margin = f"{limit:g}{comparison.metric.drop_unit}"
    return (
        f"{difference.samples:,} samples cannot tell whether a limit of {margin} is kept; with "
        f"about {samples_needed(difference, limit):,} the interval would end {margin} above the "
        f"{comparison.metric.change}"
    )


def _more_rounds(comparison: "Comparison", limit: float) -> str | None:
    speedup = comparison.speedup
    rounds = None if speedup is None else rounds_needed(speedup, limit)
    if speedup is None or rounds is None:
        return None
    return f"{speedup.rounds:,} runs cannot tell whether it is {limit:g}x faster; about {rounds:,} might"


@dataclass(frozen=True)
class Gates(Config, title=GATES_TITLE):
    """Limits on the result, compared with the baseline; None sets no limit.

    Attributes:
        judged: index of the one model to hold against the limits; None holds all but the baseline.
    """

    max_drop: Annotated[
        float | None,
        Setting(
            "Largest loss of the task's main metric, in its unit; of top-1, percentage points.",
            metavar="PP",
        ),
        Gate(
            "the measured drop of the task's main metric; with `--confident` the upper end of its interval",
            lambda model, comparison: comparison.visible_drop,
            at_most=True,
            unit=" pp",
            unit_of=lambda comparison: comparison.metric.drop_unit,
            bound=lambda comparison: comparison.difference.high if comparison.difference else None,
            is_cautious=lambda gates: gates.confident,
            lacking=without_labels,
            obstacle=_not_run,
            unresolved=_more_samples,
        ),
    ] = None
    min_ratio: Annotated[
        float | None,
        Setting("Smallest ratio of the baseline's file size to the result's.", least=0),
        Gate(
            "the ratio of sizes, which is exact",
            lambda model, comparison: comparison.ratio,
            at_most=False,
            unit="x",
        ),
    ] = None
    min_speedup: Annotated[
        float | None,
        Setting("Smallest speedup, at the lower end of its 95 % interval.", least=0),
        Gate(
            "the lower end of the speedup's interval; refused with fewer than 6 `--latency-runs`",
            lambda model, comparison: comparison.speedup.ratio if comparison.speedup else None,
            at_most=False,
            unit="x",
            bound=lambda comparison: comparison.speedup.low if comparison.speedup else None,
            is_cautious=lambda gates: True,
            lacking=_rounds,
            obstacle=_not_run,
            unresolved=_more_rounds,
        ),
    ] = None
    min_coverage: Annotated[
        float | None,
        Setting(
            "Smallest fraction of the layers that is compressed.",
            metavar="F",
            parse=fraction,
            least=0,
            most=1,
        ),
        Gate(
            "the share of layers that are compressed in the file, which is exact",
            lambda model, comparison: model.coverage,
            at_most=False,
            obstacle=_not_covered,
        ),
    ] = None
    min_snr: Annotated[
        float | None,
        Setting("Smallest signal-to-noise ratio of the outputs against the baseline's, in dB.", metavar="DB"),
        Gate(
            "the ratio of the output that has the least, on `--data` or, without it, on noise",
            lambda model, comparison: comparison.fidelity.least_snr_db if comparison.fidelity else None,
            at_most=False,
            unit=" dB",
            lacking=without_comparison,
            obstacle=_not_run,
        ),
    ] = None
    min_cosine: Annotated[
        float | None,
        Setting("Smallest cosine of the outputs with the baseline's.", metavar="C", least=-1, most=1),
        Gate(
            "the cosine of the output that has the least, on `--data` or, without it, on noise",
            lambda model, comparison: comparison.fidelity.least_cosine if comparison.fidelity else None,
            at_most=False,
            lacking=without_comparison,
            obstacle=_not_run,
        ),
    ] = None
    confident: Annotated[
        bool, Setting("Judge --max-drop by the upper end of its 95 % interval.", advanced=True)
    ] = False
    judged: Annotated[
        int | None, "Index of the one model that is held against the limits; by default all."
    ] = None

    def conflicts(self) -> Iterator[str]:
        """An interval of no limit."""
        if self.confident and self.max_drop is None:
            yield f"{option('confident')}: needs {option('max_drop')}"

    def limits(self) -> dict[str, float]:
        """The limits that are set, by the names of ``GATES``."""
        limits = {name: getattr(self, name.replace("-", "_")) for name in GATES}
        return {name: limit for name, limit in limits.items() if limit is not None}

    def __bool__(self) -> bool:
        return bool(self.limits())


def _rows() -> Iterator[tuple[str, Gate]]:
    for name, hint in get_type_hints(Gates, include_extras=True).items():
        for note in getattr(hint, "__metadata__", ()):
            if isinstance(note, Gate):
                yield name.replace("_", "-"), note


GATES: dict[str, Gate] = dict(_rows())
"""The row of each gate by its name, that of its option without the dashes."""
