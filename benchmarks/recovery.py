"""Accuracy that distillation gives back to a pruned network: ``python -m benchmarks.recovery``.

The residual network of ``benchmarks.pruning`` loses channels in one shot, without training, until 30 % of its
FLOPs are left. Its dense self then teaches it on Fashion-MNIST's training images; the same pruned network
learns as long from the labels alone (``--compare-scratch``). Three seeds of the training, all from the same
pruned file, each command on one thread. A command whose result is in the folder already is not repeated.

    make assets && python -m benchmarks.pruning
    python -m benchmarks.recovery [--jobs N] [--epochs N] [--output FILE.md]
"""

import argparse
import datetime
import statistics
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.distillation import TEACHER
from benchmarks.pruning import ROOT, SEEDS, TRAIN, accuracy, model, run, spread
from modelopt_cli.measure.environment import cpu_name

FLOPS = 0.3
LOSS = "ce:0.1+kd:0.9"
HOW = ("--lr", "0.1", "--warmup", "1", "--augment", "cifar")


def prune(folder: Path) -> dict[str, Any]:
    """The network that is to recover, and what it can still do."""
    return run(folder, "pruned", ["prune", str(TEACHER), "--flops", str(FLOPS), "--round-to", "4"])


def recover(folder: Path, epochs: int, seed: int) -> dict[str, Any]:
    """It, after learning from its dense self; next to it, from labels alone."""
    command = ["distill", str(TEACHER), "--student", str(folder / "pruned.safetensors"), "--loss", LOSS]
    command += ["--train", TRAIN, "--epochs", str(epochs), "--seed", str(seed), "--compare-scratch", *HOW]
    return run(folder, f"recovered-{epochs}-{seed}", command)


def row(name: str, tops: list[float], dense: float, pruned: float) -> str:
    """A row of the table."""
    back = 100 * (statistics.mean(tops) - pruned) / (dense - pruned)
    return f"| {name} | {spread(tops)} | {statistics.mean(tops) - dense:+.2f} | {back:.1f} % |"


def table(found: list[dict[str, Any]], pruned: dict[str, Any], epochs: int) -> str:
    """Accuracy of each network, and the share of the drop that is back."""
    # The models of a comparison: the teacher, the student from labels alone, the student.
    tops = [[float(each["top1"]) for each in result["evaluation"]["models"]] for result in found]
    dense, left = tops[0][0], accuracy(pruned)
    flops = model(pruned)["macs"] / pruned["evaluation"]["models"][0]["macs"]
    lines = [
        "| network | top-1, % | to the dense one, pp | of the drop is back |",
        "|---|---|---|---|",
        f"| dense | {dense:.2f} | | |",
        f"| pruned to {100 * flops:.1f} % of the FLOPs, no training | {left:.2f} | {left - dense:+.2f} | |",
        row(f"{epochs} epochs of labels alone", [each[1] for each in tops], dense, left),
        row(f"{epochs} epochs of `{LOSS}` from its dense self", [each[2] for each in tops], dense, left),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "benchmarks" / "recovery")
    parser.add_argument("--output", type=Path, help="also write the table to this Markdown file")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    pruned = prune(options.folder)
    with ThreadPoolExecutor(options.jobs) as pool:
        found = list(pool.map(partial(recover, options.folder, options.epochs), SEEDS))
    text = table(found, pruned, options.epochs)
    print(text)
    if options.output:
        about = f"{datetime.date.today()}, {cpu_name()}, torch {version('torch')}, seeds {SEEDS}"
        options.output.write_text(f"{about}\n\n{text}")


if __name__ == "__main__":
    main()
