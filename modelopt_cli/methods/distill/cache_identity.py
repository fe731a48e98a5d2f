"""Identity of a cache of teacher logits: all that they depend on; and the distillations that can have one."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modelopt_cli.data import Data
from modelopt_cli.errors import UsageError
from modelopt_cli.methods.distill.cache import Cache
from modelopt_cli.methods.distill.cache_layout import Layout, OutputForm
from modelopt_cli.methods.distill.config import DistillConfig
from modelopt_cli.methods.distill.distill_context import DistillContext
from modelopt_cli.methods.distill.teacher import TeacherMember, TeacherOutput
from modelopt_cli.program import InputSpec
from modelopt_cli.program.input_batch import Inputs, tensors_of
from modelopt_cli.program.metadata import input_to_data
from modelopt_cli.program.quantized_linear import DynamicLinear
from modelopt_cli.program.samples import zeros
from modelopt_cli.settings import option
from modelopt_cli.training import TrainConfig, Training, distributed
from modelopt_cli.training.loader import is_drawn, steps_per_epoch
from modelopt_cli.training.random_numbers import seeded
from modelopt_cli.training.split import samples

PROBED = 2
"""Samples whose output tells the form of all outputs."""
_LOOKED_AT = 8
"""Images whose pixels tell one data set from another of the same name."""


def require_cacheable(config: DistillConfig, training: TrainConfig, *, drawn: bool) -> None:
    """Refuse a distillation that kept logits are no use for.

    Args:
        config: the loss.
        training: how the student is trained.
        drawn: True if images differ from epoch to epoch.

    Raises:
        UsageError: features are compared, images are mixed, or new in every epoch.
    """
    if not config.terms.compare_outputs:
        raise _useless("keeps logits, and no loss compares them", "a loss on logits")
    for term in config.terms:
        if term.weight and term.loss.looks_inside:
            raise _useless(f"keeps logits alone, and the loss {term.name} needs features", "losses on logits")
    if training.mixup:
        raise _useless(
            f"keeps logits of single samples, and {option('mixup')} mixes them", f"no {option('mixup')}"
        )
    if drawn and not training.augmentation_cycle:
        raise _useless(
            "is of no use where every epoch draws new images",
            f"{option('augmentation_cycle')} N, to draw N images of each",
        )


def _useless(why: str, instead: str) -> UsageError:
    return UsageError(why, where=option("cache"), hint=f"leave it out, or use {instead}")


def teachers_identity(
    members: Sequence[TeacherMember], sources: Sequence[str], arch: str | None
) -> dict[str, Any]:
    """Identity of the teachers: SHA-256 of their files, architecture, weight and change of images."""
    return {
        str(number): {
            "sha256": source,
            "arch": arch,
            "weight": member.weight,
            "change": repr(member.change),
        }
        for number, (member, source) in enumerate(zip(members, sources, strict=True), 1)
    }


def open_cache(
    config: DistillConfig, context: DistillContext, teacher: Callable[[Inputs], TeacherOutput]
) -> Cache:
    """The cache that ``context`` asks for, ready for ``fit`` with the same context. Collective.

    Args:
        config: the loss, and how many logits are kept.
        context: the training, and the folder of the cache.
        teacher: gives the logits.

    Raises:
        UsageError: as :func:`require_cacheable`; a teacher whose logits depend on the batch; as
            :class:`Cache`.
        OutputError, EnvironmentFailure: as :class:`Cache`.
    """
    training, request = context.trained_with, context.cache
    assert request is not None
    steps_per_epoch(training.train, training.config.batch_size)  # refuses what has no length
    drawn = is_drawn(training.config.augment, training.train)
    require_cacheable(config, training.config, drawn=drawn)
    for member in context.teachers:
        if any(isinstance(module, DynamicLinear) for module in member.network.modules()):
            message = "scales its activations by the batch, so that its logits hold for no other one"
            raise UsageError(
                message, where=member.name, hint=f"leave out {option('cache')}, or give its float form"
            )
    world = distributed.world(training.device)
    output = teacher(zeros(training.train.input, PROBED, world.device)).logits
    assert output is not None
    data, layout = _trained_on(training, output), layout_of(config, training, output)
    identity = _identity(layout, training.config, data, context.seed)
    return Cache(request, layout, identity | {"teachers": dict(request.teachers)}, world)


def layout_of(config: DistillConfig, training: Training, output: Tensor) -> Layout:
    """Size and layout of the cache that such a training needs.

    Args:
        config: how many logits are kept.
        training: data and augmentation.
        output: of a teacher or student, for ``PROBED`` samples.

    Raises:
        InputError: it does not have something for each sample.
        DataError, UsageError: as ``training.split.samples``.
    """
    task, data = training.task, _trained_on(training, output)
    drawn = is_drawn(training.config.augment, training.train)
    variants = training.config.augmentation_cycle if drawn else 1
    form = OutputForm.of(output, task, PROBED)
    # Numbers that are no logits have no others to stand for.
    top = config.cache_top if task.logits(output) is not None else form.classes
    return Layout(len(data), variants, form.classes, top, form)


def _trained_on(training: Training, output: Tensor) -> Data:
    fraction, classes = training.config.val_fraction, training.task.classes(output)
    return samples(training.train, training.val, fraction, classes)[0]


def _identity(layout: Layout, training: TrainConfig, data: Data, seed: int) -> dict[str, Any]:
    """All that the logits depend on, next to the teachers.

    Without the device and the number of threads: they change how sums are rounded, and a student may well
    learn from the logits of another machine.
    """
    drawn = is_drawn(training.augment, data)
    indices = range(len(data)) if data.indices is None else data.indices
    return {
        "data": data.name,
        "samples": layout.samples,
        "chosen": hashlib.sha256(np.asarray(indices, "<i8").tobytes()).hexdigest(),
        "pixels": _pixels(data, seed),
        "input": _input_identity(data.input),
        "classes": layout.classes,
        **({"places": list(layout.form.places)} if layout.form is not None and layout.form.places else {}),
        "cache_top": min(layout.top, layout.classes),
        "augment": training.augment,
        "views": layout.variants,
        "seed": seed if drawn else None,
        "amp": training.amp,
        "torch": str(torch.__version__),
    }


def _input_identity(spec: InputSpec) -> dict[str, Any]:
    """Shapes and types of the samples; the sizes that they might have had do not count."""
    tensors = [replace(each, free=()) for each in spec.tensors]
    whole = replace(tensors[0], others=tuple(tensors[1:]))
    return {"dtype": spec.dtype, **input_to_data(whole)}


def _pixels(data: Data, seed: int) -> str:
    """The SHA-256 of a few images, spread over the data, as they are before augmentation."""
    digest = hashlib.sha256()
    for index in np.linspace(0, len(data) - 1, _LOOKED_AT).astype(int).tolist():
        with seeded(seed, 0, index):
            for tensor in tensors_of(data.get(index)[0]):
                digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
