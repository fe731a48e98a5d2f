"""Forged artifacts: the container and the digest are right, what the header says is not."""

import copy
import json

import pytest
import torch

from modelopt_cli.artifact import read_header, read_tensors, strictjson, write_tensors
from modelopt_cli.artifact.header import DIGEST_AT, PREFIX, digest_of
from modelopt_cli.errors import ArtifactError, ModeloptError
from modelopt_cli.program import Encoding, InputSpec, Preprocess


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "net.safetensors"
    encoding = Encoding("affine", {"bits": 4, "axis": 0, "group": None}, {"scale": torch.tensor([0.5, 1.0])})
    shared = torch.tensor([1, 2])
    write_tensors(
        {"l.weight": torch.tensor([[1.0], [2.0]]), "b": shared, "c": shared},
        {"l.weight": encoding},
        path,
        history=[{"method": "m"}],
        arch="builtin:net",
        input_spec=InputSpec((1, 2, 2), Preprocess(resize=4, crop=2, mean=(0.5,), std=(0.5,), channels=1)),
        labels=["x"],
    )
    return path


def forge(path, change, *, metadata=None, prefix=None):
    """Rewrite the header after ``change`` and give the file a digest that fits."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    outer = json.loads(content[8 : 8 + length])
    document = json.loads(outer["__metadata__"]["modelopt"])
    changed = change(document) if callable(change) else change
    document = document if changed is None else changed
    document["digest"] = "0" * 64
    inner = json.dumps(document, sort_keys=True, separators=(",", ":"))
    outer["__metadata__"] = {"modelopt": inner, **(metadata or {})}
    header = json.dumps(outer, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    blank = len(header).to_bytes(8, "little") + header
    data = content[8 + length :]
    digest = digest_of(blank, [data]).encode()
    place = blank.index(b'\\"digest\\":\\"' + b"0" * 64) + len(b'\\"digest\\":\\"')
    path.write_bytes(blank[:place] + digest + blank[place + 64 :] + data)


def put(*keys):
    """A change that sets the item at ``keys[:-1]`` to ``keys[-1]``."""

    def change(document):
        item = document
        for key in keys[:-2]:
            item = item[key]
        item[keys[-2]] = keys[-1]

    return change


def drop(*keys):
    def change(document):
        item = document
        for key in keys[:-1]:
            item = item[key]
        del item[keys[-1]]

    return change


def test_forging_without_a_change_is_accepted(path):
    before = path.read_bytes()
    forge(path, lambda document: None)
    assert read_tensors(path).labels == ("x",)
    assert path.read_bytes() == before


WEIGHT = ("parameters", 0)
FORGED = {
    "newer version": (put("format", 2), "format version 2, newer than 1; update modelopt"),
    "version zero": (put("format", 0), "bad format version"),
    "version true": (put("format", True), "bad format version"),
    "version a text": (put("format", "1"), "bad format version"),
    "field missing": (drop("history"), "missing or unknown header fields"),
    "field unknown": (put("exec", "x"), "missing or unknown header fields"),
    "network a number": (put("network", 1), "bad network"),
    "program a text": (put("program", "x"), "bad program"),
    "history an object": (put("history", {}), "bad history"),
    "history of texts": (put("history", ["x"]), "bad history"),
    "labels a text": (put("labels", "cat"), "bad labels"),
    "labels of numbers": (put("labels", [1]), "bad labels"),
    "parameters an object": (put("parameters", {}), "bad parameters"),
    "parameter a text": (put("parameters", ["x"]), "bad parameters"),
    "parameter without codec": (drop(*WEIGHT, "codec"), "missing or unknown fields"),
    "parameter with more": (put(*WEIGHT, "x", 1), "missing or unknown fields"),
    "parameter twice": (
        lambda d: d["parameters"].append(copy.deepcopy(d["parameters"][0])),
        "parameter twice",
    ),
    "name empty": (put(*WEIGHT, "name", ""), "bad tensor name"),
    "name with a control character": (put(*WEIGHT, "name", "a\x1b"), "control character"),
    "name a number": (put(*WEIGHT, "name", 1), "bad tensor name"),
    "codec unknown": (put(*WEIGHT, "codec", "zip"), "unknown codec 'zip'"),
    "codec a list": (put(*WEIGHT, "codec", []), "unknown codec or dtype"),
    "codec of another parameter": (put(*WEIGHT, "codec", "raw"), "exactly one part"),
    "dtype unknown": (put(*WEIGHT, "dtype", "F31"), "unknown codec or dtype"),
    "dtype an integer type": (put(*WEIGHT, "dtype", "I8"), "stores no torch.int8"),
    "shape of another size": (put(*WEIGHT, "shape", [2, 2]), "does not fit|do not fit|elements"),
    "shape transposed": (put(*WEIGHT, "shape", [1, 2]), "does not fit|do not fit|elements"),
    "shape negative": (put(*WEIGHT, "shape", [-2, -1]), "bad shape"),
    "shape huge": (put(*WEIGHT, "shape", [1 << 62, 4]), "elements"),
    "shape too long": (put(*WEIGHT, "shape", [1] * 65), "bad shape"),
    "settings a list": (put(*WEIGHT, "params", []), "bad codec settings"),
    "settings wrong": (put(*WEIGHT, "params", "bits", 99), "bits must be 2 to 8"),
    "values beyond the bits": (put(*WEIGHT, "params", "bits", 2), "exceed"),
    "no parts": (put(*WEIGHT, "parts", {}), "bad codec parts"),
    "part a number": (put(*WEIGHT, "parts", "scale", 1), "bad codec parts"),
    "part missing": (drop(*WEIGHT, "parts", "scale"), "belonging to no parameter"),
    "part unknown to the file": (put(*WEIGHT, "parts", "scale", "x"), "tensors missing"),
    "part used twice": (put(*WEIGHT, "parts", "scale", "b"), "tensor used twice"),
    "part renamed": (
        lambda d: d["parameters"][0]["parts"].update(x=d["parameters"][0]["parts"].pop("scale")),
        "scale",
    ),
    "parts swapped": (put(*WEIGHT, "parts", {"values": "l.scale", "scale": "l.weight"}), "scale cannot be"),
    "parameter missing": (drop("parameters", 1), "belonging to no parameter"),
    "tied a list": (put("tied", []), "tied"),
    "tied to nothing": (put("tied", "c", "nothing"), "tied"),
    "tied to a tied one": (put("tied", {"c": "b", "d": "c"}), "tied"),
    "tied over a parameter": (put("tied", "b", "l.weight"), "tied"),
    "tied to itself": (put("tied", "b", "b"), "tied"),
    "tied name with a control character": (put("tied", "\n", "b"), "control character"),
    "input a list": (put("input", []), "bad input description"),
    "input without preprocess": (drop("input", "preprocess"), "bad input description"),
    "input shape negative": (put("input", "shape", [-1]), "bad input description"),
    "input shape of fractions": (put("input", "shape", [1.5]), "bad input description"),
    "preprocess unknown": (put("input", "preprocess", "x", 1), "bad input description"),
    "resize of three": (put("input", "preprocess", "resize", [1, 2, 3]), "bad input description"),
    "resize zero": (put("input", "preprocess", "resize", 0), "bad input description"),
    "resize true": (put("input", "preprocess", "resize", True), "bad input description"),
    "crop negative": (put("input", "preprocess", "crop", -1), "bad input description"),
    "crop above one": (put("input", "preprocess", "crop", 1.5), "bad input description"),
    "interpolation unknown": (put("input", "preprocess", "interpolation", "magic"), "bad input description"),
    "mean a text": (put("input", "preprocess", "mean", ["0"]), "bad input description"),
    "mean huge": (put("input", "preprocess", "std", [1e300]), "bad input description"),
    "channels zero": (put("input", "preprocess", "channels", 0), "bad input description"),
}


@pytest.mark.parametrize(("change", "says"), FORGED.values(), ids=FORGED.keys())
def test_forged_header_gets_one_line(path, change, says):
    forge(path, change)
    with pytest.raises(ArtifactError, match=says) as caught:
        read_tensors(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_second_metadata_key_is_refused(path):
    forge(path, lambda document: None, metadata={"more": "x"})
    with pytest.raises(ArtifactError, match="metadata next to its own"):
        read_tensors(path)


def test_digest_elsewhere_than_at_its_offset_is_refused(path):
    content = path.read_bytes()
    # The same JSON with a space in it: still valid, still the right digest, but not at its place.
    moved = content.replace(b'{"__metadata__"', b'{ "__metadata__"', 1)
    length = int.from_bytes(content[:8], "little") + 1
    path.write_bytes(length.to_bytes(8, "little") + moved[8:])
    with pytest.raises(ArtifactError, match="does not begin as an artifact must"):
        read_tensors(path)


def test_duplicate_key_in_the_inner_json_is_refused(path):
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip().replace(b'\\"format\\":1', b'\\"format\\":1,\\"format\\":1', 1)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    with pytest.raises(ArtifactError, match="key 'format' twice"):
        read_header(path)


@pytest.mark.parametrize("inner", ["", "x", "[]", '{"a":NaN}', "null", '{"format":1}'])
def test_inner_json_that_is_not_ours_is_refused(path, inner):
    header = json.dumps({"__metadata__": {"modelopt": inner}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ArtifactError):
        read_header(path)


def test_prefix_is_where_the_digest_offset_says():
    assert DIGEST_AT == 8 + len(PREFIX) == 51


def test_canonical_json_sorts_by_code_point_and_escapes_nothing_needless():
    value = {"b": [1, 2.5, None, True], "a": 'ü/"\\\n\U0001f600', "Z": {}}
    assert (
        strictjson.canonical(value) == '{"Z":{},"a":"ü/\\"\\\\\\n\U0001f600","b":[1,2.5,null,true]}'.encode()
    )


@pytest.mark.parametrize("value", [float("inf"), {1, 2}, "\udc80", {(1,): 2}], ids=repr)
def test_canonical_json_refuses_what_is_not_data(value):
    with pytest.raises(ModeloptError):
        strictjson.canonical(value)
