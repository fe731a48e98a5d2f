"""Recognition of the network that a state dict belongs to, from its names and shapes alone."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from modelopt_cli.checkpoint.arch import Architecture
from modelopt_cli.checkpoint.fingerprint import fingerprints
from modelopt_cli.checkpoint.sources import SOURCES, resolve
from modelopt_cli.checkpoint.tensor_names import Difference, compare, shapes_of, spellings
from modelopt_cli.errors import ArchitectureError, EnvironmentFailure
from modelopt_cli.settings import option

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
    """The network that has exactly these names and shapes, of the first source that knows any.

    Returns:
        None where none fits; :func:`describe_nearest` says which comes close.

    Raises:
        ArchitectureError: several fit; names them.
    """
    recognised = recognise_state(state)
    return None if recognised is None else recognised.architecture


def recognise_state(state: Mapping[str, torch.Tensor]) -> Recognition | None:
    """Like :func:`recognise`, and return the tensors under the network's own names."""
    for candidate in spellings(state):
        shapes = shapes_of(candidate)
        known = (source.recognise(shapes) for source in SOURCES.values() if source.recognise)
        specs: list[str] = next(filter(None, known), [])
        if len(specs) > 1:
            raise ArchitectureError(
                f"the weights fit {len(specs)} networks: {', '.join(specs)}",
                hint=f"say which with {option('arch')}",
            )
        if specs:
            return Recognition(resolve(specs[0]), candidate)
    return None


def describe_nearest(state: Mapping[str, torch.Tensor]) -> str:
    """A sentence on why nothing was recognised: the closest network and how far it is."""
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


def recognise_file(
    state: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Tensor], arch: str | None
) -> tuple[Recognition | None, str | None]:
    """The network that a folder's configuration names, or whose names and shapes a file has.

    Args:
        state: the file's tensors.
        shapes: the same on the meta device.
        arch: the spec that the folder names.

    Returns:
        None where there is none, or where several fit; and why, if more is known than that none came close.
    """
    why = None
    try:
        if arch is not None:
            return Recognition(resolve(arch), dict(state)), None
    except (ArchitectureError, EnvironmentFailure) as error:
        why = str(error)
    try:
        found = recognise_state(dict(state)) if recognise(shapes) else None
    except ArchitectureError as error:
        return None, str(error)
    return found, None if found is not None else why
