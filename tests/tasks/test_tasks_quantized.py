"""Quantization-aware training for other tasks than classification: loss and teacher follow the task."""

from dataclasses import replace

import pytest
from task_cases import CASES

from modelopt_cli.measure.metrics import METRICS, metrics_named
from modelopt_cli.measure.tally import predict
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.quantize.apply import apply
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.program import Program
from modelopt_cli.training import TrainConfig, Training, fit

CONFIG = TrainConfig(epochs=25, batch_size=16, optimizer="adamw", lr=0.02, weight_decay=0.0)
BITS = QuantizeConfig(weight_bits=2, act_bits=3, edge_bits=2)


@pytest.mark.parametrize(("name", "teacher"), [("regress", None), ("segment", None), ("restore", "none")])
def test_what_rounding_loses_of_its_metric_is_learned_again(name: str, teacher: str | None) -> None:
    case, main = CASES[name], next(iter(metrics_named(name)))
    network, data = case.made(), case.data()
    assert isinstance(network, Program)
    training = Training(data, config=CONFIG, task=case.spec)
    fit(network, training, seed=0)
    given = Context(data=data, task=case.spec)
    rounded = apply(network, BITS, given).program
    training = replace(training, val=data, config=replace(CONFIG, epochs=15, teacher=teacher))
    trained = apply(network, BITS, replace(given, training=training)).program
    full, before, after = (
        predict(each, data, task=case.spec).metrics() for each in (network, rounded, trained)
    )
    sign = 1 if METRICS[main].higher_is_better else -1
    lost, left = (sign * (full[main] - each[main]) for each in (before, after))  # type: ignore[operator]
    assert left < 0.8 * lost
    entry = trained.history[-1]
    assert entry["training"]["teacher"] == (teacher or "self")
    figures = entry["trained"]
    assert figures["unit"] == METRICS[main].unit
    assert figures["best"] == pytest.approx(after[main], abs=0.01)
