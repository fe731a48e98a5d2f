"""Option values: what is understood, and what is refused."""

from pathlib import Path

import pytest

from modelopt_cli import settings
from modelopt_cli.cli.options import chosen_output
from modelopt_cli.cli.values import Reader
from modelopt_cli.data import config as values
from modelopt_cli.errors import UsageError

GOOD = [
    (values.parse_size, "224", (224, 224)),
    (values.parse_size, "192x256", (192, 256)),
    (values.parse_resize, "256", 256),
    (values.parse_resize, "192x256", (192, 256)),
    (values.parse_crop, "224", 224),
    (values.parse_crop, "0.875", 0.875),
    (values.parse_crop, ".5", 0.5),
    (values.parse_crop, "87.5%", 0.875),
    (settings.fraction, "30%", 0.3),
    (settings.fraction, " 0.3", 0.3),
    (values.parse_floats, "0.485,0.456,0.406", (0.485, 0.456, 0.406)),
    (values.parse_floats, "-1, 2e-3", (-1.0, 0.002)),
    (settings.parse_device, "cuda:1", "cuda:1"),
]
BAD = [
    *((values.parse_size, text) for text in ("", "0", "-1", "224x", "x224", "1x2x3", "2.5", "٣", "999999")),
    *((values.parse_resize, text) for text in ("", "0.5", "a")),
    *(
        (values.parse_crop, text)
        for text in ("", "0", "0.0", "1.0", "1.5", "-0.5", "nan", "1e-1", "100%", "1.2.3%", "0%")
    ),
    *((values.parse_floats, text) for text in ("", "a", "1,,2", "nan", "1,inf", ",")),
    *((settings.parse_device, text) for text in ("", "gpu", "cuda:", "cuda:-1", "CPU")),
]


@pytest.mark.parametrize(("parse", "text", "value"), GOOD, ids=[f"{p.__name__}-{t}" for p, t, _ in GOOD])
def test_understood(parse, text, value):
    assert parse(text) == value
    assert type(parse(text)) is type(value)


@pytest.mark.parametrize(("parse", "text"), BAD, ids=[f"{p.__name__}-{t}" for p, t in BAD])
def test_refused(parse, text):
    with pytest.raises(ValueError, match=f"'{text}'" if text else "''"):
        parse(text)


def test_reader_collects_and_then_raises():
    reader = Reader()
    assert reader.read("--crop", None, values.parse_crop) is None
    reader.finish()
    assert reader.read("--crop", "x", values.parse_crop) is None
    reader.check(False, "--mean", "too many")
    with pytest.raises(UsageError, match=r"^--crop: 'x' is .*; --mean: too many$"):
        reader.finish()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("resnet18.pth", "resnet18-int8.safetensors"),
        ("/some/where/net.pth.tar", "net-int8.safetensors"),
        ("model.safetensors.index.json", "model-int8.safetensors"),
        ("v1.2-best.PT", "v1.2-best-int8.safetensors"),
        ("folder/", "folder-int8.safetensors"),
        (".pth", ".pth-int8.safetensors"),
    ],
)
def test_chosen_output_name(path, name):
    assert chosen_output(None, Path(path), "int8") == Path(name)
