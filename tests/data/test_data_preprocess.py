"""Preprocessing: bit-equal to torchvision's presets, and merged in the right order."""

import modelopt_cli  # isort: skip
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from modelopt_cli.data import PreprocessOverrides
from modelopt_cli.data.preprocess import ImageTransform, resolve_preprocess
from modelopt_cli.errors import DataError, UsageError
from modelopt_cli.program.input_spec import InputSpec, Preprocess

assert modelopt_cli

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RESNET = InputSpec((3, 224, 224), Preprocess(resize=256, crop=224, mean=MEAN, std=STD))
O = PreprocessOverrides  # noqa: E741


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


@pytest.mark.parametrize("size", [(500, 375), (333, 401), (224, 224), (100, 90), (1, 7)], ids=str)
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (232, 224), (40, 48)])
def test_presets_of_torchvision_are_reproduced_bit_by_bit(size, interpolation, resize, crop):
    image = noise(*size)
    preset = ImageClassification(
        crop_size=crop,
        resize_size=resize,
        mean=MEAN,
        std=STD,
        interpolation=InterpolationMode(interpolation),
        antialias=True,
    )
    ours = ImageTransform(Preprocess(resize, crop, interpolation, MEAN, STD, 3))
    assert torch.equal(ours(image), preset(image))


def test_efficientnet_lite_recipe_against_pillow_and_numpy():
    image = noise(512, 683)
    recipe = Preprocess((224, 224), 0.875, "bicubic", (127 / 255,) * 3, (128 / 255,) * 3, 3)
    side, (width, height) = int(0.875 * 512), image.size
    left, top = (width - side) // 2, round((height - side) / 2)
    cropped = image.crop((left, top, left + side, top + side)).resize((224, 224), Image.Resampling.BICUBIC)
    expected = (np.asarray(cropped, dtype=np.float64) - 127.0) / 128.0
    np.testing.assert_allclose(ImageTransform(recipe)(image).numpy(), expected.transpose(2, 0, 1), atol=1e-6)


@pytest.mark.parametrize(("mode", "channels"), [("L", 3), ("RGB", 1), ("RGBA", 3), ("RGBA", 1), ("L", 1)])
def test_channels_are_converted_as_pillow_does(mode, channels):
    image = noise(9, 5, mode)
    got = ImageTransform(Preprocess(mean=(0.0,) * channels, std=(1.0,) * channels, channels=channels))(image)
    expected = np.asarray(image.convert("L" if channels == 1 else "RGB"), dtype=np.float32) / 255
    assert torch.equal(got, torch.from_numpy(expected.reshape(5, 9, channels).transpose(2, 0, 1).copy()))


def test_grey_becomes_rgb_by_repetition():
    got = ImageTransform(Preprocess())(noise(4, 4, "L"))
    assert torch.equal(got[0], got[1])
    assert torch.equal(got[0], got[2])


@pytest.mark.parametrize("mode", ["I", "F", "I;16"])
def test_images_that_are_not_8_bit_are_refused_rather_than_clipped(mode):
    with pytest.raises(DataError, match="not 8-bit"):
        ImageTransform(Preprocess())(Image.new(mode, (4, 4)))


MERGES = {
    "nothing known keeps size and native channels": (
        None, O(), (None, None, (0.0,), (1.0,), 1), None),
    "shape only resizes to exactly that": (
        InputSpec((3, 20, 30)), O(), ((20, 30), None, (0.0,) * 3, (1.0,) * 3, 3), (3, 20, 30)),
    "recorded is kept": (RESNET, O(), (256, 224, MEAN, STD, 3), (3, 224, 224)),
    "mean alone is replaced": (RESNET, O(mean=(0.5,)), (256, 224, (0.5,) * 3, STD, 3), (3, 224, 224)),
    "resize alone keeps the crop": (RESNET, O(resize=232), (232, 224, MEAN, STD, 3), (3, 224, 224)),
    "crop alone keeps the resize": (RESNET, O(crop=192), (256, 192, MEAN, STD, 3), (3, 192, 192)),
    "input size replaces both": (RESNET, O(160), ((160, 160), None, MEAN, STD, 3), (3, 160, 160)),
    "input size as a pair": (RESNET, O((96, 64)), ((96, 64), None, MEAN, STD, 3), (3, 96, 64)),
    "input size with short side crops to it": (
        RESNET, O(160, resize=180), (180, 160, MEAN, STD, 3), (3, 160, 160)),
    "input size with a fraction resizes to it": (
        None, O(224, crop=0.875, channels=3), ((224, 224), 0.875, (0.0,) * 3, (1.0,) * 3, 3), (3, 224, 224)),
    "shape with short side crops to it": (
        InputSpec((1, 28, 28)), O(resize=32), (32, 28, (0.0,), (1.0,), 1), (1, 28, 28)),
    "shape with a fraction resizes to it": (
        InputSpec((1, 28, 28)), O(crop=0.5), ((28, 28), 0.5, (0.0,), (1.0,), 1), (1, 28, 28)),
    "one channel of a network that repeats its mean": (
        InputSpec((3, 8, 8), Preprocess((8, 8), mean=(0.5,) * 3, std=(0.2,) * 3)),
        O(channels=1), ((8, 8), None, (0.5,), (0.2,), 1), (1, 8, 8)),
}  # fmt: skip


@pytest.mark.parametrize("case", MERGES.values(), ids=MERGES.keys())
def test_merge(case):
    recorded, overrides, expected, shape = case
    merged, got = resolve_preprocess(recorded, overrides, native_channels=1)
    assert (merged.resize, merged.crop, merged.mean, merged.std, merged.channels) == expected
    assert got == shape


@pytest.mark.parametrize(
    ("overrides", "option"),
    [
        ({"input_size": 0}, "input_size"),
        ({"input_size": (3, -1)}, "input_size"),
        ({"resize": 0}, "resize"),
        ({"crop": 0}, "crop"),
        ({"crop": 1.5}, "crop"),
        ({"std": (0.0,)}, "std"),
        ({"mean": (float("nan"),)}, "mean"),
        ({"channels": 2}, "channels"),
        ({"interpolation": "lanczos"}, "interpolation"),
    ],
    ids=str,
)
def test_senseless_overrides_name_the_option(overrides, option):
    with pytest.raises(UsageError, match=f"^{option}: "):
        O(**overrides)


@pytest.mark.parametrize(
    ("overrides", "option"),
    [
        (O(mean=(0.1, 0.2)), "mean"),
        (O(channels=1), "mean"),
        (O(200, resize=256, crop=224), "input_size"),
    ],
    ids=str,
)
def test_overrides_that_do_not_suit_the_network_name_the_option(overrides, option):
    with pytest.raises(UsageError) as raised:
        resolve_preprocess(RESNET, overrides)
    assert raised.value.where == option


@pytest.mark.parametrize("shape", [(784,), (4, 8, 8), (2, 3, 8, 8)], ids=str)
def test_a_network_that_takes_no_images_is_told_so(shape):
    with pytest.raises(DataError, match="not images"):
        resolve_preprocess(InputSpec(shape), O())
