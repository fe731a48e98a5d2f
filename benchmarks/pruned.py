"""Latency and file size after channel pruning to half the FLOPs: ``python -m benchmarks.pruned``.

Through the command line, on torchvision's networks with random weights: neither latency nor size depends on
what the weights are worth, except that the allocation ``global`` takes them at their word. Dense and pruned
network are measured in the same run, interleaved, one thread, batch 1, each in the fastest float32 form torch
has here, so that the gain is that of pruning alone.

    python -m benchmarks.pruned [NETWORK ...] [--runs N] [--output FILE]
"""

import argparse
import datetime
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import modelopt_cli  # noqa: F401  makes torchvision importable next to a CPU-only torch
from modelopt_cli.measure.environment import cpu_name

NETWORKS = ("resnet50", "resnet18", "mobilenet_v2", "efficientnet_b0")


def measure(name: str, allocation: str, folder: Path, runs: int) -> str:
    """Prune a network and return the table's row."""
    import torchvision

    torch.manual_seed(0)
    checkpoint = folder / f"{name}.pth"
    torch.save(torchvision.models.get_model(name, weights=None).state_dict(), checkpoint)
    command = [sys.executable, "-m", "modelopt_cli", "prune", str(checkpoint), "--flops", "0.5"]
    command += ["-o", str(folder / f"{name}.safetensors"), "--threads", "1", "--latency-runs", str(runs)]
    command += ["--allocation", allocation, "--force"]
    done = subprocess.run([*command, "--json", "-q"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)["evaluation"]
    (before, after), (against,) = found["models"], found["comparisons"]
    return (
        f"| {name} | {allocation} | {100 * after['macs'] / before['macs']:.1f} % "
        f"| {100 * after['parameters'] / before['parameters']:.1f} % "
        f"| {100 * after['file_bytes'] / before['file_bytes']:.1f} % "
        f"| {before['latency_ms']['median']:.1f} | {after['latency_ms']['median']:.1f} "
        f"| {against['speedup']:.2f}x |"
    )


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    lines = [
        f"{datetime.date.today()}, {cpu_name()}, torch {torch.__version__}, one thread, batch 1, "
        f"{options.runs} interleaved rounds, median ms",
        "",
        "| network | allocation | MACs left | parameters left | bytes left | dense | pruned | faster |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, allocation in itertools.product(options.networks, ("global", "uniform")):
            lines.append(measure(name, allocation, Path(folder), options.runs))
            print(lines[-1], flush=True)
    if options.output is not None:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
