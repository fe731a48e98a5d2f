"""Every task is learned by its loss, from its data to a better metric; losses against plain formulas."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from task_cases import CASES, Case, mlp, numbers
from torch import nn

from modelopt_cli.errors import InputError, UsageError
from modelopt_cli.measure.metrics import METRICS, metrics_named
from modelopt_cli.measure.tally import predict
from modelopt_cli.tasks import TASKS, parse_task
from modelopt_cli.training import StepInputs, TrainConfig, Training, fit, objective
from modelopt_cli.training.catalog import LOSSES
from modelopt_cli.training.validate import main_metric

CONFIG = TrainConfig(epochs=25, batch_size=16, optimizer="adamw", lr=0.02, weight_decay=0.0)
NEEDS = {"detect": "pycocotools"}


def trained(case: Case, network: nn.Module, **changes: Any) -> Any:
    training = Training(case.data(), config=replace(CONFIG, **changes), task=case.spec)
    return fit(network, training, seed=0)


@pytest.mark.parametrize("name", CASES)
def test_every_task_is_learned(name: str) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    case = CASES[name]
    network = case.made()
    before = predict(network, case.data(), task=case.spec).metrics()
    first = trained(case, case.made(), epochs=1).loss
    found = trained(case, network)
    assert found.loss < first
    after = predict(network, case.data(), task=case.spec).metrics()
    main = next(iter(metrics_named(name)))
    sign = 1 if METRICS[main].higher_is_better else -1
    assert sign * after[main] > sign * before[main]  # type: ignore[operator]


@pytest.mark.parametrize("name", ["segment", "regress", "language"])
def test_weights_are_chosen_by_the_main_metric(name: str) -> None:
    case = CASES[name]
    network, val = case.made(), case.data(20)
    training = Training(case.data(), val, replace(CONFIG, epochs=6), task=case.spec)
    found = fit(network, training, seed=0)
    kept = main_metric(network, val, 16, case.spec, workers=0, device="cpu")
    assert found.best == pytest.approx(kept)
    assert found.unit == next(iter(metrics_named(name).values())).unit


def test_a_metric_without_a_value_chooses_no_weights() -> None:
    case, notes = CASES["segment"], list[str]()
    ignored = [(x, torch.full_like(torch.as_tensor(mask), 255)) for x, mask in case.samples()]
    nothing = replace(case, samples=lambda: ignored).data()
    training = Training(case.data(), nothing, replace(CONFIG, epochs=3), task=case.spec)
    network, plain = case.made(), case.made()
    found = fit(network, replace(training, note=notes.append), seed=0)
    fit(plain, replace(training, val=None), seed=0)
    assert found.best is None
    assert len(notes) == 1
    assert "mIoU has no value" in notes[0]
    assert "no pixel counts" in notes[0]
    for one, other in zip(network.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)  # those of the last epoch


def loss(task: str, output: Any, targets: Any, **settings: Any) -> float:
    spec = parse_task(task)
    found = objective(TrainConfig(**settings), task=spec)
    return float(found(output, targets, StepInputs(torch.zeros(2, 3))).detach())


def test_cross_entropy_of_pixels_and_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 4, generator=generator)
    masks = torch.randint(0, 3, (2, 4, 4), generator=generator)
    masks[0, :2] = -100
    valid = masks != -100
    logs = logits.log_softmax(1).movedim(1, -1)
    wanted = -logs[valid].gather(1, masks[valid][:, None]).mean()
    assert loss("segment", logits, masks) == pytest.approx(float(wanted), rel=1e-5)
    smooth = 0.9 * wanted - 0.1 * logs[valid].mean(1).mean()
    assert loss("segment", logits, masks, label_smoothing=0.1) == pytest.approx(float(smooth), rel=1e-5)
    assert loss("segment", logits, torch.full_like(masks, -100)) == 0
    tokens = torch.randint(0, 5, (2, 4), generator=generator)
    vocabulary = torch.randn(2, 4, 5, generator=generator)
    nats = -vocabulary[:, :-1].log_softmax(2).gather(2, tokens[:, 1:, None]).mean()
    assert loss("language", vocabulary, tokens) == pytest.approx(float(nats), rel=1e-5)


def test_errors_of_numbers_images_and_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(2, 3, generator=generator) for _ in range(2))
    assert loss("regress", one, other) == pytest.approx(float((one - other).square().mean()))
    rows = (other > 0).float()
    p = one.sigmoid()
    nats = -(rows * p.log() + (1 - rows) * (1 - p).log()).mean()
    assert loss("multilabel", one, rows) == pytest.approx(float(nats), rel=1e-5)
    image = torch.rand(1, 1, 6, 6, generator=generator)
    assert loss("restore", image[..., 1:-1, 1:-1] + 0.5, image) == pytest.approx(0.5, rel=1e-5)
    vectors = {"vector": other}
    cosines = F.cosine_similarity(one, other)
    assert loss("embed", one, vectors) == pytest.approx(float(1 - cosines.mean()), rel=1e-5)
    pair = {"pair": torch.tensor([4, 4]), "score": torch.tensor([0.3, 0.3])}
    cosine = float(F.cosine_similarity(one[0], one[1], 0))
    assert loss("embed", one, pair) == pytest.approx((cosine - 0.3) ** 2, rel=1e-4)
    apart = {"pair": torch.tensor([4, 5]), "score": torch.tensor([0.3, 0.3])}
    assert loss("embed", one, apart) == 0


@pytest.mark.parametrize("task", ["regress", "restore"])
def test_a_task_with_several_losses_is_learned_by_the_one_that_is_named(task: str) -> None:
    shape = (2, 3) if task == "regress" else (2, 1, 4, 4)
    wanted = torch.zeros(shape)
    output = torch.linspace(-2, 2, wanted.numel()).reshape(shape)
    size = output.abs()
    formulas = {
        "mse": size.square().mean(),
        "l1": size.mean(),
        "huber": torch.where(size < 1, size.square() / 2, size - 0.5).mean(),
    }
    for name, formula in formulas.items():
        assert loss(f"{task}?loss={name}", output, wanted) == pytest.approx(float(formula), rel=1e-6)
    default = TASKS[task].losses[0]
    assert loss(task, output, wanted) == pytest.approx(float(formulas[default]), rel=1e-6)
    for name in formulas:
        case = replace(CASES[task], task=f"{task}?loss={name}")
        assert trained(case, case.made(), epochs=8).loss < trained(case, case.made(), epochs=1).loss


def test_labels_are_smoothed_where_there_are_classes() -> None:
    logits, rows = torch.tensor([[0.3, -1.0]]), torch.tensor([[1.0, 0.0]])
    p, soft = logits.sigmoid(), torch.tensor([[0.95, 0.05]])
    nats = -(soft * p.log() + (1 - soft) * (1 - p).log()).mean()
    assert loss("multilabel", logits, rows, label_smoothing=0.1) == pytest.approx(float(nats), rel=1e-5)
    with pytest.raises(UsageError, match="label_smoothing: spreads labels over classes, and regress is not"):
        loss("regress", logits, rows, label_smoothing=0.1)


def test_connectionist_temporal_classification_sums_over_alignments() -> None:
    logs = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]]).log()
    ids = {"ids": torch.tensor([[1]]), "lengths": torch.tensor([1])}
    # "1" is 1 1, 1 blank or blank 1.
    likely = 0.3 * 0.6 + 0.3 * 0.1 + 0.5 * 0.6
    assert loss("sequence", logs, ids) == pytest.approx(-float(torch.tensor(likely).log()), rel=1e-5)


def test_a_detector_computes_its_own_loss_with_the_targets() -> None:
    case = CASES["detect"]
    network = case.made().train()
    images, targets = zip(*case.samples()[:4], strict=True)
    losses = network(torch.stack(images), list(targets))
    assert loss("detect", losses, list(targets)) == pytest.approx(
        sum(map(float, (each.detach() for each in losses.values())))
    )
    with pytest.raises(InputError, match="returns list in training, not losses"):
        loss("detect", [1], list(targets))


def test_a_metric_of_one_s_own_may_have_a_loss(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "def near(outputs, targets):\n    return -(outputs - targets).abs().mean(1)\n"
        "def far(outputs, targets):\n    return (outputs - targets).square().mean()\n"
        "def bare(outputs, targets):\n    return outputs[:, 0]\n"
        "near.loss = far\n"
    )
    case = Case(f"{tmp_path}/net.py:near", lambda: mlp(2), numbers)
    network = case.made()
    assert trained(case, network).loss < 0.5 * trained(case, case.made(), epochs=1).loss
    with pytest.raises(UsageError, match="has no loss to train by; give the function an attribute loss"):
        trained(replace(case, task=f"{tmp_path}/net.py:bare"), case.made())


@pytest.mark.parametrize("name", ["segment", "language", "regress"])
def test_a_compressed_network_learns_from_the_one_it_was(name: str) -> None:
    case = CASES[name]
    teacher = case.made(1)
    config = replace(CONFIG, teacher="self", distill_weight=1.0, epochs=8)
    inputs = torch.stack([x for x, _ in case.samples()])
    student = case.made(2)
    before = (student(inputs) - teacher(inputs)).square().mean()
    training = Training(case.data(), config=config, task=case.spec)
    fit(student, training, seed=0, objective=objective(config, teacher, case.spec))
    assert (student(inputs) - teacher(inputs)).square().mean() < before


def test_what_has_no_meaning_for_a_task_is_refused() -> None:
    with pytest.raises(UsageError, match="mixup: mixes classes"):
        trained(CASES["regress"], CASES["regress"].made(), mixup=0.2)


def test_every_task_has_a_loss_of_the_table() -> None:
    assert {loss for row in TASKS.values() for loss in row.losses} == set(LOSSES)
