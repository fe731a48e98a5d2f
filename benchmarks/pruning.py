"""Pruning on Fashion-MNIST, from training to the table: ``python -m benchmarks.pruning``.

Everything goes through the command line, as a user would do it: three seeds train a network each, and every
way of compressing starts from those. Each command runs on one thread, as many of them at once as ``--jobs``
says. A command whose result is in the folder already is not repeated, so that an interrupted run goes on.

    make assets && python -m benchmarks.pruning [--jobs N] [--folder DIR] [--output FILE] [--only NAME ...]
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from modelopt_cli.measure.environment import cpu_name

Results = dict[str, list[dict[str, Any]]]
"""By name, what the command printed for every seed."""
ROOT = Path(__file__).parent.parent
SEEDS = (0, 1, 2)
TEST = "idx:assets/fashion-mnist"
TRAIN = f"{TEST}?split=train"
RESNET_TRAINING = ("--augment", "cifar", "--amp")
TAUGHT = (*RESNET_TRAINING, "--teacher", "self", "--weight-decay", "1e-4")
"""Few weights are left to fit with: they are pulled towards zero less than usual, and told more."""


@dataclass(frozen=True)
class Network:
    """A network to train: its architecture and how."""

    arch: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Experiment:
    """One way of compressing one of the networks.

    Attributes:
        network: a key of ``NETWORKS``.
        options: of the command.
        limit: the drop in points that it may cost, or None where there is none.
        command: of modelopt.
        after: the experiment whose results it starts from; None for those of training.
    """

    network: str
    options: tuple[str, ...]
    limit: float | None = None
    command: str = "prune"
    after: str | None = None


NETWORKS = {
    "resnet8": Network(
        "builtin:resnet8?in_channels=1", ("--epochs", "16", "--lr", "0.2", "--warmup", "1", *RESNET_TRAINING)
    ),
    "lenet300": Network("builtin:lenet300", ("--epochs", "12", "--lr", "0.05")),
    "lenet5": Network("builtin:lenet5", ("--epochs", "12", "--lr", "0.05")),
}


def tuned(epochs: int, lr: float, *more: str) -> tuple[str, ...]:
    """Options of fine-tuning."""
    return ("--train", TRAIN, "--epochs", str(epochs), "--lr", str(lr), *more)


UNSTRUCTURED = ("--structure", "unstructured")
TWELFTH = (*UNSTRUCTURED, "--params", f"{1 / 12:.6f}", "--schedule", "gradual")
AT_70 = (*UNSTRUCTURED, "--sparsity", "0.7", "--calibration", TRAIN, "--calibration-samples", "2048")
INT8 = ("--calibration", TRAIN)
EXPERIMENTS = {
    "channels to 50 % FLOPs": Experiment(
        "resnet8", ("--flops", "0.5", "--round-to", "4", *tuned(8, 0.1, *RESNET_TRAINING)), 0.5
    ),
    "unstructured 90 %": Experiment(
        "resnet8",
        (*UNSTRUCTURED, "--sparsity", "0.9", "--schedule", "gradual", *tuned(16, 0.1, *TAUGHT)),
        0.5,
    ),
    "int8": Experiment("resnet8", INT8, command="quantize"),
    "2:4": Experiment("resnet8", ("--structure", "2:4", *tuned(5, 0.05, *RESNET_TRAINING)), 0.2),
    "one-shot OBS 70 %": Experiment("resnet8", (*AT_70, "--criterion", "obs")),
    "one-shot magnitude 70 %": Experiment("resnet8", (*AT_70, "--criterion", "l2")),
    "lenet300, 12x fewer weights": Experiment("lenet300", (*TWELFTH, *tuned(12, 0.05)), 0.3),
    "lenet5, 12x fewer weights": Experiment("lenet5", (*TWELFTH, *tuned(12, 0.05)), 0.3),
    "unstructured 90 %, then int8": Experiment(
        "resnet8", INT8, command="quantize", after="unstructured 90 %"
    ),
}


def run(folder: Path, name: str, command: list[str]) -> dict[str, Any]:
    """The JSON a command prints, from its file if it has run before."""
    result = folder / f"{name}.json"
    if not result.exists():
        started = time.monotonic()
        full = [
            sys.executable,
            "-m",
            "modelopt_cli",
            *command,
            "--json",
            "-q",
            "--threads",
            "1",
            "--latency-runs",
            "0",
        ]
        full += ["--data", TEST, "-o", str(folder / f"{name}.safetensors"), "--force"]
        done = subprocess.run(full, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            raise RuntimeError(f"{' '.join(full)}: {done.stderr}")
        found = json.loads(done.stdout)
        found["seconds"] = round(time.monotonic() - started)
        result.write_text(json.dumps(found, indent=1))
        print(f"{name}: {accuracy(found):.2f} %, {found['seconds']} s", file=sys.stderr, flush=True)
    loaded: dict[str, Any] = json.loads(result.read_text())
    return loaded


def model(result: dict[str, Any]) -> dict[str, Any]:
    """Measurements of the network that a command wrote."""
    found: dict[str, Any] = result["evaluation"]["models"][-1]
    return found


def accuracy(result: dict[str, Any]) -> float:
    """Top-1 in percent of the network a command wrote."""
    return float(model(result)["top1"])


def file_name(text: str) -> str:
    """A name without characters that a shell minds."""
    return "".join(char if char.isalnum() else "-" for char in text)


def train(folder: Path, network: str, seed: int) -> dict[str, Any]:
    """Train a network from scratch."""
    how = NETWORKS[network]
    command = ["train", "--arch", how.arch, "--train", TRAIN, "--seed", str(seed), *how.options]
    return run(folder, f"{network}-{seed}", command)


def compress(folder: Path, name: str, seed: int, before: "Future[Any] | None") -> dict[str, Any]:
    """Compress the network of a seed, once the experiment before this one is done."""
    if before is not None:
        before.result()
    wanted = EXPERIMENTS[name]
    source = folder / f"{file_name(wanted.after or wanted.network)}-{seed}.safetensors"
    command = [wanted.command, str(source), "--seed", str(seed), *wanted.options]
    return run(folder, f"{file_name(name)}-{seed}", command)


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0:.2f}"


def rows(dense: Results, compressed: Results) -> Iterator[str]:
    """The table, line by line."""
    yield "| what | top-1, % | drop, pp | of its bytes | of its MACs | of its weights |"
    yield "|---|---|---|---|---|---|"
    for network, results in dense.items():
        yield f"| {network}, dense | {spread([accuracy(r) for r in results])} | | | | |"
    for name, results in compressed.items():
        wanted = EXPERIMENTS[name]
        yield f"| {name} | {' | '.join(columns(dense[wanted.network], results, wanted.limit))} |"


def columns(dense: list[dict[str, Any]], results: list[dict[str, Any]], limit: float | None) -> Iterator[str]:
    """Accuracy, drop, and the shares of bytes, arithmetic and non-zero parameters that are left."""
    pairs = list(zip(dense, results, strict=True))
    yield spread([accuracy(result) for result in results])
    drops = [accuracy(before) - accuracy(after) for before, after in pairs]
    yield spread(drops) + ("" if limit is None else f" (at most {limit})")
    for key in ("file_bytes", "macs", "nonzero"):
        left = [model(after)[key] / model(before)[key] for before, after in pairs]
        yield f"{100 * statistics.mean(left):.1f} %"


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "benchmarks" / "pruning")
    parser.add_argument("--output", type=Path, help="also write the table to this Markdown file")
    parser.add_argument("--only", nargs="*", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    networks = [name for name in NETWORKS if any(EXPERIMENTS[e].network == name for e in options.only)]
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = {n: [pool.submit(train, options.folder, n, seed) for seed in SEEDS] for n in networks}
        dense = {name: [future.result() for future in row] for name, row in futures.items()}
        waiting: dict[str, list[Future[dict[str, Any]]]] = {}
        for name in (n for n in EXPERIMENTS if n in options.only):
            before = waiting.get(EXPERIMENTS[name].after or "", [None] * len(SEEDS))
            todo = zip(SEEDS, before, strict=True)
            waiting[name] = [pool.submit(compress, options.folder, name, *each) for each in todo]
        compressed = {name: [future.result() for future in row] for name, row in waiting.items()}
    text = "\n".join(rows(dense, compressed))
    print(text)
    if options.output:
        spent = sum(result["seconds"] for row in (*dense.values(), *compressed.values()) for result in row)
        when = f"{datetime.date.today()}, {cpu_name()}, torch {version('torch')}, mean and standard deviation"
        how = f"of seeds {SEEDS}; {spent / 60:.0f} minutes of commands on a thread, {options.jobs} at a time"
        options.output.write_text(f"{when} {how}\n\n{text}\n")


if __name__ == "__main__":
    main()
