"""What an objective learns of the samples that it sees."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training_helpers import CLASSES, noisy_patterns, normalised_network, small_network, weights_of

from modelopt_cli.errors import UsageError
from modelopt_cli.training import StepInputs, TrainConfig, Training, fit
from modelopt_cli.training.split import samples

DATA = noisy_patterns(64)


class Looking:
    """Cross-entropy that notes what it was shown."""

    def __init__(self) -> None:
        self.shown: list[StepInputs] = []

    def __call__(self, logits: Tensor, targets: Tensor, inputs: StepInputs) -> Tensor:
        self.shown.append(inputs)
        return F.cross_entropy(logits, targets)


def shown(config: TrainConfig) -> list[StepInputs]:
    looking = Looking()
    fit(normalised_network(), Training(DATA, config=config), seed=0, objective=looking)
    return looking.shown


@pytest.mark.parametrize("fraction", [0.0, 0.25])
def test_each_sample_has_a_number_and_each_epoch_a_variant(fraction: float) -> None:
    config = TrainConfig(
        epochs=3, batch_size=16, val_fraction=fraction, augment="cifar", augmentation_cycle=2
    )
    train, _ = samples(DATA, None, fraction, CLASSES)
    steps = len(train) // 16
    epochs = []
    for number in range(3):
        batches = shown(config)[number * steps : (number + 1) * steps]
        assert {inputs.variant for inputs in batches} == {number % 2}
        images = torch.cat([inputs.batch for inputs in batches])
        order = torch.cat([inputs.samples for inputs in batches if inputs.samples is not None])
        assert sorted(order.tolist()) == list(range(len(train)))
        epochs.append(images[order.argsort()])
    assert torch.equal(epochs[0], epochs[2])
    assert not torch.equal(epochs[0], epochs[1])


def test_without_augmentation_the_number_is_the_place_in_what_is_trained_on() -> None:
    train, _ = samples(DATA, None, 0.25, CLASSES)
    for inputs in shown(TrainConfig(epochs=2, batch_size=16, val_fraction=0.25)):
        assert inputs.variant == 0
        assert inputs.samples is not None
        assert torch.equal(inputs.batch, torch.stack([train.get(int(i))[0] for i in inputs.samples]))


def test_mixed_samples_are_nobodys() -> None:
    assert [inputs.samples for inputs in shown(TrainConfig(epochs=1, batch_size=16, mixup=0.3))] == [None] * 4


def test_as_many_views_as_epochs_are_none_at_all() -> None:
    networks = []
    for cycle in (0, 3, 1):
        config = TrainConfig(epochs=3, batch_size=16, augment="cifar", augmentation_cycle=cycle)
        fit(network := small_network(), Training(DATA, config=config), seed=0)
        networks.append(weights_of(network))
    assert all(torch.equal(networks[0][name], networks[1][name]) for name in networks[0])
    assert not torch.equal(networks[0]["0.weight"], networks[2]["0.weight"])


def test_a_number_of_views_is_from_0() -> None:
    with pytest.raises(UsageError, match="augmentation_cycle: must be at least 0, not -1"):
        TrainConfig(augmentation_cycle=-1)


class Negating(nn.Module):
    """Changes the images that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.network = small_network()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.network(x.neg_())
        return result


def test_an_objective_sees_the_images_that_the_network_was_given() -> None:
    config, images = (
        TrainConfig(epochs=1, batch_size=16, augment="none"),
        torch.stack([x for x, _ in map(DATA.get, range(64))]),
    )
    looking = Looking()
    fit(Negating(), Training(DATA, config=config), seed=0, objective=looking)
    for inputs in looking.shown:
        assert inputs.samples is not None
        assert torch.equal(inputs.batch, images[inputs.samples])
