"""Training: one loop for every method."""

from modelopt_cli.training.config import (
    AUGMENTATIONS,
    OPTIMIZERS,
    SCHEDULES,
    Companion,
    Objective,
    Seen,
    TrainConfig,
    Trained,
    Training,
)
from modelopt_cli.training.fitting import fit
from modelopt_cli.training.forecast import Forecast
from modelopt_cli.training.objectives import CrossEntropy, Distillation, objective

__all__ = [
    "AUGMENTATIONS",
    "OPTIMIZERS",
    "SCHEDULES",
    "Companion",
    "CrossEntropy",
    "Distillation",
    "Forecast",
    "Objective",
    "Seen",
    "TrainConfig",
    "Trained",
    "Training",
    "fit",
    "objective",
]
