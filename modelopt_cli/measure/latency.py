"""Latency of a forward pass: interleaved, warmed up, with its spread.

All models are timed in the same rounds. A round calls every model once, in a newly drawn order, so
whatever drifts (heat, another process) hits all of them alike. The figures are the median and the
distance between the quartiles, because the tail belongs to the machine rather than to the model.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from modelopt_cli.program.input_batch import Inputs, call, channels_last, tensors_of, to
from modelopt_cli.program.input_spec import InputSpec
from modelopt_cli.program.samples import noise
from modelopt_cli.settings import option

Call = Callable[..., object]
Progress = Callable[[int, int | None], None]
_WIDE = 0.2  # interquartile range over median above which times are called unsteady


@dataclass(frozen=True)
class Latency:
    """Wall-clock time of one forward pass of a whole batch.

    Attributes:
        median: milliseconds.
        iqr: third quartile minus first, milliseconds.
        runs: timed passes.
        batch_size: samples in a pass.
        variant: that was timed: ``as loaded``, ``eager``, or one of ``variants.VARIANTS``.
        times: of every round, in order, milliseconds.
    """

    median: float
    iqr: float
    runs: int
    batch_size: int
    variant: str = "as loaded"
    times: tuple[float, ...] = field(default=(), repr=False)

    @property
    def throughput(self) -> float:
        """Samples per second at the median."""
        return 1000.0 * self.batch_size / self.median

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        return self.iqr / self.median


def sample_input(
    input_spec: InputSpec, batch_size: int, *, seed: int = 0, device: str = "cpu", below: int = 2
) -> Inputs:
    """Make a batch of noise, see ``program.samples``; images are channels-last, as decoders give them."""
    return channels_last(to(noise(input_spec, batch_size, seed=seed, below=below), device))


def time_interleaved(
    calls: Sequence[tuple[Call, Inputs]],
    *,
    warmup: int,
    runs: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[list[float]]:
    """Times in milliseconds, ``runs`` for each model.

    Args:
        calls: models, each with its input batch.
        warmup: rounds that are not recorded.
        runs: rounds that are.
        seed: of the order within the rounds.
        progress: called after every round.
    """
    order = list(range(len(calls)))
    shuffle = random.Random(seed).shuffle
    times: list[list[float]] = [[] for _ in calls]
    with torch.inference_mode():
        for done in range(warmup + runs):
            shuffle(order)
            for i in order:
                spent = _time_once(*calls[i])
                if done >= warmup:
                    times[i].append(spent)
            if progress:
                progress(done + 1, warmup + runs)
    return times


def summarise(times: Sequence[float], batch_size: int, variant: str) -> Latency:
    """Median and interquartile range of times in milliseconds."""
    if len(times) > 1:
        low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    else:
        low = middle = high = times[0]
    return Latency(middle, high - low, len(times), batch_size, variant, tuple(times))


def noise_notes(latencies: Mapping[str, Latency], threads: int, cores: float) -> list[str]:
    """One line for each thing that makes the latencies unsteady.

    Args:
        latencies: by the path of the model.
        threads: torch threads within one operator.
        cores: that this process may use.
    """
    notes = [
        f"{path}: its times vary, with an interquartile range of {100 * timed.spread:.0f} % of the median; "
        f"stop what else runs here, or raise {option('latency_runs')}"
        for path, timed in latencies.items()
        if timed.spread > _WIDE
    ]
    if latencies and threads > max(1.0, cores):
        notes.append(
            f"{threads} threads share {cores:g} core{'s' * (cores != 1)}, which makes latency longer and "
            f"unsteady; give {option('threads', max(1, int(cores)))}"
        )
    return notes


@contextmanager
def threads(count: int | None) -> Iterator[int]:
    """Let torch use ``count`` threads within one operator, and restore what was set before."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _time_once(model: Call, inputs: Inputs) -> float:
    device = tensors_of(inputs)[0].device
    if device.type == "cuda":
        return _time_on_cuda(model, inputs, device)
    start = time.perf_counter_ns()
    call(model, inputs)
    return (time.perf_counter_ns() - start) / 1e6


def _time_on_cuda(model: Call, inputs: Inputs, device: torch.device) -> float:
    """Between two events on the device: a CUDA call returns before its work is done."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    call(model, inputs)
    end.record()
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(end))
