"""Image files as they lie on a disk: what is read, what is left out and said so, and what is refused."""

import itertools
import os
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import modelopt_cli
from modelopt_cli.data import open_data
from modelopt_cli.errors import DataError, InputError
from modelopt_cli.regular import open_regular

assert modelopt_cli


def picture(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (value, value, value)).save(path)


def test_what_a_folder_leaves_out_is_counted(tmp_path):
    for name in ("a/1.png", "a/2.gif", "a/deep/3.GIF", "b/1.jpg", "b/.hidden.png", "loose.png"):
        picture(tmp_path / name)
    (tmp_path / "b" / "list.txt").touch()
    (tmp_path / "b" / ".DS_Store").touch()
    data = open_data(str(tmp_path))
    assert len(data) == 2
    (note,) = data.notes
    assert note.endswith("a class: 2 .gif, 1 .txt, 1 hidden .png, 1 loose .png")


def test_a_folder_of_which_all_is_read_says_nothing(tmp_path):
    picture(tmp_path / "a" / "1.png")
    assert open_data(str(tmp_path)).notes == ()


@pytest.mark.parametrize(("names", "said"), [(range(1, 11), True), (range(10), False), ("ab", False)])
def test_folders_of_numbers_that_sort_as_text_are_said_to(tmp_path, names, said):
    for name in names:
        picture(tmp_path / str(name) / "x.png")
    data = open_data(str(tmp_path))
    assert any("'10' is class 1, '2' class 2" in note for note in data.notes) == said


HEADERS = [
    "filename,class",
    "Image Path,Label",
    "file_name,category",
    "img,target",
    "path,class,label",
    "image_id,file,y",
]


@pytest.mark.parametrize("header", HEADERS)
def test_usual_headers_of_a_csv_are_recognised(tmp_path, header):
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
    names = [cell.lower().replace("_", " ") for cell in header.split(",")]
    path = next(
        i
        for i, name in enumerate(names)
        if name in ("filename", "image path", "file name", "img", "path", "file")
    )
    label = max(i for i, name in enumerate(names) if name in ("label", "category", "target", "y", "class"))
    rows = [
        [{path: f"{name}.png", label: str(i)}.get(c, "7") for c in range(len(names))]
        for i, name in enumerate("ba")
    ]
    (tmp_path / "t.csv").write_text("\n".join([header, *map(",".join, rows)]))
    data = open_data(f"csv:{tmp_path / 't.csv'}")
    assert [os.path.basename(p) for p in data.source.paths] == ["b.png", "a.png"]
    assert torch.cat([labels for _, labels in data.batches(8)]).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("header", "part"),
    [
        ("beast,kind,more", "line 1: reads like a header: beast,kind,more"),
        ("file,class,target", "columns class and target"),
    ],
)
def test_other_headers_are_asked_about(tmp_path, header, part):
    picture(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text(f"{header}\na.png,1,1\n")
    with pytest.raises(DataError, match=part):
        open_data(f"csv:{tmp_path / 't.csv'}")


def test_a_file_called_like_a_column_is_a_sample(tmp_path):
    picture(tmp_path / "image.png")
    os.rename(tmp_path / "image.png", tmp_path / "image")
    (tmp_path / "t.csv").write_text("image,1\n")
    assert len(open_data(f"csv:{tmp_path / 't.csv'}")) == 1


def test_a_label_out_of_range_names_its_row(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text("a.png,1\na.png,7\n")
    data = replace(open_data(f"csv:{tmp_path / 't.csv'}"), classes=5)
    with pytest.raises(DataError, match=r"t\.csv line 2.*label 7 is outside 0\.\.4"):
        list(data.batches(2))


def png16(path, channels):
    """A PNG of 16 bits per channel, written by hand: Pillow writes no colour in 16 bits."""
    pixels = np.random.default_rng(0).integers(0, 65536, (4, 4, channels)).astype(">u2")
    raw = b"".join(b"\0" + row.tobytes() for row in pixels)
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]

    def chunk(name, content):
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, kind, 0, 0, 0))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("channels", [1, 2, 3, 4], ids=["grey", "grey and alpha", "rgb", "rgba"])
def test_16_bits_per_channel_are_refused(tmp_path, channels):
    png16(tmp_path / "a" / "x.png", channels)
    with pytest.raises(DataError, match=r"x\.png: has 16 bits per channel.*convert it to 8 bits"):
        open_data(str(tmp_path))


def fifo_in_a_folder(folder):
    (folder / "a").mkdir()
    os.mkfifo(folder / "a" / "x.png")
    return str(folder)


def fifo_in_a_csv(folder):
    os.mkfifo(folder / "x.png")
    (folder / "t.csv").write_text("x.png,1\n")
    return f"csv:{folder / 't.csv'}"


def fifo_as(kind, name):
    def make(folder):
        os.mkfifo(folder / name)
        return f"{kind}:{folder / name}"

    return make


def fifo_as_idx(folder):
    os.mkfifo(folder / "t10k-images-idx3-ubyte")
    return f"idx:{folder}"


def fifo_as_gzipped_idx(folder):
    os.mkfifo(folder / "t10k-images-idx3-ubyte.gz")
    return f"idx:{folder}"


FIFOS = [fifo_in_a_folder, fifo_in_a_csv, fifo_as_idx, fifo_as_gzipped_idx]
KINDS = {"csv": "t.csv", "npz": "x.npz", "tar": "x.tar", "parquet": "x.parquet"}


@pytest.mark.parametrize("make", [*FIFOS, *itertools.starmap(fifo_as, KINDS.items())])
def test_a_named_pipe_is_refused_at_once(tmp_path, make):
    with pytest.raises(DataError, match=r"is not a (regular )?file"):
        open_data(make(tmp_path))


def test_devices_and_folders_are_no_regular_files(tmp_path):
    for path in ("/dev/zero", tmp_path):
        with pytest.raises(InputError, match=r"is not a regular file|is a folder"):
            open_regular(path, InputError)
    (tmp_path / "x").write_bytes(b"abc")
    with open_regular(tmp_path / "x", InputError) as file:
        assert file.read() == b"abc"
