"""Sizes and decoding speed of entropy-coded real weights: ``python -m benchmarks.coding``.

The networks of ``make assets`` and the residual network of ``benchmarks.pruning`` are shared with ``--bits
auto``, pruned, and quantized with ``--scheme int8-weight``, all with ``--code entropy``. Of every tensor
above 10,000 weights the coded bytes are held against the zero-order empirical entropy of its integers: what
the best code would take that knows how often each occurs, and nothing of their order. The tables of such a
code, or whatever else tells it how often, would come on top; ours learns it on the way, within the bytes
that are counted. Every file is then opened several times.

    make assets && python -m benchmarks.pruning
    python -m benchmarks.coding [--folder DIR] [--output FILE.md]
"""

import argparse
import datetime
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from benchmarks.pruning import ROOT
from modelopt_cli.artifact.codecs import CODECS
from modelopt_cli.artifact.reader import open_artifact
from modelopt_cli.measure.environment import cpu_name

LARGE = 10_000
LIMIT = 1.02
RUNS = 5
LITE0 = (
    *("assets/efficientnet-lite0.pth", "--arch", "assets/efficientnet_lite0.py:make"),
    *("--input-size", "224", "--resize", "224", "--crop", "0.875", "--interpolation", "bicubic"),
    *("--mean", "0.49803922", "--std", "0.50196078"),
)
MNIST = (
    *("assets/ccexam/mnist.pth", "--arch", "assets/ccexam_nets.py:mnist"),
    *("--input-size", "28", "--channels", "1", "--mean", "0.1307", "--std", "0.3081"),
)
RESNET8 = "build/benchmarks/pruning/resnet8-0.safetensors"
PRUNED = ("--structure", "unstructured", "--sparsity", "0.9", "--code", "entropy")
INT8 = ("--scheme", "int8-weight", "--code", "entropy")
COMMANDS: dict[str, tuple[str, ...]] = {
    "EfficientNet-Lite0, shared 8x": (
        *(
            "share",
            *LITE0,
            "--bits",
            "auto",
            "--ratio",
            "8",
            "--calibration",
            "csv:assets/imagenet20/labels.csv",
        ),
    ),
    "EfficientNet-Lite0, int8": ("quantize", *LITE0, *INT8),
    "ccexam MNIST, shared 40x": (
        *("share", *MNIST, "--bits", "auto", "--ratio", "40", "--calibration", "npz:assets/mnist5k.npz"),
    ),
    "ccexam MNIST, int8": ("quantize", *MNIST, *INT8),
    "ccexam MNIST, pruned": ("prune", *MNIST, *PRUNED),
    "ccexam MNIST, pruned, int8": ("quantize", "@ccexam MNIST, pruned", *INT8),
    "resnet8, int8": ("quantize", RESNET8, *INT8),
    "resnet8, pruned": ("prune", RESNET8, *PRUNED),
    "resnet8, pruned, int8": ("quantize", "@resnet8, pruned", *INT8),
}
"""By name; ``@NAME`` stands for the file of another."""


def make(folder: Path, name: str) -> Path:
    """The file of a command, made if it is not there."""
    path = folder / f"{''.join(c if c.isalnum() else '-' for c in name)}.safetensors"
    if not path.exists():
        verb, *rest = COMMANDS[name]
        rest = [str(make(folder, each[1:])) if each.startswith("@") else each for each in rest]
        command = [sys.executable, "-m", "modelopt_cli", verb, *rest, "--no-eval", "-q", "-o", str(path)]
        subprocess.run(command, check=True, cwd=ROOT)
    return path


def tensors(path: Path) -> Iterator[tuple[str, int, float]]:
    """Each large entropy-coded tensor: its name, its stream's bytes, and those of its entropy."""
    with open_artifact(path) as artifact:
        for parameter in artifact.document.parameters:
            if parameter.codec != "entropy" or math.prod(parameter.shape) < LARGE:
                continue
            tensor, encoding = artifact.decode(parameter)
            view = CODECS[encoding.codec].integers(encoding.params, parameter.shape, tensor.dtype)
            integers, _ = view.encode(tensor, encoding)
            counts = np.unique(integers, return_counts=True)[1]
            bits = float((counts * np.log2(counts.sum() / counts)).sum())
            stream = artifact.layout.tensors[parameter.parts["stream"]]
            yield parameter.name, stream.end - stream.start, bits / 8


def opening(path: Path) -> tuple[float, float]:
    """Median seconds to a network that runs, and decoded megabytes of float32."""
    import modelopt_cli

    taken = []
    for _ in range(RUNS):
        begin = time.perf_counter()
        network = modelopt_cli.load(path)
        taken.append(time.perf_counter() - begin)
    decoded = sum(p.numel() * 4 for p in network.state_dict().values() if p.is_floating_point())
    return statistics.median(taken), decoded / 1e6


def rows(folder: Path) -> Iterator[str]:
    """The table, line by line."""
    yield "| file | bytes | large tensors | coded over entropy | worst | opened, s | decoded, MB/s |"
    yield "|---|---|---|---|---|---|---|"
    for name in COMMANDS:
        path = make(folder, name)
        found = list(tensors(path))
        coded, entropy = sum(size for _, size, _ in found), sum(least for _, _, least in found)
        worst = max(size / least for _, size, least in found)
        seconds, megabytes = opening(path)
        speed = megabytes / seconds
        yield (
            f"| {name} | {path.stat().st_size:,} | {len(found)} | {coded / entropy:.3f} | {worst:.3f} "
            f"(at most {LIMIT}) | {seconds:.2f} | {speed:.1f} |"
        )


def main() -> None:
    """Make what is missing and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "benchmarks" / "coding")
    parser.add_argument("--output", type=Path, help="also write the table to this Markdown file")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    text = "\n".join(rows(options.folder))
    print(text)
    if options.output:
        about = f"{datetime.date.today()}, {cpu_name()}, torch {version('torch')}, one thread"
        options.output.write_text(f"{about}, median of {RUNS}\n\n{text}\n")


if __name__ == "__main__":
    main()
