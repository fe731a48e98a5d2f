"""Holding out validation samples from those of training."""

import weakref

from modelopt_cli.data import Data
from modelopt_cli.errors import DataError, UsageError
from modelopt_cli.settings import option

_splits: "weakref.WeakKeyDictionary[Data, dict[tuple[float, int | None], tuple[Data, Data | None]]]" = (
    weakref.WeakKeyDictionary()
)


def samples(data: Data, val: Data | None, fraction: float, classes: int | None) -> tuple[Data, Data | None]:
    """Training and validation samples for a network of so many classes; ``val`` goes before ``fraction``.

    The same arguments give the same object for as long as ``data`` lives, so that what is kept in memory for
    one training serves the next one too.

    Raises:
        DataError: samples without labels or with labels of other classes, or too few of them.
        UsageError: as :func:`hold_out`.
    """
    for each in (data, val):
        if each is not None and not each.labelled:
            raise DataError("has no labels to train with", where=each.name)
    if val is not None:
        fraction = 0.0
    splits = _splits.setdefault(data, {})
    if (fraction, classes) not in splits:
        train, held = hold_out(data, fraction) if fraction else (data, None)
        if classes is not None:
            train, held = train.fits(classes), held.fits(classes) if held is not None else None
        splits[fraction, classes] = train, held
    train, held = splits[fraction, classes]
    return train, samples(val, None, 0.0, classes)[0] if val is not None else held


def hold_out(data: Data, fraction: float) -> tuple[Data, Data]:
    """Training and validation samples: a random ``fraction`` of ``data``, at least one, is held out.

    Which samples that are depends on their number and on ``fraction`` alone, not on a training's seed: what
    one command held out, the next one on the same data does not train on either.

    Raises:
        UsageError: the data is a stream, whose samples cannot be told apart.
        DataError: nothing would be left to train on.
    """
    if data.size is None:
        raise UsageError(
            f"{data.name} has no length to hold a fraction of",
            where=option("val_fraction"),
            hint=f"give {option('val')}",
        )
    size = len(data)
    held = max(1, round(fraction * size))
    if held >= size:
        raise DataError(
            f"{size} samples are too few to hold some out", where=data.name, hint=f"give {option('val')}"
        )
    return data.split(held)
