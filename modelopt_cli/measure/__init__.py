"""Measuring: size, work, accuracy, latency, memory, and the statistics of comparing them."""

from modelopt_cli.measure.accuracy import Predictions, predict
from modelopt_cli.measure.evaluate import EvalOptions, evaluate
from modelopt_cli.measure.evaluation import (
    Accuracy,
    Comparison,
    Evaluation,
    GateResult,
    ModelReport,
)
from modelopt_cli.measure.flops import Macs, count_macs
from modelopt_cli.measure.gates import Gates
from modelopt_cli.measure.latency import Latency
from modelopt_cli.measure.size import Size, measure_size
from modelopt_cli.measure.speedup import Speedup, paired_speedup
from modelopt_cli.measure.statistics import Interval, paired_difference
from modelopt_cli.measure.subject import LabelledBatches, StageProgress, Subject

__all__ = [
    "Accuracy",
    "Comparison",
    "EvalOptions",
    "Evaluation",
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
    "Subject",
    "count_macs",
    "evaluate",
    "measure_size",
    "paired_difference",
    "paired_speedup",
    "predict",
]
