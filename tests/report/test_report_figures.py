"""Every metric and every figure, from a measurement to the table and all exports."""

import csv
import io
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from modelopt_cli.measure import EvalOptions, EvaluatedModel, Evaluation, evaluate
from modelopt_cli.measure.metrics import METRICS, metrics_of
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.report import csv_text, markdown_text, plain_text, table, to_json
from modelopt_cli.report.figure_rows import FIGURES, exported
from modelopt_cli.tasks import CLASSIFY

CLASSES = 12
DATA = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, CLASSES, (40,), generator=torch.Generator().manual_seed(1))


class Samples:
    """Forty labelled samples of noise."""

    name, labelled = "noise", True

    def batches(
        self, batch_size: int, *, limit: int | None = None, workers: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(DATA.split(batch_size), LABELS.split(batch_size), strict=True)

    def where(self, index: int) -> str:
        return f"sample {index}"


def network(seed: int) -> EvaluatedModel:
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(8, CLASSES), nn.ReLU())
    program = Program(layers, fx.symbolic_trace(layers).graph, input_spec=InputSpec((8,)))
    return EvaluatedModel(
        f"net{seed}.pth", program, program, 1000 * seed, input=program.input, tensor_bytes=10
    )


@pytest.fixture(scope="module")
def measured() -> Evaluation:
    options = EvalOptions(runs=6, warmup=1, threads=1, data_batch_size=16, memory=False)
    return evaluate([network(1), network(2)], Samples(), options)


OF_CLASSIFIERS = tuple(metrics_of(CLASSIFY))


@pytest.mark.parametrize("name", OF_CLASSIFIERS)
def test_every_metric_is_the_mean_of_what_each_sample_scores_alone(name: str, measured: Evaluation) -> None:
    metric = METRICS[name]
    for seed, model in zip((1, 2), measured.models, strict=True):
        evaluated = network(seed)
        assert evaluated.model is not None
        assert model.accuracy is not None
        with torch.inference_mode():
            logits = evaluated.model.eval()(DATA)
        scores = [
            metric.score(logits[i : i + 1], LABELS[i : i + 1]).double().item() for i in range(len(DATA))
        ]
        assert model.accuracy.metrics[name] == pytest.approx(metric.scale * sum(scores) / len(DATA))


@pytest.mark.parametrize("name", OF_CLASSIFIERS)
def test_a_metric_is_left_out_where_there_are_too_few_classes(name: str, measured: Evaluation) -> None:
    one = network(1)
    few = METRICS[name].least_classes - 1
    if few < 1:
        pytest.skip("measured with any number of classes")
    narrow = nn.Sequential(nn.Linear(8, few))
    program = Program(narrow, fx.symbolic_trace(narrow).graph, input_spec=InputSpec((8,)))
    data: Any = SimpleNamespace(
        name="few", labelled=True, where=str, batches=lambda *_, **__: [(DATA, LABELS % few)]
    )
    evaluated = EvaluatedModel("few.pth", program, program, 1, input=one.input, tensor_bytes=1)
    accuracy = evaluate([evaluated], data, EvalOptions(runs=0)).models[0].accuracy
    assert accuracy is not None
    assert accuracy.metrics[name] is None


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_in_the_table_and_in_the_exports_that_it_claims(
    name: str, measured: Evaluation, evaluation: Evaluation
) -> None:
    figure = FIGURES[name]
    for found in (measured, evaluation):  # one that was measured, one with every figure in it
        (model, comparison), compared = (found.models[1], found.comparisons[0]), to_json(found)
        text, number = figure.cell(model, comparison), figure.value(model, comparison)
        if found is evaluation and name != "peak_bytes":
            assert text
        if figure.title and text:
            assert f"| {figure.title.format(metric='top-1', change='drop')} |" in markdown_text(found)
            assert text in plain_text(table(found))
        if figure.number is None:
            continue
        place: Any = compared["comparisons"][0] if figure.compares else compared["models"][1]
        for key in figure.path or (name,):
            place = place and place.get(key)
        assert place == number
        line = list(csv.DictReader(io.StringIO(csv_text(found))))[1]
        assert line[name] == ("" if number is None else str(number))


def test_columns_of_csv_files_keep_their_places() -> None:
    places = [figure.column for _, figure in exported() if figure.column is not None]
    assert places == list(range(22))
