"""The builtin networks against their papers' figures."""

import pytest
import torch
from torch import fx, nn

from modelopt_cli.checkpoint import resolve
from modelopt_cli.checkpoint.builtin import BUILTINS
from modelopt_cli.errors import ArchitectureError

# LeNets: Han et al. 2016, table 1 (267K, 431K). ResNets: He et al. 2016, table 6 (0.27M, 0.85M), plus the
# projections of option B: 16*32 + 2*32 and 32*64 + 2*64 weights. cnn2: counted by hand.
PARAMETERS = {
    "lenet300": 266_610,
    "lenet5": 431_080,
    "cnn2": 3 * 64 * 9 + 64 + 64 * 128 * 9 + 128 + 128 * 49 * 1024 + 1024 + 1024 * 10 + 10,
    "resnet20": 269_722 + 2_752,
    "resnet56": 853_018 + 2_752,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name: str) -> None:
    assert sum(p.numel() for p in resolve(f"builtin:{name}").build().parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["resnet8", "resnet20", "resnet56"])
def test_a_resnet_has_as_many_layers_as_its_name_says(name: str) -> None:
    module = resolve(f"builtin:{name}").build()
    layers = [
        n for n, m in module.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and "downsample" not in n
    ]
    assert len(layers) == int(name.removeprefix("resnet"))


@pytest.mark.parametrize(
    "options", ["", "?width=0.5", "?width=0.01&in_channels=2&num_classes=3", "?num_classes=100&width=2"]
)
@pytest.mark.parametrize("name", BUILTINS)
def test_they_trace_and_run_at_every_width(name: str, options: str) -> None:
    architecture = resolve(f"builtin:{name}{options}")
    assert architecture.input is not None
    module = architecture.build().eval()
    images = torch.rand(2, *architecture.input.shape)
    logits = module(images)
    assert logits.shape == (2, architecture.num_classes)
    assert torch.equal(fx.symbolic_trace(module)(images), logits)


@pytest.mark.parametrize("side", [8, 28, 33])
def test_the_resnets_take_any_image_size(side: int) -> None:
    assert resolve("builtin:resnet8").build().eval()(torch.rand(1, 3, side, side)).shape == (1, 10)


def test_cnn2_starts_with_xavier_weights() -> None:
    torch.manual_seed(0)
    module = resolve("builtin:cnn2").build()
    weight = module.get_parameter("hidden.weight")
    limit = (6 / (128 * 49 + 1024)) ** 0.5
    assert 0.99 * limit < weight.abs().max() <= limit
    assert abs(weight.std().item() - limit / 3**0.5) < 0.01 * limit
    assert not module.get_parameter("hidden.bias").any()


def test_preprocessing_follows_the_channels() -> None:
    one, three, five = (resolve(f"builtin:lenet5?in_channels={c}").input for c in (1, 3, 5))
    assert one is not None
    assert one.preprocess is not None
    assert (one.shape, one.preprocess.channels, one.preprocess.mean) == ((1, 28, 28), 1, (0.0,))
    assert three is not None
    assert three.preprocess is not None
    assert three.preprocess.channels == 3
    assert five is not None
    assert (five.shape, five.preprocess) == ((5, 28, 28), None)


@pytest.mark.parametrize(
    "option",
    ["width=0", "width=-1", "width=wide", "num_classes=1.5", "in_channels=true", "depth=3", "width=nan"],
)
def test_options_that_make_no_sense(option: str) -> None:
    with pytest.raises(ArchitectureError):
        resolve(f"builtin:lenet5?{option}").build()
