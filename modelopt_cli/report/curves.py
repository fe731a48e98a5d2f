"""The course of a training, drawn from its log; it needs matplotlib, the ``plots`` extra."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from typing import Any

from modelopt_cli.report.plots import new_figure, require_plots, save
from modelopt_cli.training.log import read_metrics

_WIDTH_INCHES, _PANEL_INCHES, _REST_INCHES = 8.0, 2.6, 1.0
_LEGEND_COLUMNS = 6
_STYLES = ("-", "--", ":")
"""Line styles, the next after all ten colours were used, so that no two lines look alike."""
# The first is always drawn, the others where there is something to draw.
_PANELS = (
    ("loss", "training loss,\nmean over the epoch"),
    ("val_top1", "validation accuracy,\ntop-1 (%)"),
)


@dataclass(frozen=True)
class Course:
    """Course of one stage of a training.

    Attributes:
        stage: its name in the log.
        epochs: the place of each of its epochs on the axis.
        figures: by name, one for each epoch; NaN where there is none.
    """

    stage: str
    epochs: list[int] = field(default_factory=list)
    figures: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name, _ in _PANELS})


def draw_curve(log: Path, path: Path, *, overlaid: Sequence[str] = (), force: bool = False) -> None:
    """Draw loss and validation accuracy, where there is any, by epoch.

    Stages follow each other on the axis. The same log gives the same bytes with the same matplotlib.

    Args:
        log: the ``metrics.jsonl`` of a run.
        path: where to write; its suffix is the format.
        overlaid: stages that start at the left edge, to be compared with the others.
        force: replace an existing file.

    Raises:
        UsageError: ``path`` is no picture's name.
        ArtifactError: ``log`` is not a run's.
        OutputError: ``path`` exists and ``force`` is not given, or cannot be written to.
        EnvironmentFailure: matplotlib is missing; no space or no permission.
    """
    require_plots(path)
    drawn = courses(read_metrics(log), overlaid)
    first, *others = _PANELS
    panels = [first, *(panel for panel in others if _is_known(panel[0], drawn))]
    figure = new_figure(_WIDTH_INCHES, _REST_INCHES + _PANEL_INCHES * len(panels))
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for each, (name, label) in zip(axes, panels, strict=True):
        _draw(each, drawn, name)
        each.set_ylabel(label)
    axes[-1].set_xlabel("epochs")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    figure.align_ylabels(axes)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=_LEGEND_COLUMNS)
    save(figure, path, force=force)


def courses(metrics: Sequence[dict[str, Any]], overlaid: Sequence[str] = ()) -> list[Course]:
    """The stages in the order of their first lines; each starts where the one before it ended.

    Args:
        metrics: the lines of a log.
        overlaid: as for :func:`draw_curve`.
    """
    by_stage: dict[str, Course] = {}
    start = end = 0
    for line in metrics:
        stage = line["stage"]
        if stage not in by_stage:
            by_stage[stage] = Course(stage)
            start = 0 if stage in overlaid else end
        place = start + line["epoch"]
        by_stage[stage].epochs.append(place)
        end = end if stage in overlaid else place
        for name, values in by_stage[stage].figures.items():
            value = line.get(name)
            values.append(nan if value is None else value)
    return list(by_stage.values())


def _draw(axes: Any, drawn: Sequence[Course], name: str) -> None:
    for number, course in enumerate(drawn):
        style = _STYLES[number // 10 % len(_STYLES)]
        colour = f"C{number % 10}"
        axes.plot(course.epochs, course.figures[name], style, color=colour, marker=".", label=course.stage)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _is_known(name: str, drawn: Sequence[Course]) -> bool:
    return any(value == value for course in drawn for value in course.figures[name])
