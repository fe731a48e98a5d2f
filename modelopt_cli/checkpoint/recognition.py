"""Which network a state dict belongs to, from its names and shapes alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from modelopt_cli.checkpoint.arch import Architecture, resolve
from modelopt_cli.checkpoint.builtin import BUILTINS, Builtin, scaled
from modelopt_cli.checkpoint.fingerprint import Fingerprint, fingerprints
from modelopt_cli.checkpoint.tensor_names import Difference, Shape, compare, fits, shapes_of, spellings
from modelopt_cli.errors import ArchitectureError

_CLOSE = 0.5


@dataclass(frozen=True)
class Recognition:
    """A recognised network and the state dict in its names.

    Attributes:
        architecture: builds the network, with the class count the file has.
        state: the file's tensors under the network's names; others are left out.
    """

    architecture: Architecture
    state: dict[str, torch.Tensor]


def recognise(state: Mapping[str, torch.Tensor]) -> Architecture | None:
    """The torchvision or builtin network that has exactly these names and shapes.

    Returns:
        None where none fits; :func:`describe_nearest` says which comes close.

    Raises:
        ArchitectureError: several fit; names them.
    """
    found = recognise_state(state)
    return None if found is None else found.architecture


def recognise_state(state: Mapping[str, torch.Tensor]) -> Recognition | None:
    """Like :func:`recognise`, and return the tensors under the network's own names."""
    for candidate in spellings(state):
        shapes = shapes_of(candidate)
        specs = [*_torchvision_specs(shapes), *_builtin_specs(shapes)]
        if len(specs) > 1:
            raise ArchitectureError(
                f"the weights fit {len(specs)} networks: {', '.join(specs)}", hint="say which with --arch"
            )
        if specs:
            return Recognition(resolve(specs[0]), candidate)
    return None


def describe_nearest(state: Mapping[str, torch.Tensor]) -> str:
    """Why nothing was recognised, in words: the closest network and how far it is."""
    best: tuple[int, str, Difference] | None = None
    for candidate in spellings(state):
        shapes = shapes_of(candidate)
        for name, fingerprint in fingerprints().items():
            difference = compare(shapes, fingerprint.tensors)
            if difference.count < _CLOSE * len(shapes) and (best is None or difference.count < best[0]):
                best = difference.count, name, difference
    if best is None:
        return "no known network comes close"
    count, name, difference = best
    plural = "tensor differs" if count == 1 else "tensors differ"
    return f"closest is torchvision:{name}, {count} {plural}, first: {difference.first}"


def _torchvision_specs(shapes: Mapping[str, Shape]) -> list[str]:
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
    return _join(f"torchvision:{fingerprint.name}", options)


def _image_size(positions: int, shapes: Mapping[str, Shape]) -> int | None:
    """A vision transformer's image side from its position embedding: one position per patch, and one more."""
    side, patch = math.isqrt(max(positions - 1, 0)), shapes["conv_proj.weight"][-1]
    return side * patch if side and side * side == positions - 1 else None


def _builtin_specs(shapes: Mapping[str, Shape]) -> list[str]:
    return [spec for name, builtin in BUILTINS.items() if (spec := _match_builtin(name, builtin, shapes))]


def _match_builtin(name: str, builtin: Builtin, shapes: Mapping[str, Shape]) -> str | None:
    last, hidden = shapes.get(builtin.last), [shapes.get(weight) for weight in builtin.hidden]
    if last is None or len(last) != 2 or not all(shape and len(shape) > 1 for shape in hidden):
        return None
    rows = [shape[0] for shape in hidden if shape]
    stem = shapes[next(iter(builtin.hidden))]
    width = _width(list(zip(rows, builtin.hidden.values(), strict=True)))
    channels, rest = divmod(stem[1], builtin.pixels)
    if width is None or rest or not channels or not last[0]:
        return None
    options: dict[str, float] = {}
    if last[0] != 10:
        options["num_classes"] = last[0]
    if channels != builtin.channels:
        options["in_channels"] = channels
    if width != 1:
        options["width"] = width
    with torch.device("meta"):
        expected = shapes_of(builtin.make(**options).state_dict())
    return _join(f"builtin:{name}", options) if expected == shapes else None


def _width(layers: list[tuple[int, int]]) -> float | None:
    """The factor with the fewest digits that scales each layer's units to its rows."""
    low = max((rows - 0.5) / units if rows > 1 else 0 for rows, units in layers)
    for digits in range(8):
        width = max(math.ceil(low * 10**digits), 1) / 10**digits
        for candidate in (width, width + 10**-digits):  # the bound itself may round the other way
            if all(scaled(units, candidate) == rows for rows, units in layers):
                return float(round(candidate, digits))
    return None


def _join(base: str, options: Mapping[str, float]) -> str:
    query = "&".join(
        f"{key}={value:g}" if value == int(value) else f"{key}={value}" for key, value in options.items()
    )
    return base + ("&" if "?" in base else "?") + query if query else base
