"""What a teacher is worth on Fashion-MNIST: ``python -m benchmarks.distillation``.

The residual network of ``benchmarks.pruning`` teaches one of half its width, on all training images and on
10,000 of them, with three seeds. Everything goes through the command line, every student on one thread for
the same number of epochs, on the same four views of each image: from labels alone, and by each loss. The
teacher's answers are kept for each seed (``--cache``), so that it is asked once for all losses on logits. A
command whose result is in the folder already is not repeated.

    make assets && python -m benchmarks.pruning
    python -m benchmarks.distillation [--jobs N] [--sizes NAME ...] [--only LOSS ...] [--output FILE.md]
"""

import argparse
import datetime
import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.pruning import ROOT, SEEDS, TRAIN, accuracy, file_name, run, spread
from modelopt_cli.data import open_data
from modelopt_cli.measure.environment import cpu_name

TEACHER = ROOT / "build" / "benchmarks" / "pruning" / "resnet8-0.safetensors"
STUDENT = "builtin:resnet8?in_channels=1&width=0.5"
EPOCHS = {"10,000": 20, "all": 8}
"""By how many training images there are."""
SCRATCH = "labels alone"
LOSSES = {
    "kd": "ce:0.1+kd:0.9",
    "dkd": "ce+dkd",
    "std": "ce:0.1+std:9",
    "dist": "ce+dist",
    "mse": "ce:0.1+mse:0.9",
    "hint": "ce+hint:1",
    "kd and hint": "ce:0.1+kd:0.9+hint:1",
}
HOW = ("--batch-size", "128", "--lr", "0.1", "--warmup", "1", "--augment", "cifar", "--views", "4")


def data(folder: Path, size: str) -> str:
    """The spec of the training images."""
    if size == "all":
        return TRAIN
    path = folder / f"train-{file_name(size)}.npz"
    if not path.exists():
        whole = open_data(TRAIN).sample(int(size.replace(",", "")), seed=0)
        pairs = [whole.get(index) for index in range(len(whole))]
        images = np.stack([(image.numpy() * 255).round().astype(np.uint8)[0] for image, _ in pairs])
        np.savez(path, images=images, labels=np.array([label for _, label in pairs]))
    return f"npz:{path}"


def learn(folder: Path, size: str, name: str, seed: int) -> dict[str, Any]:
    """One student, by labels alone or by a loss."""
    options = ("--train", data(folder, size), "--epochs", str(EPOCHS[size]), "--seed", str(seed), *HOW)
    target = f"{file_name(size)}-{file_name(name)}-{seed}"
    if name == SCRATCH:
        return run(folder, target, ["train", "--arch", STUDENT, *options])
    command = ["distill", str(TEACHER), "--student", STUDENT, "--loss", LOSSES[name], *options]
    if "hint" not in LOSSES[name]:
        command += ["--cache", str(folder / f"{file_name(size)}-answers-{seed}")]
    return run(folder, target, command)


def row(name: str, results: list[dict[str, Any]], alone: list[dict[str, Any]]) -> str:
    """Mean and spread, and the paired gain over labels alone with its 95 % interval."""
    top1 = spread([accuracy(result) for result in results])
    seconds = statistics.mean(result["seconds"] for result in results)
    if name == SCRATCH:
        return f"| {name} | | {top1} | | {seconds:.0f} |"
    gains = [accuracy(a) - accuracy(b) for a, b in zip(results, alone, strict=True)]
    mean, error = statistics.mean(gains), statistics.stdev(gains) / len(gains) ** 0.5
    reach = float(stats.t.ppf(0.975, len(gains) - 1)) * error
    return f"| {name} | `{LOSSES[name]}` | {top1} | {mean:+.2f} ± {reach:.2f} | {seconds:.0f} |"


def rows(
    found: dict[tuple[str, str], list[dict[str, Any]]], sizes: list[str], names: list[str]
) -> Iterator[str]:
    """The tables, one for each number of images."""
    for size in sizes:
        yield f"**{size} training images, {EPOCHS[size]} epochs**"
        yield ""
        yield "| learned from | `--loss` | top-1, % | over labels alone, pp, 95 % interval | seconds |"
        yield "|---|---|---|---|---|"
        yield from (row(name, found[size, name], found[size, SCRATCH]) for name in (SCRATCH, *names))
        yield ""


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--sizes", nargs="*", choices=EPOCHS, default=list(EPOCHS))
    parser.add_argument("--only", nargs="*", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "benchmarks" / "distillation")
    parser.add_argument("--output", type=Path, help="also write the tables to this Markdown file")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    with ThreadPoolExecutor(options.jobs) as pool:
        for size in options.sizes:
            data(options.folder, size)
            # A loss after the other: those of one seed write to the same cache, but not at one time.
            for name in (SCRATCH, *options.only):
                futures = [pool.submit(learn, options.folder, size, name, seed) for seed in SEEDS]
                found[size, name] = [future.result() for future in futures]
    text = "\n".join(rows(found, options.sizes, options.only))
    print(text)
    if options.output:
        about = f"{datetime.date.today()}, {cpu_name()}, torch {version('torch')}, seeds {SEEDS}"
        options.output.write_text(f"{about}; teacher resnet8, student {STUDENT}\n\n{text}")


if __name__ == "__main__":
    main()
