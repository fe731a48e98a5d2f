"""Tasks: what networks are for, and with that their targets, metrics and losses; one row each."""

from modelopt_cli.tasks.task import Logits, Misfit, Task
from modelopt_cli.tasks.task_spec import CLASSIFY, TaskSpec, parse_task, parse_task_text
from modelopt_cli.tasks.task_table import TASKS

__all__ = ["CLASSIFY", "TASKS", "Logits", "Misfit", "Task", "TaskSpec", "parse_task", "parse_task_text"]
