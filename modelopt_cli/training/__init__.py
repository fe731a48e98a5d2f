"""Training: one loop for every method."""

from modelopt_cli.training.config import (
    AUGMENTATIONS,
    OPTIMIZERS,
    SCHEDULES,
    Companion,
    Objective,
    TrainConfig,
    Trained,
    Training,
)

__all__ = [
    "AUGMENTATIONS",
    "OPTIMIZERS",
    "SCHEDULES",
    "Companion",
    "Objective",
    "TrainConfig",
    "Trained",
    "Training",
]
