"""Training of networks: one loop for every method."""

from typing import TYPE_CHECKING

from modelopt_cli.lazy_names import lazy_names

if TYPE_CHECKING:
    from modelopt_cli.training.catalog import AUGMENTATIONS, OPTIMIZERS, SCHEDULES
    from modelopt_cli.training.config import TrainConfig
    from modelopt_cli.training.fitting import fit
    from modelopt_cli.training.interfaces import (
        Callback,
        Objective,
        StepInputs,
        TimeEstimate,
        Trained,
        Training,
    )
    from modelopt_cli.training.objectives import CrossEntropy, Distillation, objective


__all__ = [
    "AUGMENTATIONS",
    "OPTIMIZERS",
    "SCHEDULES",
    "Callback",
    "CrossEntropy",
    "Distillation",
    "Objective",
    "StepInputs",
    "TimeEstimate",
    "TrainConfig",
    "Trained",
    "Training",
    "fit",
    "objective",
]

__getattr__ = lazy_names(
    __name__,
    {
        "AUGMENTATIONS": "catalog",
        "Callback": "interfaces",
        "CrossEntropy": "objectives",
        "Distillation": "objectives",
        "TimeEstimate": "interfaces",
        "OPTIMIZERS": "catalog",
        "Objective": "interfaces",
        "SCHEDULES": "catalog",
        "StepInputs": "interfaces",
        "TrainConfig": "config",
        "Trained": "interfaces",
        "Training": "interfaces",
        "fit": "fitting",
        "objective": "objectives",
    },
)
