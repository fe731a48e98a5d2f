"""Results of commands: what was made, written and measured, and how to show it."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from modelopt_cli import report
from modelopt_cli.api.parts_notes import PartsSummary
from modelopt_cli.artifact import TensorFile, Written
from modelopt_cli.artifact.coding import PLAIN_CODE, Code
from modelopt_cli.errors import UsageError
from modelopt_cli.kernels import prepare
from modelopt_cli.measure import Evaluation
from modelopt_cli.measure.layer_status import Coverage
from modelopt_cli.methods.context import Reached
from modelopt_cli.program import Program
from modelopt_cli.report.dry_run import Plan
from modelopt_cli.training import Trained

if TYPE_CHECKING:
    from rich.console import RenderableType

_WEIGHTS_HINT = (
    "network.load_state_dict(result.state_dict()) puts the weights into the network, "
    "mo.save(result, path) into a file that mo.load_state_dict(path) reads"
)


@dataclass(frozen=True)
class Result:
    """Result of a command: ``str()`` is the table that the command line prints.

    Attributes:
        command: that gave it.
        coverage: every weight-carrying layer, with what became of it; None where nothing is compressed.
        layers: the method's own row for each layer, where it has some.
        target: what was asked for and what was reached.
        notes: one line for each thing the user should know of the result.
        told: those of them that ``on_note`` was called with before the result was written.
        predicted_bytes: length of the file, known before it is written; after a dry run without the
            training that was asked for, what it would have before that training.
        snr_db: signal-to-noise of the outputs against the original's, in dB, on a few samples of the
            calibration data or of noise; None where it is not measured.
        trained: how training went.
        entry: newest entry of the history, after ``distill``.
        plan: what a training would take, after a dry run of a command that trains.
        written: the file; None after a dry run, or in a process that is not the main one of several.
        scratch: that of the student without a teacher, if one was asked for.
        evaluation: original and result side by side, or None where nothing was measured.
        captured_parts: what was captured of a network that could not be captured whole; None of any other.
        untraced: why the network has no graph, where it was given and cannot be traced.
        content: the network as its file has it, or its tensors where it has no graph; in Python alone.
        code: coding of the file, a key of ``artifact.coding.CODINGS``.
    """

    command: str
    coverage: Coverage | None = None
    layers: tuple[Any, ...] = ()
    target: Reached | None = None
    notes: tuple[str, ...] = ()
    told: tuple[str, ...] = ()
    predicted_bytes: int | None = None
    snr_db: float | None = None
    trained: Trained | None = None
    entry: dict[str, Any] | None = None
    plan: Plan | None = None
    written: Written | None = None
    scratch: Written | None = None
    evaluation: Evaluation | None = None
    captured_parts: PartsSummary | None = None
    untraced: str | None = None
    content: Program | TensorFile | None = None
    code: Code = PLAIN_CODE

    @cached_property
    def program(self) -> Program | None:
        """The network, ready to run; None after a dry run and on the command line.

        Raises:
            UsageError: the network has no graph; the reason, and what to do with the weights.
        """
        if isinstance(self.content, TensorFile):
            reason = self.untraced or "nothing says what the network is"
            raise UsageError(f"there are weights and no graph: {reason}", where="program", hint=_WEIGHTS_HINT)
        return None if self.content is None else prepare(self.content)

    def state_dict(self) -> dict[str, Tensor]:
        """The weights, decoded, by name; also of a network without a graph."""
        if isinstance(self.content, Program):
            return dict(self.content.state_dict())
        return {} if self.content is None else dict(self.content.state)

    @property
    def passed(self) -> bool:
        """True if every gate was met."""
        return self.evaluation is None or all(gate.passed for gate in self.evaluation.gates)

    @property
    def lines(self) -> list[str]:
        """Lines below the table: target, coverage, notes."""
        lines = [report.target_line(self.target)] if self.target is not None else []
        if self.coverage is not None:
            lines += report.coverage_lines(self.coverage)
        return [*lines, *([] if self.captured_parts is None else [str(self.captured_parts)]), *self.notes]

    @property
    def written_lines(self) -> list[str]:
        """One line for each file."""
        files = filter(None, (self.scratch, self.written))
        return [f"wrote {file.path} ({file.file_bytes:,} bytes)" for file in files]

    @property
    def layer_table(self) -> "RenderableType | None":
        """Every layer, with what became of it; None for commands that compress nothing."""
        return None if self.coverage is None else report.layer_table(self.layers, self.coverage)

    def parts(self) -> "list[RenderableType]":
        """Everything there is to show, in order."""
        if self.plan is not None:
            return [report.plan_table(self.plan)]
        if self.evaluation is not None:
            return [report.table(self.evaluation), *self.lines, *self.written_lines]
        layers = [] if self.layer_table is None else [self.layer_table]
        size = [f"the file would have {self.predicted_bytes:,} bytes"] if self.predicted_bytes else []
        return [*layers, *self.lines, *(self.written_lines or size)]

    def as_dict(self) -> dict[str, Any]:
        """The object that ``--json`` prints, of JSON types alone.

        ``output`` is null after a dry run, ``evaluation`` (as ``eval --json`` prints it) where nothing was
        measured; so is whatever the command does not have.
        """
        if self.plan is not None:
            return {"schema_version": 1, "output": None, **report.plan_json(self.plan)}
        covered, trained = self.coverage, self.trained
        return {
            "schema_version": 1,
            "output": _file_json(self.written),
            "scratch": _file_json(self.scratch),
            "predicted_bytes": self.predicted_bytes,
            "snr_db": self.snr_db,
            "layers": [] if covered is None else report.layers_json(self.layers, covered),
            "coverage": [] if covered is None else [dict(vars(layer)) for layer in covered.layers],
            "compressed": None if covered is None else report.coverage_json(covered),
            "parts": None if self.captured_parts is None else dict(vars(self.captured_parts)),
            "target": None if self.target is None else dict(vars(self.target)),
            "notes": list(self.notes),
            "training": None if trained is None else dict(vars(trained)),
            "distillation": self.entry,
            "evaluation": None if self.evaluation is None else report.to_json(self.evaluation),
        }

    def __repr__(self) -> str:
        share = (
            "" if self.coverage is None else f"{self.coverage.compressed} of {self.coverage.total} layers, "
        )
        return (
            f"<Result of {self.command}: {share}{self.predicted_bytes or 0:,} bytes; print() shows the table>"
        )

    def __str__(self) -> str:
        return report.plain_text(report.group(self.parts())).rstrip("\n")

    def _repr_html_(self) -> str:
        return report.html(report.group(self.parts()))


@dataclass(frozen=True)
class Measured(Evaluation):
    """Figures of models side by side: ``str()`` is the table that the command line prints."""

    @classmethod
    def of(cls, evaluation: Evaluation) -> "Measured":
        """The same figures."""
        return cls(**vars(evaluation))

    @property
    def passed(self) -> bool:
        """True if every gate was met."""
        return all(gate.passed for gate in self.gates)

    def as_dict(self) -> dict[str, Any]:
        """The object that ``eval --json`` prints."""
        return report.to_json(self)

    def __repr__(self) -> str:
        return f"<Measured: {len(self.models)} models; print() shows the table>"

    def __str__(self) -> str:
        return report.plain_text(report.table(self)).rstrip("\n")

    def _repr_html_(self) -> str:
        return report.html(report.table(self))


def _file_json(written: Written | None) -> dict[str, Any] | None:
    if written is None:
        return None
    return {"path": str(written.path), "file_bytes": written.file_bytes, "sha256": written.sha256}
