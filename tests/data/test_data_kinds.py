"""Every kind of data, from its spec to a batch."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modelopt_cli.data import open_data
from modelopt_cli.data.data_kinds import DATA_KINDS
from modelopt_cli.data.data_spec import parse_spec, same_samples
from modelopt_cli.data.norm_samples import ForNetwork
from modelopt_cli.errors import DataError
from modelopt_cli.program import InputSpec
from modelopt_cli.program.capture import capture
from modelopt_cli.program.input_batch import batch_size, tensors_of
from modelopt_cli.program.samples import DTYPES
from modelopt_cli.tasks import parse_task

USER = """
import torch
def load(count=2):
    return [(torch.full((3, 8, 8), float(i)), i) for i in range(count)]
"""


def picture(path: Path | io.BytesIO, grey: int) -> None:
    Image.new("RGB", (8, 8), (grey,) * 3).save(path, "PNG")


def folder(root: Path) -> str:
    for label, name in enumerate(("cat", "dog")):
        (root / name).mkdir()
        picture(root / name / "1.png", label)
    return str(root)


def csv(root: Path) -> str:
    for label in (0, 1):
        picture(root / f"{label}.png", label)
    (root / "t.csv").write_text("0.png,0\n1.png,1\n")
    return f"csv:{root / 't.csv'}"


def tar(root: Path) -> str:
    with tarfile.open(root / "a.tar", "w") as file:
        for label in (0, 1):
            picture(content := io.BytesIO(), label)
            for name, data in ((f"{label}.png", content.getvalue()), (f"{label}.cls", str(label).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
    return f"tar:{root / '*.tar'}"


def parquet(root: Path) -> str:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    images = [io.BytesIO(), io.BytesIO()]
    for label, content in enumerate(images):
        picture(content, label)
    columns = {"image": [content.getvalue() for content in images], "label": [0, 1]}
    write_table(pyarrow.table(columns), root / "a.parquet")
    return f"parquet:{root / 'a.parquet'}"


def idx(root: Path) -> str:
    for name, sizes, values in (
        ("images-idx3", [2, 8, 8], bytes([0] * 64 + [1] * 64)),
        ("labels-idx1", [2], bytes([0, 1])),
    ):
        header = bytes([0, 0, 8, len(sizes)]) + np.array(sizes, ">u4").tobytes()
        (root / f"t10k-{name}-ubyte").write_bytes(header + values)
    return f"idx:{root}"


def npz(root: Path) -> str:
    images = np.stack([np.full((8, 8, 3), grey, np.uint8) for grey in (0, 1)])
    np.savez(root / "a.npz", x=images, y=np.arange(2))
    return f"npz:{root / 'a.npz'}"


def torchvision(root: Path) -> str:
    (root / "MNIST").mkdir()
    idx(root / "MNIST")
    (root / "MNIST" / "raw").mkdir()
    for path in [*(root / "MNIST").glob("t10k*")]:
        for name in (path.name, path.name.replace("t10k", "train")):
            (root / "MNIST" / "raw" / name).write_bytes(path.read_bytes())
    return f"torchvision:MNIST@{root}"


def user_code(root: Path) -> str:
    (root / "mine.py").write_text(USER)
    return f"{root / 'mine.py'}:load"


def pairs(root: Path) -> str:
    for label in (0, 1):
        for side in ("in", "out"):
            (root / side).mkdir(exist_ok=True)
            Image.new("L", (8, 8), label).save(root / side / f"{label}.png")
    return f"pairs:{root / 'in'}@{root / 'out'}"


def coco(root: Path) -> str:
    for label in (0, 1):
        picture(root / f"{label}.png", label)
    content = {
        "images": [{"id": label, "file_name": f"{label}.png"} for label in (0, 1)],
        "annotations": [{"image_id": i, "category_id": i, "bbox": [1, 1, 4, 4]} for i in (0, 1)],
        "categories": [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}],
    }
    (root / "c.json").write_text(json.dumps(content))
    return f"coco:{root / 'c.json'}@{root}"


def text(root: Path) -> str:
    """Of two texts that are the tokens 0 0 and 1 1."""
    pytest.importorskip("tokenizers", reason="the optional package tokenizers is not installed")
    words = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}
    (root / "tokenizer.json").write_text(
        json.dumps({"model": words, "pre_tokenizer": {"type": "Whitespace"}})
    )
    (root / "a.csv").write_text("text,label\na a,0\nb b,1\n")
    return f"text:{root / 'a.csv'}?tokenizer={root}"


def wav(root: Path) -> str:
    """Of silence, and of a constant."""
    soundfile = pytest.importorskip("soundfile", reason="the optional package soundfile is not installed")
    for label in (0, 1):
        (root / str(label)).mkdir()
        soundfile.write(root / str(label) / "a.wav", np.full(64, label / 2, np.float32), 8000)
    return f"wav:{root}"


EXAMPLES: dict[str, Callable[[Path], str]] = {
    "folder": folder,
    "csv": csv,
    "pairs": pairs,
    "coco": coco,
    "text": text,
    "wav": wav,
    "tar": tar,
    "parquet": parquet,
    "idx": idx,
    "npz": npz,
    "torchvision": torchvision,
    "callable": user_code,
    "digits": lambda root: "digits",
    "synthetic": lambda root: "synthetic:3x8x8",
    "none": lambda root: "none?n=3",
}


@pytest.mark.parametrize("name", DATA_KINDS)
def test_every_kind_gives_batches_of_what_was_written(name: str, tmp_path: Path) -> None:
    text = EXAMPLES[name](tmp_path)
    assert parse_spec(text).kind == name
    norm = torch.nn.Sequential(torch.nn.BatchNorm2d(3)).eval()
    network = ForNetwork(capture(norm, InputSpec((3, 8, 8)), verify=False))
    data = open_data(text, labels=not parse_spec(text).says_task, network=network)
    if data.source.task is not None:
        data = parse_task(data.source.task).read_targets(data)
    inputs, labels = next(data.batches(2))
    images = tensors_of(inputs)[0]
    assert images.dtype == DTYPES[data.input.dtype]
    assert images.shape == (2, *data.input.shape)
    assert data.labelled or labels.tolist() == [-1, -1]
    assert data.size is not None
    assert sum(batch_size(batch) for batch, _ in data.batches(1000)) == data.size
    if data.size == 2:  # those written here have a grey of 0 and of 1
        found = [label["labels"] if isinstance(label, dict) else label for label in labels]
        assert [torch.as_tensor(label).unique().tolist() for label in found] == [[0], [1]]
        assert images[0].eq(0).all()
        assert images[1].eq(images[1].max()).all()
        assert images[1].max() > 0


@pytest.mark.parametrize("name", DATA_KINDS)
def test_every_kind_knows_its_options_and_their_defaults(name: str, tmp_path: Path) -> None:
    kind, text = DATA_KINDS[name], EXAMPLES[name](tmp_path)
    more, given = "&" if "?" in text else "?", parse_spec(text).options
    spelt = "&".join(f"{key}={value}" for key, value in kind.defaults.items() if key not in given)
    assert same_samples(text, f"{text}{more}{spelt}" if spelt else text)
    if kind.target is None and not kind.any_option:
        with pytest.raises(DataError, match="has no option 'colour'"):
            parse_spec(f"{text}{more}colour=red")
    if kind.is_path:
        assert not parse_spec(text).is_missing
        assert kind.target is not None or parse_spec(f"{name}:{tmp_path / 'none'}").is_missing
