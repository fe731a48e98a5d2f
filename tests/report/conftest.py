"""One evaluation with every kind of figure in it, written out by hand."""

import pytest

from modelopt_cli.measure import (
    Accuracy,
    Comparison,
    Evaluation,
    Fidelity,
    GateResult,
    Latency,
    Macs,
    ModelReport,
    Size,
    Speedup,
)
from modelopt_cli.measure.environment import Environment
from modelopt_cli.measure.metrics import METRICS
from modelopt_cli.measure.statistics import paired_difference_from_counts

OTHERS = dict.fromkeys(METRICS, 0.5)


@pytest.fixture
def evaluation() -> Evaluation:
    """A baseline, its int8 version, and a bare state dict of which only the size is known."""
    return Evaluation(
        models=(
            ModelReport(
                "runs/net.pth",
                Size(46_830_571, 11_689_512, 11_689_000, 32.01, 46_758_048),
                Macs(1_814_073_344),
                Accuracy(5000, {**OTHERS, "top1": 69.76, "top5": 89.08}),
                Latency(52.5, 0.8, 30, 1, "prepacked"),
                250_000_000,
                None,
                0.0415,
            ),
            ModelReport(
                "runs/net-int8.safetensors",
                Size(11_810_000, 11_689_512, 11_000_000, 8.08, 11_800_000),
                Macs(1_814_073_344),
                Accuracy(5000, {**OTHERS, "top1": 69.5, "top5": 88.9}),
                Latency(22.5, 0.4, 30, 1),
                None,
                1.0,
                2.3456,
                0.987,
            ),
            ModelReport("bare.pth", Size(50, 0, 0, None)),
        ),
        baseline=0,
        comparisons=(
            Comparison(
                1,
                paired_difference_from_counts(43, 30, 5000),
                0.987,
                3.9653,
                Speedup(2.3333, 2.25, 2.41, 30),
                differences={"top1": paired_difference_from_counts(43, 30, 5000)},
                fidelity=Fidelity(
                    {"logits": 31.25, "boxes": 40.5}, {"logits": 0.9987, "boxes": 0.9999}, {"logits": 0.0125}
                ),
            ),
            Comparison(2, None, None, float("nan"), None),
        ),
        environment=Environment("Some CPU", "2.13.0", 1, "cpu"),
        data="val/",
        gates=(
            GateResult("max-drop", 1.0, 0.26, True, 1),
            GateResult("min-speedup", 3.0, 2.25, False, 1, "lower"),
            GateResult("max-drop", 1.0, None, False, 2),
        ),
        notes=("bare.pth: no architecture",),
    )
