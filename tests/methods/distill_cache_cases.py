"""Small teachers, students and data, and a distillation of them with or without a cache."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modelopt_cli.data import Data
from modelopt_cli.data.arrays import ArraySource
from modelopt_cli.methods.distill.apply import apply
from modelopt_cli.methods.distill.cache import CacheRequest
from modelopt_cli.methods.distill.config import DistillConfig
from modelopt_cli.methods.distill.distill_context import DistillContext
from modelopt_cli.methods.distill.teacher import TeacherMember
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.capture import capture
from modelopt_cli.training import TrainConfig, Training
from modelopt_cli.training.run_folder import Run

SHAPE, CLASSES, SAMPLES = (1, 12, 12), 5, 35
INPUT = InputSpec(SHAPE)


def noise(samples: int = SAMPLES, seed: int = 0) -> Data:
    draw = np.random.default_rng(seed)
    images = draw.normal(size=(samples, *SHAPE)).astype(np.float32)
    return Data(ArraySource("noise", images, np.arange(samples) % CLASSES), INPUT)


def network(width: int = 4, seed: int = 0, classes: int = CLASSES) -> nn.Module:
    """Convolutions and a wide linear layer, which libraries round otherwise where a batch is small."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.Sequential(
            *(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(width * 36, 50), nn.ReLU(), nn.Linear(50, classes)),
        )
    return layers.eval()


def student(width: int = 2, classes: int = CLASSES) -> Program:
    return capture(network(width, seed=1, classes=classes), INPUT)


def config(**changes: Any) -> TrainConfig:
    """35 samples make batches of 16, 16 and 3."""
    return TrainConfig(**{"epochs": 3, "batch_size": 16, "lr": 0.05, **changes})


def context(folder: Path | None, training: TrainConfig | None = None, **changes: Any) -> DistillContext:
    """What ``apply`` gets; with a folder, to keep the logits in it."""
    given = {"teachers": (TeacherMember(capture(network(8), INPUT), INPUT),), "origin": {}, **changes}
    request = None if folder is None else CacheRequest(folder, {"1": {"sha256": "abc", "weight": 1.0}})
    return DistillContext(
        training=Training(noise(), config=training or config()), **{"cache": request, **given}
    )


def running(given: DistillContext, folder: Path, **how: Any) -> tuple[Run, DistillContext]:
    """The same with a folder for the run."""
    run = Run(folder, identity={}, **how)
    assert given.training is not None
    return run, replace(given, training=replace(given.training, run=run))


def taught(given: DistillContext, pupil: Program | None = None, **settings: Any) -> dict[str, Tensor]:
    """The student's tensors after distillation."""
    result = apply(pupil or student(), DistillConfig(**settings), given)
    return dict(result.program.state_dict())
