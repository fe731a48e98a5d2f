"""Names and shapes of timm's networks, as one hash each, by which a state dict is recognised.

``timm_fingerprints.json`` is written by ``tools/timm_fingerprints.py``. The sizes that follow the number of
classes are masked before hashing: the first of the weight and the bias of the layers that timm calls the
classifier.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from modelopt_cli.checkpoint.tensor_names import Shape

_DIGITS = 16


def shapes_hash(shapes: Mapping[str, Shape], classifier: tuple[str, ...]) -> str:
    """Hash of names and shapes, in whatever order they come.

    Args:
        shapes: of all parameters and buffers, batch-norm counters left out.
        classifier: names of the layers whose outputs are the classes.
    """
    masked = {f"{layer}.{part}" for layer in classifier for part in ("weight", "bias")}
    lines = (
        f"{name} {'x'.join(map(str, ('C', *shape[1:]) if name in masked else shape))}"
        for name, shape in shapes.items()
    )
    return hashlib.sha256("\n".join(sorted(lines)).encode("utf-8", "surrogateescape")).hexdigest()[:_DIGITS]


@cache
def _table() -> dict[str, Any]:
    text = files(__package__).joinpath("timm_fingerprints.json").read_text("utf-8")
    table: dict[str, Any] = json.loads(text)
    return table


def known_networks(shapes: Mapping[str, Shape]) -> list[tuple[str, int | None]]:
    """timm's networks that have exactly these names and shapes, and the class count where that is another."""
    found: dict[str, int | None] = {}
    for layers in _table()["classifiers"]:
        parts = (f"{layer}.{part}" for layer in layers for part in ("weight", "bias"))
        counts = {shapes[part][:1] for part in parts if part in shapes}
        if layers and (len(counts) != 1 or counts == {()}):  # not there, or they disagree
            continue
        count = next(iter(counts))[0] if layers else None
        for name, usual in _table()["networks"].get(shapes_hash(shapes, tuple(layers)), {}).items():
            found[name] = None if count == usual else count
    return list(found.items())


def network_names() -> set[str]:
    """Names of the networks in the table."""
    return {name for networks in _table()["networks"].values() for name in networks}
