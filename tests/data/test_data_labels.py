"""Labels: read only where they are needed, and mapped to the network's classes by name."""

import numpy as np
import pytest
import torch
from PIL import Image

import modelopt_cli
from modelopt_cli.checkpoint import resolve
from modelopt_cli.data import open_data
from modelopt_cli.data.class_names import match_names
from modelopt_cli.errors import DataError

assert modelopt_cli

TARGETS = {
    "float": "0.5",
    "vector": "torch.rand(4)",
    "map": "torch.zeros(3, 3, dtype=torch.long)",
    "boxes": "{'boxes': torch.rand(1, 4)}",
    "text": "'cat'",
    "none": "None",
}


def user(tmp_path, item):
    (tmp_path / "u.py").write_text(f"import torch\ndef load(): return [{item} for _ in range(3)]\n")
    return f"{tmp_path / 'u.py'}:load"


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
def test_any_target_will_do_where_labels_are_not_read(tmp_path, target):
    spec = user(tmp_path, f"(torch.ones(2), {target})")
    ((images, labels),) = open_data(spec, labels=False).batches(8)
    assert torch.equal(images, torch.ones(3, 2))
    assert labels.tolist() == [-1] * 3
    with pytest.raises(DataError, match="not an integer"):
        open_data(spec)


@pytest.mark.parametrize("item", ["torch.ones(2)", "(torch.ones(2),)"], ids=["tensor", "tuple of one"])
def test_tensors_alone_have_no_labels(tmp_path, item):
    data = open_data(user(tmp_path, item))
    assert not data.labelled
    ((images, labels),) = data.batches(8)
    assert torch.equal(images, torch.ones(3, 2))
    assert labels.tolist() == [-1] * 3


@pytest.mark.parametrize("kind", ["int32", "int64"])
def test_whole_numbers_are_taken_as_they_are(tmp_path, kind):
    ((images, labels),) = open_data(user(tmp_path, f"(torch.arange(4, dtype=torch.{kind}), 1)")).batches(8)
    assert images.dtype == torch.int64
    assert images.tolist() == [[0, 1, 2, 3]] * 3
    assert labels.tolist() == [1] * 3


def test_rows_of_whole_numbers_in_an_npz_are_taken_as_they_are(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.arange(12).reshape(3, 4) * 1000, y=np.arange(3))
    ((images, _),) = open_data(f"npz:{tmp_path / 'a.npz'}").batches(8)
    assert torch.equal(images, torch.arange(12).reshape(3, 4) * 1000)


UNUSABLE = {
    "npz without y": ({"x": np.zeros((2, 4, 4), np.uint8)}, "no array called y or labels"),
    "npz of floats": (
        {"x": np.zeros((2, 4, 4), np.uint8), "y": np.array([0.5, 1.5])},
        "label is 0.5, not an integer; if the network is to return such numbers",
    ),
    "npz of vectors": (
        {"x": np.zeros((2, 4, 4), np.uint8), "y": np.zeros((2, 3), int)},
        r"label is 3 numbers \(0, 0, 0\), not",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE.values(), ids=UNUSABLE.keys())
def test_arrays_whose_labels_cannot_be_used(tmp_path, case):
    arrays, part = case
    np.savez(tmp_path / "a.npz", **arrays)
    ((images, labels),) = open_data(f"npz:{tmp_path / 'a.npz'}", labels=False).batches(8)
    assert images.shape == (2, 1, 4, 4)
    assert labels.tolist() == [-1, -1]
    with pytest.raises(DataError, match=part):
        open_data(f"npz:{tmp_path / 'a.npz'}")


def test_loose_images_and_a_column_of_floats_do_where_labels_are_not_read(tmp_path):
    for name in "ab":
        Image.new("L", (4, 4)).save(tmp_path / f"{name}.png")
    (tmp_path / "t.csv").write_text("a.png,0.5\nb.png,1.5\n")
    for spec, part in ((tmp_path, "no class folders"), (f"csv:{tmp_path / 't.csv'}", "t.csv line 1")):
        ((images, labels),) = open_data(str(spec), labels=False).batches(8)
        assert (len(images), labels.tolist()) == (2, [-1, -1])
        with pytest.raises(DataError, match=part):
            open_data(str(spec))


ANIMALS = ("bird", "cat", "dog", "polar bear")


@pytest.mark.parametrize(
    ("names", "positions", "noted"),
    [
        (ANIMALS, (0, 1, 2, 3), False),
        (("Bird", "Cat", "Dog", "polar_bear"), (0, 1, 2, 3), False),
        (("Polar-Bear", "bird", "cat", "dog"), (3, 0, 1, 2), True),
        (("bird", "dog"), (0, 2), True),
        (("bird", "cat", "doggo", "polar bear"), (0, 1, 2, 3), True),
        (("n01", "n02", "n03", "n04"), (0, 1, 2, 3), True),
    ],
    ids=["same", "case", "another order", "some missing", "one renamed in place", "all others"],
)
def test_classes_are_matched_by_name(names, positions, noted):
    match = match_names(names, ANIMALS, "val")
    assert match.positions == positions
    assert (match.note is not None) == noted


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (
            ("bird", "cat", "polar beer", "dog"),
            "class 'polar beer' is not among the network's 4.*mean 'polar bear'.*number them with csv:FILE",
        ),
        (("n01", "n02"), r"class 'n01'[^;]*; name the folders by the network's class names, or number "),
        (("bird", "cat", "dog", "fox", "polar bear"), "class 'fox'"),
        (("bird", "Bird"), "class 'bird' is not"),
    ],
    ids=["renamed out of place", "fewer and others", "one more", "twice"],
)
def test_names_that_say_nothing_are_refused(names, part):
    with pytest.raises(DataError, match=part):
        match_names(names, ANIMALS, "val")


@pytest.mark.parametrize("name", ["cat", "n01440764"])
def test_no_class_is_suggested_that_is_only_a_little_alike(name):
    with pytest.raises(DataError) as caught:
        match_names((name,), resolve("torchvision:resnet18").labels, "val")
    assert caught.value.hint.startswith("name the folders by the network's class names")


def test_a_name_that_the_network_has_twice_is_not_taken():
    assert match_names(("crane", "fox", "crane"), ("crane", "fox", "crane"), "val").positions == (0, 1, 2)
    with pytest.raises(DataError, match="crane"):
        match_names(("crane", "fox"), ("crane", "fox", "crane"), "val")
    # As torchvision's ImageNet and its networks do: the second maillot is called tank suit by the latter.
    match = match_names(("fox", "maillot", "maillot"), ("fox", "maillot", "tank suit"), "val")
    assert match.positions == (0, 1, 2)


def test_synonyms_are_known_by_the_first(tmp_path):
    (tmp_path / "u.py").write_text(
        "import torch\nclass Two(list):\n    classes = [('tench', 'Tinca tinca'), ('church', 'house')]\n"
        "def load(): return Two([(torch.zeros(1), 0), (torch.zeros(1), 1)])\n"
    )
    labels = tuple(resolve("torchvision:resnet18").labels)
    data = open_data(f"{tmp_path / 'u.py'}:load").with_labels(labels)
    assert torch.cat([found for _, found in data.batches(2)]).tolist() == [0, labels.index("church")]


@pytest.mark.parametrize("workers", [0, 1])
def test_mapped_labels_are_the_networks(tmp_path, workers):
    for name in ("cat", "polar bear"):
        (tmp_path / name).mkdir()
        Image.new("L", (4, 4)).save(tmp_path / name / "x.png")
    data = open_data(str(tmp_path)).with_labels(ANIMALS)
    assert torch.cat([labels for _, labels in data.batches(1, workers=workers)]).tolist() == [1, 3]
    assert (data.num_classes, data.class_names) == (4, ANIMALS)
    assert "2 of 4 classes" in data.notes[0]
    assert len(data.fits(4)) == 2
