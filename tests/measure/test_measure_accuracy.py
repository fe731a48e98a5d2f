"""Top-1 and top-5 against sorting, ties, and everything that is no classifier."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from modelopt_cli.errors import DataError, EnvironmentFailure, InputError
from modelopt_cli.measure.accuracy import run
from modelopt_cli.measure.metrics import metrics_of
from modelopt_cli.measure.tally import Tally, agreement, predict
from modelopt_cli.tasks import CLASSIFY


class Batches:
    """Fixed logits and labels, given out as images; the network under test is the identity."""

    name = "fixed"

    def __init__(self, logits: Tensor, labels: Tensor, labelled: bool = True) -> None:
        self.logits, self.labels, self.labelled = logits, labels, labelled

    def where(self, index: int) -> str:
        return f"{self.name} sample {index}"

    def batches(
        self, batch_size: int, *, limit: int | None = None, workers: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        end = limit or len(self.labels)
        for i in range(0, end, batch_size):
            yield self.logits[i : min(i + batch_size, end)], self.labels[i : min(i + batch_size, end)]


def random_batches(classes: int = 12, samples: int = 100) -> Batches:
    generator = torch.Generator().manual_seed(0)
    # Few distinct values, so that there are many ties.
    logits = torch.randint(0, 6, (samples, classes), generator=generator).float()
    return Batches(logits, torch.randint(0, classes, (samples,), generator=generator))


def test_agrees_with_a_stable_sort() -> None:
    data = random_batches()
    found = predict(nn.Identity(), data, batch_size=7)
    order = np.argsort(-data.logits.numpy(), axis=1, kind="stable")
    labels = data.labels.numpy()
    assert found.predicted.tolist() == order[:, 0].tolist()
    assert found.scores["top1"].tolist() == (order[:, 0] == labels).tolist()
    assert found.scores["top5"].tolist() == (order[:, :5] == labels[:, None]).any(1).tolist()
    assert found.metrics()["top1"] == pytest.approx(100 * np.mean(order[:, 0] == labels))


@pytest.mark.parametrize("batch_size", [1, 3, 100, 1000])
def test_batch_size_changes_nothing(batch_size: int) -> None:
    whole, parts = (predict(nn.Identity(), random_batches(), batch_size=size) for size in (100, batch_size))
    assert whole.predicted.tolist() == parts.predicted.tolist()
    assert whole.scores["top5"].tolist() == parts.scores["top5"].tolist()


def test_a_constant_network_is_right_for_class_zero_alone() -> None:
    found = predict(nn.Identity(), Batches(torch.zeros(10, 10), torch.arange(10)))
    assert found.scores["top1"].tolist() == [True] + [False] * 9
    assert found.scores["top5"].tolist() == [True] * 5 + [False] * 5


@pytest.mark.parametrize(("classes", "has_top5"), [(4, False), (5, True)])
def test_top5_needs_five_classes(classes: int, has_top5: bool) -> None:
    found = predict(nn.Identity(), random_batches(classes))
    assert ("top5" in found.scores) == has_top5
    assert (found.metrics()["top5"] is not None) == has_top5


def test_limit_and_progress() -> None:
    seen: list[tuple[int, int | None]] = []
    found = predict(
        nn.Identity(), random_batches(), 8, lambda done, total: seen.append((done, total)), limit=20
    )
    assert found.samples == 20
    assert seen == [(8, 20), (16, 20), (20, 20)]


def test_unlabelled_data_gives_predictions_alone() -> None:
    data = random_batches()
    data.labelled, data.labels = False, torch.full((100,), -1)
    found = predict(nn.Identity(), data)
    assert found.samples == 100
    assert found.correct is None
    assert found.metrics() == dict.fromkeys(metrics_of(CLASSIFY))


def test_infinite_logits_are_fine() -> None:
    logits = torch.tensor([[float("-inf"), 0.0], [float("inf"), 0.0]])
    found = predict(nn.Identity(), Batches(logits, torch.tensor([1, 0])))
    assert found.metrics()["top1"] == 100.0


def test_agreement_counts_equal_predictions() -> None:
    first = predict(nn.Identity(), Batches(torch.eye(4), torch.arange(4)))
    second = predict(nn.Identity(), Batches(torch.eye(4)[[0, 1, 3, 2]], torch.arange(4)))
    assert agreement(first, second) == 0.5


class Raises(nn.Module):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


ONE_LABEL = torch.tensor([0])
REFUSED = [
    pytest.param(torch.tensor([[0.0, float("nan")]]), ONE_LABEL, InputError, "NaN", id="nan"),
    pytest.param(torch.zeros(1, 2, 3), ONE_LABEL, InputError, r"\(1, 2, 3\)", id="feature-map"),
    pytest.param(torch.zeros(2, 2), ONE_LABEL, InputError, r"for 1 samples", id="other-batch-size"),
    pytest.param({"ids": torch.zeros(1).long()}, ONE_LABEL, InputError, "dict", id="dictionary"),
    pytest.param(torch.zeros(1, 0), ONE_LABEL, InputError, "zero", id="no-classes"),
    pytest.param(
        torch.zeros(1, 2), torch.tensor([2]), DataError, "label 2 .* 2 classes", id="label-too-large"
    ),
    pytest.param(torch.zeros(1, 2), torch.tensor([-1]), DataError, "label -1", id="label-negative"),
    pytest.param(torch.zeros(1, 2), torch.tensor([0.5]), DataError, "integer", id="label-fraction"),
]


@pytest.mark.parametrize(("output", "labels", "error", "message"), REFUSED)
def test_refused_with_the_file_named(
    output: object, labels: Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        Tally("net.pth").add(output, labels)
    assert str(caught.value).startswith("net.pth: ")


def test_no_samples_is_an_error() -> None:
    with pytest.raises(DataError, match="not one sample"):
        predict(nn.Identity(), Batches(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        pytest.param(lambda: RuntimeError("size mismatch\nat x"), DataError, "size mismatch$", id="shape"),
        pytest.param(
            lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: x"),
            EnvironmentFailure,
            "batch_size or data_batch_size",
            id="out-of-memory",
        ),
        pytest.param(lambda: torch.OutOfMemoryError("x"), EnvironmentFailure, "memory", id="cuda-memory"),
    ],
)
def test_failing_networks_give_one_line(
    make: Callable[[], BaseException], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        predict(Raises(make()), random_batches())


@pytest.mark.parametrize("error", [ZeroDivisionError, AttributeError, KeyError, NotImplementedError, OSError])
def test_whatever_a_network_raises_is_one_line_about_its_input(error: type[Exception]) -> None:
    class Failing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise error("first\nsecond")

    with pytest.raises(DataError, match=r"cannot run on samples of shape \(3, 4\): ") as caught:
        run(Failing(), torch.zeros(2, 3, 4), "a.pth")
    assert (caught.value.exit_code, caught.value.where) == (2, "a.pth")
    assert "second" not in str(caught.value) or error is KeyError
