"""Parquet files, written by pyarrow, next to the same images in a folder."""

import json
import pickle
import sys

import numpy as np
import pytest
import torch
from image_files import PNG, encoded, everything, outcomes_of_damage

import modelopt_cli
from modelopt_cli.data import PreprocessOverrides, open_data, parquet
from modelopt_cli.data.data_spec import same_samples
from modelopt_cli.errors import DataError, EnvironmentFailure

assert modelopt_cli

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

# Python 3.12 warns about any fork of a process with threads, and DataLoader forks.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

HOW = PreprocessOverrides(resize=8, crop=6, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
LAYOUTS = {
    "bytes": (pa.binary(), lambda images: images),
    "large bytes": (pa.large_binary(), lambda images: images),
    "struct": (STRUCT, lambda images: [{"bytes": image, "path": None} for image in images]),
    "struct, path first": (
        pa.struct([("path", pa.string()), ("bytes", pa.large_binary())]),
        lambda images: [{"bytes": image, "path": "x.png"} for image in images],
    ),
}


def write(path, images, labels, *, layout="struct", names=("image", "label"), metadata=None, **options):
    """A file of encoded images and of labels, which are a list or an Arrow array."""
    kind, shape = LAYOUTS[layout]
    other = pa.array(range(len(images)))
    columns = [other, pa.array(shape(images), kind), pa.array(labels)]
    schema = pa.schema(list(zip(("other", *names), [c.type for c in columns], strict=True)), metadata)
    pq.write_table(pa.table(columns, schema=schema), path, **options)
    return path


@pytest.fixture(params=LAYOUTS)
def both_sources(tmp_path, request):
    """Thirty images of three formats and all sizes in class folders, and the same in two files."""
    images = []
    for i in range(30):
        kind = ("jpeg", "png", "bmp")[i % 3]
        images.append(encoded(i, kind, (8 + i % 5, 7 + i % 3)))
        path = tmp_path / "folder" / f"class{i // 10}" / f"{i:04}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(images[-1])
    labels = [i // 10 for i in range(30)]
    write(tmp_path / "a-0.parquet", images[:13], labels[:13], layout=request.param, row_group_size=4)
    write(tmp_path / "a-1.parquet", images[13:], labels[13:], layout=request.param, row_group_size=100)
    return str(tmp_path / "folder"), f"parquet:{tmp_path}/a-{{0..1}}.parquet"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_row_is_bit_equal_to_the_same_image_in_a_folder(both_sources, workers):
    folder, rows = (open_data(spec, overrides=HOW) for spec in both_sources)
    for one, other in zip(everything(folder), everything(rows, workers=workers), strict=True):
        assert torch.equal(one, other)
    assert (rows.size, rows.num_classes, rows.class_names) == (30, 3, None)
    assert rows.input == folder.input


@pytest.mark.parametrize("kept", [0, 1000, 2**28])
def test_rows_are_read_in_any_order_with_few_groups_in_memory(both_sources, monkeypatch, kept):
    monkeypatch.setattr(parquet, "KEPT", kept)
    folder, rows = (open_data(spec, overrides=HOW) for spec in both_sources)
    for index in np.random.default_rng(0).permutation(30).tolist():
        assert torch.equal(rows.get(index)[0], folder.get(index)[0])
        sizes = [images.nbytes for images in rows.source._kept.values()]
        assert sum(sizes) <= kept or len(sizes) == 1
    assert len(rows.source._kept) == (5 if kept == 2**28 else len(sizes))


def test_in_order_each_row_group_is_read_once(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", [PNG] * 30, range(30), row_group_size=7)
    monkeypatch.setattr(parquet, "KEPT", 1)
    read, groups = parquet._read_images, []
    monkeypatch.setattr(parquet, "_read_images", lambda *args: groups.append(args[1]) or read(*args))
    everything(open_data(f"parquet:{path}"))
    assert groups == [0, 1, 2, 3, 4]


def test_what_is_pickled_for_a_spawned_worker_holds_no_images(both_sources):
    data = open_data(both_sources[1], overrides=HOW)
    assert data.source._kept
    there = pickle.loads(pickle.dumps(data))  # noqa: S301
    assert not there.source._kept
    for one, other in zip(everything(there), everything(data), strict=True):
        assert torch.equal(one, other)


def test_columns_may_have_other_names(tmp_path):
    path = write(tmp_path / "a.parquet", [PNG] * 2, [7, 3], names=("img", "fine_label"))
    data = open_data(f"parquet:{path}?image=img&label=fine_label")
    assert everything(data)[1].tolist() == [7, 3]


@pytest.mark.parametrize("kind", [pa.int8(), pa.int64(), pa.uint8(), pa.uint64()], ids=str)
def test_any_integer_type_is_a_label(tmp_path, kind):
    path = write(tmp_path / "a.parquet", [PNG] * 2, pa.array([7, 3], kind))
    assert everything(open_data(f"parquet:{path}"))[1].tolist() == [7, 3]


def features(names):
    label = {"names": names, "_type": "ClassLabel"}
    return {"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": label}}})}


@pytest.mark.parametrize(
    ("first", "second", "names"),
    [
        (features(["ant", "bee", "cat"]), features(["ant", "bee", "cat"]), ("ant", "bee", "cat")),
        (features(["ant", "bee", "cat"]), features(["bee", "ant", "cat"]), None),
        (features(["ant", "bee", "cat"]), None, None),
        (features(["ant"]), features(["ant"]), None),
        (features([1, 2]), features([1, 2]), None),
        (features([]), features([]), None),
        ({"huggingface": "{"}, {"huggingface": "{"}, None),
        ({"huggingface": '{"info": []}'}, {"huggingface": '{"info": []}'}, None),
    ],
    ids=["names", "other order", "one file only", "too few", "numbers", "none", "no JSON", "no features"],
)
def test_class_names_are_those_that_hugging_face_writes(tmp_path, first, second, names):
    write(tmp_path / "a.parquet", [PNG], [1], metadata=first)
    write(tmp_path / "b.parquet", [PNG], [0], metadata=second)
    data = open_data(f"parquet:{tmp_path}/*.parquet")
    assert data.class_names == names
    assert data.num_classes == (3 if names else 2)


def refused(spec):
    with pytest.raises(DataError) as raised:
        list(open_data(str(spec)).batches(2))
    line = str(raised.value)
    assert "\n" not in line
    return line


CONTENT = {
    "no rows": ([], pa.array([], pa.int64()), "holds no rows"),
    "null label": ([PNG] * 3, [0, None, 1], "a.parquet row 1: label is null"),
    "negative label": ([PNG] * 3, [0, 1, -1], "a.parquet row 2: label -1 is not an integer from 0"),
    "huge label": ([PNG] * 2, [0, 10**9], "a.parquet row 1: label 1000000000 is not"),
    "huge unsigned label": (
        [PNG] * 2,
        pa.array([0, 2**64 - 1], pa.uint64()),
        "row 1: label 18446744073709551615",
    ),
    "float label": ([PNG] * 2, [0.0, 1.0], "a.parquet: column label is double, not integers"),
    "bool label": ([PNG] * 2, [False, True], "column label is bool, not integers"),
    "text label": ([PNG] * 2, ["0", "1"], "column label is string, not integers"),
    "null image": ([PNG, PNG, None], [0, 1, 2], "a.parquet row 2: column image is null"),
    "no image": ([PNG, b"hello"], [0, 1], "a.parquet row 1: is not an image"),
    "cut image": ([PNG, PNG, PNG[:-30]], [0, 1, 2], "a.parquet row 2: is truncated or damaged"),
    "first image": ([b""], [0], "a.parquet row 0: is not an image"),
}


@pytest.mark.parametrize("case", CONTENT.values(), ids=CONTENT.keys())
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_that_make_no_sample(tmp_path, case, layout):
    images, labels, part = case
    path = write(tmp_path / "a.parquet", images, labels, layout=layout, row_group_size=2)
    assert part in refused(f"parquet:{path}")


def test_a_struct_that_is_null(tmp_path):
    images = pa.array([{"bytes": PNG, "path": None}, None], STRUCT)
    pq.write_table(pa.table({"image": images, "label": [0, 1]}), tmp_path / "a.parquet")
    assert "a.parquet row 1: column image is null" in refused(f"parquet:{tmp_path / 'a.parquet'}")


def test_the_row_is_counted_in_its_file(tmp_path):
    write(tmp_path / "a.parquet", [PNG] * 3, [0, 0, 0])
    for row, images in enumerate(([b"hello", PNG], [PNG, b"hello"])):
        write(tmp_path / "b.parquet", images, [0, 0], row_group_size=1)
        line = refused(f"parquet:{tmp_path}/*.parquet")
        assert line.startswith(f"{tmp_path}/b.parquet row {row}: is not an image")


def test_columns_that_are_missing_or_of_another_kind(tmp_path):
    path = tmp_path / "a.parquet"
    write(path, [PNG], [0], names=("img", "fine_label"))
    line = refused(f"parquet:{path}")
    assert (
        line
        == f"{path}: has no column image, but other, img, fine_label; name them: ?image=img&label=fine_label"
    )
    assert "has no column label, but" in refused(f"parquet:{path}?image=img")
    assert "column other is int64, not encoded images" in refused(
        f"parquet:{path}?image=other&label=fine_label"
    )
    assert "did you mean 'label'" in refused(f"parquet:{path}?lable=x")
    pq.write_table(pa.table({"image": [{"path": "a.png"}], "label": [0]}), path)
    assert "column image is struct<path: string>, not encoded images" in refused(f"parquet:{path}")


def test_files_that_are_not_parquet(tmp_path):
    path = write(tmp_path / "a.parquet", [encoded(i, size=(40, 40)) for i in range(9)], range(9))
    content = path.read_bytes()
    for damaged in (b"", b"hello", content[:-9], content[: len(content) // 2], b"PAR1" + bytes(99) + b"PAR1"):
        path.write_bytes(damaged)
        assert f"{path}: is not Parquet, or damaged (" in refused(f"parquet:{path}")
    middle = len(content) // 3
    path.write_bytes(content[: middle - 99] + bytes(99) + content[middle:])
    assert refused(f"parquet:{path}").startswith(str(path))
    assert "is not a file" in refused(f"parquet:{tmp_path}")
    assert "no such file" in refused(f"parquet:{tmp_path}/b-{{0..1}}.parquet")
    assert f"write parquet:{path}" in refused(path)


def test_a_row_group_too_large_for_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "LARGEST_GROUP", 2**20)
    path = write(tmp_path / "a.parquet", [bytes(2**14)] * 100, range(100))
    assert "row group 0 holds more than 1 MiB of images; write it with fewer rows" in refused(
        f"parquet:{path}"
    )


def test_damaged_bytes_give_one_line_or_samples(tmp_path):
    path = write(tmp_path / "a.parquet", [PNG] * 4, range(4), row_group_size=2)
    outcomes = outcomes_of_damage(path, "parquet", rounds=200, places=3)
    assert outcomes == {"read", "refused in 1 line"}


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", [PNG], [0])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(EnvironmentFailure, match=r"pip install 'modelopt-cli\[parquet\]'"):
        open_data(f"parquet:{path}")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("parquet:{}/*", "parquet:{}/a-{{0..1}}.parquet?label=label", True),
        ("parquet:{}/*", "parquet:{}/*?label=coarse", False),
        ("parquet:{}/*", "parquet:{}/a-1.parquet", False),
    ],
)
def test_the_same_rows_are_recognised(one, other, same, tmp_path):
    for name in ("a-0.parquet", "a-1.parquet"):
        (tmp_path / name).touch()
    assert same_samples(one.format(tmp_path), other.format(tmp_path)) is same
