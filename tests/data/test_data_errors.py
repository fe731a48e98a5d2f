"""Everything that can be wrong with a spec or its files: one line that names it and says what next."""

import gzip
import struct

import numpy as np
import pytest
from PIL import Image

import modelopt_cli
from modelopt_cli.data import PreprocessOverrides, open_data
from modelopt_cli.errors import DataError
from modelopt_cli.program.input_spec import InputSpec

assert modelopt_cli


def refused(spec, **options):
    with pytest.raises(DataError) as raised:
        open_data(str(spec), **options)
    line = str(raised.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("spec", "part"),
    [
        ("nowhere", "no such folder"),
        ("no/where", "no such folder"),
        ("digit", "did you mean 'digits'"),
        ("digits:x", "takes no path"),
        ("digits?split=tset", "did you mean 'test'"),
        ("digits?spilt=test", "did you mean 'split'"),
        ("digits?split=test&split=all", "given twice"),
        ("digits?=&", "?key=value"),
        ("sintetic:3x8x8", "did you mean 'synthetic'"),
        ("synthetic:3x8x0", "not a shape"),
        ("synthetic:9999999x9999999", "larger"),
        ("synthetic", "needs a shape"),
        ("synthetic:3x8x8?n=0", "n is 0"),
        ("synthetic:3x8x8?n=true", "n is True"),
        ("csv:", "after the colon"),
        ("imagenet:/data", "no data kind"),
        ("C:\\images", "no data kind"),
        ("torchvision:CIFR10@x", "did you mean 'CIFAR10'"),
        ("torchvision:CIFAR10", "names no folder"),
        ("torchvision:CIFAR10@nowhere", "never downloads"),
        ("torchvision:CIFAR10@x?download=true", "never downloads"),
        ("torchvision:CIFAR10@x?trian=true", "did you mean 'train'"),
        ("torchvision:os@x", "no dataset called"),
        ("nowhere.py:load", "no such file"),
        ("nowhere.py:a.b", "names no callable"),
        ("no.such.module:load", "no module 'no' can be imported from here"),
        ("idx:nowhere", "no such folder"),
        ("npz:nowhere.npz", "no such file"),
        ("csv:nowhere.csv", "no such file"),
    ],
)
def test_specs(spec, part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert part in refused(spec)


def test_torchvision_is_never_asked_to_download(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    def download(_):
        raise AssertionError("it was")

    monkeypatch.setattr(CIFAR10, "download", download)
    assert "Dataset not found" in refused(f"torchvision:CIFAR10@{tmp_path}")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("a.csv", "write csv:"), ("a.npz", "write npz:"), ("a.py", ":CALLABLE"), ("a.zip", "csv:FILE")],
)
def test_a_file_where_a_folder_belongs(tmp_path, name, hint):
    (tmp_path / name).touch()
    assert hint in refused(tmp_path / name)


def test_folders_without_images(tmp_path):
    assert "no class folders" in refused(tmp_path)
    (tmp_path / "a").mkdir()
    assert "no class folders" in refused(tmp_path)
    Image.new("RGB", (2, 2)).save(tmp_path / "x_3.png")
    assert "images but no class folders" in refused(tmp_path)
    Image.new("RGB", (2, 2)).save(tmp_path / "a" / "x.png")
    (tmp_path / "b").mkdir()
    assert refused(tmp_path).startswith(f"{tmp_path / 'b'}: holds no images")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "is not an image"),
        (b"hello", "is not an image"),
        (b"\x89PNG\r\n\x1a\n", "image"),
        (None, "truncated or damaged"),
    ],
    ids=["empty", "text", "magic only", "truncated"],
)
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".webp", ".ppm"])
def test_images_that_cannot_be_decoded(tmp_path, content, part, suffix):
    path = tmp_path / "class" / f"x{suffix}"
    path.parent.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content is None else content)
    line = refused(tmp_path)
    assert line.startswith(f"{path}: ")
    if suffix != ".webp":  # libwebp does not tell a truncated file from no image
        assert part in line


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_an_image_of_absurd_size_is_refused_before_it_is_decoded(tmp_path, side):
    path = tmp_path / "class" / "x.ppm"
    path.parent.mkdir()
    path.write_bytes(b"P6 %d %d 255\n" % (side, side) + bytes(100))
    assert "million pixels" in refused(tmp_path)


def test_a_16_bit_image_is_refused_by_name(tmp_path):
    path = tmp_path / "class" / "x.png"
    path.parent.mkdir()
    Image.new("I;16", (4, 4)).save(path)
    line = refused(tmp_path)
    assert line.startswith(f"{path}: ")
    assert "16 bits per channel" in line


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "holds no rows"),
        ("path,label\n", "holds no rows"),
        ("path,kind\na.png,1\n", "no column called label"),
        ("where,label\na.png,1\n", "no column called path"),
        ("path;label\na.png;1\n", "has semicolons between its columns, not commas: path;label; save it with"),
        ("a.png\t1\n", "has tabs between its columns, not commas: "),
        ("\ufeffpath|label\na.png|1\n", "has bars between its columns, not commas"),
        ("a.png\n", "line 1: lacks a path or a label"),
        ("a.png,\n", "line 1: lacks a path or a label"),
        ("a.png,1\nb.png,1\n", "line 2: no such file"),
        ("a.png,1\na.png,x\n", "line 2: label 'x'"),
        ("a.png,1\na.png,-1\n", "line 2: label '-1'"),
        ("a.png,1.0\na.png,10.0\n", "line 1: label '1.0' is not an integer; write 3, not 3.0"),
        ("a.png,1\na.png,99999999999\n", "line 2: label '99999999999'"),
        ('a.png,1\n"a.png,2\n', "line 2: has a quote that is not closed"),
        (b"\xff\xfe\x00", "not a UTF-8 CSV"),
    ],
)
def test_csv(tmp_path, text, part):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    table = tmp_path / "t.csv"
    table.write_bytes(text if isinstance(text, bytes) else text.encode())
    line = refused(f"csv:{table}")
    assert line.startswith(str(table))
    assert part in line


def header(*shape, kind=8):
    return bytes([0, 0, kind, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)


IDX = {
    "text": (b"hello world", "is not an IDX file"),
    "empty": (b"", "is not an IDX file"),
    "floats": (header(2, 2, 2, kind=13) + bytes(32), "0x0d"),
    "ends in its header": (header(2, 2, 2)[:9], "ends inside its header"),
    "too short": (header(2, 2, 2) + bytes(7), "fewer bytes than the 8"),
    "too long": (header(2, 2, 2) + bytes(9), "more bytes than the 8"),
    "absurd size": (header(2**32 - 1, 2**32 - 1, 2) + bytes(9), "fewer bytes"),
    "labels for images": (header(2) + bytes(2), "not images"),
    "no images": (header(0, 2, 2), "holds no images"),
    "other count": (header(3, 2, 2) + bytes(12), "3 images, but labels of shape (2,)"),
}


@pytest.mark.parametrize("case", IDX.values(), ids=IDX.keys())
@pytest.mark.parametrize("gz", [False, True], ids=["plain", "gzip"])
def test_idx(tmp_path, case, gz):
    content, part = case
    images = tmp_path / f"t10k-images-idx3-ubyte{'.gz' if gz else ''}"
    images.write_bytes(gzip.compress(content) if gz else content)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(header(2) + bytes([0, 1]))
    line = refused(f"idx:{tmp_path}")
    assert line.startswith(str(images))
    assert part in line


def test_idx_that_is_no_gzip_or_a_cut_one(tmp_path):
    images = tmp_path / "t10k-images-idx3-ubyte.gz"
    for content in (b"hello", gzip.compress(header(2, 2, 2) + bytes(8))[:-12]):
        images.write_bytes(content)
        (tmp_path / "t10k-labels-idx1-ubyte").touch()
        assert "truncated or not gzip" in refused(f"idx:{tmp_path}")


def test_idx_files_missing_or_of_two_sets(tmp_path):
    assert "t10k-images-idx3-ubyte[.gz]" in refused(f"idx:{tmp_path}")
    (tmp_path / "a-test-images-idx3-ubyte").touch()
    (tmp_path / "b-test-images-idx3-ubyte").touch()
    assert "several test sets" in refused(f"idx:{tmp_path}")


BYTES = np.zeros((2, 4, 4), dtype=np.uint8)
NPZ = {
    "no images": ({"y": np.arange(2)}, "no array called x or images or data"),
    "no labels": ({"x": BYTES}, "no array called y or labels"),
    "two kinds of images": ({"x": BYTES, "data": BYTES, "y": np.arange(2)}, "more than one of x, data"),
    "empty": ({"x": BYTES[:0], "y": np.arange(0)}, "holds no images"),
    "count": ({"x": BYTES, "y": np.arange(3)}, "labels of shape (3,)"),
    "float labels": ({"x": BYTES, "y": np.zeros(2)}, "label is 0.0, not an integer"),
    "negative label": ({"x": BYTES, "y": np.array([0, -1])}, "row 1: label -1 is below 0"),
    "objects": ({"x": BYTES, "y": np.array([{}, {}])}, "holds Python objects"),
    "beyond bytes": ({"x": BYTES.astype(int) + 256, "y": np.arange(2)}, "beyond 0..255"),
    "complex": ({"x": BYTES.astype(complex), "y": np.arange(2)}, "images are complex128"),
    "five channels": ({"x": np.zeros((2, 4, 4, 5), np.uint8), "y": np.arange(2)}, "2x4x4x5 is not"),
    "ambiguous": ({"x": np.zeros((2, 3, 4, 3), np.uint8), "y": np.arange(2)}, "NHWC or NCHW"),
    "nan": ({"x": np.array([[np.nan]] * 2), "y": np.arange(2)}, "row 0: holds NaN"),
}


@pytest.mark.parametrize("case", NPZ.values(), ids=NPZ.keys())
def test_npz(tmp_path, case):
    arrays, part = case
    np.savez(tmp_path / "a.npz", **arrays)
    line = refused(f"npz:{tmp_path / 'a.npz'}")
    assert line.startswith(str(tmp_path / "a.npz"))
    assert part in line


@pytest.mark.parametrize("damage", ["text", "cut", "npy", "bad crc", "folder"])
def test_npz_that_is_not_one(tmp_path, damage):
    path = tmp_path / "a.npz"
    np.savez(path, x=BYTES, y=np.arange(2))
    content = bytearray(path.read_bytes())
    if damage == "text":
        content = bytearray(b"hello")
    elif damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "npy":
        np.save(tmp_path / "b.npy", BYTES)
        content = bytearray((tmp_path / "b.npy").read_bytes())
    elif damage == "bad crc":
        content[60] ^= 1
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        path.write_bytes(content)
    assert refused(f"npz:{path}").startswith(f"{path}: ")


USER = {
    "raises": ("1/0", "ZeroDivisionError"),
    "no dataset": ("3", "returned int, not a Dataset"),
    "a one-shot iterator": ("iter([(torch.zeros(2), 0)])", "can start again"),
    "empty": ("[]", "no samples"),
    "a length that fails": ("Sized()", "has no length that can be used"),
    "empty stream": ("Stream([])", "yields no samples"),
    "no pair": ("[(torch.zeros(2), 0, 1)]", "not a pair"),
    "bytes": ("[(torch.zeros(2, dtype=torch.uint8), 0)]", "torch.uint8, not a float tensor"),
    "list": ("[([0.0], 0)]", "list, not a float tensor"),
    "float label": ("[(torch.zeros(2), 0.0)]", "label is 0.0, not an integer"),
    "negative label": ("[(torch.zeros(2), -1)]", "label -1 is below 0"),
    "nan": ("[(torch.tensor([float('nan')]), 0)]", "NaN or infinity"),
    "raises inside": ("Stream(1 / 0 for _ in [1])", "ZeroDivisionError"),
}


@pytest.mark.parametrize("case", USER.values(), ids=USER.keys())
def test_callables(tmp_path, case):
    body, part = case
    (tmp_path / "u.py").write_text(
        "import torch\nclass Stream:\n    def __init__(self, x): self.x = x\n"
        "    def __iter__(self): return iter(self.x)\n"
        "class Sized(list):\n    def __len__(self): return int('x')\n"
        f"def load(): return {body}\nvalue = 3\n"
    )
    assert part in refused(f"{tmp_path / 'u.py'}:load")


def test_callables_that_are_not_there(tmp_path):
    (tmp_path / "v.py").write_text("value = 3\n")
    (tmp_path / "w.py").write_text("import nothing_of_that_name\n")
    assert "has no 'load'" in refused(f"{tmp_path / 'v.py'}:load")
    (tmp_path / "y.py").write_text("def load_test(): return []\nraise SystemExit(7)\n")
    (tmp_path / "z.py").write_text("def load_test(): return []\n")
    assert "SystemExit: 7 at y.py:2" in refused(f"{tmp_path / 'y.py'}:load_test")
    assert "did you mean 'load_test'" in refused(f"{tmp_path / 'z.py'}:loadtest")
    assert "'value' is an int, not callable" in refused(f"{tmp_path / 'v.py'}:value")
    assert "nothing_of_that_name" in refused(f"{tmp_path / 'w.py'}:load")
    (tmp_path / "x.py").write_text("def load(): return []\n")
    assert "unexpected keyword" in refused(f"{tmp_path / 'x.py'}:load?n=1")


def test_images_of_several_sizes_need_a_resize(tmp_path):
    (tmp_path / "class").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "class" / "a.png")
    Image.new("RGB", (5, 4)).save(tmp_path / "class" / "b.png")
    with pytest.raises(DataError) as raised:
        list(open_data(str(tmp_path)).batches(2))
    assert str(raised.value).startswith(f"{tmp_path / 'class' / 'b.png'}: is 3x4x5, where 3x4x4 is expected")
    assert "input_size" in str(raised.value)
    assert len(list(open_data(str(tmp_path), overrides=PreprocessOverrides(4)).batches(2))) == 1


@pytest.mark.parametrize("spec", ["synthetic:3x8x8", "npz"])
def test_ready_samples_of_another_shape_than_the_network_takes(tmp_path, spec):
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 3, 8, 8), np.float32), y=np.arange(2))
    spec = f"npz:{tmp_path / 'a.npz'}" if spec == "npz" else spec
    assert "is 3x8x8, where 1x8x8 is expected" in refused(spec, input_spec=InputSpec((1, 8, 8)))


def test_a_network_that_takes_vectors_gets_no_images():
    assert refused("digits", input_spec=InputSpec((64,))).startswith("digits: the network takes")
