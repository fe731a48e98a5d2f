"""Costs of a training: networks, stages, time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import nn

from modelopt_cli.measure.flops import count_macs
from modelopt_cli.measure.size import logical_parameters
from modelopt_cli.program.input_spec import InputSpec
from modelopt_cli.text import printable
from modelopt_cli.training import TimeEstimate


@dataclass(frozen=True)
class Cost:
    """Costs of a network, counted as in the table.

    Attributes:
        role: ``network``, ``teacher`` or ``student``.
        name: a file's name, or an architecture.
        parameters: logical ones, see ``measure.size``.
        flops: for one sample, see ``measure.flops``.
    """

    role: str
    name: str
    parameters: int
    flops: int


@dataclass(frozen=True)
class Plan:
    """Plan of a command: networks to train, and the time that takes.

    Attributes:
        networks: teachers first.
        stages: its trainings, one after another.
        predicted_bytes: length of the file, but for a few digits in its history; None where that depends
            on what is learned.
        cache_bytes: that the teachers' logits would take on disk; None without a cache.
    """

    networks: Sequence[Cost]
    stages: Sequence[TimeEstimate]
    predicted_bytes: int | None = None
    cache_bytes: int | None = None

    @property
    def epochs(self) -> int:
        """Epochs of all trainings together."""
        return sum(stage.epochs for stage in self.stages)

    @property
    def steps(self) -> int:
        """Steps of all trainings together."""
        return sum(stage.steps for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Seconds of all trainings together; measuring the result and writing it come on top."""
        return sum(stage.seconds for stage in self.stages)


def cost_of(role: str, name: str, network: nn.Module, sample: InputSpec) -> Cost:
    """Count the costs of a network that takes such samples."""
    parameters = sum(tensor.numel() for tensor in logical_parameters(network))
    return Cost(role, name, parameters, count_macs(network, sample).flops)


def plan_table(plan: Plan) -> RenderableType:
    """Table of every network, every stage of training, and the time in all."""
    lines = [_total_line(plan)]
    if plan.predicted_bytes is not None:
        lines.append(f"the file would have about {plan.predicted_bytes:,} bytes")
    if plan.cache_bytes is not None:
        lines.append(f"the teacher's logits would take {plan.cache_bytes:,} bytes")
    texts = [Text(line, style="bold") for line in lines]
    return Group(_networks(plan), Text(), _stages(plan), Text(), *texts)


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as ``train --dry-run --json`` prints it, but for what every object has."""
    return {
        "networks": [
            {"role": each.role, "name": each.name, "params": each.parameters, "flops": each.flops}
            for each in plan.networks
        ],
        "epochs": plan.epochs,
        "steps": plan.steps,
        "seconds": plan.seconds,
        "predicted_bytes": plan.predicted_bytes,
        "cache_bytes": plan.cache_bytes,
        "stages": [dict(vars(stage)) for stage in plan.stages],
    }


def duration(seconds: float) -> str:
    """Write a time with enough digits: ``4.2 ms``, ``37 s``, ``12 min 5 s``, ``3 h 20 min``."""
    if seconds < 0.9995:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 10:
        return f"{seconds:.2g} s"
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60} min"


def _networks(plan: Plan) -> Table:
    grid = Table(box=None, pad_edge=False)
    grid.add_column("network", overflow="fold")
    grid.add_column("name", overflow="fold")
    for title in ("params", "FLOPs"):
        grid.add_column(title, justify="right")
    for each in plan.networks:
        grid.add_row(each.role, Text(printable(each.name)), f"{each.parameters:,}", f"{each.flops:,}")
    return grid


def _stages(plan: Plan) -> Table:
    grid = Table(box=None, pad_edge=False)
    grid.add_column("training", overflow="fold")
    for title in (
        "samples",
        "validated on",
        "epochs",
        "steps/epoch",
        "a step",
        "timed",
        "validation",
        "in all",
    ):
        grid.add_column(title, justify="right")
    for stage in plan.stages:
        grid.add_row(
            stage.stage,
            f"{stage.train_samples:,}",
            "?" if stage.val_samples is None else f"{stage.val_samples:,}",
            f"{stage.epochs:,}",
            f"{stage.steps_per_epoch:,}",
            _step(stage),
            f"{stage.timed_steps:,}",
            duration(stage.validation_seconds),
            duration(stage.seconds),
        )
    return grid


def _step(stage: TimeEstimate) -> str:
    """Time of one epoch; where logits are kept, also of the one that computes them."""
    text, kept = duration(stage.seconds_per_step), stage.seconds_per_kept_step
    return text if kept is None else f"{text}, then {duration(kept)}"


def _total_line(plan: Plan) -> str:
    epochs = f"{plan.epochs:,} epoch{'s' * (plan.epochs != 1)}"
    return f"{epochs}, {plan.steps:,} steps; training would take about {duration(plan.seconds)}"
