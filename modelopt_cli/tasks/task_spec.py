"""A task as it is asked for: a row of ``TASKS`` with its options. Imports no torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from modelopt_cli.errors import UsageError
from modelopt_cli.settings import did_you_mean, option, row_named
from modelopt_cli.tasks.task import LOSS, Scalar, Task
from modelopt_cli.tasks.task_table import DEFAULT, TASKS

if TYPE_CHECKING:
    from torch import Tensor

    from modelopt_cli.data import Data
    from modelopt_cli.data.targets import TargetFormat, Targets


@dataclass(frozen=True)
class TaskSpec:
    """A task and its options.

    Attributes:
        text: as it was given, ``segment?ignore=0``.
        row: of ``TASKS``.
        options: those that were given.
        chosen_loss: that was given, where the row has several.
        output: name of the output that is judged and learned, where the row's own is not meant.
    """

    text: str
    row: Task
    options: Mapping[str, Scalar] = field(default_factory=dict)
    chosen_loss: str | None = None
    output: str | None = None

    @property
    def name(self) -> str:
        """A key of ``TASKS``; of the user's metric its text."""
        return self.text.partition("?")[0]

    @property
    def loss(self) -> str | None:
        """Name of the loss that is learned by; None where the row has none."""
        return self.chosen_loss or next(iter(self.row.losses), None)

    @property
    def is_own(self) -> bool:
        """True if the metric is the user's code."""
        return self.row.spelling is not None

    @cached_property
    def function(self) -> Any:
        """The user's metric, where the task is one."""
        from modelopt_cli.tasks.own import load

        return load(self.text)

    def targets(self, names: tuple[str, ...] | None = None) -> "TargetFormat":
        """The format of its targets, for a network whose classes have these names, or none."""
        return self.row.form(names=names, **self.options)

    def read_targets(self, data: "Data", names: tuple[str, ...] | None = None) -> "Data":
        """Opened data with their targets read.

        Args:
            data: opened in any way.
            names: of the network's classes, in logit order, to which those of the data are mapped where each
                sample has a class; or None.

        Raises:
            DataError: the first target is of another form, or a class is none of these.
        """
        read = data.with_targets(self.targets(names))
        return read.with_labels(names) if self.row.predicted is not None else read

    def find(self, outputs: Any) -> Any:
        """The output that is judged and learned: a tensor, or all outputs where they are judged together.

        Raises:
            UsageError: there is none of the name that the user gave.
        """
        from modelopt_cli.tasks.task_output import find_output

        if not self.row.outputs and self.output is None:
            return outputs
        output = find_output(outputs, self.row.outputs, self.output)
        return outputs if output is None else output

    def judged(self, outputs: Any, targets: "Targets", inputs: Any) -> Any:
        """The output that its metrics score, from all outputs for a batch; raises as ``Task.judged``."""
        return self.row.judged(self.find(outputs), targets, inputs, **self.options)

    def logits(self, outputs: Any) -> "Tensor | None":
        """Rows of logits ``(M, classes)``, of every sample, pixel or token; None where there are none."""
        from torch import Tensor
        from torch.nn.functional import pad

        where, output = self.row.logits, self.find(outputs)
        if where is None or not isinstance(output, Tensor) or output.dim() not in where.ranks:
            return None
        rows = output.movedim(where.axis, -1).flatten(0, -2)
        # The single logit of a pixel is that of class 1 against class 0.
        is_binary = rows.shape[1] == 1 and output.dim() > 2
        return pad(rows, (1, 0)) if is_binary else rows

    def counted(self, targets: Any, inputs: Any) -> "Tensor | None":
        """Which tokens of a batch are no padding, bool ``(N, T)``; None where nothing says so."""
        return None if self.row.counted is None else self.row.counted(targets, inputs)

    def softmax_rows(self, outputs: Any) -> "Tensor | None":
        """Rows of logits whose softmax are the probabilities; None where there are none.

        Of classes that are there or not by themselves a row ``(2,)`` for each, without it and with it.
        """
        from torch.nn.functional import pad

        where, rows = self.row.logits, self.logits(outputs)
        if where is None or rows is None or where.exclusive:
            return rows
        return pad(rows.reshape(-1, 1), (1, 0))

    def batch_axis(self, output: Any, samples: int) -> int:
        """Dimension of the samples in the output that is judged; raises InputError where it is not known."""
        axis = self.row.batch_axis
        return 0 if axis is None else axis(output, samples, **self.options)

    def classes(self, outputs: Any) -> int | None:
        """Number of classes that the outputs tell apart; None where they stand for no probabilities."""
        rows = self.logits(outputs)
        return None if rows is None else rows.shape[1]

    def with_inferred(self, run: Callable[[int], Any]) -> "TaskSpec":
        """The same with the options that a network tells; those that were given stay.

        Args:
            run: gives all outputs for a number of samples.
        """
        if self.row.infer is None:
            return self
        told = self.row.infer(lambda samples: self.find(run(samples)))
        return replace(self, options={**told, **self.options})

    def named(self, output: str | None) -> "TaskSpec":
        """The same with another output."""
        return self if output is None else replace(self, output=output)


def parse_task(text: str) -> TaskSpec:
    """A task of ``--task``: ``NAME``, ``NAME?key=value`` or ``FILE.py:CALLABLE``.

    Raises:
        UsageError: there is no such task, or it has no such option; the nearest is named.
    """
    name, mark, query = text.partition("?")
    row = row_named(name, TASKS)
    if row is None:
        hint = did_you_mean(name, TASKS) or f"there are {', '.join(TASKS)}"
        raise UsageError(f"there is no task {name!r}", where=option("task"), hint=hint)
    options: dict[str, Scalar] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        known = row.all_options
        if key not in known:
            hint = did_you_mean(key, known) or f"it takes {', '.join(known) or 'no options'}"
            raise UsageError(f"{name} has no option {key!r}", where=option("task"), hint=hint)
        options[key] = _read(name, key, value, known[key])
    if mark and not options:
        raise UsageError(f"{text!r} has nothing after its ?", where=option("task"), hint="write key=value")
    loss = options.pop(LOSS, None)
    return TaskSpec(text, row, options, None if loss is None else str(loss))


def parse_task_text(text: str) -> str:
    """The text itself, if it names a task; raises ValueError with what is wrong."""
    try:
        parse_task(text)
    except UsageError as error:
        raise ValueError(f"{error.message}; {error.hint}" if error.hint else error.message) from None
    return text


def _read(name: str, key: str, value: str, default: Scalar | tuple[str, ...]) -> Scalar:
    if isinstance(default, tuple):
        if value not in default:
            hint = did_you_mean(value, default) or f"it is one of {', '.join(default)}"
            raise UsageError(f"{name}: there is no {key} {value!r}", where=option("task"), hint=hint)
        return value
    try:
        return type(default)(value)
    except ValueError:
        kind = {int: "an integer", float: "a number"}.get(type(default), "text")
        raise UsageError(f"{name}: {key} is {value!r}, not {kind}", where=option("task")) from None


CLASSIFY = parse_task(DEFAULT)
"""Task of a network where nothing says another."""
