"""Networks of other people, compressed, by the metric of their task: ``python -m benchmarks.real_networks``.

Everything goes through the command line. A command whose result is in the folder already is not repeated.

    make assets && python -m benchmarks.real_networks [NETWORK ...] [--folder DIR] [--output FILE]
"""

import argparse
import datetime
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from modelopt_cli.measure.environment import cpu_name

ROOT = Path(__file__).parent.parent
Found = dict[str, Any]
"""What a command prints with ``--json``."""

INT8 = {"int8": ("quantize",)}
SHARED = {"4-bit shared": ("share", "--bits", "4")}


@dataclass(frozen=True)
class Network:
    """A trained network, how it is judged, and what is done to it.

    Attributes:
        checkpoint: the file, from the root of the project.
        data: what it is, and what it is judged on.
        options: of each command: data, task and, where the file does not say it, the architecture.
        metric: key of ``metrics`` in ``--json``.
        fp32: that metric as it was measured.
        methods: what is done to it: name, and command with its options.
        loses: fraction of the metric that int8 may lose.
        note: what a reader has to know, such as the layer that int8 loses by.
        needs: packages that do not come with the project.
    """

    checkpoint: str
    data: str
    options: tuple[str, ...]
    metric: str
    fp32: float
    methods: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: INT8 | SHARED)
    loses: float = 0.01
    note: str = ""
    needs: tuple[str, ...] = ()


PHOTOGRAPHS = ("--calibration", "assets/pictures")
NETWORKS = {
    "MobileNetV2": Network(
        "assets/mobilenet/mobilenet_v2-b0353104.pth",
        "torchvision's ImageNet weights; 20 ImageNet images",
        ("--data", "csv:assets/imagenet20/labels.csv", *PHOTOGRAPHS),
        "top1",
        90.0,
        {
            "int8": ("quantize", "--observer", "percentile"),
            "4-bit shared": ("share", "--bits", "4", "--weighting", "hessian", "--scope", "channels"),
        },
        note="Calibrated on seven photographs. An image is 5 points: the observer `mse` loses one. With one "
        "codebook for each tensor, shared weights keep 40 %: those of depthwise channels differ too much.",
    ),
}


def run(name: str, method: str, folder: Path) -> Found:
    """What a command says of a network that it compresses into ``folder``, or what it said before.

    Raises:
        RuntimeError: the command fails.
    """
    network = NETWORKS[name]
    stem = folder / f"{name}-{method}".replace(" ", "-").lower()
    result = stem.with_suffix(".json")
    if not result.exists():
        verb, *options = network.methods[method]
        command = [sys.executable, "-m", "modelopt_cli", verb, network.checkpoint, *network.options, *options]
        command += ["-o", str(stem.with_suffix(".safetensors")), "--force", "--json", "-q"]
        command += ["--threads", "1", "--latency-runs", "0"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
        result.write_text(done.stdout)
    found: Found = json.loads(result.read_text())
    return found


def lost(found: Found, metric: str) -> float:
    """The fraction of the metric that the compressed network has lost; negative where it is better."""
    before, _ = found["evaluation"]["models"]
    return float(found["evaluation"]["comparisons"][0]["drops"][metric]["drop"] / before["metrics"][metric])


def cells(found: Found, metric: str) -> Iterator[str]:
    """The columns of a row, from the metric on."""
    before, after = found["evaluation"]["models"]
    against = found["evaluation"]["comparisons"][0]
    drop = against["drops"][metric]
    yield number(before["metrics"][metric])
    yield number(after["metrics"][metric])
    yield f"{number(drop['drop'])} ({number(drop['low'])} to {number(drop['high'])})"
    yield f"{100 * lost(found, metric):.2f} %"
    yield "" if against["snr_db"] is None else f"{against['snr_db']:.1f} dB"
    yield f"{before['file_bytes'] / 1e6:.2f} to {after['file_bytes'] / 1e6:.2f} MB, {against['ratio']:.2f}x"
    yield f"{found['compressed']['layers']} of {found['compressed']['of_layers']}"


def number(value: float) -> str:
    """Four digits, as far as they are behind the point."""
    return f"{value:.{2 if abs(value) >= 10 else 4}f}"


def page(folder: Path, names: list[str]) -> Iterator[str]:
    """The page, line by line."""
    where = f"{datetime.date.today()}, {cpu_name()}, torch {version('torch')}"
    yield f"{where}, `python -m benchmarks.real_networks`"
    yield ""
    yield "| network | | metric | fp32 | compressed | drop, 95 % interval | lost | outputs | file | layers |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for name in names:
        network = NETWORKS[name]
        for method in network.methods:
            found = run(name, method, folder)
            samples = found["evaluation"]["models"][0]["samples"]
            row = (name, method, f"{network.metric}, {samples}", *cells(found, network.metric))
            yield f"| {' | '.join(row)} |"
    yield ""
    yield from (f"- **{name}**: {NETWORKS[name].data}. {NETWORKS[name].note}".rstrip() for name in names)


def main() -> None:
    """Run what is missing and print the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "benchmarks" / "real_networks")
    parser.add_argument("--output", type=Path, help="also write the page to this Markdown file")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for line in page(options.folder, options.networks or list(NETWORKS)):
        print(line, flush=True)
        lines.append(line)
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
