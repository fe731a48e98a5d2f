"""Detections in every form; COCO's average precision by hand and, where it is there, by pycocotools."""

import builtins
import contextlib
import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modelopt_cli.errors import EnvironmentFailure, InputError
from modelopt_cli.measure.bootstrap import draws, once
from modelopt_cli.tasks import detection, parse_task
from modelopt_cli.tasks.average_precision import (
    IOUS,
    Detections,
    Ranking,
    Rankings,
    average_precision,
    matches,
    rankings,
)

IMAGES = torch.zeros(2, 3, 50, 100)
SPEC = parse_task("detect")


def by_hand(right: list[bool], boxes: float) -> float:
    """Average precision at COCO's 101 recalls, of detections by falling score."""
    precisions, recalls = [], []
    for place in range(len(right)):
        found = sum(right[: place + 1])
        precisions.append(found / (place + 1))
        recalls.append(found / boxes)
    wanted = np.linspace(0, 1, 101)
    best = [max((p for p, r in zip(precisions, recalls, strict=True) if r >= x), default=0.0) for x in wanted]
    return float(np.mean(best))


def ranking(right: list[bool], images: list[int], boxes: list[float]) -> Ranking:
    rows = np.tile(np.array(right), (IOUS, 1))
    return Ranking(np.array(images), rows, ~rows, np.array(boxes))


def test_average_precision_by_hand() -> None:
    right = [True, False, True, True, False, True]
    kept = Rankings([ranking(right, [0, 0, 1, 2, 2, 2], [1, 2, 3])], 3)
    assert average_precision(kept, once(3))[0] == pytest.approx(by_hand(right, 6))
    # The second image twice, the third not at all.
    written = [True, False, True, True]
    assert average_precision(kept, np.array([[1.0, 2, 0]]))[0] == pytest.approx(by_hand(written, 5))


def test_the_mean_is_over_classes_that_there_are_boxes_of() -> None:
    one, other = ranking([True], [0], [1, 0]), ranking([False, True], [1, 1], [0, 1])
    kept = Rankings([one, other], 2)
    assert average_precision(kept, once(2))[0] == pytest.approx((1 + 0.5) / 2)
    # A draw without the second image has one class.
    assert average_precision(kept, np.array([[2.0, 0]]))[0] == pytest.approx(1)
    assert np.isnan(average_precision(Rankings([], 2), once(2))[0])


def test_overlaps_are_averaged_or_the_first_alone_counts() -> None:
    right = np.zeros((IOUS, 1), bool)
    right[:4] = True
    kept = Rankings([Ranking(np.array([0]), right, ~right, np.array([1.0]))], 1)
    assert average_precision(kept, once(1))[0] == pytest.approx(0.4)
    assert average_precision(kept, once(1), ious=1)[0] == pytest.approx(1)


def found(boxes: list[list[float]], scores: list[float], labels: list[int]) -> dict[str, Tensor]:
    return {"boxes": torch.tensor(boxes), "scores": torch.tensor(scores), "labels": torch.tensor(labels)}


FORMS: dict[str, Any] = {
    "a dictionary for each image": [
        found([[1, 2, 3, 4.0]], [0.5], [1]),
        found([[5, 6, 7, 8.0]], [0.25], [2]),
    ],
    "one for the batch": {
        "boxes": torch.tensor([[[1, 2, 3, 4.0]], [[5, 6, 7, 8.0]]]),
        "scores": torch.tensor([[0.5], [0.25]]),
        "labels": torch.tensor([[1], [2]]),
    },
}


@pytest.fixture
def coco(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forms need no library."""
    monkeypatch.setattr(detection, "require_coco", lambda: None)


@pytest.mark.usefixtures("coco")
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_detections_in_any_form(form: Any) -> None:
    one, other = SPEC.judged(form, [{}, {}], IMAGES)
    assert (one.boxes.tolist(), one.scores.tolist(), one.labels.tolist()) == ([[1, 2, 3, 4]], [0.5], [1])
    assert (other.boxes.tolist(), other.labels.tolist()) == ([[5, 6, 7, 8]], [2])


@pytest.mark.usefixtures("coco")
def test_queries_are_shares_of_the_image_and_the_last_class_is_nothing() -> None:
    logits = torch.tensor([[[0.0, 3.0, 1.0]]]).expand(2, 1, 3)
    centred = torch.tensor([[[0.5, 0.5, 0.2, 0.4]]]).expand(2, 1, 4)
    one, _ = SPEC.judged({"logits": logits, "pred_boxes": centred}, [{}, {}], IMAGES)
    assert one.boxes[0].tolist() == pytest.approx([40, 15, 60, 35])
    assert one.labels.tolist() == [1]
    assert one.scores.tolist() == pytest.approx([float(np.exp(3) / (1 + np.exp(3) + np.exp(1)))])


REFUSED = {
    "a tensor": (torch.zeros(2, 3), "returned .2, 3. for 2 samples where a detector"),
    "other keys": ([{"boxes": torch.zeros(0, 4)}] * 2, "returned list"),
    "fewer images": ([found([[1, 2, 3, 4.0]], [0.5], [1])], "boxes of 1 images for 2 samples"),
    "NaN": ([found([[1, 2, 3, float("nan")]], [0.5], [1])] * 2, "NaN"),
}


@pytest.mark.usefixtures("coco")
@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_is_no_detection_is_refused(case: Any) -> None:
    outputs, message = case
    with pytest.raises(InputError, match=message):
        SPEC.judged(outputs, [{}, {}], IMAGES)


def test_without_the_library_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def refuse(name: str, *args: Any, **more: Any) -> Any:
        if name.startswith("pycocotools"):
            raise ImportError(name)
        return imported(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(EnvironmentFailure, match=r"not installed; pip install 'modelopt-cli\[detect\]'"):
        SPEC.judged([], [], IMAGES)


def scene(*, ties: bool, images: int = 30) -> tuple[list[dict[str, Tensor]], list[Detections]]:
    """Boxes of three classes, and detections near them, of the wrong class, and of nothing."""
    generator = torch.Generator().manual_seed(0)

    def boxes(count: int) -> Tensor:
        corner = torch.rand(count, 2, generator=generator) * 60
        return torch.cat([corner, corner + 2 + torch.rand(count, 2, generator=generator) * 40], 1)

    wanted, detected = [], []
    for _ in range(images):
        count, more = (int(torch.randint(0, 6, (), generator=generator)) for _ in range(2))
        truth = boxes(count)
        labels = torch.randint(1, 4, (count,), generator=generator)
        crowd = torch.rand(count, generator=generator) < 0.1
        wanted.append({"boxes": truth, "labels": labels, "iscrowd": crowd})
        near = truth + 2 * torch.randn(count, 4, generator=generator)
        guessed = torch.cat([labels, torch.randint(1, 5, (more,), generator=generator)])
        scores = torch.rand(count + more, generator=generator)
        scores = (10 * scores).round() / 10 if ties else scores
        detected.append(Detections(torch.cat([near, boxes(more)]).double(), scores.double(), guessed))
    return wanted, detected


def reference(wanted: list[dict[str, Tensor]], detected: list[Detections]) -> tuple[float, float]:
    """COCO's own two figures."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def sides(box: list[float]) -> list[float]:
        return [box[0], box[1], box[2] - box[0], box[3] - box[1]]

    truth, guesses = [], []
    for image, (target, guess) in enumerate(zip(wanted, detected, strict=True)):
        for box, label, crowd in zip(*(target[key].tolist() for key in target), strict=True):
            bbox = sides(box)
            area = bbox[2] * bbox[3]
            truth.append(
                {"id": len(truth) + 1, "image_id": image, "category_id": label, "bbox": bbox, "area": area}
                | {"iscrowd": int(crowd)}
            )
        for box, score, label in zip(*(part.tolist() for part in guess), strict=True):
            guesses.append({"image_id": image, "category_id": label, "bbox": sides(box), "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": image} for image in range(len(wanted))],
            "categories": [{"id": each} for each in range(1, 5)],
            "annotations": truth,
        }
        coco.createIndex()
        judge = COCOeval(coco, coco.loadRes(guesses), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge.stats[0], judge.stats[1]


@pytest.mark.parametrize("ties", [True, False])
def test_figures_are_those_of_coco_whatever_the_batches(ties: bool) -> None:
    pytest.importorskip("pycocotools")
    wanted, detected = scene(ties=ties)
    parts = [
        match
        for start in range(0, 30, 7)
        for match in matches(detected[start : start + 7], wanted[start : start + 7])
    ]
    kept = rankings(parts)
    ours = [average_precision(kept, once(30), ious)[0] for ious in (IOUS, 1)]
    assert ours == pytest.approx(reference(wanted, detected))


def test_a_draw_has_the_figures_of_its_images_written_out() -> None:
    pytest.importorskip("pycocotools")
    wanted, detected = scene(ties=False)
    kept = rankings(matches(detected, wanted))
    for counts in next(draws(30, 3)):
        written = np.repeat(np.arange(30), counts.astype(int))
        theirs = reference([wanted[i] for i in written], [detected[i] for i in written])
        assert average_precision(kept, counts[None])[0] == pytest.approx(theirs[0])


def test_images_without_boxes_or_detections() -> None:
    pytest.importorskip("pycocotools")
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "iscrowd": torch.zeros(0).bool()}
    nothing = Detections(torch.zeros(0, 4).double(), torch.zeros(0).double(), torch.zeros(0).long())
    kept = rankings(matches([nothing, nothing], [empty, empty]))
    assert np.isnan(average_precision(kept, once(2))[0])
    full = {
        "boxes": torch.tensor([[1, 2, 3, 4.0]]),
        "labels": torch.tensor([1]),
        "iscrowd": torch.tensor([False]),
    }
    kept = rankings(matches([nothing, nothing], [full, empty]))
    assert average_precision(kept, once(2))[0] == 0
