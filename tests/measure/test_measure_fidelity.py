"""How near outputs are: by plain formulas, streamed, of any structure, and on noise without data."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelopt_cli.data import open_data
from modelopt_cli.data.in_memory import as_samples
from modelopt_cli.measure import EvalOptions, EvaluatedModel, Fidelity, Gates, evaluate, gates
from modelopt_cli.measure.fidelity import FidelityTally, divergence, mean_cosine
from modelopt_cli.measure.output_comparison import LIMIT_DB, least_snr_db
from modelopt_cli.program import InputSpec
from modelopt_cli.tasks import parse_task

GENERATOR = torch.Generator().manual_seed(0)
ONE, OTHER = (torch.randn(20, 5, generator=GENERATOR) for _ in range(2))


def compared(expected: Any, found: Any, task: str = "classify", batch: int = 7) -> Fidelity:
    tally = FidelityTally(parse_task(task))
    size = len(next(iter(expected.values())) if isinstance(expected, dict) else expected)
    for start in range(0, size, batch):
        part = slice(start, start + batch)
        tally.add(*(cut(each, part) for each in (expected, found)), min(batch, size - start))
    result = tally.result()
    assert result is not None
    return result


def cut(outputs: Any, part: slice) -> Any:
    if isinstance(outputs, dict):
        return {name: tensor[part] for name, tensor in outputs.items()}
    return outputs[part]


@pytest.mark.parametrize("batch", [1, 7, 20])
def test_figures_of_one_output_whatever_the_batches(batch: int) -> None:
    found = compared(ONE, OTHER, batch=batch)
    signal, noise = float(ONE.double().square().sum()), float((ONE - OTHER).double().square().sum())
    assert found.snr_db == {"output": pytest.approx(10 * math.log10(signal / noise), rel=1e-6)}
    assert found.cosine == {"output": pytest.approx(float(F.cosine_similarity(ONE, OTHER).mean()), rel=1e-6)}
    logs = ONE.log_softmax(1), OTHER.log_softmax(1)
    nats = (logs[0].exp() * (logs[0] - logs[1])).sum(1).mean()
    assert found.kl == {"output": pytest.approx(float(nats), rel=1e-5)}


def test_each_output_by_its_name_and_the_one_that_is_furthest() -> None:
    found = compared(
        {"logits": ONE, "boxes": OTHER, "ids": ONE.long()},
        {"logits": ONE + 0.01, "boxes": OTHER * 2, "ids": ONE.long() + 1},
    )
    assert found.snr_db.keys() == found.cosine.keys() == {"logits", "boxes"}
    assert found.snr_db["boxes"] == pytest.approx(0, abs=1e-4)
    assert found.cosine["boxes"] == pytest.approx(1)
    assert found.least_snr_db == found.snr_db["boxes"]
    assert found.least_cosine == found.cosine["logits"]
    assert found.kl.keys() == {"logits"}


def test_pixels_and_tokens_are_divergences_of_their_own() -> None:
    one, other = (torch.randn(4, 3, 2, 2, generator=GENERATOR) for _ in range(2))
    logs = [x.movedim(1, -1).reshape(-1, 3).log_softmax(1) for x in (one, other)]
    nats = (logs[0].exp() * (logs[0] - logs[1])).sum(1).mean()
    assert compared(one, other, "segment").kl["output"] == pytest.approx(float(nats), rel=1e-5)
    tokens = [x.flatten(2).transpose(1, 2) for x in (one, other)]
    assert compared(*tokens, "language").kl["output"] == pytest.approx(float(nats), rel=1e-5)
    assert compared(one, other, "restore").kl == {}


class OfTokens(nn.Module):
    """Logits and hidden states of tokens, and a vector of each text; the noise on padding is large."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.noise = noise

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = F.one_hot(input_ids, 7).float() + torch.linspace(0, 1, 7)
        noise = self.noise * (1 + 100 * (1 - attention_mask).unsqueeze(2)) * x.flip(2).cos()
        return {"logits": x + noise, "pooled": x.mean(1) + self.noise}


@pytest.mark.parametrize("task", ["language", "text"])
def test_padding_counts_nothing(task: str) -> None:
    ids = torch.randint(0, 7, (12, 5), generator=GENERATOR)
    mask = (torch.arange(5) < torch.randint(1, 6, (12, 1), generator=GENERATOR)).long()
    spec = InputSpec((5,), dtype="int64", name="input_ids")
    spec = replace(spec, others=(InputSpec((5,), dtype="int64", name="attention_mask"),))
    models = [EvaluatedModel(f"{n}", OfTokens(n), None, 1, input=spec, tensor_bytes=1) for n in (0.0, 0.1)]
    batch = {"input_ids": ids, "attention_mask": mask}
    data = open_data(as_samples([batch], "texts"), labels=False).with_targets(parse_task(task).targets())
    options = EvalOptions(runs=0, memory=False, threads=1, data_batch_size=5)
    found = evaluate(models, data, options, task=parse_task(task))
    fidelity = found.comparisons[0].fidelity
    assert fidelity is not None
    one, other = (OfTokens(n)(ids, mask) for n in (0.0, 0.1))
    rows = [[row[m.bool()] for row, m in zip(each["logits"], mask, strict=True)] for each in (one, other)]
    a, b = (torch.cat(each).double() for each in rows)
    ratio = 10 * math.log10(float(a.square().sum() / (a - b).square().sum()))
    assert fidelity.snr_db["logits"] == pytest.approx(ratio, rel=1e-6)
    cosines = [F.cosine_similarity(x.flatten(), y.flatten(), 0) for x, y in zip(*rows, strict=True)]
    assert fidelity.cosine["logits"] == pytest.approx(float(torch.stack(cosines).mean()), rel=1e-6)
    if task == "language":
        nats = F.kl_div(b.log_softmax(1), a.log_softmax(1), log_target=True, reduction="batchmean")
        assert fidelity.kl["logits"] == pytest.approx(float(nats), rel=1e-6)
    assert fidelity.snr_db["pooled"] == compared(one, other).snr_db["pooled"]


def test_labels_that_do_not_exclude_each_other() -> None:
    p, q = ONE.double().sigmoid(), OTHER.double().sigmoid()
    nats = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1).mean()
    assert compared(ONE, OTHER, "multilabel").kl["output"] == pytest.approx(float(nats), rel=1e-6)


def test_equal_outputs_have_the_limit() -> None:
    found = compared(ONE, ONE.clone())
    assert (found.snr_db["output"], found.kl["output"]) == (LIMIT_DB, 0)
    assert found.cosine["output"] == pytest.approx(1)
    zeros = compared(torch.zeros(3, 2), torch.zeros(3, 2))
    assert (zeros.snr_db["output"], zeros.cosine["output"]) == (LIMIT_DB, 1)
    assert compared(torch.zeros(3, 2), torch.ones(3, 2)).snr_db["output"] == -LIMIT_DB


def test_what_is_masked_with_minus_infinity_counts_nothing() -> None:
    masked = ONE.clone()
    masked[:, 2] = -math.inf
    found = compared(masked, masked + 0.0)
    assert (found.snr_db["output"], found.kl["output"]) == (LIMIT_DB, 0)
    assert float(divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -math.inf]]))) == math.inf


def test_outputs_of_another_shape_are_left_out() -> None:
    found = compared({"a": ONE, "b": ONE}, {"a": ONE[:, :3], "b": ONE})
    assert found.snr_db.keys() == {"b"}
    tally = FidelityTally()
    tally.add(ONE, ONE[:, :3], 20)
    assert tally.result() is None
    assert tally.unlike == (
        "the baseline returned output (20, 5), the other output (20, 3) for the same samples, "
        "so no output is in both"
    )
    partly = FidelityTally()
    partly.add({"a": ONE, "b": ONE}, {"a": ONE[:, :3], "b": ONE}, 20)
    assert (partly.unlike, partly.left_out) == (
        None,
        "signal to noise and cosine leave out a: of another shape",
    )


class Two(nn.Module):
    """Returns two outputs in a dictionary."""

    def __init__(self, noise: float) -> None:
        super().__init__()
        self.noise = noise

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"first": x, "second": x * 2 + self.noise}


def model(noise: float, path: str, shape: tuple[int, ...] = (4,)) -> EvaluatedModel:
    return EvaluatedModel(path, Two(noise), None, 1, input=InputSpec(shape), tensor_bytes=1)


def test_without_data_outputs_are_compared_on_noise() -> None:
    options = EvalOptions(runs=0, memory=False, threads=1)
    found = evaluate([model(0, "a"), model(0.1, "b"), model(0, "c", (5,))], None, options)
    first, second = found.comparisons
    assert first.fidelity is not None
    assert first.fidelity.snr_db["first"] == LIMIT_DB
    assert 10 < first.fidelity.snr_db["second"] < 40
    assert second.fidelity is None  # it takes other samples


def test_networks_of_any_outputs_are_compared_on_data_without_labels() -> None:
    class Unlabelled:
        name, labelled = "noise", False

        def batches(self, *args: Any, **more: Any) -> Any:
            yield torch.randn(6, 4, generator=GENERATOR), torch.full((6,), -1)

        def where(self, index: int) -> str:
            return f"sample {index}"

    options = EvalOptions(runs=0, memory=False, threads=1, baseline=1)
    found = evaluate([model(0.1, "a"), model(0, "b")], Unlabelled(), options)
    (comparison,) = found.comparisons
    assert comparison.model == 0
    assert comparison.fidelity is not None
    assert list(comparison.fidelity.snr_db) == ["first", "second"]
    assert found.models[0].accuracy is not None
    assert found.models[0].accuracy.top1 is None


def some_missing() -> Tensor:
    missing = ONE.clone()
    missing[:, 0] = missing[3] = math.nan
    return missing


def test_what_is_nan_in_both_is_not_compared_and_its_share_is_told() -> None:
    tally = FidelityTally(parse_task("regress"))
    tally.add(some_missing(), some_missing() + 0.1, 20)
    found = tally.result()
    assert found is not None
    kept = [row for row in range(20) if row != 3]
    one = ONE[kept, 1:].double()
    noise = float(((some_missing() + 0.1) - some_missing())[kept, 1:].double().square().sum())
    assert found.least_snr_db == pytest.approx(10 * math.log10(float(one.square().sum()) / noise), rel=1e-6)
    assert found.least_cosine == pytest.approx(float(F.cosine_similarity(one, one + 0.1).mean()), rel=1e-5)
    assert (
        tally.not_numbers()
        == "24 % of the baseline's outputs are not a number (NaN); the others are compared"
    )


@pytest.mark.parametrize("swap", [False, True], ids=["baseline", "other"])
def test_nan_of_one_network_alone_is_an_endless_error(swap: bool) -> None:
    missing = ONE.clone()
    missing[0, 0] = math.nan
    found = compared(ONE, missing) if swap else compared(missing, ONE)
    assert (found.least_snr_db, found.kl["output"]) == (-LIMIT_DB, math.inf)
    assert found.least_cosine < 0.96  # that of one of 20 samples is 0
    tally = FidelityTally()
    tally.add(missing, ONE, 20)
    assert tally.not_numbers() == (
        "1 % of the baseline's outputs are not a number (NaN), and not all of these are in both networks: "
        "that is an endless error"
    )


@pytest.mark.parametrize("task", ["classify", "regress"])
def test_outputs_that_are_all_nan_have_no_figure(task: str) -> None:
    tally = FidelityTally(parse_task(task))
    tally.add({"a": ONE, "b": ONE * math.nan}, {"a": ONE, "b": ONE * math.nan}, 20)
    assert tally.result() is None
    assert tally.not_numbers() == (
        "signal to noise and cosine not measured: output b of the baseline is not a number (NaN)"
    )


def test_without_data_a_network_of_nan_fails_its_gates() -> None:
    class Missing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * math.nan

    sides = [
        EvaluatedModel(path, Missing(), None, 1, input=InputSpec((4,)), tensor_bytes=1) for path in ("a", "b")
    ]
    found = evaluate(sides, None, EvalOptions(runs=0, memory=False, threads=1))
    assert found.comparisons[0].fidelity is None
    assert any("b: signal to noise and cosine not measured: the output" in note for note in found.notes)
    judged = gates.apply(found, Gates(min_snr=100, min_cosine=0.99)).gates
    assert [(gate.passed, gate.value) for gate in judged] == [(False, None)] * 2


def test_infinities_are_equal_where_they_are_the_same() -> None:
    masked = ONE.clone()
    masked[:, 2] = -math.inf
    assert compared(masked, masked.clone()).least_snr_db == LIMIT_DB
    assert compared(masked, -masked).least_snr_db == -LIMIT_DB
    assert compared(masked, ONE).least_snr_db == -LIMIT_DB
    tally = FidelityTally(parse_task("regress"))
    tally.add(masked[:, 2], masked[:, 2], 20)
    assert tally.result() is None
    assert tally.not_numbers() == (
        "signal to noise and cosine not measured: the baseline gives no finite number"
    )


@pytest.mark.parametrize("batch", [1, 7, 20])
def test_numbers_alone_are_together_one_vector(batch: int) -> None:
    """The cosine of two numbers is only their sign: 1 of all that are positive, however far apart."""
    one, other = ONE[:, :1].abs() + 0.1, OTHER[:, :1].abs() + 0.1
    assert F.cosine_similarity(one, other).min() == 1
    expected = float(F.cosine_similarity(one[:, 0], other[:, 0], dim=0))
    assert expected < 0.9
    for own, changed in ((one, other), (one[:, 0], other[:, 0])):
        assert compared(own, changed, "regress", batch).least_cosine == pytest.approx(expected, rel=1e-6)
    assert mean_cosine(one, other) == pytest.approx(expected, rel=1e-6)
    assert compared(one, one.clone(), "regress", batch).least_cosine == pytest.approx(1)
    zeros = torch.zeros(3, 1)
    assert [compared(zeros, zeros + n, "regress").least_cosine for n in (0, 1)] == [1, 0]
    missing = other.clone()
    missing[0] = math.nan
    assert compared(one, missing, "regress", batch).least_cosine == 0


def test_samples_of_one_number_count_next_to_longer_ones() -> None:
    tally = FidelityTally(parse_task("regress"))
    tally.add(ONE[:4], OTHER[:4], 4)
    tally.add(ONE[4:, :1], OTHER[4:, :1], 16)
    whole = float(F.cosine_similarity(ONE[4:, 0], OTHER[4:, 0], dim=0))
    found = tally.result()
    assert found is not None
    expected = (float(F.cosine_similarity(ONE[:4], OTHER[:4]).sum()) + 16 * whole) / 20
    assert found.least_cosine == pytest.approx(expected, rel=1e-6)


def test_one_number_of_one_sample_has_no_cosine_and_fails_its_gate() -> None:
    class Single:
        name, labelled = "one", False

        def batches(self, *args: Any, **more: Any) -> Any:
            yield torch.ones(1, 1), torch.full((1,), -1)

        def where(self, index: int) -> str:
            return f"sample {index}"

    sides = [
        EvaluatedModel(f"{scale}", nn.Linear(1, 1), None, 1, input=InputSpec((1,)), tensor_bytes=1)
        for scale in (1, 2)
    ]
    found = evaluate(
        sides, Single(), EvalOptions(runs=0, memory=False, threads=1), task=parse_task("regress")
    )
    (comparison,) = found.comparisons
    assert comparison.fidelity is not None
    assert comparison.fidelity.snr_db
    assert comparison.fidelity.least_cosine is None
    why = "the one number of a single sample has no more than a sign"
    assert f"2: cosine not measured: {why}" in found.notes
    (judged,) = gates.apply(found, Gates(min_cosine=-1)).gates
    assert (judged.passed, judged.value) == (False, None)


def test_a_large_output_does_not_hide_what_a_small_one_loses() -> None:
    """The decibels that are checked before a file is written, whatever sizes the outputs have."""
    expected = {
        "logits": torch.tensor([1.0, -1.0]),
        "features": torch.full((50,), 100.0),
        "mask": torch.zeros(3),
    }
    outputs = {**expected, "logits": torch.tensor([1.1, -1.0]), "mask": torch.full((3,), 1e-9)}
    assert least_snr_db(expected, outputs) == pytest.approx(10 * math.log10(2 / 0.1**2), abs=1e-4)
    assert least_snr_db({"mask": expected["mask"]}, {"mask": outputs["mask"]}) == -LIMIT_DB
