import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from modelopt_cli.data import Data, PreprocessOverrides, open_data
from modelopt_cli.errors import UsageError
from modelopt_cli.training.augment import Affine, CropAndFlip, affine, batch_augmentation, image_augmentation
from modelopt_cli.training.random_numbers import seeded, splitmix64, uniform

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
BLACK = [-m / s for m, s in zip(MEAN, STD, strict=True)]
FILL = torch.tensor(BLACK).view(3, 1, 1)


def coloured(tmp_path: Path, images: np.ndarray) -> Data:
    np.savez(tmp_path / "images.npz", x=images, y=np.zeros(len(images), dtype=np.int64))
    return open_data(f"npz:{tmp_path / 'images.npz'}", overrides=PreprocessOverrides(mean=MEAN, std=STD))


def test_crop_and_flip_are_those_of_torchvision() -> None:
    images = torch.randn(200, 3, 34, 32)
    numbers = uniform(5, 0, np.arange(200), 3)
    for image, (top, left, flip), result in zip(
        images, numbers.tolist(), CropAndFlip(FILL)(images, numbers), strict=True
    ):
        padded = F.pad(image, [4], fill=BLACK)
        theirs = F.crop(padded, int(top * 9), int(left * 9), 34, 32)
        assert torch.equal(result, F.horizontal_flip(theirs) if flip < 0.5 else theirs)


@pytest.mark.parametrize(("size", "padding"), [(32, 4), (8, 1)])
def test_crops_and_flips_are_equally_likely_as_in_torchvision(size: int, padding: int) -> None:
    """One marked pixel comes wherever v2 may bring it, and to all of these places alike often."""
    marked = torch.zeros(1, 1, size, size)
    marked[..., size // 3, size // 3] = 1
    moved = CropAndFlip(torch.zeros(1, 1, 1))(
        marked.expand(8100, 1, size, size), uniform(0, 3, np.arange(8100), 3)
    )
    places, times = torch.unique(moved.flatten(1).argmax(1), return_counts=True)
    theirs = v2.Compose([v2.RandomCrop(size, padding=padding), v2.RandomHorizontalFlip()])
    torch.manual_seed(0)
    assert set(places.tolist()) == {int(theirs(marked).argmax()) for _ in range(1800)}
    assert len(places) == 2 * (2 * padding + 1) ** 2
    assert stats.chisquare(times.numpy()).pvalue > 1e-4


@pytest.mark.parametrize("size", [(28, 28), (9, 14)])
def test_affine_is_that_of_torchvision(size: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(60, 3, *size, generator=draw)
    angle, right, down, scale = (
        torch.rand(60, generator=draw).double() * span + low
        for low, span in ((-60, 120), (-3.5, 7), (-3.5, 7), (0.6, 1))
    )
    right, down = right.round(), down.round()
    ours = affine(images, angle, right, down, scale, FILL)
    for i, image in enumerate(images):
        theirs = F.affine(
            image - FILL,
            angle=angle[i].item(),
            translate=[right[i].item(), down[i].item()],
            scale=scale[i].item(),
            shear=[0.0, 0.0],
            interpolation=InterpolationMode.BILINEAR,
        )
        torch.testing.assert_close(ours[i], theirs + FILL, rtol=1e-4, atol=1e-4)


def test_affine_draws_what_torchvision_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr("modelopt_cli.training.augment.affine", lambda *given, **_: taken.append(given[1:5]))
    Affine(FILL)(torch.zeros(4000, 3, 28, 20), uniform(1, 0, np.arange(4000), 4))
    theirs = v2.RandomAffine(10, translate=(0.1, 0.1), scale=(0.9, 1.1))
    torch.manual_seed(0)
    drawn = [theirs.make_params([torch.zeros(3, 28, 20)]) for _ in range(4000)]
    angle, right, down, scale = (given.numpy() for given in taken[0])
    assert stats.ks_2samp(angle, [d["angle"] for d in drawn]).pvalue > 1e-4
    assert stats.ks_2samp(scale, [d["scale"] for d in drawn]).pvalue > 1e-4
    for ours, axis in ((right, 0), (down, 1)):
        counts = [
            np.unique(values, return_counts=True)
            for values in (ours, np.array([d["translate"][axis] for d in drawn], dtype=float))
        ]
        assert counts[0][0].tolist() == counts[1][0].tolist()
        assert stats.chi2_contingency([counts[0][1], counts[1][1]]).pvalue > 1e-4


@pytest.mark.parametrize("preset", ["cifar", "mnist"])
def test_black_stays_black(tmp_path: Path, preset: str) -> None:
    data = coloured(tmp_path, np.zeros((8, 12, 12, 3), dtype=np.uint8))
    augment = batch_augmentation(preset, data)
    assert augment is not None
    images, _ = next(data.batches(8))
    moved = augment(images, uniform(0, 0, np.arange(8), augment.draws))
    torch.testing.assert_close(moved, images)
    assert images[0, 0, 0, 0] == pytest.approx(-2)


def test_imagenet_cuts_the_image_itself_with_torchvision(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    (tmp_path / "data.csv").write_text("a.png,0\n")
    chosen = PreprocessOverrides(
        resize=24, crop=16, mean=MEAN, std=STD, input_size=16, interpolation="bicubic"
    )
    data = open_data(f"csv:{tmp_path / 'data.csv'}", overrides=chosen)
    augment = image_augmentation("imagenet", data)
    assert augment is not None
    theirs = v2.Compose(
        [
            v2.RandomResizedCrop(16, interpolation=InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(MEAN), list(STD)),
        ]
    )
    results = []
    for index in range(20):
        with seeded(7, 1, index):
            results.append(augment(image))
        with seeded(7, 1, index):
            torch.testing.assert_close(results[-1], torch.Tensor(theirs(image)), rtol=0, atol=1e-6)
    assert len({tuple(result.flatten().tolist()) for result in results}) == 20


def test_a_grey_or_paletted_image_is_converted_before_it_is_resized() -> None:
    data = open_data("digits", overrides=PreprocessOverrides(input_size=12, channels=3))
    augment = image_augmentation("imagenet", data)
    assert augment is not None
    with seeded(0, 0, 0):
        grey = augment(Image.new("L", (30, 20), 51))
    with seeded(0, 0, 0):
        paletted = augment(Image.new("RGB", (30, 20), (51, 51, 51)).quantize(4))
    torch.testing.assert_close(grey, torch.full((3, 12, 12), 0.2))
    torch.testing.assert_close(grey, paletted)


def test_presets_refuse_what_they_cannot_augment(tmp_path: Path) -> None:
    np.savez(tmp_path / "flat.npz", x=np.zeros((3, 5), dtype=np.float32), y=np.arange(3))
    flat = open_data(f"npz:{tmp_path / 'flat.npz'}")
    assert batch_augmentation("none", flat) is None
    assert image_augmentation("none", flat) is None
    for preset in ("cifar", "mnist"):
        with pytest.raises(UsageError, match=r"augment: .*samples are 5"):
            batch_augmentation(preset, flat)
    with pytest.raises(UsageError, match="ready tensors"):
        image_augmentation("imagenet", flat)


def test_splitmix64_gives_its_published_sequence() -> None:
    sequence = splitmix64(np.array([1234567], dtype=np.uint64), np.arange(5, dtype=np.uint64))
    assert sequence.tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_numbers_belong_to_the_sample() -> None:
    numbers = uniform(3, 4, np.arange(5000), 3)
    assert torch.equal(uniform(3, 4, np.array([4000, 17]), 3), numbers[[4000, 17]])
    for other in (uniform(4, 4, np.arange(5000), 3), uniform(3, 5, np.arange(5000), 3), numbers.roll(1, 0)):
        assert abs(float(np.corrcoef(numbers.flatten(), other.flatten())[0, 1])) < 0.04
    assert stats.kstest(numbers.flatten().numpy(), "uniform").pvalue > 1e-4
    assert float(uniform(-1, 0, np.arange(3), 1).max()) < 1


def test_seeding_a_sample_leaves_the_generators_alone() -> None:
    def drawn() -> tuple[float, float, float]:
        return torch.rand(1).item(), float(np.random.rand()), random.random()

    def start() -> None:
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)

    start()
    undisturbed = drawn()
    start()
    inside = []
    for index in (0, 1, 0):
        with seeded(0, 0, index):
            inside.append(drawn())
    assert drawn() == undisturbed
    assert inside[0] == inside[2]
    assert all(one != other for one, other in zip(inside[0], inside[1], strict=True))
