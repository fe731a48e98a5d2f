"""Every optimizer, schedule, augmentation and teacher trains a network from end to end."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from training_helpers import noisy_patterns, normalised_network, small_network

from modelopt_cli.data import Data, PreprocessOverrides, open_data
from modelopt_cli.settings import fields_of
from modelopt_cli.training import Objective, TrainConfig, Trained, Training, fit, objective
from modelopt_cli.training.catalog import AUGMENTATIONS, OPTIMIZERS, SCHEDULES, TEACHERS
from modelopt_cli.training.loader import is_drawn, training_batches
from modelopt_cli.training.log import read_metrics
from modelopt_cli.training.run_folder import Run

DATA = noisy_patterns(64)


@pytest.fixture
def images(tmp_path: Path) -> Data:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 6, 6, 3), np.uint8)
    np.savez(tmp_path / "images.npz", x=pixels, y=np.arange(32) % 3)
    overrides = PreprocessOverrides(mean=(0.5,) * 3, std=(0.5,) * 3)
    return open_data(f"npz:{tmp_path / 'images.npz'}", overrides=overrides)


def trained(config: TrainConfig, aim: Objective | None = None, run: Run | None = None) -> Trained:
    return fit(normalised_network(), Training(DATA, config=config, run=run), seed=0, objective=aim)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_learns_at_its_usual_rate_and_takes_its_settings(name: str) -> None:
    result = trained(TrainConfig(epochs=6, batch_size=16, optimizer=name))
    assert result.lr == OPTIMIZERS[name].usual_lr(16)
    assert result.loss < 0.95 * trained(TrainConfig(epochs=1, batch_size=16, optimizer=name)).loss
    fields = {field.name: field for field in fields_of(TrainConfig)}
    for setting in OPTIMIZERS[name].settings:
        field = fields[setting]
        other = not field.initial if field.type is bool else field.initial / 2
        changed = TrainConfig(epochs=6, batch_size=16, optimizer=name, **{setting: other})
        assert trained(changed).loss != result.loss


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_sets_the_rate_of_every_epoch(name: str, tmp_path: Path) -> None:
    factor = SCHEDULES[name].factor
    assert all(0 <= factor(step, 100, 10) <= 1 for step in range(10, 100))
    assert factor(10, 100, 10) == 1
    config = TrainConfig(epochs=4, batch_size=16, lr=0.05, schedule=name)
    with Run(tmp_path / "run", identity={}, resume=False) as run:
        assert trained(config, run=run).loss < math.log(3)
    rates = [line["lr"] for line in read_metrics(run.metrics)]
    assert rates == pytest.approx([0.05 * factor(last, 16, 0) for last in (3, 7, 11, 15)])


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentation_changes_images_in_every_epoch_if_it_says_so(name: str, images: Data) -> None:
    def epoch(number: int, augment: str = name) -> torch.Tensor:
        batches = training_batches(images, batch_size=8, epoch=number, seed=1, augment=augment)
        rows = {int(i): image for b in batches for i, image in zip(b.samples, b.inputs, strict=True)}
        return torch.stack([rows[i] for i in range(len(images))])

    random = AUGMENTATIONS[name].is_random
    assert is_drawn(name, images) is random
    assert torch.equal(epoch(0), epoch(0))
    assert torch.equal(epoch(0), epoch(1)) is not random
    plain = torch.stack([images.get(i)[0] for i in range(len(images))])
    assert torch.equal(epoch(0), plain) is not random
    assert epoch(0).shape == plain.shape
    assert epoch(0).min() >= -1 - 1e-5  # black, which fills what is empty
    assert epoch(0).max() <= 1 + 1e-5
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(108, 3))
    result = fit(network, Training(images, config=TrainConfig(epochs=1, batch_size=8, augment=name)), seed=0)
    assert math.isfinite(result.loss)


@pytest.mark.parametrize("name", TEACHERS)
def test_teacher_is_learned_from(name: str) -> None:
    config = TrainConfig(epochs=8, batch_size=16, lr=0.05, teacher=name, distill_weight=1.0)
    original = small_network(seed=3).eval()
    with torch.no_grad():
        original[-1].weight.mul_(3)  # type: ignore[operator, union-attr]
    first = trained(replace(config, epochs=1), objective(config, original))
    assert trained(config, objective(config, original)).loss < 0.7 * first.loss
