"""The --arch option, parsed."""

import pytest

from modelopt_cli.checkpoint.spec import parse_spec
from modelopt_cli.errors import ArchitectureError


@pytest.mark.parametrize(
    ("text", "source", "place", "name"),
    [
        ("torchvision:resnet18", "torchvision", "", "resnet18"),
        ("timm:vit_base_patch16_224.augreg", "timm", "", "vit_base_patch16_224.augreg"),
        ("builtin:lenet5", "builtin", "", "lenet5"),
        ("nets/net.py:make", "file", "nets/net.py", "make"),
        ("my.nets:Net.from_name", "module", "my.nets", "Net.from_name"),
        ("a:b/net.py:make", "file", "a:b/net.py", "make"),
        ("net.py", "file", "net.py", ""),
    ],
)
def test_every_form(text: str, source: str, place: str, name: str) -> None:
    spec = parse_spec(text)
    assert (spec.source, spec.place, spec.name, spec.options) == (source, place, name, {})


def test_option_values_are_literals() -> None:
    options = parse_spec("builtin:x?a=10&b=0.5&c=true&d=False&e=none&f=relu&g=1e-3&h=-2&i=a%26b").options
    assert options == {
        "a": 10, "b": 0.5, "c": True, "d": False, "e": None, "f": "relu", "g": 1e-3, "h": -2, "i": "a&b"
    }  # fmt: skip
    assert [type(value) for value in options.values()][:4] == [int, float, bool, bool]


@pytest.mark.parametrize(
    "text",
    ["", "resnet18", "torchvision:", ":resnet18", "builtin:x?", "builtin:x?a", "builtin:x?a=1&a=2",
     "builtin:x?1a=2", "builtin:x?a=1&&b=2"],
)  # fmt: skip
def test_what_is_malformed_is_refused(text: str) -> None:
    with pytest.raises(ArchitectureError) as caught:
        parse_spec(text)
    assert "\n" not in str(caught.value)
