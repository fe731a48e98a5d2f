"""Every task from its data to the figures of an evaluation, and each metric against a plain formula."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from task_cases import CASES, Case
from torch import nn

from modelopt_cli.errors import DataError, InputError
from modelopt_cli.measure import EvalOptions, EvaluatedModel, Evaluation, evaluate
from modelopt_cli.measure.bootstrap import draws
from modelopt_cli.measure.metrics import METRICS, metrics_named
from modelopt_cli.measure.tally import Tally, predict
from modelopt_cli.program import InputSpec
from modelopt_cli.report import plain_text, table, to_json
from modelopt_cli.tasks import Misfit, parse_task
from modelopt_cli.training.label_losses import ctc

OPTIONS = EvalOptions(runs=0, memory=False, threads=1, data_batch_size=10)
NEEDS = {"detect": "pycocotools"}


def model(case: Case, seed: int) -> EvaluatedModel:
    network = case.made(seed)
    sample = case.samples()[0][0]
    dtype: Any = "float32" if sample.is_floating_point() else "int64"
    spec = InputSpec(tuple(sample.shape), dtype=dtype)
    return EvaluatedModel(
        f"net{seed}.pth", network, network if case.traced else None, 100, input=spec, tensor_bytes=1
    )


def outputs_and_targets(case: Case, seed: int = 1) -> tuple[Any, Any]:
    """All outputs in one pass, and the raw targets."""
    inputs, targets = zip(*case.samples(), strict=True)
    with torch.inference_mode():
        return case.made(seed)(torch.stack(inputs)), targets


def evaluation(case: Case) -> Evaluation:
    for name, package in NEEDS.items():
        if name == case.task:
            pytest.importorskip(package)
    return evaluate([model(case, 1), model(case, 2)], case.data(), OPTIONS, task=case.spec)


@pytest.mark.parametrize("name", CASES)
def test_every_task_is_measured_compared_and_shown(name: str) -> None:
    case = CASES[name]
    found = evaluation(case)
    metrics = found.models[0].accuracy.metrics  # type: ignore[union-attr]
    main = next(iter(metrics_named(name)))
    assert next(iter(metrics)) == main
    (comparison,) = found.comparisons
    assert comparison.metric is METRICS[main]
    difference = comparison.difference
    assert difference is not None
    sign = 1 if METRICS[main].higher_is_better else -1
    others = found.models[1].accuracy.metrics  # type: ignore[union-attr]
    assert difference.drop == pytest.approx(sign * (metrics[main] - others[main]))  # type: ignore[operator]
    assert difference.low < difference.drop < difference.high
    data = to_json(found)
    assert data["models"][0]["metrics"][main] == metrics[main]
    assert data["comparisons"][0]["drops"][main]["drop"] == difference.drop
    text = plain_text(table(found))
    assert METRICS[main].text(metrics[main]) in text  # type: ignore[arg-type]
    assert METRICS[main].drop_text(difference.drop) in text
    if name != "detect":  # whose detections differ in number
        assert comparison.fidelity is not None
        assert data["models"][1]["fidelity"]["snr_db"].keys() == {"output"}


@pytest.mark.parametrize("name", CASES)
def test_the_size_of_a_batch_changes_nothing(name: str) -> None:
    case = CASES[name]
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    network, data = case.made(1), case.data()
    whole, parts = (predict(network, data, size, task=case.spec).metrics() for size in (48, 7))
    for name, value in whole.items():
        assert value == parts[name] or value == pytest.approx(parts[name], rel=1e-5)


def samples(case: Case) -> list[tuple[int, tuple[Any, Any]]]:
    return list(enumerate(case.samples()))


def metric(case: Case, name: str) -> float:
    found = predict(case.made(1), case.data(), 10, task=case.spec).metrics()[name]
    assert found is not None
    return found


def test_multilabel_average_precision_and_f1() -> None:
    case = CASES["multilabel"]
    logits, targets = outputs_and_targets(case)
    rows = torch.stack(targets).numpy()
    precisions, ones = [], []
    for scores, truth in zip(logits.numpy().T, rows.T, strict=True):
        ranked = truth[np.argsort(-scores)]
        hits = np.cumsum(ranked) / np.arange(1, len(ranked) + 1)
        precisions.append(hits[ranked == 1].mean())
        guess = scores > 0
        precision, recall = truth[guess].mean(), guess[truth == 1].mean()
        ones.append(2 * precision * recall / (precision + recall))
    assert metric(case, "map") == pytest.approx(100 * np.mean(precisions))
    assert metric(case, "f1") == pytest.approx(100 * np.mean(ones))


def test_equal_scores_count_together_in_average_precision() -> None:
    row = METRICS["map"]
    logits, rows = torch.tensor([[1.0], [1.0], [0.0], [0.0]]), torch.tensor([[1.0], [0.0], [0.0], [1.0]])
    # Half of what is found has precision 1/2, the other half, too.
    kept = row.score(logits, rows).numpy()
    assert row.value(kept, np.ones((1, 4))).tolist() == [0.5]


def test_regression_errors() -> None:
    case = CASES["regress"]
    outputs, targets = outputs_and_targets(case)
    error, actual = (outputs - torch.stack(targets)).double(), torch.stack(targets).double()
    assert metric(case, "mae") == pytest.approx(float(error.abs().mean()), rel=1e-6)
    spread = (actual - actual.mean(0)).square().sum(0)
    assert metric(case, "r2") == pytest.approx(float((1 - error.square().sum(0) / spread).mean()), rel=1e-6)


def test_r2_of_large_numbers_loses_no_digits() -> None:
    actual = torch.randn(50, 1, generator=torch.Generator().manual_seed(0)).double() + 1e6
    row = METRICS["r2"]
    kept = row.score(actual + 0.5, actual).numpy()
    spread = float((actual - actual.mean()).square().sum())
    assert row.value(kept, np.ones((1, 50)))[0] == pytest.approx(1 - 50 * 0.25 / spread, rel=1e-6)


def test_intersection_over_union_of_pixels_that_count() -> None:
    case = CASES["segment"]
    logits, targets = outputs_and_targets(case)
    truth, guess = torch.stack(targets), logits.argmax(1)
    valid = truth != 255
    each = []
    for number in range(3):
        one, other = (guess == number) & valid, (truth == number) & valid
        each.append(float((one & other).sum() / (one | other).sum()))
    assert metric(case, "miou") == pytest.approx(100 * np.mean(each))
    right = (guess == truth)[valid].double().mean()
    assert metric(case, "pixel_accuracy") == pytest.approx(100 * float(right))


def test_masks_of_another_size_than_the_logits_are_compared_in_theirs() -> None:
    logits = torch.zeros(1, 2, 2, 2)
    logits[0, 0, :, 0] = logits[0, 1, :, 1] = 5.0
    mask = torch.tensor([[[0, 0, 1, 1]] * 4])
    judged = parse_task("segment").judged(logits, mask, torch.zeros(1, 3, 4, 4))
    assert judged.ids.tolist() == mask.tolist()


def test_a_single_logit_is_that_of_class_one() -> None:
    judged = parse_task("segment").judged(torch.tensor([[[[-1.0, 2.0]]]]), torch.tensor([[[0, 1]]]), None)
    assert (judged.ids.tolist(), judged.classes) == ([[[0, 1]]], 2)


def test_peak_signal_to_noise() -> None:
    case = CASES["restore"]
    outputs, targets = outputs_and_targets(case)
    error = (outputs - torch.stack(targets)).double().square().flatten(1).mean(1)
    assert metric(case, "psnr") == pytest.approx(float((-10 * error.log10()).mean()), rel=1e-6)
    equal = parse_task("restore?peak=255").judged(targets[0][None] + 25.5, targets[0][None], None)
    assert METRICS["psnr"].score(equal, targets[0][None]).item() == pytest.approx(20.0)
    same = parse_task("restore").judged(targets[0][None], targets[0][None], None)
    assert METRICS["psnr"].score(same, targets[0][None]).item() == 100.0


def test_structural_similarity_window_by_window() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.rand(1, 1, 13, 12, generator=generator).double() for _ in range(2))
    judged = parse_task("restore").judged(one, other, None)
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weights = np.outer(line, line) / np.outer(line, line).sum()
    found = []
    for top in range(3):
        for left in range(2):
            a, b = (x[0, 0, top : top + 11, left : left + 11].numpy() for x in (one, other))
            ma, mb = (weights * a).sum(), (weights * b).sum()
            va, vb = (weights * (a - ma) ** 2).sum(), (weights * (b - mb) ** 2).sum()
            cov = (weights * (a - ma) * (b - mb)).sum()
            top_, low = (2 * ma * mb + 1e-4) * (2 * cov + 9e-4), (ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)
            found.append(top_ / low)
    assert METRICS["ssim"].score(judged, other).item() == pytest.approx(np.mean(found))
    small = parse_task("restore").judged(one[..., :4], other[..., :4], None)
    assert torch.isnan(METRICS["ssim"].score(small, other[..., :4])).all()


def test_a_network_that_loses_the_border_is_compared_with_the_middle() -> None:
    image = torch.rand(1, 3, 8, 8)
    judged = parse_task("restore").judged(image[:, :, 1:-1, 2:-2] + 0.1, image, None)
    assert METRICS["psnr"].score(judged, image).item() == pytest.approx(20.0, abs=1e-3)


def test_rank_correlation_and_cosine_of_pairs() -> None:
    case = CASES["embed"]
    vectors, targets = outputs_and_targets(case)
    cosines = torch.cosine_similarity(vectors[::2], vectors[1::2]).numpy()
    scores = [target["score"] for target in targets[::2]]
    assert metric(case, "spearman") == pytest.approx(stats.spearmanr(cosines, scores).statistic)
    assert metric(case, "pair_cosine") == pytest.approx(float(cosines.mean()), rel=1e-5)


def test_draws_of_ties_are_ranked_as_if_the_samples_were_written_out() -> None:
    row, generator = METRICS["spearman"], torch.Generator().manual_seed(0)
    targets = {
        "pair": torch.arange(20).repeat_interleave(2),
        "score": torch.randint(0, 4, (40,), generator=generator).float(),
    }
    targets["score"] = targets["score"][::2].repeat_interleave(2)
    vectors = torch.randint(-1, 2, (40, 2), generator=generator).float()
    kept = row.score(parse_task("embed").judged(vectors, targets, None), targets)
    pairs = row.gathered({name: part.numpy() for name, part in kept.items()})
    some = next(draws(20, 5))
    found = row.value(pairs, some)
    for count, value in zip(some.astype(int), found, strict=True):
        written = stats.spearmanr(np.repeat(pairs.cosines, count), np.repeat(pairs.scores, count)).statistic
        assert value == pytest.approx(written)


def first_halves_first(case: Case) -> Case:
    samples = case.samples()
    return replace(case, samples=lambda: samples[::2] + samples[1::2])


def test_pairs_apart_in_the_data_are_found_and_none_is_no_crash() -> None:
    case = first_halves_first(CASES["embed"])
    models = [model(case, 1), model(case, 2)]
    assert metric(case, "spearman") == metric(CASES["embed"], "spearman")
    few = evaluate(models, case.data(), replace(OPTIONS, limit=10), task=case.spec)
    assert few.models[0].accuracy.metrics == {"spearman": None, "pair_cosine": None}  # type: ignore[union-attr]
    assert few.comparisons[0].difference is None
    assert "cosine of pairs not measured: no pair is complete" in few.notes
    assert [note for note in few.notes if note.startswith("10 of 10 samples are left out")]


def with_target(number: int, **changes: Any) -> Case:
    samples = CASES["embed"].samples()
    samples[number] = samples[number][0], {**samples[number][1], **changes}
    return replace(CASES["embed"], samples=lambda: samples)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        pytest.param(with_target(9, pair=0), "sample 9: is a third sample of pair 0", id="third sample"),
        pytest.param(with_target(7, score=9.0), "sample 7: pair 3 has two scores", id="two scores"),
        pytest.param(with_target(4, pair=99), "sample 4: no other sample belongs to", id="no other"),
    ],
)
def test_samples_that_make_no_pairs_are_named(case: Case, message: str) -> None:
    with pytest.raises(DataError, match=message):
        evaluate([model(case, 1)], case.data(), OPTIONS, task=case.spec)


def test_a_limit_that_cuts_a_pair_apart_says_what_is_left_out() -> None:
    case = CASES["embed"]
    found = evaluate([model(case, 1)], case.data(), replace(OPTIONS, limit=7), task=case.spec)
    (note,) = found.notes
    assert note.startswith("1 of 7 samples is left out, since the other of the pair comes later: ")
    assert note.endswith(" sample 6")


def test_vectors_that_samples_should_have() -> None:
    wanted = {"vector": torch.tensor([[3.0, 4.0], [1.0, 0.0]])}
    row = METRICS["pair_cosine"]
    kept = row.score(parse_task("embed").judged(torch.tensor([[4.0, 3.0], [0.0, 2.0]]), wanted, None), wanted)
    pairs = row.gathered({name: part.numpy() for name, part in kept.items()})
    assert pairs.cosines == pytest.approx([0.96, 0.0])


def test_tokens_are_pooled_where_the_mask_leaves_them() -> None:
    output = torch.tensor([[[1.0, 0.0], [0.0, 9.0]]])
    inputs = {"attention_mask": torch.tensor([[1, 0]])}
    wanted = {"vector": torch.tensor([[1.0, 0.0]])}
    assert parse_task("embed").judged(output, wanted, inputs).vectors.tolist() == [[1.0, 0.0]]


def test_perplexity_of_the_next_token() -> None:
    case = CASES["language"]
    logits, _ = outputs_and_targets(case)
    inputs = torch.stack([x for x, _ in case.samples()])
    nats = nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 10), inputs[:, 1:].reshape(-1))
    assert metric(case, "perplexity") == pytest.approx(float(nats.exp()), rel=1e-6)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_every_token_counts_as_much_whatever_batch_or_text_it_is_in(workers: int) -> None:
    """Texts of one to six tokens, in batches of 7: means of texts or of batches would be others."""
    case = CASES["language"]
    texts = [(row, row.clone().masked_fill(torch.arange(6) > i % 6, -100)) for i, (row, _) in samples(case)]
    uneven = replace(case, samples=lambda: texts)
    inputs, targets = (torch.stack(part) for part in zip(*texts, strict=True))
    with torch.inference_mode():
        logs = case.made(1)(inputs).double().log_softmax(2)
    ahead = targets[:, 1:]
    nats = -logs[:, :-1].gather(2, ahead.clamp(min=0)[..., None])[..., 0][ahead != -100]
    assert 0 < len(nats) < 48 * 5
    network = case.made(1)
    found = predict(network, uneven.data(), 7, task=case.spec, workers=workers).metrics()["perplexity"]
    assert found == pytest.approx(float(nats.mean().exp()), rel=1e-6)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_every_pixel_counts_as_much_whatever_image_it_is_in(workers: int) -> None:
    case = CASES["segment"]
    pictures = []
    for i, (x, mask) in samples(case):
        ignored = mask.clone()
        ignored[i % 8 :] = 255
        pictures.append((x, ignored))
    inputs, truth = (torch.stack(part) for part in zip(*pictures, strict=True))
    with torch.inference_mode():
        guess = case.made(1)(inputs).argmax(1)
    valid = truth != 255
    # scikit-learn's confusion_matrix, whose rows are the true classes.
    confusion = np.zeros((3, 3))
    np.add.at(confusion, (truth[valid].numpy(), guess[valid].numpy()), 1)
    both = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - both
    uneven = replace(case, samples=lambda: pictures)
    found = predict(case.made(1), uneven.data(), 7, task=case.spec, workers=workers).metrics()
    assert found["miou"] == pytest.approx(100 * np.mean(both / union))
    assert found["pixel_accuracy"] == pytest.approx(100 * both.sum() / confusion.sum())


def test_characters_of_all_texts_count_alike() -> None:
    spec = parse_task("sequence")
    wanted = [torch.tensor([1]), torch.tensor([1, 2, 3, 1, 2, 3, 1, 2, 3])]
    spoken = [[2], [1, 2, 3, 1, 2, 3, 1, 2, 3]]
    logits = [nn.functional.one_hot(torch.tensor(each), 4).float()[None] for each in spoken]
    tally = Tally("net", spec)
    for output, target in zip(logits, wanted, strict=True):
        padded = torch.cat(
            [output, output.new_tensor([[[9.0, 0, 0, 0]]]).expand(1, 12 - output.shape[1], 4)], 1
        )
        tally.add(padded, spec.targets().collate([target]))
    # One of ten characters is wrong; the mean of the texts' rates would be a half.
    assert tally.result().metrics()["cer"] == pytest.approx(10.0)


def test_characters_that_are_wrong_missing_or_too_many() -> None:
    spec = parse_task("sequence")
    best = [[1, 1, 0, 2, 2, 0, 2], [0, 0, 3, 3, 3, 0, 0]]
    logits = nn.functional.one_hot(torch.tensor(best), 4).float()
    ids = spec.targets().collate([torch.tensor([1, 2, 3]), torch.tensor([1, 3])])
    assert isinstance(ids, dict)
    judged = spec.judged(logits, ids, None)
    assert [row.tolist() for row in judged.ids] == [[1, 2, 2], [3]]
    assert METRICS["cer"].score(judged, ids).tolist() == [[1, 3], [1, 2]]
    turned = spec.judged(logits.transpose(0, 1), ids, None)
    assert [row.tolist() for row in turned.ids] == [[1, 2, 2], [3]]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("Ab", "holds 'A', which is none of the network's classes; it has small letters: write the texts so"),
        ("aB", "holds 'B', which is none of the network's classes; it has small letters: write the texts so"),
        ("xAb", "holds 'x', which is none of the network's classes$"),
    ],
)
def test_a_text_of_other_characters(text: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        parse_task("sequence").targets(("_", "a", "b")).check(text, None, None)
    with pytest.raises(DataError, match=r"no names for its classes; give rows of class ids"):
        parse_task("sequence").targets().check(text, None, None)


def test_a_text_that_no_path_of_the_frames_spells_is_refused_in_training() -> None:
    """The loss of torch is infinite for just these."""
    rows = [[1], [1, 2], [1, 1], [1, 2, 1], [2, 2, 1], [1, 1, 1], [1, 2, 1, 2], [1, 2, 1, 2, 1], [1, 1, 2, 2]]
    for frames in range(1, 7):
        logits = torch.randn(1, frames, 3)
        for row in rows:
            ids = parse_task("sequence").targets().collate([torch.tensor(row)])
            loss = nn.functional.ctc_loss(
                logits.log_softmax(2).movedim(0, 1), ids["ids"], torch.tensor([frames]), ids["lengths"]
            )
            if loss.isfinite():
                assert torch.equal(ctc(logits, ids, None, batch_first="true"), loss)
                continue
            with pytest.raises(Misfit, match=rf"target of {len(row)} symbols .* network gives {frames}"):
                ctc(logits, ids, None, batch_first="true")
    ids = parse_task("sequence").targets().collate([torch.tensor([1]), torch.tensor([1, 1])])
    with pytest.raises(Misfit, match="needs 3 frames") as refused:
        ctc(torch.randn(2, 2, 3), ids, None, batch_first="true")
    assert refused.value.place == 1


def test_as_many_frames_as_samples_are_never_guessed_at() -> None:
    best = torch.tensor([[1, 0, 1], [2, 0, 3], [2, 2, 2]])
    logits = nn.functional.one_hot(best, 4).float()
    ids = parse_task("sequence").targets().collate([torch.tensor([1])] * 3)
    with pytest.raises(InputError, match=r"3, 3, 4.* for 3 samples: they or the frames may come first"):
        parse_task("sequence").judged(logits, ids, None)
    first = parse_task("sequence?batch_first=true").judged(logits, ids, None)
    assert [row.tolist() for row in first.ids] == [[1, 1], [2, 3], [2]]
    second = parse_task("sequence?batch_first=false").judged(logits, ids, None)
    assert [row.tolist() for row in second.ids] == [[1, 2], [2], [1, 3, 2]]
    with pytest.raises(InputError, match=r"returned .3, 2, 4. for 3 samples"):
        parse_task("sequence?batch_first=false").judged(logits[:, :2], ids, None)


@pytest.mark.parametrize("first", [True, False])
def test_a_network_tells_by_two_batches_what_comes_first(first: bool) -> None:
    frames = torch.zeros(12, 4)

    def run(samples: int) -> torch.Tensor:
        batch = frames.expand(samples, 12, 4)
        return batch if first else batch.transpose(0, 1)

    told = parse_task("sequence").with_inferred(run)
    assert told.options == {"batch_first": "true" if first else "false"}
    assert parse_task("sequence?batch_first=false").with_inferred(run).options == {"batch_first": "false"}
    assert (
        parse_task("sequence").with_inferred(lambda samples: torch.zeros(samples, samples, 4)).options == {}
    )
    assert parse_task("segment").with_inferred(run).options == {}


def edits(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    if not one or not other:
        return len(one) + len(other)
    return min(
        edits(one[1:], other) + 1, edits(one, other[1:]) + 1, edits(one[1:], other[1:]) + (one[0] != other[0])
    )


def test_edit_distance_is_the_fewest_steps() -> None:
    from modelopt_cli.tasks.sequence import edit_distance

    generator = np.random.default_rng(0)
    for _ in range(60):
        one, other = (generator.integers(0, 3, generator.integers(0, 6)) for _ in range(2))
        assert edit_distance(one, other) == edits(tuple(one), tuple(other))


def test_a_metric_of_one_s_own(tmp_path: Any) -> None:
    (tmp_path / "net.py").write_text(
        "def nearest(outputs, targets):\n    return (outputs - targets).abs().amax(1)\n"
        "nearest.higher_is_better, nearest.unit = False, ' mm'\n"
    )
    case = Case(f"{tmp_path}/net.py:nearest", CASES["regress"].network, CASES["regress"].samples)
    found = evaluation(case)
    outputs, targets = outputs_and_targets(case)
    worst = float((outputs - torch.stack(targets)).abs().amax(1).mean())
    assert found.models[0].accuracy.metrics == {"nearest": pytest.approx(worst)}  # type: ignore[union-attr]
    assert f"{worst:.4f} mm" in plain_text(table(found))
    assert to_json(found)["comparisons"][0]["drops"]["nearest"]["low"] < 10
    assert found.comparisons[0].difference.drop == pytest.approx(  # type: ignore[union-attr]
        found.models[1].accuracy.metrics["nearest"] - worst,  # type: ignore[union-attr, operator]
        abs=1e-6,  # of values in float32
    )


MISFITS = {
    "class": (
        "segment",
        torch.zeros(2, 2, 4, 4),
        torch.tensor([[[0]], [[2]]]).expand(2, 4, 4),
        "sample 1: mask holds class 2",
    ),
    "labels": ("multilabel", torch.zeros(2, 3), torch.zeros(2, 4), "target has 4 classes, the network 3"),
    "numbers": (
        "regress",
        torch.zeros(2, 3),
        torch.zeros(2, 4),
        "target has 4 numbers, the network returns 3",
    ),
    "image": (
        "restore",
        torch.zeros(2, 1, 4, 4),
        torch.zeros(2, 3, 4, 4),
        "target is .3, 4, 4., the network returns",
    ),
    "token": (
        "language",
        torch.zeros(2, 3, 5),
        torch.tensor([[0, 1, 2], [0, 1, 5]]),
        "sample 1: target holds class 5",
    ),
    "character": (
        "sequence",
        torch.zeros(2, 5, 3),
        {"ids": torch.tensor([[1, 2], [1, 3]]), "lengths": torch.tensor([2, 2])},
        "sample 1: target holds class 3",
    ),
    "one number": (
        "regress",
        torch.zeros(2, 3),
        torch.zeros(2, 1),
        "target has 1 number, the network returns 3",
    ),
    "vector": ("embed", torch.zeros(2, 3), {"vector": torch.zeros(2, 4)}, "target has 4 numbers"),
}


@pytest.mark.parametrize("case", MISFITS.values(), ids=MISFITS)
def test_targets_that_do_not_go_with_the_network_name_the_sample(case: Any) -> None:
    task, outputs, targets, message = case
    with pytest.raises(DataError, match=message):
        Tally("net.pth", parse_task(task), name=lambda place: f"sample {place}").add(outputs, targets)


FORMS: dict[str, tuple[str, Any, str]] = {
    "classify": ("classify", torch.zeros(2, 3, 4), "a classifier"),
    "multilabel": ("multilabel", torch.zeros(2), "several labels"),
    "regress": ("regress", torch.zeros(3), "regression"),
    "segment": ("segment", torch.zeros(2, 3), "a segmentation network"),
    "restore": ("restore", torch.zeros(2, 3), "a network for images"),
    "embed": ("embed", torch.zeros(3, 3), "embeddings"),
    "language": ("language", torch.zeros(2, 3), "a language model"),
    "sequence": ("sequence", torch.zeros(4, 5, 3), "sequences"),
}
TARGETS: dict[str, Any] = {
    "classify": torch.zeros(2).long(),
    "multilabel": torch.zeros(2, 3),
    "regress": torch.zeros(2, 1),
    "segment": torch.zeros(2, 4, 4).long(),
    "restore": torch.zeros(2, 3, 4, 4),
    "embed": {"vector": torch.zeros(2, 3)},
    "language": torch.zeros(2, 3).long(),
    "sequence": {"ids": torch.ones(2, 1).long(), "lengths": torch.tensor([1, 1])},
}


@pytest.mark.parametrize("name", FORMS)
def test_outputs_of_another_form_are_refused_in_one_line(name: str) -> None:
    task, outputs, words = FORMS[name]
    with pytest.raises(InputError, match=words) as caught:
        Tally("net.pth", parse_task(task)).add(outputs, TARGETS[name])
    assert str(caught.value).startswith("net.pth: returned")


def test_the_output_that_is_judged_can_be_named() -> None:
    outputs = {"aux": torch.zeros(2, 3), "logits": torch.ones(2, 3)}
    assert torch.equal(parse_task("classify").find(outputs), torch.ones(2, 3))
    assert torch.equal(parse_task("classify").named("aux").find(outputs), torch.zeros(2, 3))
    assert torch.equal(parse_task("classify").find((torch.zeros(1).long(), torch.ones(1))), torch.ones(1))
    with pytest.raises(InputError, match="no output 'axu'; did you mean 'aux'"):
        parse_task("classify").named("axu").find(outputs)


WITHOUT_A_VALUE: dict[str, tuple[str, Any, str]] = {
    "segment": ("segment", lambda target: torch.full_like(target, 255), "mIoU not measured: no pixel counts"),
    "multilabel": ("multilabel", torch.zeros_like, "mAP not measured: no sample has any of the classes"),
    "regress": ("regress", torch.zeros_like, "R2 not measured: the targets are all the same"),
    "embed": (
        "embed",
        lambda target: {**target, "score": 1.0},
        "Spearman not measured: there are no pairs whose scores and cosines differ",
    ),
    "detect": (
        "detect",
        lambda target: {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()},
        "mAP 50-95 not measured: no image has a box",
    ),
    "language": (
        "language",
        lambda target: torch.full((6,), -100),
        "perplexity not measured: no token counts",
    ),
    "sequence": (
        "sequence",
        lambda target: torch.zeros(0).long(),
        "character error rate not measured: every target is empty",
    ),
}


@pytest.mark.parametrize("name", WITHOUT_A_VALUE)
def test_a_metric_without_a_value_says_why(name: str) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    key, changed, says = WITHOUT_A_VALUE[name]
    samples = CASES[key].samples()
    case = replace(CASES[key], samples=lambda: [(x, changed(target)) for x, target in samples])
    found = evaluate([model(case, 0), model(case, 1)], case.data(20), OPTIONS, task=case.spec)
    assert [note for note in found.notes if note.startswith(says)]
    assert says in plain_text(table(found))
    assert not [note for note in evaluation(CASES[key]).notes if "not measured" in note]
