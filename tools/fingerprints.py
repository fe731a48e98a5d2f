"""Write or check modelopt_cli/checkpoint/fingerprints.json.

    python tools/fingerprints.py            write it from the installed torchvision
    python tools/fingerprints.py --check    exit 1 if it would change

Every network is built twice with different class counts (vision transformers also with different image
sizes); dimensions that change are masked. Parameters go to the meta device one by one as they are
registered, because RegNet computes its widths with real tensors and cannot be built there as a whole.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import modelopt_cli
from modelopt_cli.checkpoint.fingerprint import VERSION, Packer, pack_input
from modelopt_cli.checkpoint.tensor_names import Pattern, is_counter
from modelopt_cli.program.input_spec import InputSpec, Preprocess

TARGET = Path(modelopt_cli.__file__).parent / "checkpoint" / "fingerprints.json"
AUXILIARY = ("googlenet", "inception_v3")


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

    if name in AUXILIARY:
        options["init_weights"] = False
    with meta_parameters():
        return models.get_model(name, weights=None, **options)


def shapes(name: str, **options: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by name, batch-norm counters left out."""
    state = build(name, **options).state_dict()
    return {key: tuple(tensor.shape) for key, tensor in state.items() if not is_counter(key)}


def patterns(name: str, **options: Any) -> dict[str, Pattern]:
    """Shapes with the dimensions masked that depend on class count or image size."""
    base = shapes(name, **options)
    masks = {"C": shapes(name, num_classes=7, **options)}
    if name.startswith("vit_"):
        masks["S"] = shapes(name, image_size=448, **options)
    return {key: _masked(shape, {m: other[key] for m, other in masks.items()}) for key, shape in base.items()}


def _masked(shape: tuple[int, ...], others: dict[str, tuple[int, ...]]) -> Pattern:
    return tuple(
        next((mask for mask, other in others.items() if other[i] != dim), dim) for i, dim in enumerate(shape)
    )


def inputs(name: str) -> list[dict[str, Any]]:
    """Input of each set of published weights; equal ones once."""
    from torchvision import models

    found = []
    for weights in models.get_model_weights(name):
        transform = weights.transforms()
        (crop,), (resize,) = transform.crop_size, transform.resize_size
        spec = InputSpec(
            (3, crop, crop),
            Preprocess(
                resize=resize,
                crop=crop,
                interpolation=transform.interpolation.value,
                mean=tuple(transform.mean),
                std=tuple(transform.std),
            ),
        )
        if pack_input(spec) not in found:
            found.append(pack_input(spec))
    return found


def generate(names: list[str] | None = None) -> dict[str, Any]:
    """The whole table, or the part for some networks."""
    import torchvision

    packer, networks = Packer(), {}
    for name in names or torchvision.models.list_models(module=torchvision.models):
        entry = {"inputs": inputs(name)}
        networks[name] = {"root": packer.add(patterns(name)), **entry}
        if name in AUXILIARY:
            networks[f"{name}?aux_logits=false"] = {
                "root": packer.add(patterns(name, aux_logits=False)),
                **entry,
            }
    return {
        "version": VERSION,
        "torchvision": torchvision.__version__.partition("+")[0],
        "networks": networks,
        "nodes": packer.nodes,
    }


def to_text(table: dict[str, Any]) -> str:
    """JSON with one network and one node to a line, so that a change can be reviewed."""
    head = {key: value for key, value in table.items() if key not in ("networks", "nodes")}
    networks = ",\n".join(f"{json.dumps(k)}:{_compact(v)}" for k, v in table["networks"].items())
    nodes = ",\n".join(_compact(node) for node in table["nodes"])
    return f'{_compact(head)[:-1]},\n"networks":{{\n{networks}\n}},\n"nodes":[\n{nodes}\n]}}\n'


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def main() -> int:
    """Write, or with --check compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if the file is out of date")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text = to_text(generate())
    if not arguments.check:
        TARGET.write_text(text, "utf-8")
        print(f"{TARGET}: {len(text):,} bytes")
        return 0
    current = TARGET.read_text("utf-8") if TARGET.exists() else ""
    if current != text:
        print(f"{TARGET} is out of date; run: python tools/fingerprints.py", file=sys.stderr)
        return 1
    print(f"{TARGET} is up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
