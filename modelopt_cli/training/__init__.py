"""Training: one loop for every method."""

from typing import TYPE_CHECKING

from modelopt_cli.lazy_names import lazy_names

if TYPE_CHECKING:
    from modelopt_cli.training.config import AUGMENTATIONS, OPTIMIZERS, SCHEDULES, TrainConfig
    from modelopt_cli.training.fitting import fit
    from modelopt_cli.training.forecast import Forecast
    from modelopt_cli.training.interfaces import Companion, Objective, Seen, Trained, Training
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

__getattr__ = lazy_names(
    __name__,
    {
        "AUGMENTATIONS": "config",
        "Companion": "interfaces",
        "CrossEntropy": "objectives",
        "Distillation": "objectives",
        "Forecast": "forecast",
        "OPTIMIZERS": "config",
        "Objective": "interfaces",
        "SCHEDULES": "config",
        "Seen": "interfaces",
        "TrainConfig": "config",
        "Trained": "interfaces",
        "Training": "interfaces",
        "fit": "fitting",
        "objective": "objectives",
    },
)
