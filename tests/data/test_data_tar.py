"""Tar shards, written by the standard library's ``tarfile``, next to the same images in a folder."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
from image_files import PNG, encoded, everything, outcomes_of_damage

import modelopt_cli
from modelopt_cli.data import PreprocessOverrides, open_data, shards
from modelopt_cli.data.data_spec import same_samples
from modelopt_cli.errors import DataError

assert modelopt_cli

# Python 3.12 warns about any fork of a process with threads, and DataLoader forks.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
SUFFIXES = ("jpg", "png", "bmp", "webp", "ppm", "JPEG")


def write(path, members, layout=tarfile.PAX_FORMAT):
    """A tar file of pairs of name (or ``TarInfo``) and content."""
    with tarfile.open(path, "w", format=layout) as tar:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            if info.isreg():
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def both_sources(tmp_path):
    """Thirty images of six formats and all sizes in class folders, and the same in three shards."""
    members = []
    for i in range(30):
        suffix, label = SUFFIXES[i % 6], i // 10
        content = encoded(i, suffix, (8 + i % 5, 7 + i % 3))
        path = tmp_path / "folder" / f"class{label}" / f"{i:04}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        members.append([(f"{i:04}.{suffix}", content), (f"{i:04}.cls", b"%d" % label)])
    (tmp_path / "shards").mkdir()
    for shard in range(3):
        parts = [part for sample in members[shard * 10 : shard * 10 + 10] for part in sample]
        write(tmp_path / "shards" / f"train-{shard:06}.tar", parts, list(FORMATS.values())[shard])
    return str(tmp_path / "folder"), f"tar:{tmp_path / 'shards'}/train-{{000000..000002}}.tar"


HOW = PreprocessOverrides(resize=8, crop=6, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_is_bit_equal_to_the_same_image_in_a_folder(both_sources, workers):
    folder, tar = (open_data(spec, overrides=HOW) for spec in both_sources)
    for one, other in zip(everything(folder), everything(tar, workers=workers), strict=True):
        assert torch.equal(one, other)
    assert (tar.size, tar.num_classes, tar.class_names) == (30, 3, None)
    assert tar.input == folder.input


def test_samples_are_read_in_any_order_with_few_files_open(both_sources, monkeypatch):
    monkeypatch.setattr(shards, "_MOST_OPEN", 2)
    folder, tar = (open_data(spec, overrides=HOW) for spec in both_sources)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    for index in np.random.default_rng(0).permutation(30).tolist():
        assert torch.equal(tar.get(index)[0], folder.get(index)[0])
        assert len(tar.source.shards._open) <= 2
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) <= before


def test_what_is_pickled_for_a_spawned_worker_opens_its_own_files(both_sources):
    data = open_data(both_sources[1], overrides=HOW)
    there = pickle.loads(pickle.dumps(data))  # noqa: S301
    assert there.source.shards._open == {}
    for one, other in zip(everything(there), everything(data), strict=True):
        assert torch.equal(one, other)


def test_closing_leaves_no_file_open(both_sources):
    data = open_data(both_sources[1], overrides=HOW)
    everything(data)
    descriptors = list(data.source.shards._open.values())
    assert descriptors
    data.source.shards.__del__()
    for descriptor in descriptors:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def labels(spec):
    return everything(open_data(spec))[1].tolist()


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a-00.tar", [0]),
        ("a-*.tar", [0, 1, 2, 10]),
        ("a-{00..02}.tar", [0, 1, 2]),
        ("a-{01..10..}.tar", None),
        ("a-{0..2}.tar", None),
        ("{a..b}-00.tar", None),
        ("[ab]-{00..01}.tar", [0, 1, 20, 21]),
        ("b-0{0..1}.tar", [20, 21]),
        ("b-{0..0}{1..1}.tar", [21]),
        ("**/b-01.tar", [21]),
        ("a-{09..10}.tar", None),
        ("a-{02..00}.tar", None),
        ("{00..01}.tar", [99]),
    ],
)
def test_patterns(tmp_path, monkeypatch, pattern, expected):
    monkeypatch.chdir(tmp_path)
    for name, label in (("a-10", 10), ("a-02", 2), ("a-01", 1), ("a-00", 0), ("b-00", 20), ("b-01", 21)):
        write(tmp_path / f"{name}.tar", [("x.png", PNG), ("x.cls", b"%d" % label)])
    write(tmp_path / "{00..01}.tar", [("x.png", PNG), ("x.cls", b"99")])
    if expected is None:
        with pytest.raises(DataError, match=r"no such file|matches no file|ends before it starts"):
            open_data(f"tar:{pattern}")
    else:
        assert labels(f"tar:{pattern}") == expected


@pytest.mark.parametrize("layout", FORMATS.values(), ids=FORMATS.keys())
def test_names(tmp_path, layout):
    long = "l" * 90 + "/" + "n" * (90 if layout == tarfile.USTAR_FORMAT else 300)
    members = [
        (info("dir", tarfile.DIRTYPE), b""),
        ("README", b"no dot, no sample"),
        ("notes.txt", b"a sample of nothing that is read"),
        ("._0.png", b"hidden"),
        ("dir/.png", b"hidden, too"),
        ("a.b/c.d.png", b"its suffix is .d.png"),
        ("a.b/c.png", PNG),
        ("a.b/c.CLS", b" 7\n"),
        ("/etc/0001.png", PNG),
        ("/etc/0001.cls", b"1"),
        ("x/0001.cls", b"2"),
        ("x/0001.png", PNG),
        ("x/0001.json", b"not read, for there is a .cls"),
        ("x/0001.seg.png", b"not an image of ours"),
        (f"{long}.png", PNG),
        (f"{long}.json", b'{"label": 4, "more": [1.5, null]}'),
        ("grün\n.png", PNG),
        ("grün\n.cls", b"5"),
    ]
    source = open_data(f"tar:{write(tmp_path / 'a.tar', members, layout)}").source
    assert source.labels.tolist() == [7, 1, 2, 4, 5]
    shown = [source.where(i).removeprefix(f"{tmp_path / 'a.tar'}: ") for i in range(5)]
    assert shown[:3] == ["a.b/c.png", "/etc/0001.png", "x/0001.png"]
    assert shown[3] == f"{long}.png"[:119] + "…"
    assert shown[4] == r"grün\n.png"
    assert all(np.array_equal(source.load(i)[0], source.load(0)[0]) for i in range(5))


def info(name, kind=tarfile.REGTYPE, link=""):
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, link
    return made


def sparse():
    made = tarfile.TarInfo("a.png")
    made.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a.png"}
    return made


GOOD = [("0.png", PNG), ("0.cls", b"0")]
MEMBERS = {
    "no samples": ([("notes.txt", b"")], "holds no samples"),
    "no image": ([*GOOD, ("a.cls", b"1")], "a.cls: has no image"),
    "no label": ([*GOOD, ("a.png", PNG), ("b.cls", b"1")], "a.png: has no label in a .cls or .json"),
    "no label at the end": ([*GOOD, ("a.png", PNG)], "a.png: has no label"),
    "not adjacent": ([*GOOD, ("a.png", PNG), *GOOD, ("a.cls", b"1")], "a.png: has no label"),
    "two images": ([("a.png", PNG), ("a.jpg", PNG), ("a.cls", b"1")], "a.jpg: is a second image"),
    "two labels": ([("a.png", PNG), ("a.cls", b"1"), ("a.CLS", b"1")], "a.CLS: is a second .cls"),
    "float": ([("a.png", PNG), ("a.cls", b"1.0")], "a.cls: label '1.0' is not an integer from 0"),
    "negative": ([("a.png", PNG), ("a.cls", b"-1")], "a.cls: label '-1' is not"),
    "empty label": ([("a.png", PNG), ("a.cls", b"")], "a.cls: label '' is not"),
    "other digits": ([("a.png", PNG), ("a.cls", "٣".encode())], "a.cls: label '٣' is not"),
    "huge": ([("a.png", PNG), ("a.cls", b"1000000000")], "label 1000000000 is not"),
    "long label": ([("a.png", PNG), ("a.cls", b"1" * 65)], "a.cls: is larger than a label"),
    "not JSON": ([("a.png", PNG), ("a.json", b"{")], "a.json: is not JSON"),
    "deep JSON": ([("a.png", PNG), ("a.json", b"[" * 10**5)], "a.json: is not JSON"),
    "large JSON": ([("a.png", PNG), ("a.json", b" " * (2**20 + 1))], "a.json: is larger than a label"),
    "JSON list": ([("a.png", PNG), ("a.json", b"[3]")], "a.json: has no key label"),
    "no key": ([("a.png", PNG), ("a.json", b'{"cls": 3}')], "a.json: has no key label"),
    "JSON text": ([("a.png", PNG), ("a.json", b'{"label": "3"}')], "a.json: label '3' is not"),
    "JSON bool": ([("a.png", PNG), ("a.json", b'{"label": true}')], "label True is not"),
    "JSON float": ([("a.png", PNG), ("a.json", b'{"label": 3.0}')], "label 3.0 is not"),
    "JSON huge": ([("a.png", PNG), ("a.json", b'{"label": 1000000000}')], "label 1000000000"),
    "symbolic link": ([*GOOD, (info("a.png", tarfile.SYMTYPE, "/etc/passwd"), b"")], "a.png: is a link"),
    "hard link": ([*GOOD, (info("a.png", tarfile.LNKTYPE, "0.png"), b"")], "a.png: is a link"),
    "device": ([*GOOD, (info("a.png", tarfile.CHRTYPE), b"")], "a.png: is a link, a device"),
    "pipe": ([*GOOD, (info("a.png", tarfile.FIFOTYPE), b"")], "a.png: is a link, a device"),
    "sparse": ([*GOOD, (info("a.png", tarfile.GNUTYPE_SPARSE), b"")], "a.png: is a sparse file"),
    "PAX sparse": ([*GOOD, (sparse(), b"")], "holds a sparse file"),
    "no image in it": ([("a.png", b"hello"), ("a.cls", b"1")], "a.png: is not an image"),
    "empty image": ([*GOOD, ("a.png", b""), ("a.cls", b"1")], "a.png: is not an image"),
    "cut image": ([*GOOD, ("a.png", PNG[:-30]), ("a.cls", b"1")], "a.png: is truncated or damaged"),
}


def refused(spec):
    with pytest.raises(DataError) as raised:
        list(open_data(str(spec)).batches(2))
    line = str(raised.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("case", MEMBERS.values(), ids=MEMBERS.keys())
def test_members_that_make_no_sample(tmp_path, case):
    members, part = case
    path = write(tmp_path / "a.tar", members)
    line = refused(f"tar:{path}")
    assert str(path) in line
    assert part in line


@pytest.mark.parametrize(
    ("compress", "name"), [(gzip.compress, "gzip"), (bz2.compress, "bzip2"), (lzma.compress, "xz")]
)
def test_compressed_shards_are_to_be_decompressed(tmp_path, compress, name):
    path = write(tmp_path / "a.tar", GOOD)
    path.write_bytes(compress(path.read_bytes()))
    assert f"{path}: is compressed with {name}; decompress it" in refused(f"tar:{path}")


def header(name, size, kind=tarfile.REGTYPE):
    made = info(name, kind)
    made.size = size
    return made.tobuf(tarfile.GNU_FORMAT)


END = bytes(1024)
BYTES = {
    "empty": (b"", "is not a tar file"),
    "text": (b"hello" * 200, "is not a tar file"),
    "short text": (b"hello", "is not a tar file"),
    "member past the end": (header("a.png", 10**6) + END, "a.png: goes on after the end"),
    "member past the end, base 256": (header("a.png", 2**62) + END, "a.png: goes on after the end"),
    "no end mark": (header("notes.txt", 0), "is truncated: it has no end mark"),
    "half a header": (header("notes.txt", 0) + header("a.png", 0)[:300], "is truncated"),
    "negative size": (header("a.png", -512) + END, "damaged header at byte 0"),
    "checksum": (
        header("a.txt", 0) + header("b.txt", 0).replace(b"b", b"c") + END,
        "damaged header at byte 512",
    ),
    "joined": (header("a.txt", 0) + END + header("b.txt", 0) + END, "holds data after its end mark"),
    "long name past the end": (header("", 9999, b"L") + END, "is truncated"),
    "huge long name": (header("", 2**40, b"L") + END, "damaged header at byte 0"),
    "many long names": ((header("", 1, b"L") + bytes(512)) * 3000 + END, "damaged header"),
    "long name of nothing": (header("", 1, b"L") + bytes(512) + END, "damaged header at byte 1024"),
    "PAX record without end": (header("", 8, b"x") + b"99 a=bc\n".ljust(512, b"\0") + END, "damaged header"),
    "PAX record of length 0": (header("", 8, b"x") + b"0 a=bcd\n".ljust(512, b"\0") + END, "damaged header"),
    "PAX negative size": (
        header("", 12, b"x") + b"12 size=-51\n".ljust(512, b"\0") + header("a.png", 0) + END,
        "damaged header at byte 0",
    ),
    "PAX large size": (
        header("", 14, b"x") + b"14 size=99999\n".ljust(512, b"\0") + header("a.png", 0) + END,
        "a.png: goes on after the end",
    ),
}


@pytest.mark.parametrize("case", BYTES.values(), ids=BYTES.keys())
def test_bytes_that_are_no_tar_file(tmp_path, case):
    content, part = case
    (tmp_path / "a.tar").write_bytes(content)
    line = refused(f"tar:{tmp_path / 'a.tar'}")
    assert line.startswith(str(tmp_path / "a.tar"))
    assert part in line


def test_a_shard_cut_anywhere_is_refused(tmp_path):
    path = write(tmp_path / "a.tar", [*GOOD, ("1.png", PNG), ("1.cls", b"1")])
    content = path.read_bytes()
    used = len(content.rstrip(b"\0")) // 512 * 512 + 512
    for length in range(0, used + 512, 128):
        path.write_bytes(content[:length])
        refused(f"tar:{path}")
    path.write_bytes(content[: used + 512])  # tar writes two blocks of zeros; one says enough
    assert labels(f"tar:{path}") == [0, 1]


def test_a_shard_that_shrinks_after_it_was_opened_is_refused(tmp_path):
    path = write(tmp_path / "a.tar", GOOD)
    data = open_data(f"tar:{path}")
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(DataError, match="is shorter than when it was opened"):
        list(data.batches(1))


def test_damaged_headers_give_one_line_or_samples(tmp_path):
    path = write(tmp_path / "a.tar", [*GOOD, ("l" * 120 + ".png", PNG), ("l" * 120 + ".cls", b"1")])
    outcomes = outcomes_of_damage(path, "tar", rounds=300, places=4)
    assert outcomes == {"read", "refused in 1 line"}


def test_files_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused("tar:a.tar").startswith("a.tar: no such file")
    assert refused("tar:a-{0..99999999}.tar").startswith("a-0.tar: no such file")
    assert refused("tar:*.tar").startswith("*.tar: matches no file")
    assert refused(f"tar:{tmp_path}").endswith(f"is not a file; write {tmp_path}/*")
    assert "has no option 'split'" in refused("tar:a.tar?split=test")
    assert "after the colon" in refused("tar:")
    write(tmp_path / "a.tar", GOOD)
    assert "write tar:a.tar" in refused("a.tar")
    assert "did you mean 'tar'" in refused("tra:a.tar")


def test_a_module_may_be_called_almost_like_a_kind():
    assert "no module 'target'" in refused("target:load")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("tar:{}/a-*.tar", "tar:{}/../here/a-{{0..1}}.tar", True),
        ("tar:{}/a-*.tar", "tar:{}/a-0.tar", False),
        ("tar:{}/a-0.tar", "tar:{}/link.tar", True),
    ],
)
def test_the_same_shards_are_recognised(one, other, same, tmp_path):
    here = tmp_path / "here"
    here.mkdir()
    for name in ("a-0.tar", "a-1.tar"):
        write(here / name, GOOD)
    (here / "link.tar").symlink_to(here / "a-0.tar")
    assert same_samples(one.format(here), other.format(here)) is same


def test_json_labels_are_those_of_the_key_label(tmp_path):
    members = []
    for i, label in enumerate((3, 0, 999999999)):
        members += [(f"{i}.json", json.dumps({"label": label, "cls": 1}).encode()), (f"{i}.png", PNG)]
    assert labels(f"tar:{write(tmp_path / 'a.tar', members)}") == [3, 0, 999999999]
