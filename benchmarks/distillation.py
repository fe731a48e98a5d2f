"""Gain from a teacher on Fashion-MNIST: ``python -m benchmarks.distillation``.

The residual network of ``benchmarks.pruning`` teaches one of half its width, on all training images and on
10,000 of them, with three seeds. Everything goes through the command line, every student on one thread for
the same number of epochs, with the same four augmentations of each image: from labels alone, and by each
loss. The teacher's logits are kept for each seed (``--cache``), so that it is asked once for all losses on
logits. A command whose result is in the folder already is not repeated.

    make assets && python -m benchmarks.pruning
    python -m benchmarks.distillation [--jobs N] [--sizes NAME ...] [--only LOSS ...] [--output FILE.md]

With ``--torchdistill-python ENV/bin/python`` torchdistill trains the same students by its own KD loss and its
own loop: from the same weights and teacher, on the same images, for as many steps at the same rates; both
augment images anew in every epoch. It is no dependency of this project and has an environment of its own:

    python3 -m venv ENV && ENV/bin/pip install torch torchvision safetensors torchdistill==1.1.5
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from benchmarks.pruning import ROOT, SEEDS, TEST, TRAIN, accuracy, file_name, run, spread
from modelopt_cli.artifact import read_program
from modelopt_cli.checkpoint import fresh_model
from modelopt_cli.data import Data, open_data
from modelopt_cli.measure.environment import cpu_name
from modelopt_cli.training import TrainConfig

TEACHER = ROOT / "build" / "benchmarks" / "pruning" / "resnet8-0.safetensors"
WIDTH = 0.5
STUDENT = f"builtin:resnet8?in_channels=1&width={WIDTH}"
EPOCHS = {"10,000": 20, "all": 3}
"""By how many training images there are."""
SCRATCH = "labels alone"
LOSSES = {
    "kd": "ce:0.1+kd:0.9",
    "dkd": "ce+dkd",
    "std": "ce:0.1+std:9",
    "hint": "ce+hint:1",
    "kd and hint": "ce:0.1+kd:0.9+hint:1",
    "dist": "ce+dist",
    "mse": "ce:0.1+mse:0.9",
}
LR, WARMUP, BATCH_SIZE = 0.1, 1, 128
HOW = ("--batch-size", str(BATCH_SIZE), "--lr", str(LR), "--warmup", str(WARMUP), "--augment", "cifar")
SIDE_BY_SIDE = "10,000"
"""Training images of the students that torchdistill trains, too."""
OURS, THEIRS = "modelopt", "torchdistill"


@dataclass(frozen=True)
class Result:
    """Figures of one student: top-1 on the test images in percent, and what it took to train it."""

    top1: float
    seconds: float


def data(folder: Path, size: str) -> str:
    """The spec of the training images."""
    if size == "all":
        return TRAIN
    path = folder / f"train-{file_name(size)}.npz"
    if not path.exists():
        images, labels = arrays(open_data(TRAIN).sample(int(size.replace(",", "")), seed=0))
        pixels = (images * 255).round().to(torch.uint8)[:, 0].numpy()
        np.savez(path, images=pixels, labels=labels.numpy())
    return f"npz:{path}"


def arrays(whole: Data) -> tuple[torch.Tensor, torch.Tensor]:
    """All images, float ``(N, C, H, W)``, and their labels."""
    pairs = [whole.get(index) for index in range(len(whole))]
    return torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])


def learn(folder: Path, size: str, name: str, seed: int) -> Result:
    """One student, by labels alone or by a loss."""
    options = ("--train", data(folder, size), "--epochs", str(EPOCHS[size]), "--seed", str(seed), *HOW)
    options += ("--augmentation-cycle", "4")
    target = f"{file_name(size)}-{file_name(name)}-{seed}"
    if name == SCRATCH:
        return of(run(folder, target, ["train", "--arch", STUDENT, *options]))
    command = ["distill", str(TEACHER), "--student", STUDENT, "--loss", LOSSES[name], *options]
    if "hint" not in LOSSES[name]:
        command += ["--cache", str(folder / f"{file_name(size)}-logits-{seed}")]
    return of(run(folder, target, command))


def of(printed: dict[str, Any]) -> Result:
    """The output of a command."""
    return Result(accuracy(printed), printed["seconds"])


def ours(folder: Path, seed: int) -> Result:
    """A student by our KD, with a new augmentation of each image in every epoch."""
    train = data(folder, SIDE_BY_SIDE)
    options = ("--train", train, "--epochs", str(EPOCHS[SIDE_BY_SIDE]), "--seed", str(seed), *HOW)
    command = ["distill", str(TEACHER), "--student", STUDENT, "--loss", LOSSES["kd"], *options]
    return of(run(folder, f"next-to-{OURS}-{seed}", command))


def theirs(folder: Path, seed: int, python: Path) -> Result:
    """The same student by torchdistill's."""
    result = folder / f"next-to-{THEIRS}-{seed}.json"
    if not result.exists():
        job = folder / f"next-to-{THEIRS}-{seed}.pt"
        torch.save(job_of(folder, seed), job)
        command = [str(python), "-m", "benchmarks.torchdistill_worker", str(job)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
        result.write_text(done.stdout)
        print(f"{result.stem}: {done.stdout.strip()}", file=sys.stderr, flush=True)
    found = json.loads(result.read_text())
    return Result(found["top1"], found["seconds"])


def job_of(folder: Path, seed: int) -> dict[str, Any]:
    """Configuration for torchdistill."""
    teacher = read_program(TEACHER)
    student = fresh_model(f"{STUDENT}&num_classes=10", teacher.input, seed)
    train, test = (open_data(spec, input_spec=teacher.input) for spec in (data(folder, SIDE_BY_SIDE), TEST))
    config = TrainConfig(EPOCHS[SIDE_BY_SIDE], BATCH_SIZE, lr=LR, warmup=WARMUP)
    images, labels = arrays(train)
    test_images, test_labels = arrays(test)
    return {
        "seed": seed,
        "teacher": dict(teacher.state_dict()),
        "student": student.state,
        "width": WIDTH,
        "config": config.as_dict(),
        "weights": {"ce": 0.1, "kd": 0.9, "temperature": 4.0},
        "images": images,
        "labels": labels,
        "test_images": test_images,
        "test_labels": test_labels,
    }


def mean_of(results: list[Result]) -> tuple[str, str]:
    """Top-1 with its spread, and seconds."""
    return spread([result.top1 for result in results]), f"{statistics.mean(r.seconds for r in results):.0f}"


def gain(results: list[Result], others: list[Result]) -> str:
    """The mean difference over the seeds in points, with its paired 95 % interval (Student's t)."""
    gains = [a.top1 - b.top1 for a, b in zip(results, others, strict=True)]
    mean, error = statistics.mean(gains), statistics.stdev(gains) / len(gains) ** 0.5
    return f"{mean:+.2f} ± {float(stats.t.ppf(0.975, len(gains) - 1)) * error:.2f}"


def rows(found: dict[tuple[str, str], list[Result]], sizes: list[str], names: list[str]) -> Iterator[str]:
    """The tables, one for each number of images."""
    for size in sizes:
        yield f"**{size} training images, {EPOCHS[size]} epochs**"
        yield ""
        yield "| learned from | `--loss` | top-1, % | over labels alone, pp, 95 % interval | seconds |"
        yield "|---|---|---|---|---|"
        alone = found[size, SCRATCH]
        top1, seconds = mean_of(alone)
        yield f"| {SCRATCH} | | {top1} | | {seconds} |"
        for name in names:
            top1, seconds = mean_of(found[size, name])
            over = gain(found[size, name], alone)
            yield f"| {name} | `{LOSSES[name]}` | {top1} | {over} | {seconds} |"
        yield ""


def rows_beside(pair: dict[str, list[Result]]) -> Iterator[str]:
    """The table of both tools."""
    yield f"**KD next to torchdistill, {SIDE_BY_SIDE} training images, {EPOCHS[SIDE_BY_SIDE]} epochs**"
    yield ""
    yield "| by | top-1, % | ours over theirs, pp, 95 % interval | seconds |"
    yield "|---|---|---|---|"
    for name, results in pair.items():
        top1, seconds = mean_of(results)
        over = gain(pair[OURS], pair[THEIRS]) if name == OURS else ""
        yield f"| {name} | {top1} | {over} | {seconds} |"
    yield ""


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--sizes", nargs="*", choices=EPOCHS, default=list(EPOCHS))
    parser.add_argument("--only", nargs="*", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--torchdistill-python", type=Path, help="of an environment that has torchdistill")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "benchmarks" / "distillation")
    parser.add_argument("--output", type=Path, help="also write the tables to this Markdown file")
    options = parser.parse_args()
    folder, python = options.folder, options.torchdistill_python
    folder.mkdir(parents=True, exist_ok=True)
    for size in options.sizes:
        data(folder, size)
    # More would begin two of one seed at once, which share a cache that is not there yet.
    with ThreadPoolExecutor(min(options.jobs, len(SEEDS))) as pool:
        students = {
            (size, name): [pool.submit(learn, folder, size, name, seed) for seed in SEEDS]
            for size in options.sizes
            for name in (SCRATCH, *options.only)
        }
        pairs = []
        if python is not None:
            pairs = [
                (pool.submit(ours, folder, seed), pool.submit(theirs, folder, seed, python)) for seed in SEEDS
            ]
        found = {key: [each.result() for each in runs] for key, runs in students.items()}
        lines = list(rows(found, options.sizes, options.only))
        if pairs:
            first, second = ([each.result() for each in tool] for tool in zip(*pairs, strict=True))
            lines += rows_beside({OURS: first, THEIRS: second})
    text = "\n".join(lines)
    print(text)
    if options.output:
        about = f"{datetime.date.today()}, {cpu_name()}, torch {version('torch')}, seeds {SEEDS}"
        options.output.write_text(f"{about}; teacher resnet8, student {STUDENT}\n\n{text}")


if __name__ == "__main__":
    main()
