"""Seconds and memory that static W8A8 takes, next to other quantizers on the same images.

Every quantizer reads resnet50 at 224x224, as a checkpoint or an ONNX file, and the images from files, and
writes a file. It runs in a process of its own on one CPU, with one thread. Rounds are interleaved and of
seconds the least counts. Peak memory is the largest resident set. The other quantizers are in the environment
of ``benchmarks.rivals``, which the first call makes. Results go to benchmarks/calibration.md.

    make assets && python -m benchmarks.calibration [--only NAME ...] [--images 512] [--rounds 2]
"""

import argparse
import datetime
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from benchmarks.rivals.__main__ import ROOT, enter

FOLDER = ROOT / "build" / "benchmarks" / "calibration"
RESULT = Path(__file__).with_suffix(".md")


def ours(*options: str) -> list[str]:
    """The command of this project."""
    data = ("--calibration", f"npz:{FOLDER}/images.npz", "--resize", "224", "--crop", "224")
    network = (f"{FOLDER}/resnet50.pt", "--arch", "torchvision:resnet50")
    where = ("-o", f"{FOLDER}/int8.safetensors", "--force", "-q", "--threads", "1")
    return ["modelopt_cli", "quantize", *network, *data, *where, *options]


def theirs(side: str, method: str) -> list[str]:
    """The worker with another quantizer."""
    return ["benchmarks.calibration_worker", side, str(FOLDER), method]


COMMANDS = {
    "modelopt quantize": ours(),
    "modelopt quantize --no-eval": ours("--no-eval"),
    "modelopt quantize --no-eval --observer minmax": ours("--no-eval", "--observer", "minmax"),
    "onnxruntime, MinMax": theirs("onnxruntime", "MinMax"),
    "onnxruntime, Percentile": theirs("onnxruntime", "Percentile"),
    "onnxruntime, Entropy": theirs("onnxruntime", "Entropy"),
    "NNCF": theirs("nncf", "NNCF"),
}
"""Arguments of ``python -m``, by the name in the table."""


@dataclass(frozen=True)
class Run:
    """Cost of one command: seconds, and the peak of memory in KiB."""

    seconds: float
    processor: float
    peak: int


def run(command: Sequence[str]) -> Run:
    """Run a module on one CPU and look at what it took."""
    started = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-m", *command], env={**os.environ, "OMP_NUM_THREADS": "1"})
    os.sched_setaffinity(child.pid, {max(os.sched_getaffinity(0))})
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"failed: {' '.join(command)}")
    return Run(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss)


def table(runs: Mapping[str, Sequence[Run]], images: int) -> str:
    """Markdown."""
    from modelopt_cli.measure.environment import cpu_name

    packages = ", ".join(f"{each} {version(each)}" for each in ("torch", "onnxruntime", "nncf", "openvino"))
    rounds = len(next(iter(runs.values())))
    lines = [
        f"{datetime.date.today()}, {cpu_name()}, one thread, {packages}: resnet50, {images} images, {rounds} "
        f"round{'s' * (rounds > 1)}",
        "",
        "| quantizer | processor, s | seconds | peak resident memory, MB |",
        "|---|---|---|---|",
    ]
    for name, each in runs.items():
        processor, seconds = (min(getattr(run, key) for run in each) for key in ("processor", "seconds"))
        peak = max(run.peak for run in each) * 1024 / 1e6
        lines.append(f"| {name} | {processor:.1f} | {seconds:.1f} | {peak:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make the network and the images, run the commands, write the table, remove everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=list(COMMANDS), choices=COMMANDS, metavar="NAME")
    parser.add_argument("--images", type=int, default=512, help="a multiple of 16")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    enter("benchmarks.calibration")
    os.chdir(ROOT)
    FOLDER.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[Run]] = {name: [] for name in options.only}
    try:
        # This process stays small: the peak that the system reports of a child is at least its parent's.
        run(["benchmarks.calibration_worker", "make", str(FOLDER), str(options.images)])
        for _ in range(options.rounds):
            for name, each in runs.items():
                each.append(run(COMMANDS[name]))
                print(name, each[-1], flush=True)
    finally:
        shutil.rmtree(FOLDER)
    text = table(runs, options.images)
    print(text)
    RESULT.write_text(text)


if __name__ == "__main__":
    main()
