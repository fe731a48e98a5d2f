"""The tables of choices in docs/, made from the rows that declare the choices.

A page marks a table with ``<!-- table: NAME -->`` and ``<!-- end of table -->``, each on a line of its own.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from modelopt_cli.artifact.coding import CODINGS
from modelopt_cli.data.data_kinds import DATA_KINDS
from modelopt_cli.measure.config import GATES, Gates
from modelopt_cli.measure.metrics import METRICS, Metric, metrics_named
from modelopt_cli.methods.distill.losses import LOSSES
from modelopt_cli.methods.prune.allocation import ALLOCATIONS
from modelopt_cli.methods.prune.criteria import CRITERIA
from modelopt_cli.methods.prune.structures import CHANNELS, LAYERS, WEIGHTS
from modelopt_cli.methods.quantize.equalizing.bias_corrections import BIAS_CORRECTIONS
from modelopt_cli.methods.quantize.equalizing.equalizations import EQUALIZATIONS
from modelopt_cli.methods.quantize.observers import OBSERVERS
from modelopt_cli.methods.quantize.schemes import SCHEMES
from modelopt_cli.methods.quantize.weight_rounding.roundings import ROUNDINGS
from modelopt_cli.methods.share.config import INITS, SCOPES, TUNINGS, WEIGHTINGS
from modelopt_cli.report.figure_rows import FIGURES
from modelopt_cli.settings import fields_of, help_of
from modelopt_cli.tasks import TASKS
from modelopt_cli.training.catalog import AUGMENTATIONS, OPTIMIZERS, SCHEDULES, TEACHERS
from modelopt_cli.training.catalog import LOSSES as LABEL_LOSSES

Column = Callable[[Any], str]
_MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def _paper(row: Any) -> str:
    return "" if row.paper == "none" else row.paper


def _yes(truth: object) -> str:
    return "yes" if truth else ""


def _ranks(granularity: Any) -> Column:
    return lambda row: _yes(granularity in row.granularities)


def _needs(row: Any) -> str:
    return "labelled data" if row.needs_labels else "data" if row.needs_data else ""


def _activations(row: Any) -> str:
    if row.activation_bits:
        return f"{row.activation_bits} bits"
    return f"float32 or {row.float_type}" if row.float_type else "float32"


def choices(head: str, rows: Mapping[str, Any], **columns: Column) -> list[list[str]]:
    """A table of the rows of a registry: name, what it is, and more columns by their titles."""
    lines = [
        [f"`{name}`", help_of(row), *(column(row) for column in columns.values())]
        for name, row in rows.items()
    ]
    return [[head, "", *(title.replace("_", " ") for title in columns)], *lines]


def gates() -> list[list[str]]:
    """The limits, as options, and what is held against each."""
    fields = [field for field in fields_of(Gates) if field.optional]
    lines = (
        [f"`{field.flag} {field.metavar}`", field.setting.help.rstrip("."), gate.judged]
        for field, gate in zip(fields, GATES.values(), strict=True)
    )
    return [["gate", "limit", "held against it"], *lines]


def figures() -> list[list[str]]:
    """The figures of an evaluation: in the table, and in exports; metrics are on a page of their own."""
    lines = (
        [
            figure.title.format(metric="top-1", change="drop"),
            "" if figure.number is None else f"`{'.'.join(figure.path) or name}`",
            figure.help,
        ]
        for name, figure in FIGURES.items()
        if name not in METRICS or not figure.optional
    )
    return [["row of the table", "key in JSON", ""], *lines]


def tasks() -> list[list[str]]:
    """The tasks: targets, metrics, and the unit of the largest drop."""
    lines = (
        [
            f"`{name}{_options(row.all_options)}`",
            row.help,
            row.target,
            ", ".join(metric.title for metric in metrics_named(name).values()) or "your own",
            _drop_unit(*list(metrics_named(name).values())[:1]),
        ]
        for name, row in TASKS.items()
    )
    return [["task", "", "target of a sample", "metrics", "unit of `--max-drop`"], *lines]


def label_losses() -> list[list[str]]:
    """The losses with targets, and the tasks that are learned by each."""
    lines = (
        [row.help, ", ".join(_learned_by(name)), f"`{name}`" if _is_choice(name) else ""]
        for name, row in LABEL_LOSSES.items()
    )
    return [["loss", "of", "chosen by `loss=`"], *lines]


def distilled_by() -> list[list[str]]:
    """The losses that ``distill`` learns by where none is given, and their tasks."""
    tasks: dict[str | None, list[str]] = {}
    for name, row in TASKS.items():
        tasks.setdefault(row.distilled_by, []).append(f"`{name}`")
    lines = ([", ".join(names), f"`{loss}`" if loss is not None else "none"] for loss, names in tasks.items())
    return [["task", "default of `--loss`"], *lines]


def _learned_by(loss: str) -> list[str]:
    """Tasks that may be learned by a loss; those that are by default are marked."""
    tasks = ((task, row.losses) for task, row in TASKS.items() if loss in row.losses)
    return [
        f"`{task}`" + (" (default)" if len(losses) > 1 and loss == losses[0] else "")
        for task, losses in tasks
    ]


def _is_choice(loss: str) -> bool:
    return any(loss in row.losses and len(row.losses) > 1 for row in TASKS.values())


def _options(options: Mapping[str, Any]) -> str:
    """Options of a spec with their defaults; empty where it has none."""
    defaults = {key: value[0] if isinstance(value, tuple) else value for key, value in options.items()}
    return "?" + "&".join(f"{key}={value}" for key, value in defaults.items()) if defaults else ""


def _drop_unit(metric: Metric | None = None) -> str:
    unit = metric.drop_unit.strip() if metric is not None else ""
    return {"pp": "percentage points", "": "that of the metric"}.get(unit, unit)


def metrics() -> list[list[str]]:
    """The metrics: as the table calls them, and their keys in JSON."""
    lines = (
        [f"`{name}`", row.title, row.help, "higher" if row.higher_is_better else "lower"]
        for name, row in METRICS.items()
    )
    return [["key in `metrics`", "row of the table", "", "better"], *lines]


TABLES: dict[str, Callable[[], list[list[str]]]] = {
    "schemes": lambda: choices(
        "scheme",
        SCHEMES,
        weights=lambda row: f"{row.weight_bits} bits",
        activations=_activations,
        needs=lambda row: (
            {"TENSORS": "weights", "MODULE": "a network", "GRAPH": "a traced network"}[row.source.name]
            + (", data" if row.needs_calibration else "")
        ),
    ),
    "bias_corrections": lambda: choices("bias_correction", BIAS_CORRECTIONS, paper=_paper),
    "equalizations": lambda: choices("equalize", EQUALIZATIONS, paper=_paper),
    "observers": lambda: choices("observer", OBSERVERS, paper=_paper),
    "roundings": lambda: choices("rounding", ROUNDINGS, paper=_paper),
    "criteria": lambda: choices(
        "criterion",
        CRITERIA,
        weights=_ranks(WEIGHTS),
        channels=_ranks(CHANNELS),
        layers=_ranks(LAYERS),
        needs=_needs,
        paper=_paper,
    ),
    "allocations": lambda: choices("allocation", ALLOCATIONS, paper=_paper),
    "inits": lambda: choices("init", INITS, paper=_paper),
    "scopes": lambda: choices("scope", SCOPES),
    "weightings": lambda: choices(
        "weighting", WEIGHTINGS, needs=lambda row: "data, no labels" if row.needs_data else "", paper=_paper
    ),
    "tunings": lambda: choices("tune", TUNINGS, paper=_paper),
    "codes": lambda: choices("code", CODINGS),
    "losses": lambda: [
        ["term", "weight", "looks at", "compares"],
        *(
            [f"`{name}`", f"{row.weight:g}", row.looks_at, f"{row.help} ({row.paper})"]
            for name, row in LOSSES.items()
        ),
    ],
    "distilled-by": distilled_by,
    "augmentations": lambda: choices("preset", AUGMENTATIONS),
    "optimizers": lambda: choices("optimizer", OPTIMIZERS),
    "lr-schedules": lambda: choices("schedule", SCHEDULES),
    "teachers": lambda: choices("teacher", TEACHERS),
    "figures": figures,
    "tasks": tasks,
    "metrics": metrics,
    "label-losses": label_losses,
    "data": lambda: [
        ["spec", "data"],
        *([f"`{kind.form}`", kind.help] for kind in DATA_KINDS.values()),
    ],
    "gates": gates,
}


def filled_pages(folder: Path) -> dict[Path, str]:
    """The pages in a folder that have tables, as they should be; raises KeyError for an unknown table."""
    pages = {path: path.read_text() for path in sorted(folder.glob("*.md"))}
    return {
        path: _MARKED.sub(lambda found: f"{found[1]}{markdown(TABLES[found[2]]())}{found[3]}", text)
        for path, text in pages.items()
        if "<!-- table: " in text
    }


def markdown(lines: Iterable[Iterable[str]]) -> str:
    """A table; columns without any entry are left out."""
    rows = [list(line) for line in lines]
    kept = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    head, *body = (f"| {' | '.join(row[i] for i in kept)} |" for row in rows)
    return "\n".join([head, "|" + "---|" * len(kept), *body]) + "\n"
