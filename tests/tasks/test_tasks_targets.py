"""Targets of every task: what is taken, how a batch is put together, and what is refused in one line."""

import copy
from typing import Any

import pytest
import torch

from modelopt_cli.data.targets import raw_target
from modelopt_cli.errors import DataError, UsageError
from modelopt_cli.measure.metrics import METRICS, metrics_named
from modelopt_cli.tasks import TASKS, parse_task

IMAGE = torch.zeros(3, 8, 12)
NAN = float("nan")
MASK = torch.tensor([[0, 1, 255]] * 4)
BOX = [1.0, 2.0, 5.0, 6.0]


def checked(task: str, raw: Any, inputs: Any = IMAGE, classes: int | None = 3, names: Any = None) -> Any:
    form = parse_task(task).targets(names)
    return form.collate([form.check(raw, inputs, classes)])


def test_classes_by_number_or_by_name():
    assert checked("classify", 2).tolist() == [2]
    assert checked("text", "dog", names=("cat", "dog")).tolist() == [1]


def test_several_labels_are_a_row_of_zeros_and_ones():
    assert checked("multilabel", torch.tensor([True, False, True])).tolist() == [[1.0, 0.0, 1.0]]


@pytest.mark.parametrize(("raw", "row"), [(0.5, [0.5]), (2, [2.0]), (torch.tensor([[1.0, 2.0]]), [1.0, 2.0])])
def test_numbers_are_rows(raw, row):
    assert checked("regress", raw).tolist() == [row]


def test_pixels_that_are_ignored_are_marked_as_cross_entropy_knows_them():
    mask = torch.full((8, 12), 2, dtype=torch.uint8)
    mask[0, 0], mask[1, 1] = 255, 0
    found = checked("segment", mask)
    assert found.dtype == torch.int64
    assert found[0, 0, 0] == -100
    assert found[0, 1, :3].tolist() == [2, 0, 2]
    assert checked("segment?ignore=0", mask.clamp(max=2))[0, 1, 1] == -100


def test_masks_may_have_a_channel():
    assert checked("segment", torch.zeros(1, 8, 12, dtype=torch.int64)).shape == (1, 8, 12)


def test_boxes_of_each_image_stay_apart():
    ((found),) = checked("detect", {"boxes": torch.tensor([BOX]), "labels": torch.tensor([1])})
    assert found["boxes"].tolist() == [BOX]
    assert found["labels"].tolist() == [1]
    assert found["iscrowd"].tolist() == [False]
    (empty,) = checked("detect", {"boxes": torch.zeros(0), "labels": torch.zeros(0)})
    assert empty["boxes"].shape == (0, 4)


def test_images_up_to_the_peak_that_is_given():
    assert checked("restore?peak=255", torch.full((3, 4, 4), 255.0)).max() == 255
    assert checked("restore", torch.full((3, 4, 4), 1.1)).shape == (1, 3, 4, 4)  # bicubic edges overshoot


def test_images_pairs_and_vectors():
    assert checked("restore", torch.rand(3, 4, 4)).shape == (1, 3, 4, 4)
    assert checked("embed", {"pair": 7, "score": 0.5})["pair"].tolist() == [7]
    assert checked("embed", torch.rand(5))["vector"].shape == (1, 5)


def test_texts_are_their_own_targets():
    tokens = torch.tensor([1, 2, 0, 0])
    assert checked("language", None, tokens).tolist() == [[1, 2, 0, 0]]
    inputs = {"input_ids": tokens, "attention_mask": torch.tensor([1, 1, 0, 0])}
    assert checked("language", None, inputs).tolist() == [[1, 2, -100, -100]]
    assert checked("language", torch.tensor([2, -100]), tokens).tolist() == [[2, -100]]
    assert parse_task("language").targets().of_inputs


def test_rows_of_classes_are_padded():
    form = parse_task("sequence").targets(("-", "a", "b"))
    found = form.collate([form.check(raw, IMAGE, 3) for raw in ("abb", torch.tensor([2]))])
    assert found["ids"].tolist() == [[1, 2, 2], [2, 0, 0]]
    assert found["lengths"].tolist() == [3, 1]


def test_targets_of_one_s_own_are_taken_as_they_are():
    form = parse_task("net.py:metric").targets()
    assert form.collate([form.check(0.5, IMAGE, None)] * 2).tolist() == [0.5, 0.5]
    assert form.collate([torch.zeros(2), torch.zeros(3)])[1].shape == (3,)
    assert form.collate([{"a": torch.zeros(2)}] * 3)["a"].shape == (3, 2)


REFUSED = {
    "class that is none": (
        "classify",
        3,
        "label 3 is outside 0..2; .* if the data's count from 1, take 1 off",
    ),
    "unknown name": ("classify", "cow", "label is 'cow', not an integer; if it is right"),
    "no target": ("classify", None, "label is None, not an integer"),
    "text class": ("text", 0.5, "label is 0.5, not an integer; .* say .*regress"),
    "one number as a class": ("classify", torch.tensor([-0.112]), "label is -0.112, not .* say .*regress"),
    "numbers as a class": (
        "classify",
        torch.tensor([0.5, 1, 2]),
        r"label is 3 numbers \(0.5, 1, 2\), not .*regress",
    ),
    "many as a class": (
        "classify",
        torch.ones(5).long(),
        r"label is 5 numbers \(1, 1, 1, ...\), .* what the",
    ),
    "mask as a class": (
        "classify",
        torch.zeros(8, 12).long(),
        "label is a tensor of shape 8x12, not an integer",
    ),
    "labels of another number": ("multilabel", torch.zeros(4), "target has 4 classes, the network 3"),
    "labels that are numbers": ("multilabel", torch.tensor([0, 0.5, 1]), "holds 0.5 where only 0 and 1"),
    "labels with NaN": ("multilabel", torch.tensor([0, NAN, 1]), "holds nan"),
    "one label": ("multilabel", 2, "not one 0 or 1 for each class"),
    "number that is NaN": ("regress", NAN, "holds NaN"),
    "number that is text": ("regress", "5", "target is str, not numbers"),
    "mask of another size": ("segment", torch.zeros(8, 8, dtype=torch.int64), "mask is 8x8, the image 8x12"),
    "mask with an unknown class": (
        "segment",
        torch.full((8, 12), 7),
        r"mask holds class 7, outside 0\.\.2; 255 marks",
    ),
    "mask counted from 1": (
        "segment",
        torch.full((8, 12), 3),
        r"class 3, outside 0\.\.2; 255 marks .*: if the data's count from 1, take 1 off",
    ),
    "mask of floats": ("segment", torch.zeros(8, 12), "not a mask of class ids"),
    "box outside": (
        "detect",
        {"boxes": [[1.0, 2, 40, 6]], "labels": [1]},
        "1, 2, 40, 6 reaches outside .* 12x8",
    ),
    "box without width": ("detect", {"boxes": [[5.0, 2, 5, 6]], "labels": [1]}, "has no width"),
    "box with NaN": ("detect", {"boxes": [[NAN, 2, 5, 6]], "labels": [1]}, "holds NaN"),
    "box of an unknown class": (
        "detect",
        {"boxes": [BOX], "labels": [5]},
        "class id 5 is outside 0..2; .*count from 0; check",
    ),
    "box without a class": ("detect", {"boxes": [BOX], "labels": []}, "1 boxes and 0 labels"),
    "no boxes": ("detect", torch.zeros(4), "not a dictionary of boxes and labels"),
    "image with NaN": ("restore", torch.full((3, 4, 4), NAN), "holds NaN"),
    "image of bytes": ("restore", torch.zeros(3, 4, 4, dtype=torch.uint8), "target is uint8; give floats"),
    "image above the peak": (
        "restore",
        torch.full((3, 4, 4), 255.0),
        "target holds 255, above the peak of 1; say with task='restore.peak=VALUE' what the largest value is",
    ),
    "image that is flat": ("restore", torch.zeros(4, 4), "not an image"),
    "pair without a score": ("embed", {"pair": 1}, "neither a vector nor"),
    "pair that is none": ("embed", {"pair": 0.5, "score": 1.0}, "needs an integer as pair"),
    "vector with NaN": ("embed", torch.tensor([NAN]), "holds NaN"),
    "unknown token": ("language", torch.tensor([0, 3]), "token 3, outside 0..2"),
    "tokens of floats": ("language", torch.zeros(3), "not a row of token ids"),
    "the blank": (
        "sequence",
        torch.tensor([1, 0]),
        r"target holds class 0, the blank; leave it out, or say .*sequence\?blank=N",
    ),
    "symbol above": (
        "sequence",
        torch.tensor([1, 3]),
        r"target holds class 3, outside 0\.\.2; classes count",
    ),
    "text without names": ("sequence", "abc", "no names for its classes"),
    "nothing for a metric": ("net.py:metric", None, "has no target"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line(case):
    task, raw, message = case
    with pytest.raises(DataError, match=message) as caught:
        checked(task, raw)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "raw", "message"),
    [
        ("classify", -1, "label -1 is below 0; classes count from 0"),
        ("sequence", torch.tensor([1, -2]), "target holds class -2, below 0; classes count from 0"),
        (
            "detect",
            {"boxes": [[1.0, 2, 3, 4]], "labels": [-1]},
            "class id -1 is below 0; classes count from 0",
        ),
    ],
)
def test_a_class_below_0_is_refused_where_nobody_knows_how_many_there_are(task, raw, message):
    form = parse_task(task).targets()
    with pytest.raises(DataError, match=message):
        form.check(form.named(raw_target(raw)), IMAGE, None)


def test_a_character_that_is_no_class_is_named():
    with pytest.raises(DataError, match="holds 'c', which is none"):
        checked("sequence", "abc", names=("-", "a", "b"))
    with pytest.raises(DataError, match="no class 'dig'; did you mean 'dog'"):
        checked("classify", "dig", names=("cat", "dog"))


def test_targets_of_a_batch_must_have_one_shape():
    for task, size in (("regress", 1), ("restore", 3)):
        form = parse_task(task).targets()
        with pytest.raises(DataError, match=r"target has shape \(3,.* others have \(2,") as caught:
            form.collate([torch.zeros(*(each,) * size) for each in (2, 2, 3, 2)])
        assert caught.value.place == 2
        copied = copy.copy(caught.value)  # as it is pickled where a worker hands it over
        assert (copied.place, copied.message) == (2, caught.value.message)


WRONG = {
    "no task": ("segmnt", "no task 'segmnt'; did you mean 'segment'"),
    "no option": ("segment?ignor=0", "no option 'ignor'; did you mean 'ignore'"),
    "no options at all": ("classify?k=1", "it takes no options"),
    "no number": ("segment?ignore=x", "ignore is 'x', not an integer"),
    "nothing after the mark": ("segment?", "nothing after its"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG)
def test_tasks_that_there_are_not(case):
    text, message = case
    with pytest.raises(UsageError, match=message):
        parse_task(text)


@pytest.mark.parametrize("name", TASKS)
def test_every_row_says_what_its_targets_are(name):
    row = TASKS[name]
    assert row.help
    assert row.target
    assert metrics_named(name) or row.spelling is not None


def test_every_metric_is_of_tasks_that_exist():
    assert all(row.tasks and set(row.tasks) <= set(TASKS) for row in METRICS.values())
