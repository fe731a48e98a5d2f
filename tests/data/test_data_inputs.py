"""Samples of several inputs: by place, by name, in batches and streams, and of free sizes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from modelopt_cli.data import open_data
from modelopt_cli.data.in_memory import as_samples
from modelopt_cli.errors import DataError
from modelopt_cli.program import InputSpec

IMAGES, IDS = torch.randn(5, 3, 4, 4), torch.arange(20).reshape(5, 4)
LABELS = torch.tensor([0, 2, 1, 0, 2])
SPEC = InputSpec((3, 4, 4), name="image", others=(InputSpec((4,), dtype="int64", name="ids"),))


class Pairs(Dataset[Any]):
    def __init__(self, make: Any) -> None:
        self.make = make

    def __len__(self) -> int:
        return len(LABELS)

    def __getitem__(self, index: int) -> Any:
        return self.make(IMAGES[index], IDS[index], int(LABELS[index]))


class Streamed(IterableDataset[Any]):
    def __init__(self, make: Any) -> None:
        self.make = make

    def __iter__(self) -> Iterator[Any]:
        return (self.make(*parts) for parts in zip(IMAGES, IDS, LABELS.tolist(), strict=True))


SAMPLES: dict[str, Any] = {
    "by-place": lambda image, ids, label: ((image, ids), label),
    "by-name": lambda image, ids, label: ({"ids": ids, "image": image}, label),
    "more-names": lambda image, ids, label: ({"ids": ids, "image": image, "mask": ids > 1}, label),
    "other-names": lambda image, ids, label: ((image.numpy(), ids.numpy()), np.int64(label)),
    "one-mapping": lambda image, ids, label: {"image": image, "ids": ids, "labels": label, "path": "x.png"},
}
FORMS: dict[str, Any] = {
    "dataset": Pairs,
    "stream": Streamed,
    "loader": lambda make: DataLoader(Pairs(make), batch_size=2),
    "batches": lambda make: list(DataLoader(Pairs(make), batch_size=3)),
}


def joined(data: Any, spec: InputSpec | None = SPEC, batch_size: int = 2, **how: Any) -> tuple[Any, Tensor]:
    opened = open_data(as_samples(data, "data"), input_spec=spec)
    inputs, labels = zip(*opened.batches(batch_size, **how), strict=True)
    return {name: torch.cat([each[name] for each in inputs]) for name in inputs[0]}, torch.cat(labels)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sample", SAMPLES)
def test_inputs_come_by_the_networks_names_and_in_its_order(form: str, sample: str) -> None:
    inputs, labels = joined(FORMS[form](SAMPLES[sample]))
    assert list(inputs) == ["image", "ids"]
    assert torch.equal(inputs["image"], IMAGES)
    assert torch.equal(inputs["ids"], IDS)
    assert inputs["ids"].dtype == torch.int64
    assert torch.equal(labels, LABELS)


@pytest.mark.parametrize("data", [((IMAGES, IDS), LABELS), ({"image": IMAGES, "ids": IDS}, LABELS)])
def test_one_batch_alone_will_do(data: Any) -> None:
    inputs, labels = joined(data)
    assert torch.equal(inputs["ids"], IDS)
    assert torch.equal(labels, LABELS)


def test_batches_without_labels_may_be_mappings() -> None:
    inputs, labels = joined([{"image": IMAGES, "ids": IDS}])
    assert torch.equal(inputs["image"], IMAGES)
    assert labels.tolist() == [-1] * 5


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_processes_hand_on_all_inputs(workers: int) -> None:
    inputs, _ = joined(Pairs(SAMPLES["by-name"]), workers=workers)
    assert torch.equal(inputs["image"], IMAGES)


def test_without_a_network_the_samples_say_what_it_takes() -> None:
    by_name = open_data(as_samples(Pairs(SAMPLES["by-name"]), "data")).input
    assert [(each.name, each.shape, each.dtype) for each in by_name.tensors] == [
        ("ids", (4,), "int64"),
        ("image", (3, 4, 4), "float32"),
    ]
    by_place = open_data(as_samples(Pairs(SAMPLES["by-place"]), "data")).input
    assert [each.name for each in by_place.tensors] == ["x", "x1"]


@pytest.mark.parametrize(
    ("inputs", "name"),
    [
        pytest.param({"pixel_values": IMAGES[0], "ids": IDS[0]}, "image", id="usual-name"),
        pytest.param({"ids": IDS[0], "wave": IMAGES[0]}, "wave", id="own-name"),
        pytest.param({"wave": IMAGES[0]}, "x", id="alone"),
        pytest.param((IMAGES[0],), "x", id="tuple-of-one"),
    ],
)
def test_a_network_of_one_input_takes_its_own_out_of_a_mapping(inputs: Any, name: str) -> None:
    class One(Dataset[Any]):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> Any:
            return inputs, 1

    opened = open_data(as_samples(One(), "data"), input_spec=InputSpec((3, 4, 4), name=name))
    ((batch, _),) = opened.batches(4)
    assert torch.equal(batch, IMAGES[:1])


def test_numbers_are_inputs_too() -> None:
    spec = InputSpec((4,), dtype="int64", name="ids", others=(InputSpec((), dtype="int64", name="length"),))
    inputs, _ = joined([({"ids": IDS, "length": torch.arange(5)}, LABELS)], spec)
    assert inputs["length"].tolist() == [0, 1, 2, 3, 4]


def test_callables_of_the_users_may_return_several_inputs(tmp_path: Path) -> None:
    (tmp_path / "u.py").write_text(
        "import torch\ndef load():\n    return [({'a': torch.ones(3), 'n': 2}, i) for i in range(4)]\n"
    )
    opened = open_data(f"{tmp_path / 'u.py'}:load")
    assert [(each.name, each.shape, each.dtype) for each in opened.input.tensors] == [
        ("a", (3,), "float32"),
        ("n", (), "int64"),
    ]
    inputs, labels = next(opened.batches(3))
    assert inputs["n"].tolist() == [2, 2, 2]
    assert labels.tolist() == [0, 1, 2]


REFUSED: dict[str, tuple[Any, str]] = {
    "too-few": (lambda image, ids, label: ((image,), label), "has 1 input, where the network takes 2 inputs"),
    "one": (lambda image, ids, label: (image, label), "has 1 input, where the network takes 2 inputs"),
    "too-many": (lambda image, ids, label: ((image, ids, ids), label), "has 3 inputs"),
    "name": (lambda image, ids, label: ({"image": image, "idx": ids}, label), "no input 'ids'"),
    "shape": (lambda image, ids, label: ((image, ids[:2]), label), "input ids is 2, where 4 is expected"),
    "fractions": (lambda image, ids, label: ((image, ids / 2), label), "input ids holds fractions"),
    "nan": (lambda image, ids, label: ((image / 0, ids), label), "input image holds NaN or infinity"),
    "text": (lambda image, ids, label: ({"image": image, "ids": "x"}, label), "is str, not a float tensor"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_one_line(case: tuple[Any, str]) -> None:
    make, part = case
    with pytest.raises(DataError, match=part) as raised:
        joined(Pairs(make))
    assert "\n" not in str(raised.value)
    assert raised.value.where == "data sample 0"


def test_inputs_of_a_batch_have_as_many_samples() -> None:
    with pytest.raises(DataError, match="inputs have 5 and 4 samples"):
        as_samples([((IMAGES, IDS[:4]), LABELS)], "data")


def test_a_flat_row_of_three_is_not_taken_apart() -> None:
    with pytest.raises(DataError, match="not a pair of inputs and target; return"):
        joined(DataLoader(TensorDataset(IMAGES, IDS, LABELS), batch_size=2, drop_last=True))


class TestFreeSizes:
    FREE = InputSpec((3, 4, 4), free=(1, 2))

    def batches(self, sizes: list[tuple[int, int]], batch_size: int, spec: InputSpec = FREE) -> list[Tensor]:
        samples = [(torch.zeros(3, *size), 0) for size in sizes]
        opened = open_data(as_samples(Many(samples), "data"), input_spec=spec)
        return [inputs for inputs, _ in opened.batches(batch_size)]  # type: ignore[misc]

    def test_each_sample_may_have_its_own(self) -> None:
        found = self.batches([(4, 4), (5, 4), (6, 8)], 1)
        assert [tuple(each.shape[2:]) for each in found] == [(4, 4), (5, 4), (6, 8)]

    def test_equal_ones_come_together(self) -> None:
        assert [each.shape for each in self.batches([(5, 6)] * 2 + [(7, 7)] * 2, 2)] == [
            (2, 3, 5, 6),
            (2, 3, 7, 7),
        ]

    def test_others_in_one_batch_are_refused(self) -> None:
        with pytest.raises(DataError, match=r"different sizes cannot make one batch.*batch.size"):
            self.batches([(4, 4), (5, 4)], 2)

    def test_what_is_not_free_stays(self) -> None:
        with pytest.raises(DataError, match="is 3x5x4, where 3x4x4 is expected"):
            self.batches([(5, 4)], 1, InputSpec((3, 4, 4), free=(2,)))


class Many(Dataset[Any]):
    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]
