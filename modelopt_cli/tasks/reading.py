"""Targets of opened data, in the form that a task takes them."""

from modelopt_cli.data import Data
from modelopt_cli.tasks.task_spec import TaskSpec


def read_targets(data: Data, task: TaskSpec, names: tuple[str, ...] | None = None) -> Data:
    """The same data with targets read.

    Args:
        data: opened in any way.
        task: what they are for.
        names: of the network's classes, in logit order, to which those of the data are mapped where each
            sample has a class; or None.

    Raises:
        DataError: the first target is of another form, or a class is none of these.
    """
    read = data.with_targets(task.targets(names))
    return read.with_labels(names) if task.row.predicted is not None else read
