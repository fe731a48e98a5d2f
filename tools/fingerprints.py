"""Write or check modelopt_cli/checkpoint/fingerprints.json.

    python tools/fingerprints.py            write it from the installed torchvision
    python tools/fingerprints.py --check    exit 1 if it would change

Every network is built twice with different class counts (vision transformers also with different image
sizes); dimensions that change are masked. Parameters go to the meta device one by one as they are
registered, because RegNet computes its widths with real tensors and cannot be built there as a whole.
"""

import argparse
import inspect
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

import modelopt_cli
from modelopt_cli.checkpoint.fingerprint import VERSION, Packer, pack_input
from modelopt_cli.checkpoint.tensor_names import Pattern, is_counter
from modelopt_cli.program.input_spec import InputSpec, Preprocess

TARGET = Path(modelopt_cli.__file__).parent / "checkpoint" / "fingerprints.json"
AUXILIARY: dict[str, tuple[str, bool]] = {
    **dict.fromkeys(("googlenet", "inception_v3"), ("aux_logits", False)),
    **dict.fromkeys(("deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50"), ("aux_loss", True)),
    **dict.fromkeys(("deeplabv3_resnet101", "fcn_resnet50", "fcn_resnet101"), ("aux_loss", True)),
}
"""Networks with and without a second classifier, and the option that makes the other one."""
RUN = ("ssdlite320_mobilenet_v3_large",)
"""Networks that are run while they are built, which needs parameters with memory."""
KINDS = ("classification", "segmentation", "detection", "video", "optical_flow")
FRAMES = {"swin3d_t": 32, "swin3d_s": 32, "swin3d_b": 32}
SIDES = {
    "ssd300_vgg16": 300,
    "ssdlite320_mobilenet_v3_large": 320,
    "fasterrcnn_mobilenet_v3_large_320_fpn": 320,
}
"""Sides of the images of detectors; of the others 800, to which they bring the short side themselves."""


@contextmanager
def meta_parameters() -> Iterator[None]:
    """Parameters registered inside have shapes but no memory."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, None if param is None else nn.Parameter(param.to("meta"), param.requires_grad))

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def build(name: str, **options: Any) -> nn.Module:
    """A torchvision network without memory for its parameters."""
    from torchvision import models

    if "aux_logits" in AUXILIARY.get(name, ()):
        options["init_weights"] = False
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        options["weights_backbone"] = None
    with nullcontext() if name in RUN else meta_parameters():
        return models.get_model(name, weights=None, **options)


def shapes(name: str, **options: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by name, batch-norm counters left out."""
    state = build(name, **options).state_dict()
    return {key: tuple(tensor.shape) for key, tensor in state.items() if not is_counter(key)}


def patterns(name: str, classes: int | None, **options: Any) -> dict[str, Pattern]:
    """Shapes with the dimensions masked that depend on class count or image size."""
    base = shapes(name, **options)
    masks = {}
    if classes is not None:
        masks["C"] = shapes(name, num_classes=7, **options), classes - 7
    if name.startswith("vit_"):
        masks["S"] = shapes(name, image_size=448, **options), None
    return {
        key: tuple(_masked(dim, i, key, masks) for i, dim in enumerate(shape)) for key, shape in base.items()
    }


def _masked(dim: int, place: int, key: str, masks: dict[str, Any]) -> int | str:
    """A dimension, or the mask of what it depends on, with how many there are for each class."""
    for mask, (other, fewer) in masks.items():
        changed = dim - other[key][place]
        if changed:
            each = 1 if fewer is None else changed // fewer
            return mask if each == 1 else f"{each}{mask}"
    return dim


def inputs(name: str, kind: str) -> list[dict[str, Any]]:
    """Input of each set of published weights; equal ones once."""
    from torchvision import models

    found = []
    for weights in models.get_model_weights(name):
        packed = pack_input(_INPUTS[kind](name, weights.transforms()))
        if packed not in found:
            found.append(packed)
    return found


def _of_images(name: str, transform: Any) -> InputSpec:
    (crop,), (resize,) = transform.crop_size, transform.resize_size
    return InputSpec((3, crop, crop), _normalized(transform, resize=resize, crop=crop))


def _of_masks(name: str, transform: Any) -> InputSpec:
    """An image as a square of the published short side, since masks of one size make a batch."""
    (side,) = transform.resize_size
    return InputSpec((3, side, side), _normalized(transform, resize=(side, side)))


def _normalized(transform: Any, **sizes: Any) -> Preprocess:
    mean, std = tuple(transform.mean), tuple(transform.std)
    return Preprocess(interpolation=transform.interpolation.value, mean=mean, std=std, **sizes)


def _of_boxes(name: str, transform: Any) -> InputSpec:
    """Detectors normalize and resize the image themselves."""
    side = SIDES.get(name, 800)
    return InputSpec((3, side, side), Preprocess(resize=(side, side)))


def _of_clips(name: str, transform: Any) -> InputSpec:
    return InputSpec((3, FRAMES.get(name, 16), *transform.crop_size))


def _of_pairs(name: str, transform: Any) -> InputSpec:
    second = InputSpec((3, 128, 128), name="image2")
    return InputSpec((3, 128, 128), name="image1", others=(second,))


_INPUTS = dict(zip(KINDS, (_of_images, _of_masks, _of_boxes, _of_clips, _of_pairs), strict=True))


def kinds() -> dict[str, str]:
    """The kind of every network, classification first."""
    from torchvision import models

    modules = {KINDS[0]: models, **{kind: getattr(models, kind) for kind in KINDS[1:]}}
    return {name: kind for kind, module in modules.items() for name in models.list_models(module=module)}


def generate(names: list[str] | None = None) -> dict[str, Any]:
    """The whole table, or the part for some networks."""
    import torchvision

    packer, networks = Packer(), {}
    for name, kind in kinds().items():
        if names is not None and name not in names:
            continue
        weights = list(torchvision.models.get_model_weights(name))
        classes = len(weights[0].meta.get("categories", ())) or None
        entry: dict[str, Any] = {"inputs": inputs(name, kind)}
        if kind != KINDS[0]:
            entry |= {"kind": kind, "classes": classes}
        networks[name] = {"root": packer.add(patterns(name, classes)), **entry}
        if name in AUXILIARY:
            option, value = AUXILIARY[name]
            root = packer.add(patterns(name, classes, **{option: value}))
            networks[f"{name}?{option}={str(value).lower()}"] = {"root": root, **entry}
    return {
        "version": VERSION,
        "torchvision": torchvision.__version__.partition("+")[0],
        "networks": networks,
        "nodes": packer.nodes,
    }


def to_text(table: dict[str, Any]) -> str:
    """JSON with one network and one node to a line, so that a change can be reviewed."""
    head = {key: value for key, value in table.items() if key not in ("networks", "nodes")}
    networks = ",\n".join(f"{json.dumps(k)}:{compact(v)}" for k, v in table["networks"].items())
    nodes = ",\n".join(compact(node) for node in table["nodes"])
    return f'{compact(head)[:-1]},\n"networks":{{\n{networks}\n}},\n"nodes":[\n{nodes}\n]}}\n'


def compact(value: Any) -> str:
    """JSON without spaces."""
    return json.dumps(value, separators=(",", ":"))


def write_or_check(target: Path, text: str, *, check: bool) -> int:
    """Write a table, or compare the file with it; returns the exit code."""
    if not check:
        target.write_text(text, "utf-8")
        print(f"{target}: {len(text):,} bytes")
        return 0
    if text != (target.read_text("utf-8") if target.exists() else ""):
        print(f"{target} is out of date; run: python tools/{Path(sys.argv[0]).name}", file=sys.stderr)
        return 1
    print(f"{target} is up to date")
    return 0


def main() -> int:
    """Write, or with --check compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if the file is out of date")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    return write_or_check(TARGET, to_text(generate()), check=arguments.check)


if __name__ == "__main__":
    sys.exit(main())
