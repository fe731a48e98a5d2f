"""One's own datasets: their collate_fn, DataLoaders, and targets by place or by name."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from modelopt_cli.data import Data, open_data
from modelopt_cli.data.in_memory import as_samples
from modelopt_cli.errors import DataError
from modelopt_cli.program import InputSpec
from modelopt_cli.tasks import parse_task
from modelopt_cli.training.loader import training_batches

CODE = """
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

COUNT = 5

def row(index):
    return torch.arange(1, 2 + index % 3), index % 2

def pad(items):
    rows, labels = zip(*items)
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {"ids": padded, "mask": padded > 0, "labels": torch.tensor(labels)}

class Rows(Dataset):
    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        return row(index)

class Padded(Rows):
    collate_fn = staticmethod(pad)

class Flow(IterableDataset):
    def __iter__(self):
        return map(row, range(COUNT))

def of_callable():
    return Rows()

of_callable.collate_fn = pad

def flow():
    return Flow()

flow.collate_fn = pad

def loader():
    return DataLoader(Rows(), batch_size=3, collate_fn=pad, shuffle=True)

def plain_loader(count=5):
    return DataLoader([(torch.tensor([i, i + 1.0]), i % 2) for i in range(count)], batch_size=4)

class Backwards(torch.utils.data.Sampler):
    def __iter__(self):
        return iter([2, 1, 0])

    def __len__(self):
        return 3

def ordered_loader():
    return DataLoader([(torch.tensor([float(i)]), i) for i in range(3)], batch_size=2, sampler=Backwards())

def doubles(items):
    return pad(items * 2)

def fails(items):
    raise RuntimeError("no such thing")

def failing(name):
    made = Rows()
    made.collate_fn = globals()[name]
    return made

class Pictures(Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        count = index % 2 + 1
        boxes = torch.tensor([[1.0, 1, 4, 5]]).repeat(count, 1)
        return torch.full((3, 8, 8), float(index)), {"boxes": boxes, "labels": torch.full((count,), index)}

    @staticmethod
    def collate_fn(items):
        return tuple(zip(*items))
"""
IDS = InputSpec((3,), name="ids", dtype="int64", free=(0,))
MASK = InputSpec((3,), name="mask", dtype="bool", free=(0,))
SPEC = InputSpec((3,), name="ids", dtype="int64", free=(0,), others=(MASK,))


@pytest.fixture
def code(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(CODE)
    return str(tmp_path / "mine.py")


def opened(text: str, task: str = "classify", spec: InputSpec | None = None) -> Data:
    return open_data(text, input_spec=spec, labels=False).with_targets(parse_task(task).targets())


def check_padded(inputs: Any, labels: Any, indices: list[int]) -> None:
    longest = max(1 + index % 3 for index in indices)
    for index, ids, mask, label in zip(indices, inputs["ids"], inputs["mask"], labels, strict=True):
        length = 1 + index % 3
        assert ids.tolist() == [*range(1, length + 1), *[0] * (longest - length)]
        assert mask.sum() == length
        assert label == index % 2


@pytest.mark.parametrize("name", ["Padded", "of_callable", "flow", "loader"])
def test_a_collate_function_of_dataset_callable_or_loader_makes_the_batches(code: str, name: str) -> None:
    data = opened(f"{code}:{name}", spec=SPEC)
    for start, (inputs, labels) in zip((0, 2, 4), data.batches(2), strict=True):
        check_padded(inputs, labels, [*range(start, min(5, start + 2))])


@pytest.mark.parametrize("name", ["Padded", "of_callable", "loader"])
@pytest.mark.parametrize("workers", [0, 1])
def test_training_shuffles_what_is_put_together(code: str, name: str, workers: int) -> None:
    data = opened(f"{code}:{name}", spec=SPEC)
    seen: list[int] = []
    for batch in training_batches(data, batch_size=2, epoch=1, seed=0, workers=workers):
        indices = batch.samples.tolist()
        check_padded(batch.inputs, batch.labels, indices)
        seen += indices
    assert sorted(seen) == [0, 1, 2, 3, 4]
    assert seen != sorted(seen)


def test_a_copy_in_another_process_makes_the_same(code: str) -> None:
    data = opened(f"{code}:loader", spec=SPEC)
    copy = pickle.loads(pickle.dumps(data.source))  # noqa: S301 -- our own
    assert copy.collates
    assert torch.equal(copy.load(2)[0]["ids"], torch.tensor([1, 2, 3]))


def test_a_loader_gives_its_dataset_unless_its_order_means_something(code: str) -> None:
    data = opened(f"{code}:plain_loader?count=3")
    assert len(data) == 3
    assert next(data.batches(3))[0].tolist() == [[0, 1], [1, 2], [2, 3]]
    ordered = opened(f"{code}:ordered_loader")
    assert ordered.size is None
    assert next(ordered.batches(3))[0].tolist() == [[2], [1], [0]]


def test_pictures_in_a_tuple_are_samples_and_not_inputs(code: str) -> None:
    """As torchvision's references for detection do it; here there are as many as channels."""
    images, targets = next(opened(f"{code}:Pictures", "detect").batches(3))
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert [len(target["boxes"]) for target in targets] == [1, 2, 1]
    assert [target["labels"].tolist() for target in targets] == [[0], [1, 1], [2]]


def test_the_same_from_python() -> None:
    scope: dict[str, Any] = {"__name__": "mine"}
    exec(CODE, scope)  # noqa: S102 -- our own text
    for made in (scope["loader"](), scope["Padded"](), scope["flow"]()):
        given = made
        if made.__class__.__name__ == "Flow":
            given.collate_fn = scope["pad"]
        data = open_data(as_samples(given, "data"), input_spec=SPEC, labels=False)
        inputs, labels = next(data.with_targets(parse_task("classify").targets()).batches(3))
        check_padded(inputs, labels, [0, 1, 2])


BAD = {
    "doubles": "its collate_fn made 2 samples of 1; it must keep their number and order",
    "fails": "its collate_fn failed (RuntimeError: no such thing",
}


@pytest.mark.parametrize(("name", "part"), BAD.items(), ids=BAD)
def test_a_collate_function_that_does_not_fit_is_told_in_one_line(code: str, name: str, part: str) -> None:
    with pytest.raises(DataError) as caught:
        list(opened(f"{code}:failing?name={name}", spec=SPEC).batches(2))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


BOXES, LABELS = torch.tensor([[1.0, 2, 5, 6]]), torch.tensor([1])
TARGETS: dict[str, tuple[str, Any, Callable[[Any], Any], Any]] = {
    "tensors by place": ("detect", (BOXES, LABELS), lambda y: y[0]["labels"].tolist(), [1]),
    "lists by name": (
        "detect",
        {"boxes": [[1.0, 2, 5, 6]], "labels": [1]},
        lambda y: y[0]["boxes"].tolist(),
        BOXES.tolist(),
    ),
    "nothing there": (
        "detect",
        (torch.zeros(0, 4), torch.zeros(0)),
        lambda y: tuple(y[0]["boxes"].shape),
        (0, 4),
    ),
    "numbers": ("regress", (1, 2.5), lambda y: y.tolist(), [[1, 2.5]]),
    "one's own by place": (
        "net.py:f",
        (BOXES, LABELS),
        lambda y: {k: v.shape for k, v in y.items()},
        {"0": (1, 1, 4), "1": (1, 1)},
    ),
    "one's own by name": (
        "net.py:f",
        {"a": BOXES, "b": 3},
        lambda y: (y["a"].shape, y["b"].tolist()),
        ((1, 1, 4), [3]),
    ),
}


@pytest.mark.parametrize(("task", "target", "read", "expected"), TARGETS.values(), ids=TARGETS)
def test_targets_come_by_place_or_by_name(task: str, target: Any, read: Any, expected: Any) -> None:
    class One(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> tuple[Tensor, Any]:
            return torch.zeros(3, 8, 8), target

    data = open_data(as_samples(One(), "data"), labels=False).with_targets(parse_task(task).targets())
    assert read(next(data.batches(1))[1]) == expected


def test_too_many_parts_are_refused() -> None:
    data = open_data(as_samples(DataLoader([(torch.zeros(1), (BOXES,) * 4)]), "data"), labels=False)
    with pytest.raises(DataError, match="target has 4 parts; give boxes, labels, iscrowd"):
        data.with_targets(parse_task("detect").targets())
