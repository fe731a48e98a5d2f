"""Each kind of ``--data`` against an independent reading of the same files."""

import csv
import gzip
import struct

import numpy as np
import pytest
import torch
from PIL import Image

import modelopt_cli
from modelopt_cli.data import open_data
from modelopt_cli.data.data_kinds import DATA_KINDS
from modelopt_cli.data.data_spec import parse_spec, same_samples
from modelopt_cli.data.dataset_sources import open_callable
from modelopt_cli.program.input_spec import InputSpec

assert modelopt_cli


def everything(data, batch_size=64, **options):
    images, labels = zip(*data.batches(batch_size, **options), strict=True)
    return torch.cat(images), torch.cat(labels)


def picture(path, seed, size=(6, 5), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def test_folder_has_the_order_and_labels_of_torchvisions_imagefolder(tmp_path):
    from torchvision.datasets import ImageFolder

    names = [
        "b/2.png",
        "b/10.PNG",
        "a/x.bmp",
        "10/deep/er/z.ppm",
        "10/deep/a.png",
        "10/b.png",
        "2/q.webp",
        "2/p.tif",
        "2/o.TIFF",
        "2/n.pgm",
    ]
    for seed, name in enumerate(names):
        picture(tmp_path / name, seed)
    (tmp_path / "a" / "notes.txt").write_text("no image")
    for seed, name in enumerate("zqmxbwac"):
        picture(tmp_path / "b" / name / "x.png", 100 + seed)
    reference = ImageFolder(tmp_path)
    (tmp_path / ".hidden").mkdir()
    data = open_data(str(tmp_path))
    assert list(zip(data.source.paths, data.source.labels, strict=True)) == reference.samples
    assert data.class_names == ("10", "2", "a", "b")
    assert data.num_classes == 4
    images, labels = everything(data)
    assert labels.tolist() == [label for _, label in reference.samples]
    expected = np.asarray(reference[0][0], dtype=np.float32).transpose(2, 0, 1) / 255
    assert torch.equal(images[0], torch.from_numpy(expected.copy()))


@pytest.mark.parametrize(
    ("text", "labels", "names"),
    [
        ("path,label\na.png,3\nsub/b.png,0\n", [3, 0], None),
        ("a.png,3\nsub/b.png,0\n", [3, 0], None),
        ("\ufeffLabel, id ,PATH\r\n7,x,a.png\r\n\r\n2,y,sub/b.png\r\n", [7, 2], None),
        ('a.png,zebra\n"sub/b.png", ant\n', [1, 0], ("ant", "zebra")),
    ],
    ids=["header", "no header", "columns in another order", "class names"],
)
def test_csv(tmp_path, text, labels, names):
    picture(tmp_path / "a.png", 0)
    picture(tmp_path / "sub" / "b.png", 1)
    (tmp_path / "table.csv").write_text(text, encoding="utf-8")
    data = open_data(f"csv:{tmp_path / 'table.csv'}")
    assert everything(data)[1].tolist() == labels
    assert data.class_names == names
    assert data.num_classes == (2 if names else max(labels) + 1)


def test_csv_takes_absolute_paths_and_keeps_its_order(tmp_path):
    rows = [(str(tmp_path / "images" / f"{i}.png"), 9 - i) for i in (3, 1, 2)]
    for seed, (path, _) in enumerate(rows):
        picture(tmp_path / "images" / path, seed)
    table = tmp_path / "elsewhere" / "t.csv"
    table.parent.mkdir()
    with table.open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    data = open_data(f"csv:{table}")
    assert data.source.paths == [path for path, _ in rows]
    assert everything(data)[1].tolist() == [6, 8, 7]


def write_idx(path, array):
    content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("suffix", ["", ".gz"], ids=["plain", "gzip"])
@pytest.mark.parametrize(
    ("query", "images_name", "labels_name"),
    [
        ("", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
        ("?split=train", "train-images.idx3-ubyte", "train-labels.idx1-ubyte"),
        ("?split=test", "emnist-digits-test-images-idx3-ubyte", "emnist-digits-test-labels-idx1-ubyte"),
    ],
)
def test_idx(tmp_path, suffix, query, images_name, labels_name):
    images = np.random.default_rng(0).integers(0, 256, (7, 5, 4), dtype=np.uint8)
    labels = np.array([3, 0, 1, 2, 9, 9, 4], dtype=np.uint8)
    write_idx(tmp_path / (images_name + suffix), images)
    write_idx(tmp_path / (labels_name + suffix), labels)
    data = open_data(f"idx:{tmp_path}{query}")
    got, got_labels = everything(data, batch_size=3)
    assert torch.equal(got, torch.from_numpy(images[:, None].astype(np.float32) / 255))
    assert got_labels.tolist() == labels.tolist()
    assert data.num_classes == 10
    assert data.input.shape == (1, 5, 4)


def test_idx_plain_files_go_before_gzipped_ones(tmp_path):
    write_idx(tmp_path / "t10k-images-idx3-ubyte", np.ones((2, 3, 3), dtype=np.uint8))
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", np.zeros((2, 3, 3), dtype=np.uint8))
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.zeros(2, dtype=np.uint8))
    assert everything(open_data(f"idx:{tmp_path}"))[0].min() > 0


@pytest.mark.parametrize(
    ("axes", "channels", "dtype"),
    [
        ((0, 1, 2, 3), 3, np.uint8),
        ((0, 3, 1, 2), 3, np.uint8),
        ((0, 1, 2, 3), 1, np.uint8),
        ((0, 3, 1, 2), 1, np.uint8),
        ((0, 1, 2), None, np.uint8),
        ((0, 1, 2), None, np.int64),
    ],
    ids=["NHWC rgb", "NCHW rgb", "NHWC grey", "NCHW grey", "NHW", "NHW of int64"],
)
@pytest.mark.parametrize(("x", "y"), [("x", "y"), ("images", "labels"), ("data", "labels")])
def test_npz_layouts(tmp_path, axes, channels, dtype, x, y):
    shape = (4, 6, 5) if channels is None else (4, 6, 5, channels)
    images = np.random.default_rng(0).integers(0, 256, shape).astype(dtype)
    np.savez(tmp_path / "a.npz", **{x: images.transpose(axes), y: np.array([0, 1, 2, 1])})
    got, labels = everything(open_data(f"npz:{tmp_path / 'a.npz'}"))
    expected = images.reshape(4, 6, 5, channels or 1).transpose(0, 3, 1, 2).astype(np.float32) / 255
    assert torch.equal(got, torch.from_numpy(expected))
    assert labels.tolist() == [0, 1, 2, 1]


def test_float_npz_is_used_as_it_is(tmp_path):
    samples = np.random.default_rng(0).normal(size=(3, 10))
    np.savez(tmp_path / "a.npz", x=samples, y=np.arange(3))
    data = open_data(f"npz:{tmp_path / 'a.npz'}", input_spec=InputSpec((10,)))
    assert torch.equal(everything(data)[0], torch.from_numpy(samples.astype(np.float32)))
    assert data.input == InputSpec((10,))


def test_digits_are_the_1797_of_uci():
    data = open_data("digits?split=all")
    images, labels = everything(data)
    assert images.shape == (1797, 1, 8, 8)
    assert data.num_classes == 10
    # Counts per class as published with the data set.
    assert torch.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    steps = images * 16
    assert torch.allclose(steps, steps.round(), atol=0.04)
    assert (steps.round().min().item(), steps.round().max().item()) == (0, 16)
    assert steps.round().mean().item() == pytest.approx(4.8842, abs=1e-4)


def test_digits_stored_values_are_0_to_16():
    from modelopt_cli.data.arrays import DIGITS

    with np.load(DIGITS, allow_pickle=False) as stored:
        assert stored["images"].shape == (1797, 8, 8)
        assert (stored["images"].min(), stored["images"].max()) == (0, 16)
        assert set(stored["labels"].tolist()) == set(range(10))


def test_digits_split_is_a_partition_with_the_last_fifth_of_each_class_for_testing():
    whole, train, test = (everything(open_data(f"digits?split={s}"))[1] for s in ("all", "train", "test"))
    assert len(train) + len(test) == len(whole)
    for digit in range(10):
        count = int((whole == digit).sum())
        assert int((train == digit).sum()) == count * 4 // 5
    assert open_data("digits").size == len(test)


def test_digits_are_resized_and_made_rgb_for_the_network():
    data = open_data("digits", input_spec=InputSpec((3, 28, 28)))
    images, _ = everything(data, limit=4)
    assert images.shape == (4, 3, 28, 28)
    assert data.input.preprocess.resize == (28, 28)


def test_synthetic_is_seeded_unlabelled_noise():
    one = open_data("synthetic:3x8x9?n=300", seed=1)
    images, labels = everything(one)
    assert images.shape == (300, 3, 8, 9)
    assert set(labels.tolist()) == {-1}
    assert not one.labelled
    assert abs(images.mean().item()) < 0.02
    assert abs(images.std().item() - 1) < 0.02
    assert torch.equal(images, everything(open_data("synthetic:3x8x9?n=300", seed=1))[0])
    assert not torch.equal(images, everything(open_data("synthetic:3x8x9?n=300", seed=2))[0])


def test_synthetic_takes_the_networks_shape():
    data = open_data("synthetic", input_spec=InputSpec((1, 5, 5)))
    assert next(data.batches(4))[0].shape == (4, 1, 5, 5)
    assert data.size == 256


def test_torchvision_reads_its_own_layout_and_defaults_to_the_test_split(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for stem, count in (("train", 5), ("t10k", 3)):
        write_idx(raw / f"{stem}-images-idx3-ubyte", np.full((count, 28, 28), count, dtype=np.uint8))
        write_idx(raw / f"{stem}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8))
    test = open_data(f"torchvision:FashionMNIST@{tmp_path}")
    train = open_data(f"torchvision:FashionMNIST@{tmp_path}?train=true")
    assert (test.size, train.size, test.num_classes) == (3, 5, 10)
    images, labels = everything(test)
    assert images.shape == (3, 1, 28, 28)
    assert torch.equal(images, torch.full((3, 1, 28, 28), 3 / 255))
    assert labels.tolist() == [0, 1, 2]


USER = """
import torch
from torch.utils.data import Dataset, IterableDataset
from neighbour import SHAPE

class Map(Dataset):
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i): return torch.full(SHAPE, float(i)), i % 3

class Flow(IterableDataset):
    def __init__(self, n): self.n = n
    def __iter__(self): return ((torch.full(SHAPE, float(i)), torch.tensor(i % 3)) for i in range(self.n))

def load(n: int = 5): return Map(n)
def flow(n: int = 5): return Flow(n)
"""


@pytest.fixture
def user(tmp_path, monkeypatch):
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "mine.py").write_text(USER)
    (folder / "neighbour.py").write_text("SHAPE = (1, 2, 2)\n")
    monkeypatch.syspath_prepend(folder)
    return folder / "mine.py"


@pytest.mark.parametrize("name", ["load", "flow"], ids=["map-style", "iterable-style"])
def test_callable_in_a_file(user, name):
    data = open_data(f"{user}:{name}?n=7")
    images, labels = everything(data, batch_size=3)
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert data.size == (7 if name == "load" else None)
    assert data.input == InputSpec((1, 2, 2))


def test_what_the_users_code_prints_stays_off_stdout(tmp_path, capfd):
    (tmp_path / "loud.py").write_text(
        "import torch\nprint('import')\n"
        "class Map:\n    def __len__(self): return 3\n"
        "    def __getitem__(self, i):\n        print('item', i)\n        return torch.zeros(1), 0\n"
        "class Flow:\n    def __iter__(self):\n        print('flow')\n        yield torch.zeros(1), 0\n"
        "def load():\n    print('call')\n    return Map()\n"
        "def flow(): return Flow()\n"
    )
    everything(open_data(f"{tmp_path / 'loud.py'}:load"))
    everything(open_data(f"{tmp_path / 'loud.py'}:flow"))
    out, err = capfd.readouterr()
    assert out == ""
    assert {"import", "call", "item 2", "flow"} <= set(err.splitlines())


def test_callable_in_a_module(user):
    assert open_data("mine:load").size == 5


@pytest.mark.parametrize("kind", DATA_KINDS)
def test_a_folder_may_be_called_like_a_kind(tmp_path, monkeypatch, kind):
    (tmp_path / kind).mkdir()
    monkeypatch.chdir(tmp_path)
    assert parse_spec(kind).kind == "folder"


def test_options_are_read_as_literals():
    options = parse_spec("f.py:load?a=true&b=3&c=0.5&d=x%20y").options
    assert options == {"a": True, "b": 3, "c": 0.5, "d": "x y"}
    numbers = "f.py:load?a=007&b=1e3&c=1_0&d=nan&e=-.5&f=%D9%A3&g=0&h=3."
    expected = {"a": "007", "b": 1000.0, "c": "1_0", "d": "nan", "e": -0.5, "f": "٣", "g": 0, "h": 3.0}
    assert parse_spec(numbers).options == expected


TEXTS = ["007", "1e3", "True", "0", "1.50", "nan"]


@pytest.mark.parametrize("kind", [name for name, row in DATA_KINDS.items() if row.defaults])
def test_options_that_are_texts_stay_as_they_are_written(kind):
    for name in (name for name, default in DATA_KINDS[kind].defaults.items() if isinstance(default, str)):
        found = [parse_spec(f"{DATA_KINDS[kind].form}?{name}={text}").option(name) for text in TEXTS]
        assert found == TEXTS


@pytest.mark.parametrize("text", TEXTS)
def test_columns_may_be_called_like_numbers(tmp_path, text):
    (tmp_path / "table.csv").write_text(f"{text},other\n1,0\n3,1\n")
    data = open_data(f"csv:{tmp_path / 'table.csv'}?inputs={text}&labels=other")
    assert [float(inputs) for inputs, _ in data.batches(1)] == [1, 3]


CALLABLES = """
from __future__ import annotations
import torch

def made(said):
    return [(torch.zeros(1), f"{type(said).__name__} {said}")]

def plain(said):
    return made(said)

def texts(said: str | None = None):
    return made(said)

def usual(said="x"):
    return made(said)

def unknown(said: Nobody):
    return made(said)
"""


@pytest.mark.parametrize(
    ("name", "expected"),
    [("plain", "float 1000.0"), ("texts", "str 1e3"), ("usual", "str 1e3"), ("unknown", "float 1000.0")],
)
def test_a_callable_gets_texts_where_it_wants_them(tmp_path, name, expected):
    (tmp_path / "net.py").write_text(CALLABLES)
    spec = parse_spec(f"{tmp_path / 'net.py'}:{name}?said=1e3")
    assert open_callable(spec).item(0)[1] == expected


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("digits", "digits?split=test", True),
        ("digits", "digits?split=train", False),
        ("idx:{}", "idx:{}/", True),
        ("idx:{}", "idx:{}/../here?split=test", True),
        ("{}", "{}/.", True),
        ("npz:{}/a.npz", "npz:{}/b.npz", False),
        ("torchvision:MNIST@{}", "torchvision:MNIST@{}/", True),
        ("torchvision:MNIST@{}", "torchvision:FashionMNIST@{}", False),
    ],
)
def test_samples_written_differently_are_recognised(one, other, same, tmp_path):
    (tmp_path / "here").mkdir()
    first, second = (text.format(tmp_path / "here") for text in (one, other))
    assert same_samples(first, second) is same
