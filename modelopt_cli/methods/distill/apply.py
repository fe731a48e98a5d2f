"""Distillation of a student: training on labels and on the outputs of teachers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from modelopt_cli.artifact.encodings import compact, require_not_shared
from modelopt_cli.errors import UsageError
from modelopt_cli.measure.coverage import coverage
from modelopt_cli.measure.evaluated_model import is_quantized
from modelopt_cli.measure.layer_status import recorded
from modelopt_cli.methods.context import MethodResult
from modelopt_cli.methods.distill.cache_identity import open_cache
from modelopt_cli.methods.distill.config import DistillConfig
from modelopt_cli.methods.distill.distill_context import DistillContext
from modelopt_cli.methods.distill.feature_pairs import NetworkPoints, Pair, described, pairs_of
from modelopt_cli.methods.distill.feature_points import recording
from modelopt_cli.methods.distill.objective import DistillationLoss
from modelopt_cli.methods.distill.teacher import Teacher
from modelopt_cli.methods.prune.masks import Masks
from modelopt_cli.methods.quantize.learning import qat
from modelopt_cli.methods.stages import Stages
from modelopt_cli.program import Encoding, Program
from modelopt_cli.program.history import history_entry
from modelopt_cli.program.parted import code_of
from modelopt_cli.training import TrainConfig, Trained, Training, distributed, fit
from modelopt_cli.training.objectives import label_loss

STAGE, FINETUNE = "distill", "finetune"
SLOWER = 10
"""Divisor of the learning rate on labels alone, and of that of an int8 student, where none is given."""


def apply(program: Program, config: DistillConfig, context: DistillContext) -> MethodResult:
    """Train a copy of the student on the labels and on the teachers' outputs.

    Args:
        program: the student; it is not changed. Weights that were pruned stay zero, and int8 layers int8.
        config: the loss, and what follows.
        context: seed, training and teachers; it must have the latter two.

    Returns:
        The student in evaluation mode, its history one entry longer; no layer is left alone.

    Raises:
        UsageError: no training or no teacher, a loss that these networks cannot have, or a student that
            cannot be trained.
        InputError, DataError: as ``modelopt_cli.training.fit``.
    """
    training = training_of(program, context.trained_with)
    config = config.for_task(training.task)
    stages, context = Stages(training), replace(context, training=training)
    if training.run is not None:
        training.run.network = code_of(program)
    student = stages.once(STAGE, lambda: _distilled(program, config, context))
    if config.finetune_epochs:
        distilled = student
        student = stages.once(FINETUNE, lambda: _finetuned(distilled, config, context))
    return MethodResult(student, {})


def learn(
    network: nn.Module, config: DistillConfig, context: DistillContext, encodings: Mapping[str, Encoding]
) -> dict[str, Any]:
    """Distil in place, with or without a graph.

    Args:
        network: the student.
        config: the loss.
        context: as for :func:`apply`.
        encodings: how the student's tensors were stored so far.

    Returns:
        The entry of the history.

    Raises:
        as :func:`apply`.
    """
    training = context.trained_with
    config = config.for_task(training.task)
    require_not_shared(encodings)
    pairs = _pairs(network, config, context)
    teacher = _teacher(pairs, config, context)
    cache = open_cache(config, context, teacher) if context.cache is not None else None
    with recording(network, [pair.student for pair in pairs]) as values, torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        objective = DistillationLoss(
            config,
            teacher,
            values,
            pairs,
            training.config.label_smoothing,
            training.train.size or 1,
            cache,
            training.task,
        )
        masks = Masks.of_state(network.state_dict(), encodings)
        trained = fit(
            network,
            training,
            seed=context.seed,
            stage=STAGE,
            objective=objective,
            callbacks=[masks],
            kept_after=cache.layout.variants if cache is not None else None,
        )
    entry = _entry(config, context, trained) | ({"compared": described(pairs)} if pairs else {})
    if cache is not None and not cache.layout.exact:
        entry["logits"] = {"kept": cache.layout.top, "classes": cache.layout.classes}
    return entry


def _teacher(pairs: Sequence[Pair], config: DistillConfig, context: DistillContext) -> Teacher:
    training = context.trained_with
    together = distributed.world(training.device)
    largest = min(training.config.batch_size, training.train.size or training.config.batch_size)
    return Teacher(
        context.teachers,
        [pair.teacher for pair in pairs],
        together.device,
        batch_size=-(-largest // together.size),
        amp=training.config.amp,
        on_note=context.on_note,
        task=training.task,
        compares_output=config.terms.compare_outputs,
    )


def _pairs(network: nn.Module, config: DistillConfig, context: DistillContext) -> list[Pair]:
    """Pairs of values that the terms on features compare."""
    training, first = context.trained_with, context.teachers[0]
    student = NetworkPoints(network, training.train.input, "the student")
    teacher = NetworkPoints(first.network, first.input, first.name)
    pairs = [pair for term in config.terms if term.weight for pair in pairs_of(term, student, teacher)]
    if pairs and is_quantized(first.network):
        raise UsageError(
            "has int8 layers, whose values cannot be compared",
            where=first.name,
            hint="use losses on logits, or its float form",
        )
    return pairs


def _distilled(program: Program, config: DistillConfig, context: DistillContext) -> Program:
    network = qat.prepare(program)
    entry = learn(network, config, context, network.encodings)
    student = qat.convert(network, program)
    student.input = student.input.with_samples_of(context.trained_with.train.input)
    student.encodings = compact(student)
    return _with(student, program.history, entry)


def _finetuned(student: Program, config: DistillConfig, context: DistillContext) -> Program:
    """The student after training on labels alone."""
    training = context.trained_with
    network = qat.prepare(student)
    settings = finetuning(config, training.config, student.history[-1]["lr"])
    masks = Masks.of_state(network.state_dict(), network.encodings)
    trained = fit(
        network,
        replace(training, config=settings),
        seed=context.seed,
        stage=FINETUNE,
        objective=label_loss(training.task, settings.label_smoothing),
        callbacks=[masks],
    )
    tuned = qat.convert(network, student)
    tuned.encodings = compact(tuned)
    entry = student.history[-1] | {"finetuned": trained.figures}
    return _with(tuned, student.history[:-1], entry)


def training_of(student: Program, training: Training) -> Training:
    """Training of a student: with a smaller learning rate for an int8 one, where none is given.

    Its batch norms are folded, and nothing else keeps large steps from destroying what it knows already.
    """
    config = training.config
    if config.lr is not None or not is_quantized(student):
        return training
    return replace(training, config=replace(config, lr=config.peak_lr / SLOWER))


def finetuning(config: DistillConfig, training: TrainConfig, largest: float) -> TrainConfig:
    """Settings of the training on labels alone that follows.

    Args:
        config: its epochs and, where given, its learning rate.
        training: settings of the distillation.
        largest: learning rate of the distillation.
    """
    rate = config.finetune_lr if config.finetune_lr is not None else largest / SLOWER
    return replace(training, epochs=config.finetune_epochs, lr=rate, warmup=0.0)


def _with(program: Program, before: tuple[dict[str, Any], ...], entry: dict[str, Any]) -> Program:
    entry |= recorded(coverage(program, (*before, entry)))
    program.history = (*before, entry)
    return program.eval()


def _entry(config: DistillConfig, context: DistillContext, trained: Trained) -> dict[str, Any]:
    """Entry of the history: nothing that would differ from one run to the next."""
    training = context.trained_with
    entry = history_entry(
        config.method,
        config.as_dict() | {"loss": str(config.terms)},
        seed=context.seed,
        origin=context.origin,
        teachers=[{"name": each.name, "weight": each.weight} for each in context.teachers],
        training={"data": training.train.name, **training.config.as_dict()},
        **trained.figures,
    )
    if training.val is not None:
        entry["validation"] = training.val.name
    return entry
