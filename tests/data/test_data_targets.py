"""Targets of any form: from a source, checked and collated by a task's format, to a batch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modelopt_cli.data import open_data
from modelopt_cli.data.in_memory import as_samples
from modelopt_cli.data.targets import (
    CLASS_TARGETS,
    RawTarget,
    TargetFormat,
    raw_target,
    select_targets,
    target_count,
    targets_to,
)
from modelopt_cli.errors import DataError
from modelopt_cli.training.loader import ordered_batches, training_batches


class Padded(TargetFormat):
    """Rows of numbers of any length, padded to the longest of the batch."""

    def check(self, raw: RawTarget, inputs: Any, classes: int | None) -> Tensor:
        if not isinstance(raw, Tensor) or len(raw) > len(inputs):
            raise DataError(f"target is {type(raw).__name__}, or too long")
        return raw

    def collate(self, targets: Sequence[Tensor]) -> dict[str, Tensor]:
        rows = torch.nn.utils.rnn.pad_sequence(list(targets), batch_first=True)
        return {"rows": rows, "lengths": torch.tensor([len(row) for row in targets])}


def rows(count: int = 5) -> list[tuple[Tensor, Tensor]]:
    return [(torch.full((4,), float(i)), torch.arange(1 + i % 3)) for i in range(count)]


class Streamed(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(rows())


class Listed(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int):
        return rows()[index]


@pytest.mark.parametrize("given", [Streamed, Listed, lambda: [tuple(zip(*rows(), strict=True))]])
def test_a_format_checks_and_collates_every_batch(given, monkeypatch):
    data = given()
    if isinstance(data, list):  # one batch in memory
        inputs, targets = data[0]
        data = [(torch.stack(inputs), list(targets))]
    opened = open_data(as_samples(data, "data"), labels=False).with_targets(Padded())
    first, last = opened.batches(3)
    assert first[1]["lengths"].tolist() == [1, 2, 3]
    assert first[1]["rows"].tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 2]]
    assert last[1]["rows"].shape == (2, 2)
    whole = list(ordered_batches(opened, 3))
    assert [targets["lengths"].tolist() for _, targets in whole] == [[1, 2, 3], [1, 2]]


def test_training_batches_collate_what_fell_together():
    data = open_data(as_samples(Listed(), "train"), labels=False).with_targets(Padded())
    batches = list(training_batches(data, batch_size=3, epoch=0, seed=0))
    for batch in batches:
        assert isinstance(batch.labels, dict)
        assert batch.labels["lengths"].tolist() == [1 + int(i) % 3 for i in batch.samples]


def test_a_single_sample_left_over_in_a_stream_is_collated_with_the_batch_before():
    data = open_data(as_samples(Streamed(), "train"), labels=False).with_targets(Padded())
    sizes = [target_count(b.labels) for b in training_batches(data, batch_size=2, epoch=0, seed=0)]
    assert sizes == [2, 3]


def test_a_target_that_the_format_refuses_names_the_sample():
    samples = [*rows(3), (torch.zeros(4), torch.zeros(9))]
    data = open_data(
        as_samples([(torch.stack([x for x, _ in samples]), [t for _, t in samples])], "data"), labels=False
    )
    with pytest.raises(DataError, match=r"^data sample 3: target is Tensor, or too long"):
        list(data.with_targets(Padded()).batches(2))


def test_targets_that_are_not_read_are_minus_one():
    data = open_data(as_samples(Listed(), "data"), labels=False)
    assert next(data.batches(5))[1].tolist() == [-1] * 5


RAW = {
    "NumPy integer": (np.int64(3), 3),
    "NumPy float": (np.float32(0.5), 0.5),
    "text": ("cat", "cat"),
    "nothing": (None, None),
}


@pytest.mark.parametrize(("given", "handed"), RAW.values(), ids=RAW.keys())
def test_what_user_code_gives_as_a_source_hands_it_over(given, handed):
    assert raw_target(given) == handed
    assert type(raw_target(given)) is type(handed)


def test_arrays_lists_and_what_is_in_dictionaries_become_tensors():
    found = raw_target(
        {"boxes": np.ones((2, 4), np.float32), "labels": [1, 2], "crowd": {"is": np.bool_(True)}}
    )
    assert torch.equal(found["boxes"], torch.ones(2, 4))
    assert found["labels"].tolist() == [1, 2]
    assert found["crowd"] == {"is": True}
    assert isinstance(raw_target({"boxes": object()}), DataError)
    assert isinstance(raw_target(object()), DataError)


def test_classes_are_whole_numbers_below_the_networks():
    assert CLASS_TARGETS.check(torch.tensor([2]), None, 3) == 2
    for raw, part in (
        (3, "outside 0..2"),
        (-1, "outside"),
        (True, "True, not"),
        (0.5, "0.5, not"),
        ("a", "'a', not"),
        (None, "None"),
    ):
        with pytest.raises(DataError, match=part):
            CLASS_TARGETS.check(raw, None, 3)


def test_parts_of_targets():
    listed = [{"boxes": torch.ones(i, 4)} for i in range(3)]
    assert select_targets(listed, torch.tensor([2, 0])) == [listed[2], listed[0]]
    named = {"a": torch.arange(3)}
    assert select_targets(named, slice(1, 3))["a"].tolist() == [1, 2]
    assert (target_count(listed), target_count(named), target_count(torch.zeros(4, 2))) == (3, 3, 4)
    assert targets_to(listed, "meta")[2]["boxes"].is_meta


def test_masks_and_vectors_in_an_npz_are_handed_over(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 3, 4, 4), np.float32), y=np.arange(32).reshape(2, 4, 4))
    source = open_data(f"npz:{tmp_path / 'a.npz'}", labels=False).source
    assert source.load(1)[1].tolist() == np.arange(16, 32).reshape(4, 4).tolist()
