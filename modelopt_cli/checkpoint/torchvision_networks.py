"""torchvision's networks: built by name, recognised by names and shapes."""

import dataclasses
import inspect
import math
from collections.abc import Mapping
from functools import partial

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
from modelopt_cli.checkpoint.fingerprint import Fingerprint, fingerprints, kind_of, torchvision_inputs
from modelopt_cli.checkpoint.tensor_names import Shape, fits
from modelopt_cli.errors import ArchitectureError
from modelopt_cli.program.input_spec import InputSpec
from modelopt_cli.settings import option
from modelopt_cli.text import short

_TASKS = {"segmentation": "segment", "detection": "detect", "video": "classify"}
"""The task of a kind of networks; classification is what is taken where nobody says one."""
_OF_TENSORFLOW = {"googlenet", "inception_v3"}
"""Their published weights, and what was fine-tuned from them, expect TensorFlow's range of values."""


def _resolve(spec: ArchSpec) -> Architecture:
    inputs = torchvision_inputs()
    require_known(spec, inputs)
    kind, published = kind_of(spec.name)
    options, assumed = dict(spec.options), list[str]()
    if spec.name in _OF_TENSORFLOW:
        if "transform_input" not in options:
            assumed.append(_transform_note(spec.text))
        options.setdefault("transform_input", True)
        options.setdefault("init_weights", True)  # else torchvision warns

    def build() -> nn.Module:
        from torchvision import models

        if "weights_backbone" in inspect.signature(models.get_model_builder(spec.name)).parameters:
            options["weights_backbone"] = None  # the default is to download some
        return construct(spec, lambda: models.get_model(spec.name, weights=None, **options))

    classes = class_count(spec, published)
    return Architecture(
        spec.text,
        build,
        _input(spec, inputs[spec.name]),
        own=True,
        num_classes=classes,
        published=True,
        published_classes=published,
        class_names=partial(_names_of, spec.name) if classes is not None and classes == published else None,
        assumed=tuple(assumed),
        task=_TASKS.get(kind),
    )


def _transform_note(spec: str) -> str:
    plain = f"{spec}{'&' if '?' in spec else '?'}transform_input=false"
    return (
        "transform_input=true is assumed, as its published weights need it; "
        f"trained without them, give {option('arch', plain)}"
    )


def _names_of(name: str) -> tuple[str, ...]:
    """The classes of its published weights; numbers that stand for none, of COCO, are told apart."""
    from torchvision import models

    names = list(models.get_model_weights(name))[0].meta["categories"]  # noqa: RUF015 -- an Enum
    return tuple(f"{each} {number}" if names.count(each) > 1 else each for number, each in enumerate(names))


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
                count, rest = divmod(dim, int(mask[:-1] or 1))
                read.setdefault(mask[-1], set()).add(count if not rest else -1)
    if any(len(values) != 1 or -1 in values for values in read.values()):
        return None
    options = {}
    for classes in read.get("C", ()):
        if classes != fingerprint.classes:
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
    "torchvision:NAME",
    _resolve,
    names=torchvision_inputs,
    recognise=_recognise,
    published_top1=_published_top1,
)
