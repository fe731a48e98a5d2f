"""Sizes of the inputs that may be others: height and width, length of a sequence, time.

Each is tried at a second size. It is free if the network takes that, and the Program gives the same there.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

from modelopt_cli.program.input_spec import INPUT_TYPE, InputSpec

Places = dict[str, tuple[int, ...]]
"""Places in the shapes of the inputs, by their names."""

STEP = 32
"""Pixels by which an image's sides differ: networks halve them five times."""
_CHANGES = (-0.5, 0.5, 1.0)
"""Parts of a length by which it differs, in the order in which they are tried."""


def free_sizes(input_spec: InputSpec, agree: Callable[[InputSpec], bool]) -> InputSpec:
    """The description of the inputs with the places whose sizes are free.

    Args:
        input_spec: the inputs; those that are free already are not asked for.
        agree: True if network and Program give the same for inputs of other sizes.
    """
    free: dict[str, set[int]] = {each.name: set() for each in input_spec.tensors}
    for together in _candidates(input_spec):
        apart: list[Places] = [{name: (place,)} for name, places in together.items() for place in places]
        free_places = [together] if _agrees(input_spec, together, agree) else []
        if not free_places and together not in apart:
            free_places = [places for places in apart if _agrees(input_spec, places, agree)]
        for places in free_places:
            for name, own in places.items():
                free[name].update(own)
    first, *others = (replace(each, free=tuple(sorted(free[each.name]))) for each in input_spec.tensors)
    return replace(first, others=tuple(others))


def _agrees(input_spec: InputSpec, places: Places, agree: Callable[[InputSpec], bool]) -> bool:
    return any(map(agree, _resized(input_spec, places)))


def _candidates(input_spec: InputSpec) -> Iterator[Places]:
    """Places that may vary together: both sides of images, then the lengths that are equal."""
    inputs = input_spec.tensors
    if sides := {each.name: _sides(each) for each in inputs if _sides(each)}:
        yield sides
    rows = [(each, place) for each in inputs for place in _row_places(each)]
    for size in sorted({each.shape[place] for each, place in rows}):
        alike: Places = {}
        for each, place in rows:
            if each.shape[place] == size:
                alike[each.name] = (*alike.get(each.name, ()), place)
        yield alike


def _sides(each: InputSpec) -> tuple[int, ...]:
    """Places of height and width: ``(C, H, W)``, ``(C, T, H, W)``."""
    rank = len(each.shape)
    return (rank - 2, rank - 1) if rank in (3, 4) else ()


def _row_places(each: InputSpec) -> tuple[int, ...]:
    """Places that may be a length or a time: ``(T,)``, ``(T, C)`` or ``(C, T)``, ``(C, T, H, W)``."""
    return {1: (0,), 2: (0, 1), 4: (1,)}.get(len(each.shape), ())


def _resized(input_spec: InputSpec, places: Places) -> Iterator[InputSpec]:
    """The inputs with other sizes there: first smaller ones, which take less time, then larger ones.

    A length that is doubled comes last: it can be halved as often as before, and once more. That of tokens is
    not: a network that needs such lengths of them is to get the one that it was captured with.
    """
    for change in _CHANGES:
        tensors = [_with_sizes(each, places.get(each.name, ()), change) for each in input_spec.tensors]
        if all(tensor is not None for tensor in tensors):
            first, *others = [tensor for tensor in tensors if tensor is not None]
            yield replace(first, others=tuple(others))


def _with_sizes(each: InputSpec, places: tuple[int, ...], change: float) -> InputSpec | None:
    """An input with other sizes; None where it cannot have them."""
    shape, larger = list(each.shape), change > 0
    for number, place in enumerate(places):
        side = place in _sides(each)
        if change == 1 and (side or each.dtype != INPUT_TYPE):
            return None
        step = (number + 1) * STEP if side else int(shape[place] * abs(change))
        shape[place] += max(step, 1) if larger else -step
        if not larger and (step == 0 or shape[place] < min(STEP, step)):
            return None
    return replace(each, shape=tuple(shape))
