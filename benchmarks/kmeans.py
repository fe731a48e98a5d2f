"""4-bit tables for random-Gaussian weights in resnet50's shapes, next to scikit-learn's KMeans.

    python -m benchmarks.kmeans [--sklearn-python PATH] [--layers GLOB] [--repetitions N] [--output FILE]

One table for each layer. Both sides get the same data and make the table and the index of every weight, on
one thread, in turns. Of each layer's repetitions the shortest counts, by the clock and by processor time,
which neighbours on the machine disturb less; only our default and scikit-learn's are repeated, the others
run once. scikit-learn's default is k-means++ with `n_init="auto"`, which means 1 there; `n_init=1` is also
said outright. It is no dependency: it runs in the interpreter that `--sklearn-python` names. Squared errors
are all summed here, in float64, from the tables.
"""

import argparse
import datetime
import fnmatch
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import modelopt_cli  # noqa: F401  makes torchvision importable next to a CPU-only torch
from modelopt_cli.methods.share.choices import INITS
from modelopt_cli.methods.share.config import ShareConfig
from modelopt_cli.methods.share.kmeans import assign, cluster, error

ENTRIES = 16
OURS, REFERENCE = ShareConfig.init, "auto"
THEIRS = """
import sys, time
import numpy as np, sklearn
from sklearn.cluster import KMeans
print(sklearn.__version__, flush=True)
for line in sys.stdin:
    source, target, entries, init = line.split()
    x = np.load(source)[:, None]
    clock, processor = time.perf_counter(), time.process_time()
    fitted = KMeans(int(entries), n_init="auto" if init == "auto" else int(init), random_state=0).fit(x)
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    np.save(target, fitted.cluster_centers_[:, 0])
    print(clock, processor, flush=True)
"""


class Run(NamedTuple):
    """Seconds by the clock and of processor time, and the table."""

    clock: float
    processor: float
    table: Tensor


@dataclass
class Score:
    """One layer on one side: the best seconds and the squared error."""

    clock: float
    processor: float
    error: float


class Theirs:
    """scikit-learn in a process of its own, which waits while ours works."""

    def __init__(self, python: str, folder: Path) -> None:
        self.source, self.target = folder / "x.npy", folder / "table.npy"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [python, "-c", THEIRS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.version = self._line()

    def _line(self) -> str:
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise SystemExit("scikit-learn's process has ended")
        return line.strip()

    def fit(self, weight: Tensor, n_init: str) -> Run:
        """Table and labels."""
        assert self.process.stdin is not None
        np.save(self.source, weight.numpy())
        print(self.source, self.target, ENTRIES, n_init, file=self.process.stdin, flush=True)
        clock, processor = map(float, self._line().split())
        return Run(clock, processor, torch.from_numpy(np.load(self.target)).float().unique())


def ours(weight: Tensor, init: str) -> Run:
    """Table and indices."""
    clock, processor = time.perf_counter(), time.process_time()
    table = cluster(weight, ENTRIES, init=init)
    assign(weight, table)
    return Run(time.perf_counter() - clock, time.process_time() - processor, table)


def weights(pattern: str) -> dict[str, Tensor]:
    """Random-Gaussian weights, flat, of resnet50's convolutions and its linear layer."""
    import torchvision

    with torch.device("meta"):
        network = torchvision.models.resnet50()
    generator = torch.Generator().manual_seed(0)
    shapes = {name: p.shape for name, p in network.named_parameters() if p.dim() > 1}
    return {
        name: torch.randn(math.prod(shape), generator=generator) * (2 / math.prod(shape[1:])) ** 0.5
        for name, shape in shapes.items()
        if fnmatch.fnmatch(name, pattern)
    }


def compete(weight: Tensor, theirs: Theirs, repetitions: int) -> dict[str, Score]:
    """All sides on one layer."""
    runs: dict[str, list[Run]] = {side: [] for side in (*INITS, "1", REFERENCE)}
    for repetition in range(repetitions):
        for side, done in runs.items():
            if repetition == 0 or side in (OURS, REFERENCE):
                done.append(ours(weight, side) if side in INITS else theirs.fit(weight, side))
    return {
        side: Score(min(r.clock for r in done), min(r.processor for r in done), error(weight, done[0].table))
        for side, done in runs.items()
    }


def totals(scores: list[dict[str, Score]]) -> list[str]:
    """All layers together, one row for each side."""
    lines = [
        f"| | seconds | faster than `{REFERENCE}` | by processor time | squared error | above `exact` "
        f"| layers worse than `{REFERENCE}` | layers better than `exact` |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for side in scores[0]:
        title = f"`{side}`" if side in INITS else f"scikit-learn, `n_init={side}`"
        mine, reference, exact = ([s[name] for s in scores] for name in (side, REFERENCE, "exact"))
        clock, processor = sum(s.clock for s in mine), sum(s.processor for s in mine)
        total, least = sum(s.error for s in mine), sum(s.error for s in exact)
        worse = sum(a.error > b.error for a, b in zip(mine, reference, strict=True))
        better = sum(a.error < b.error for a, b in zip(mine, exact, strict=True))
        lines.append(
            f"| {title} | {clock:.2f} | {sum(s.clock for s in reference) / clock:.1f}x "
            f"| {sum(s.processor for s in reference) / processor:.1f}x | {total:.3f} "
            f"| {total / least - 1:.5%} | {worse} | {better} |"
        )
    return lines


def by_size(scores: list[dict[str, Score]], sizes: list[int]) -> list[str]:
    """Means over layers of one size."""
    lines = [
        f"| weights in a layer | layers | `{OURS}`, ms | scikit-learn `{REFERENCE}`, ms | faster "
        "| scikit-learn's error above ours |",
        "|---|---|---|---|---|---|",
    ]
    for size in sorted(set(sizes)):
        chosen = [s for s, n in zip(scores, sizes, strict=True) if n == size]
        mine, other = (1e3 * sum(s[side].clock for s in chosen) / len(chosen) for side in (OURS, REFERENCE))
        excess = sum(s[REFERENCE].error for s in chosen) / sum(s[OURS].error for s in chosen) - 1
        lines.append(
            f"| {size:,} | {len(chosen)} | {mine:.1f} | {other:.1f} | {other / mine:.1f}x | {excess:.2%} |"
        )
    return lines


def main() -> None:
    """Measure and print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sklearn-python", default=sys.executable, help="an interpreter with scikit-learn")
    parser.add_argument("--layers", default="*", help="glob of parameter names")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    from modelopt_cli.measure.environment import cpu_name

    layers = weights(options.layers)
    scores = []
    with tempfile.TemporaryDirectory() as folder:
        theirs = Theirs(options.sklearn_python, Path(folder))
        for name, weight in layers.items():
            scores.append(compete(weight, theirs, options.repetitions))
            ratio = scores[-1][REFERENCE].clock / scores[-1][OURS].clock
            print(f"{name}: {ratio:.1f}x", file=sys.stderr, flush=True)
        theirs.process.kill()
    sizes = [weight.numel() for weight in layers.values()]
    head = (
        f"{datetime.date.today()}, {cpu_name()}, torch {torch.__version__}, numpy {np.__version__}, "
        f"scikit-learn {theirs.version}, one thread, {len(layers)} layers with {sum(sizes) / 1e6:.1f} M "
        f"weights, {ENTRIES} entries each, best of {options.repetitions} interleaved repetitions of "
        f"`{OURS}` and `{REFERENCE}`"
    )
    text = "\n".join([head, "", *totals(scores), "", *by_size(scores, sizes)]) + "\n"
    print(text, end="")
    if options.output is not None:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
