"""Loading of data here or in other processes, whose death is one error."""

import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from modelopt_cli.errors import EnvironmentFailure, ModeloptError
from modelopt_cli.settings import option

Item = TypeVar("Item")


def in_order(make: Callable[[int], Item], count: int, workers: int, where: str) -> Iterator[Item]:
    """The items ``make(0)`` to ``make(count - 1)``.

    Args:
        make: an item from its number; where other processes make it, it cannot change anything here.
        count: number of items.
        workers: so many other processes make them; 0 for this one.
        where: place to name in an error.

    Raises:
        ModeloptError: as ``make``.
        EnvironmentFailure: one of the processes died.
    """
    if workers == 0 or count == 0:
        yield from map(make, range(count))
        return
    for item in _in_workers(_Items(make, count), min(workers, count), where):
        if isinstance(item, ModeloptError):
            raise item
        yield item


class _Items(Dataset[Item | ModeloptError], Generic[Item]):
    """Items by number. A worker hands an error back as a value, for torch would make a page of it."""

    def __init__(self, make: Callable[[int], Item], count: int) -> None:
        self.make, self.count = make, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Item | ModeloptError:
        try:
            return self.make(number)
        except ModeloptError as error:
            return error.with_traceback(None)


def _in_workers(items: Dataset[Item], workers: int, where: str) -> Iterator[Item]:
    loader: DataLoader[Item] = DataLoader(
        items,
        batch_size=None,
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=_leave_interrupts_to_parent,
        # Its own generator: a loader draws from the global one otherwise, and workers would change results.
        generator=torch.Generator(),
    )
    before = signal.getsignal(signal.SIGCHLD)
    try:
        results = iter(loader)
        # The loader's handler raises wherever the program happens to be when a worker dies. Without it the
        # loader finds out by itself, within seconds, and raises here.
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before)
        yield from results
    except (RuntimeError, OSError, EOFError) as error:
        # What a worker itself raised comes back as "Caught ..."; the rest is a worker that is gone.
        if str(error).startswith("Caught"):
            raise
        raise EnvironmentFailure(
            "a data worker died",
            where=where,
            hint=f"use fewer {option('workers')}, or {option('workers', 0)}",
        ) from error


def _unchanged(item: Any) -> Any:
    return item


def _leave_interrupts_to_parent(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
