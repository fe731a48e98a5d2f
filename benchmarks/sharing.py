"""Sizes of the networks of Deep Compression on Fashion-MNIST: ``python -m benchmarks.sharing``.

Everything goes through the command line: three seeds train a network each (those of ``benchmarks.pruning``,
if they are there), each is pruned to a twelfth and to a thirtieth of its weights, and what is left is shared
with ``--bits auto`` for files of several sizes. A command whose result is in the folder already is not
repeated.

    make assets && python -m benchmarks.sharing [--jobs N] [--folder DIR] [--output FILE.md] [--plot FILE.svg]
"""

import argparse
import datetime
import statistics
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.pruning import ROOT, SEEDS, TRAIN, file_name, model, run, spread, train, tuned
from modelopt_cli.measure.environment import cpu_name

PRUNED = {"12x": 1 / 12, "30x": 1 / 30}
RATIOS = {"12x": (40, 60, 80, 100), "30x": (80, 100, 130, 160)}
"""Times smaller than the fp32 file, by how many times fewer weights there are."""
WANTED = {"lenet300": 40, "lenet5": 39}
"""Deep Compression's own ratios (Han, Mao and Dally, ICLR 2016, table 1), on MNIST."""
LIMIT = 0.3
"""Points that may be lost at those."""


@dataclass(frozen=True)
class Point:
    """One network at one size, over the seeds.

    Attributes:
        fewer: the key of ``PRUNED``.
        wanted: the ratio that was asked for.
        dense: what was measured of the fp32 networks, by seed.
        small: the same of the files.
    """

    fewer: str
    wanted: int
    dense: list[dict[str, Any]]
    small: list[dict[str, Any]]

    @property
    def drops(self) -> list[float]:
        """Points of top-1 lost, against the fp32 network of the same seed."""
        return [before["top1"] - after["top1"] for before, after in zip(self.dense, self.small, strict=True)]

    @property
    def ratios(self) -> list[float]:
        """Bytes of the fp32 file over those of the small one."""
        pairs = zip(self.dense, self.small, strict=True)
        return [before["file_bytes"] / after["file_bytes"] for before, after in pairs]


def prune(folder: Path, network: str, fewer: str, seed: int) -> dict[str, Any]:
    """Prune the network of a seed."""
    name = f"{file_name(f'{network}, {fewer} fewer weights')}-{seed}"
    how = ("--structure", "unstructured", "--params", f"{PRUNED[fewer]:.6f}", "--schedule", "gradual")
    source = str(folder / f"{network}-{seed}.safetensors")
    return run(folder, name, ["prune", source, "--seed", str(seed), *how, *tuned(12, 0.05)])


def share(folder: Path, network: str, fewer: str, seed: int, ratio: int, dense: int) -> dict[str, Any]:
    """Share the pruned network of a seed, for a file so many times smaller than the dense one."""
    source = folder / f"{file_name(f'{network}, {fewer} fewer weights')}-{seed}.safetensors"
    budget = dense / ratio / source.stat().st_size
    command = ["share", str(source), "--seed", str(seed), "--bits", "auto", "--bytes", f"{budget:.6f}"]
    name = f"{source.stem}-shared-{ratio}x"
    return run(folder, name, [*command, "--calibration", TRAIN])


def points(folder: Path, network: str, pool: ThreadPoolExecutor) -> Iterator[Point]:
    """The whole curve of a network."""
    dense = [model(each) for each in pool.map(lambda seed: train(folder, network, seed), SEEDS)]
    for fewer in PRUNED:
        list(pool.map(lambda seed, fewer=fewer: prune(folder, network, fewer, seed), SEEDS))
    for fewer, ratios in RATIOS.items():
        for ratio in ratios:
            small = pool.map(
                lambda seed, fewer=fewer, ratio=ratio: share(
                    folder, network, fewer, seed, ratio, dense[seed]["file_bytes"]
                ),
                SEEDS,
            )
            yield Point(fewer, ratio, dense, [model(each) for each in small])


def rows(network: str, curve: list[Point]) -> Iterator[str]:
    """The table of a network."""
    dense = curve[0].dense
    yield f"**{network}**: {dense[0]['file_bytes']:,} bytes, top-1 {spread([d['top1'] for d in dense])} %"
    yield ""
    yield "| fewer weights | bytes | smaller | top-1, % | drop, pp |"
    yield "|---|---|---|---|---|"
    for point in curve:
        size = statistics.mean(after["file_bytes"] for after in point.small)
        smaller = statistics.mean(point.ratios)
        top1 = spread([after["top1"] for after in point.small])
        yield f"| {point.fewer} | {size:,.0f} | {smaller:.1f}x | {top1} | {spread(point.drops)} |"
    held = [p for p in curve if statistics.mean(p.drops) <= LIMIT]
    most = max((min(p.ratios) for p in held), default=0.0)
    yield ""
    yield f"Wanted: {WANTED[network]}x at a drop of at most {LIMIT} pp. Reached at that drop: {most:.1f}x."


def plot(curves: dict[str, list[Point]], path: Path) -> None:
    """Accuracy against bytes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "modelopt"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(5 * len(curves), 3.6), squeeze=False)
    for axis, (network, curve) in zip(axes[0], curves.items(), strict=True):
        for fewer in PRUNED:
            some = [point for point in curve if point.fewer == fewer]
            kilobytes = [statistics.mean(a["file_bytes"] for a in p.small) / 1000 for p in some]
            tops = [[a["top1"] for a in p.small] for p in some]
            errors = [statistics.stdev(values) for values in tops]
            means = [statistics.mean(values) for values in tops]
            axis.errorbar(kilobytes, means, errors, marker="o", capsize=3, label=f"{fewer} fewer weights")
        dense = statistics.mean(d["top1"] for d in curve[0].dense)
        axis.axhline(dense, color="grey", linestyle=":", label="fp32")
        axis.set_title(network)
        axis.set_xlabel("file, kB")
        axis.set_ylabel("top-1 on Fashion-MNIST's test images, %")
        axis.legend()
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Run what is missing, print the tables, draw the curves."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "benchmarks" / "pruning")
    parser.add_argument("--output", type=Path, help="also write the tables to this Markdown file")
    parser.add_argument("--plot", type=Path, help="draw the curves into this .svg file")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        curves = {network: list(points(options.folder, network, pool)) for network in WANTED}
    about = (
        f"{datetime.date.today()}, {cpu_name()}, torch {version('torch')}; mean and standard deviation of "
    )
    lines = [f"{about}seeds {SEEDS}", ""]
    for network, curve in curves.items():
        lines += [*rows(network, curve), ""]
    print("\n".join(lines))
    if options.plot:
        plot(curves, options.plot)
        lines += [f"![accuracy against bytes]({options.plot.name})", ""]
    if options.output:
        options.output.write_text("\n".join(lines).rstrip() + "\n")
    failed = [n for n, curve in curves.items() if not any(_meets(n, point) for point in curve)]
    sys.exit(f"missed: {', '.join(failed)}" if failed else 0)


def _meets(network: str, point: Point) -> bool:
    """True if a point is one that was wanted."""
    return min(point.ratios) >= WANTED[network] and statistics.mean(point.drops) <= LIMIT


if __name__ == "__main__":
    main()
