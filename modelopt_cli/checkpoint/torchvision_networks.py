"""torchvision's classification networks: built by name, recognised by names and shapes."""

import dataclasses
import math
from collections.abc import Mapping

from torch import nn

from modelopt_cli.checkpoint.arch import (
    Architecture,
    ArchitectureSource,
    ArchSpec,
    class_count,
    construct,
    join_options,
    require_known,
)
from modelopt_cli.checkpoint.fingerprint import Fingerprint, fingerprints, torchvision_inputs
from modelopt_cli.checkpoint.tensor_names import Shape, fits
from modelopt_cli.errors import ArchitectureError
from modelopt_cli.program.input_spec import InputSpec
from modelopt_cli.settings import option
from modelopt_cli.text import short

_IMAGENET_CLASSES = 1000
_OF_TENSORFLOW = {"googlenet", "inception_v3"}
"""Their published weights, and what was fine-tuned from them, expect TensorFlow's range of values."""


def _place(name: str) -> str | None:
    """The module of a network that torchvision has, a classifier or not."""
    from torchvision import models

    return models.get_model_builder(name).__module__ if name in models.list_models() else None


def _resolve(spec: ArchSpec) -> Architecture:
    inputs = torchvision_inputs()
    if spec.name not in inputs and (place := _place(spec.name)) is not None:
        hint = f"name it {option('arch', f'{place}:{spec.name}')}, with {option('input_shape')}"
        raise ArchitectureError(
            f"torchvision's {short(spec.name)} is no network for image classification", hint=hint
        )
    require_known(spec, inputs)
    options, assumed = dict(spec.options), list[str]()
    if spec.name in _OF_TENSORFLOW:
        if "transform_input" not in options:
            assumed.append(_transform_note(spec.text))
        options.setdefault("transform_input", True)
        options.setdefault("init_weights", True)  # else torchvision warns

    def build() -> nn.Module:
        from torchvision import models

        return construct(spec, lambda: models.get_model(spec.name, weights=None, **options))

    classes = class_count(spec, _IMAGENET_CLASSES)
    return Architecture(
        spec.text,
        build,
        _input(spec, inputs[spec.name]),
        own=True,
        num_classes=classes,
        published=True,
        published_classes=_IMAGENET_CLASSES,
        class_names=_imagenet_names if classes == _IMAGENET_CLASSES else None,
        assumed=tuple(assumed),
    )


def _transform_note(spec: str) -> str:
    plain = f"{spec}{'&' if '?' in spec else '?'}transform_input=false"
    return (
        "transform_input=true is assumed, as its published weights need it; "
        f"trained without them, give {option('arch', plain)}"
    )


def _imagenet_names() -> tuple[str, ...]:
    from torchvision import models

    return tuple(models.ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


def _published_top1(spec: ArchSpec) -> float | None:
    from torchvision import models

    stated = [
        w.meta["_metrics"].get("ImageNet-1K", {}).get("acc@1") for w in models.get_model_weights(spec.name)
    ]
    return min((value for value in stated if value is not None), default=None)


def _input(spec: ArchSpec, published: tuple[InputSpec, ...]) -> InputSpec:
    """The input of the first published weights; of those for the image size, where that can vary."""
    if not spec.name.startswith("vit_"):
        return published[0]
    size = spec.options.get("image_size", 224)
    if not isinstance(size, int):
        raise ArchitectureError("image_size must be an integer", where=short(spec.text))
    match = next((entry for entry in published if entry.shape[-1] == size), None)
    if match is not None:
        return match
    preprocess = published[0].preprocess
    assert preprocess is not None
    return InputSpec((3, size, size), dataclasses.replace(preprocess, resize=size, crop=size))


def _recognise(shapes: Mapping[str, Shape]) -> list[str]:
    return [
        spec
        for fingerprint in fingerprints().values()
        if len(fingerprint.tensors) == len(shapes) and (spec := _match(shapes, fingerprint))
    ]


def _match(shapes: Mapping[str, Shape], fingerprint: Fingerprint) -> str | None:
    """The spec, with class count and image size read from the shapes; None if they do not fit."""
    read: dict[str, set[int]] = {}
    for name, pattern in fingerprint.tensors.items():
        shape = shapes.get(name)
        if shape is None or not fits(shape, pattern):
            return None
        for dim, mask in zip(shape, pattern, strict=True):
            if isinstance(mask, str):
                read.setdefault(mask, set()).add(dim)
    if any(len(values) != 1 for values in read.values()):
        return None
    options = {}
    (classes,) = read["C"]
    if classes != 1000:
        options["num_classes"] = classes
    if "S" in read:
        size = _image_size(read["S"].pop(), shapes)
        if size is None:
            return None
        if size != 224:
            options["image_size"] = size
    return join_options(f"torchvision:{fingerprint.name}", options)


def _image_size(positions: int, shapes: Mapping[str, Shape]) -> int | None:
    """A vision transformer's image side from its position embedding: one position per patch, and one more."""
    side, patch = math.isqrt(max(positions - 1, 0)), shapes["conv_proj.weight"][-1]
    return side * patch if side and side * side == positions - 1 else None


TORCHVISION = ArchitectureSource(
    "torchvision:NAME", _resolve, recognise=_recognise, published_top1=_published_top1
)
