"""Order, limits, workers and subsets of Data."""

import pickle
import signal

import numpy as np
import pytest
import torch
from PIL import Image

import modelopt_cli
from modelopt_cli.data import open_data
from modelopt_cli.errors import DataError, EnvironmentFailure

assert modelopt_cli

# Python 3.12 warns about any fork of a process with threads, and DataLoader forks.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

STREAM = """
import torch
class Flow:
    def __iter__(self): return ((torch.full((2,), float(i)), i) for i in range(7))
def flow(): return Flow()
"""


@pytest.fixture
def stream(tmp_path):
    (tmp_path / "flow.py").write_text(STREAM)
    return open_data(f"{tmp_path / 'flow.py'}:flow")


@pytest.fixture
def numbers(tmp_path):
    """Ten samples, each of which says its own number."""
    np.savez(tmp_path / "n.npz", x=np.arange(10, dtype=np.float32)[:, None], y=np.arange(10))
    return open_data(f"npz:{tmp_path / 'n.npz'}")


def labels(data, batch_size=4, **options):
    return [batch.tolist() for _, batch in data.batches(batch_size, **options)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("batch_size", "limit", "expected"),
    [
        (4, None, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]),
        (5, None, [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]),
        (4, 6, [[0, 1, 2, 3], [4, 5]]),
        (4, 99, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]),
        (99, 1, [[0]]),
    ],
)
def test_batches_come_in_order_with_the_last_one_partial(numbers, workers, batch_size, limit, expected):
    assert labels(numbers, batch_size, limit=limit, workers=workers) == expected


def test_types_and_shapes_are_what_a_network_takes():
    images, targets = next(open_data("digits").batches(3))
    assert (images.dtype, targets.dtype) == (torch.float32, torch.int64)
    assert (tuple(images.shape), tuple(targets.shape)) == ((3, 1, 8, 8), (3,))
    assert images.is_contiguous()


def test_workers_change_no_bit_of_an_image():
    data = open_data("digits")
    alone, helped = (list(data.batches(100, workers=w)) for w in (0, 2))
    for (a, x), (b, y) in zip(alone, helped, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(x, y)


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_leaves_the_global_generator_alone(numbers, workers):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    labels(numbers.sample(3, seed=5), workers=workers)
    assert torch.equal(torch.get_rng_state(), before)


def test_sample_is_a_seeded_subset_without_replacement(numbers):
    once, again, other = (labels(numbers.sample(5, seed=s), 99)[0] for s in (1, 1, 2))
    assert once == again
    assert once != other
    assert len(set(once)) == 5
    assert once == sorted(once)


def test_every_sample_is_drawn_equally_often(numbers):
    counts = np.bincount(
        [i for s in range(400) for i in labels(numbers.sample(3, seed=s), 99)[0]], minlength=10
    )
    # 120 expected of each; the standard deviation is 9.2.
    assert counts.min() > 120 - 5 * 9.2
    assert counts.max() < 120 + 5 * 9.2


def test_sample_of_more_than_there_is_takes_all(numbers):
    assert labels(numbers.sample(99), 99) == [list(range(10))]


def test_sample_of_a_sample_stays_inside_it(numbers):
    outer = numbers.sample(6, seed=3)
    assert set(labels(outer.sample(4, seed=4), 99)[0]) <= set(labels(outer, 99)[0])
    assert len(outer.sample(4, seed=4)) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_is_read_once_in_order_whatever_the_workers(stream, workers):
    assert labels(stream, workers=workers) == [[0, 1, 2, 3], [4, 5, 6]]
    assert labels(stream, workers=workers, limit=5) == [[0, 1, 2, 3], [4]]
    assert labels(stream, workers=workers) == [[0, 1, 2, 3], [4, 5, 6]]


def test_the_sample_of_a_stream_is_its_beginning(stream):
    assert labels(stream.sample(5)) == [[0, 1, 2, 3], [4]]
    assert labels(stream.sample(5).sample(9), limit=3) == [[0, 1, 2]]


def test_a_stream_has_no_length(stream, numbers):
    assert stream.size is None
    assert (numbers.size, len(numbers)) == (10, 10)
    with pytest.raises(TypeError, match="no length"):
        len(stream)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_sample_is_one_line_from_a_worker_too(tmp_path, workers):
    folder = tmp_path / "class"
    folder.mkdir()
    for i in range(5):
        Image.effect_noise((16, 16), 50).save(folder / f"{i}.png")
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:150])
    batches = open_data(str(tmp_path)).batches(2, workers=workers)
    next(batches)
    with pytest.raises(DataError) as raised:
        next(batches)
    assert str(raised.value).startswith(str(folder / "3.png") + ": ")
    assert "\n" not in str(raised.value)


DYING = """
import os, torch, torch.utils.data
class Map:
    def __len__(self): return 4
    def __getitem__(self, i):
        if i == 3 and torch.utils.data.get_worker_info(): os._exit(1)
        return torch.zeros(1), 0
def load(): return Map()
"""


@pytest.mark.slow
def test_a_worker_that_dies_is_a_failure_of_the_environment(tmp_path):
    (tmp_path / "dying.py").write_text(DYING)
    data = open_data(f"{tmp_path / 'dying.py'}:load")
    with pytest.raises(EnvironmentFailure, match="worker died"):
        list(data.batches(1, workers=1))


def test_no_handler_that_raises_anywhere_is_left_behind(numbers):
    before = signal.getsignal(signal.SIGCHLD)
    batches = numbers.batches(2, workers=1)
    next(batches)
    assert signal.getsignal(signal.SIGCHLD) is before is signal.SIG_DFL


@pytest.mark.parametrize("spec", ["digits", "synthetic:1x2x2", "npz:{0}/n.npz", "{0}/m.py:load?n=3"])
def test_data_survives_the_trip_to_a_spawned_worker(tmp_path, spec):
    np.savez(tmp_path / "n.npz", x=np.zeros((3, 4, 4), dtype=np.uint8), y=np.arange(3))
    (tmp_path / "m.py").write_text(
        "import torch\ndef load(n): return [(torch.full((1,), float(i)), i) for i in range(n)]\n"
    )
    data = open_data(spec.format(tmp_path))
    there = pickle.loads(pickle.dumps(data))  # noqa: S301
    images, targets = list(there.batches(2, limit=3))[1]
    assert torch.equal(images, list(data.batches(2, limit=3))[1][0])
    assert torch.equal(targets, list(data.batches(2, limit=3))[1][1])


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": 2, "limit": 0}], ids=str)
def test_senseless_sizes_are_refused(numbers, options):
    with pytest.raises(DataError, match="at least 1"):
        next(numbers.batches(**options))


def test_fits_refuses_more_classes_than_the_network_has(numbers):
    assert labels(numbers.fits(10), 99) == [list(range(10))]
    with pytest.raises(DataError, match="10 classes, but the network has 9"):
        numbers.fits(9)


def test_fits_holds_a_stream_to_its_bound_as_it_is_read(stream):
    batches = stream.fits(5).batches(4)
    next(batches)
    with pytest.raises(DataError, match=r"sample 5: label 5 is outside 0\.\.4"):
        next(batches)
