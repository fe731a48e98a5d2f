"""Processor time of several ways to do one thing, measured in turns."""

import time
from collections.abc import Callable, Mapping

import torch


def shortest(ways: Mapping[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Milliseconds of processor time of the shortest call of each way, which neighbours disturb least.

    On one thread and an idle machine that is the time that passes.

    Args:
        ways: what is called, by name; the calls take turns.
        runs: calls of each.
    """
    taken = dict.fromkeys(ways, float("inf"))
    with torch.inference_mode():
        for _ in range(runs):
            for name, run in ways.items():
                begin = time.process_time()
                run()
                taken[name] = min(taken[name], (time.process_time() - begin) * 1e3)
    return taken
