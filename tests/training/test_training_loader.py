from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from modelopt_cli.data import Data, PreprocessOverrides, open_data
from modelopt_cli.errors import DataError, UsageError
from modelopt_cli.training import memory
from modelopt_cli.training.distributed import World
from modelopt_cli.training.loader import Batch, ordered_batches, steps_per_epoch, training_batches
from modelopt_cli.training.memory import in_memory

DATASETS = '''
import random
import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset

class Random(Dataset):
    """Every generator a user's own augmentation may draw from."""

    def __len__(self):
        return 9

    def __getitem__(self, index):
        return torch.tensor([float(index), torch.rand(1).item(), np.random.rand(), random.random()]), index

class Stream(IterableDataset):
    def __iter__(self):
        return ((torch.full((1, 6, 6), float(i)), i % 3) for i in range(9))

def drawn():
    return Random()

def stream():
    return Stream()
'''


@pytest.fixture
def numbered(tmp_path: Path) -> Data:
    """21 samples that hold their own number, label included."""
    x = np.arange(21, dtype=np.float32)
    np.savez(tmp_path / "numbered.npz", x=np.stack([x, -x], 1), y=np.arange(21))
    return open_data(f"npz:{tmp_path / 'numbered.npz'}")


@pytest.fixture
def pictures(tmp_path: Path) -> Data:
    draw = np.random.default_rng(0)
    for i in range(7):
        Image.fromarray(draw.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "list.csv").write_text("".join(f"{i}.png,{i}\n" for i in range(7)))
    return open_data(f"csv:{tmp_path / 'list.csv'}", overrides=PreprocessOverrides(input_size=12))


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(DATASETS)
    return tmp_path / "own.py"


def epoch(data: Data, **options: Any) -> list[Batch]:
    return list(training_batches(data, **{"batch_size": 4, "epoch": 1, "seed": 2, **options}))


def joined(batches: list[Batch]) -> tuple[Tensor, Tensor]:
    return torch.cat([b.inputs for b in batches]), torch.cat([b.labels for b in batches])


def same(one: list[Batch], other: list[Batch]) -> bool:
    return len(one) == len(other) and all(
        all(torch.equal(a[i], b[i]) for i in (0, 1, 3)) and (a.weight, a.variant) == (b.weight, b.variant)
        for a, b in zip(one, other, strict=True)
    )


def test_an_epoch_is_every_sample_once_in_an_order_of_its_own(numbered: Data) -> None:
    orders = []
    for number in range(3):
        batches = epoch(numbered, epoch=number)
        images, labels = joined(batches)
        assert all(torch.equal(b.samples, b.labels) for b in batches)
        assert sorted(labels.tolist()) == list(range(21))
        assert torch.equal(images[:, 0], labels.float())
        orders.append(tuple(labels.tolist()))
    assert len({*orders, tuple(range(21))}) == 4
    assert same(epoch(numbered), epoch(numbered))
    assert not same(epoch(numbered), epoch(numbered, seed=3))


@pytest.mark.parametrize(
    ("batch_size", "sizes"),
    [(7, [7, 7, 7]), (8, [8, 8, 5]), (5, [5, 5, 5, 6]), (20, [21]), (21, [21]), (50, [21]), (1, [1] * 21)],
)
def test_a_single_sample_left_over_joins_the_last_batch(
    numbered: Data, batch_size: int, sizes: list[int]
) -> None:
    assert [len(b.labels) for b in epoch(numbered, batch_size=batch_size)] == sizes
    assert steps_per_epoch(numbered, batch_size) == len(sizes)


@pytest.mark.parametrize("augment", ["none", "cifar", "imagenet"])
def test_batches_do_not_depend_on_who_loads_them(
    pictures: Data, augment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = epoch(pictures, batch_size=3, augment=augment)
    assert [len(b.labels) for b in alone] == [3, 4]
    monkeypatch.setattr(memory, "IN_MEMORY", 0)
    assert in_memory(replace(pictures)) is None
    assert same(alone, epoch(pictures, batch_size=3, augment=augment))
    assert same(alone, epoch(pictures, batch_size=3, augment=augment, workers=2))
    parts = [epoch(pictures, batch_size=3, augment=augment, world=World(rank, 2)) for rank in range(2)]
    for whole, *shared in zip(alone, *parts, strict=True):
        assert sum(part.weight for part in shared) == 1
        images, labels = joined(shared)
        assert torch.equal(images, whole.inputs)
        assert torch.equal(labels, whole.labels)
        assert torch.equal(torch.cat([part.samples for part in shared]), whole.samples)
        assert [part.weight * len(whole.labels) for part in shared] == [part.size for part in shared]


def test_a_process_without_samples_gets_a_stand_in(numbered: Data) -> None:
    parts = [epoch(numbered, batch_size=2, world=World(rank, 3)) for rank in range(3)]
    first = [part[0] for part in parts]
    assert [(b.size, b.weight, len(b.labels)) for b in first] == [(0, 0.0, 1), (1, 0.5, 1), (1, 0.5, 1)]
    assert all(b.samples.tolist() == b.labels.int().tolist() for b in first)
    assert sorted(int(label) for part in parts for b in part if b.size for label in b.labels) == list(
        range(21)
    )


@pytest.mark.parametrize("augment", ["cifar", "imagenet"])
def test_resuming_within_an_epoch_reads_only_what_is_left(
    pictures: Data, augment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = epoch(pictures, batch_size=2, augment=augment)
    monkeypatch.setattr(memory, "IN_MEMORY", 0)
    read: list[int] = []
    load = pictures.source.load
    monkeypatch.setattr(pictures.source, "load", lambda index: read.append(index) or load(index))
    assert same(epoch(pictures, batch_size=2, augment=augment, start_step=2), whole[2:])
    assert read == whole[2].labels.tolist()
    assert epoch(pictures, batch_size=2, augment=augment, start_step=3) == []


def test_samples_in_memory_are_read_once(pictures: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = in_memory(pictures)
    assert kept is not None
    monkeypatch.setattr(pictures.source, "load", None)
    assert len(epoch(pictures)) == 2
    images, labels = (torch.cat(column) for column in zip(*ordered_batches(pictures, 3), strict=True))
    assert torch.equal(images, kept[0])
    assert labels.tolist() == list(range(7))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("resize", [None, 10, (10, 12)])
def test_an_array_is_preprocessed_to_the_same_bits_all_at_once(
    tmp_path: Path, channels: int, resize: int | tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (30, 10, 12, channels) if channels == 3 else (30, 10, 12)
    draw = np.random.default_rng(0)
    np.savez(tmp_path / "a.npz", x=draw.integers(0, 256, shape, dtype=np.uint8), y=draw.integers(0, 9, 30))
    chosen = PreprocessOverrides(resize=resize, mean=(0.1307,) * channels, std=(0.3081,) * channels)
    data = open_data(f"npz:{tmp_path / 'a.npz'}", overrides=chosen).sample(20, seed=1)
    images, labels = (torch.cat(column) for column in zip(*data.batches(7), strict=True))
    monkeypatch.setattr(memory, "_one_by_one", None)
    kept = in_memory(data)
    assert kept is not None
    assert torch.equal(kept[0], images)
    assert torch.equal(kept[1], labels)


@pytest.mark.parametrize(
    "chosen",
    [
        PreprocessOverrides(resize=16),
        PreprocessOverrides(crop=6),
        PreprocessOverrides(crop=0.5),
        PreprocessOverrides(channels=3),
    ],
    ids=["resized", "cropped", "a share", "coloured"],
)
def test_what_changes_an_image_goes_one_by_one(chosen: PreprocessOverrides) -> None:
    data = open_data("digits", overrides=chosen).sample(9)
    kept = in_memory(data)
    assert kept is not None
    assert torch.equal(kept[0], next(data.batches(9))[0])


def test_a_label_out_of_range_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 5, 5), dtype=np.uint8), y=np.array([0, 1, 7, 1]))
    data = replace(open_data(f"npz:{tmp_path / 'a.npz'}"), classes=3)
    with pytest.raises(DataError, match=r"row 2.*label 7"):
        epoch(data)


def test_an_unreadable_image_is_named_by_any_worker(pictures: Data, tmp_path: Path) -> None:
    (tmp_path / "3.png").write_bytes(b"no image")
    for workers in (0, 2):
        with pytest.raises(DataError, match=r"3\.png: is not an image"):
            epoch(pictures, augment="imagenet", workers=workers)


def test_the_users_random_dataset_is_read_anew_and_replays(own: Path) -> None:
    data = open_data(f"{own}:drawn")
    assert in_memory(data) is None
    first = epoch(data)
    torch.rand(3)
    assert same(first, epoch(data))
    assert same(first, epoch(data, workers=2))
    assert same(first[1:], epoch(data, start_step=1))
    by_number = {int(x[0]): x for x in joined(first)[0]}
    for x in joined(epoch(data, epoch=2))[0]:
        assert not bool((x[1:] == by_number[int(x[0])][1:]).any())


def by_number(batches: list[Batch]) -> dict[int, Tensor]:
    """The images by the sample's index."""
    return {int(i): image for b in batches for i, image in zip(b.samples, b.inputs, strict=True)}


@pytest.mark.parametrize("augment", ["cifar", "imagenet"])
def test_views_come_round_and_the_order_does_not(pictures: Data, augment: str) -> None:
    epochs = [epoch(pictures, epoch=number, augment=augment, cycle=2) for number in range(4)]
    assert [{b.variant for b in batches} for batches in epochs] == [{0}, {1}, {0}, {1}]
    assert len({tuple(int(i) for b in batches for i in b.samples) for batches in epochs}) == 4
    images = [by_number(batches) for batches in epochs]
    for i in range(7):
        assert torch.equal(images[0][i], images[2][i])
        assert torch.equal(images[1][i], images[3][i])
    assert any(not torch.equal(images[0][i], images[1][i]) for i in range(7))
    # A view is the augmentation of the epoch of that number.
    assert same(epochs[1], epoch(pictures, epoch=1, augment=augment))
    assert not same(epochs[2], epoch(pictures, epoch=2, augment=augment))


def test_what_is_not_drawn_has_one_view(pictures: Data, own: Path) -> None:
    assert {b.variant for b in epoch(pictures, epoch=5)} == {0}
    drawn = open_data(f"{own}:drawn")
    assert {b.variant for b in epoch(drawn, epoch=5)} == {5}
    first, third = (by_number(epoch(drawn, epoch=number, cycle=2)) for number in (1, 3))
    assert all(torch.equal(first[i], third[i]) for i in range(9))


def test_samples_are_counted_in_the_subset(numbered: Data) -> None:
    subset = replace(numbered, indices=(20, 3, 11, 7))
    for batch in epoch(subset):
        assert [subset.indices[i] for i in batch.samples] == batch.labels.tolist()  # type: ignore[index]


def test_a_stream_is_read_in_its_order(own: Path) -> None:
    data = open_data(f"{own}:stream")
    whole = epoch(data, augment="cifar")
    assert [b.labels.tolist() for b in whole] == [[0, 1, 2, 0], [1, 2, 0, 1, 2]]
    assert [b.samples.tolist() for b in whole] == [[0, 1, 2, 3], [4, 5, 6, 7, 8]]
    assert same(epoch(data, augment="cifar", start_step=1), whole[1:])
    parts = [epoch(data, augment="cifar", world=World(rank, 2)) for rank in range(2)]
    for batch, *shared in zip(whole, *parts, strict=True):
        assert torch.equal(joined(shared)[0], batch.inputs)
    with pytest.raises(UsageError, match="has no length"):
        steps_per_epoch(data, 4)
    with pytest.raises(UsageError, match="imagenet"):
        epoch(data, augment="imagenet")
