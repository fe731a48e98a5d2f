"""Loading of data in other processes, whose death is one error."""

import signal
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from modelopt_cli.errors import EnvironmentFailure
from modelopt_cli.settings import option

Item = TypeVar("Item")


def in_workers(items: Dataset[Item], workers: int, where: str) -> Iterator[Item]:
    """The items of a sized dataset in order, made by that many other processes.

    Raises:
        EnvironmentFailure: one of them died.
    """
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
