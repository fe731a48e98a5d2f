"""Measuring: size, work, accuracy, latency, memory, and the statistics of comparing them."""

from typing import TYPE_CHECKING

from modelopt_cli.lazy_names import lazy_names

if TYPE_CHECKING:
    from modelopt_cli.measure.config import EvalOptions, Gates
    from modelopt_cli.measure.evaluated_model import EvaluatedModel, LabelledBatches, StageProgress
    from modelopt_cli.measure.evaluation import (
        Accuracy,
        Comparison,
        Evaluation,
        GateResult,
        ModelReport,
    )
    from modelopt_cli.measure.fidelity import Fidelity
    from modelopt_cli.measure.flops import Macs, count_macs
    from modelopt_cli.measure.latency import Latency
    from modelopt_cli.measure.side_by_side import evaluate
    from modelopt_cli.measure.size import Size, measure_size
    from modelopt_cli.measure.speedup import Speedup, paired_speedup
    from modelopt_cli.measure.statistics import Interval, paired_difference
    from modelopt_cli.measure.tally import Predictions, predict

__all__ = [
    "Accuracy",
    "Comparison",
    "EvalOptions",
    "EvaluatedModel",
    "Evaluation",
    "Fidelity",
    "GateResult",
    "Gates",
    "Interval",
    "LabelledBatches",
    "Latency",
    "Macs",
    "ModelReport",
    "Predictions",
    "Size",
    "Speedup",
    "StageProgress",
    "count_macs",
    "evaluate",
    "measure_size",
    "paired_difference",
    "paired_speedup",
    "predict",
]

__getattr__ = lazy_names(
    __name__,
    {
        "Accuracy": "evaluation",
        "Comparison": "evaluation",
        "EvalOptions": "config",
        "Evaluation": "evaluation",
        "Fidelity": "fidelity",
        "GateResult": "evaluation",
        "Gates": "config",
        "Interval": "statistics",
        "LabelledBatches": "evaluated_model",
        "Latency": "latency",
        "Macs": "flops",
        "ModelReport": "evaluation",
        "Predictions": "tally",
        "Size": "size",
        "Speedup": "speedup",
        "StageProgress": "evaluated_model",
        "EvaluatedModel": "evaluated_model",
        "count_macs": "flops",
        "evaluate": "side_by_side",
        "measure_size": "size",
        "paired_difference": "statistics",
        "paired_speedup": "speedup",
        "predict": "tally",
    },
)
