"""The --arch option, parsed."""

import re

import pytest

from modelopt_cli.checkpoint.sources import check_found_spec, parse_spec
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


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("resnet18", "torchvision:resnet18"),
        ("lenet5?width=0.5", "builtin:lenet5?width=0.5"),
        ("vit_base_patch16_224", "timm:vit_base_patch16_224"),
    ],
)
def test_a_name_of_a_library_without_its_place_is_told(text: str, meant: str) -> None:
    with pytest.raises(ArchitectureError, match=re.escape(f"did you mean {meant}?")):
        parse_spec(text)


@pytest.mark.parametrize(
    "text",
    ["timm:resnet18?checkpoint_path=/tmp/evil.pth", "timm:resnet18?num_classes=10&pretrained=true",
     "timm:resnet18?num_classes=7x", "timm:resnet18?global_pool=/etc/passwd",
     "torchvision:resnet18?weights=IMAGENET1K_V1",
     "builtin:lenet5?width=1e9", "builtin:lenet5?width=nan", "builtin:lenet5?num_classes=-1",
     "torchvision:resnet18?num_classes=70000", "net.py:make", "my.nets:Net"],
)  # fmt: skip
def test_a_spec_out_of_a_file_may_set_only_what_is_on_the_list(text: str) -> None:
    with pytest.raises(ArchitectureError, match="yourself"):
        check_found_spec(text, 65_536, "a.safetensors")
    parse_spec(text)  # what the user types may be more


@pytest.mark.parametrize(
    "text",
    ["torchvision:resnet18", "torchvision:vit_b_16?num_classes=65536&image_size=384",
     "builtin:lenet5?width=0.25", "timm:resnet18?num_classes=21843&in_chans=1&global_pool=avg&drop_rate=0.1",
     "timm:vit_tiny?img_size=96"],
)  # fmt: skip
def test_a_spec_out_of_a_file_may_size_the_network(text: str) -> None:
    check_found_spec(text, 65_536, "a.safetensors")
