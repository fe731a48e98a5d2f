"""Networks at few bits without training, by the rounding of their weights: ``python -m benchmarks.low_bits``.

Each row is one ``modelopt quantize`` in a process of its own, whose processor time and memory are noted, the
comparison of both networks included: a neighbour on the machine does not lengthen the former much. A command
whose result is in the folder already is not repeated.

    python -m benchmarks.low_bits [NETWORK ...] [--widths 4/8 ...] [--roundings block ...] [--steps N]
        [--samples N] [--folder DIR] [--output FILE]
"""

import argparse
import datetime
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.crops import make_crops
from modelopt_cli.measure.environment import cpu_name
from modelopt_cli.methods.quantize.weight_rounding.roundings import ROUNDINGS

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "benchmarks" / "low_bits"
WIDTHS = ("4/8", "4/4", "3/8", "2/8")
"""Bits of weights and of activations."""


@dataclass(frozen=True)
class Network:
    """A trained network and its data.

    Attributes:
        checkpoint: its file, from the root of the project.
        data: what it is judged on.
        calibration: what is looked at.
        options: what else ``quantize`` and ``eval`` need for it.
        about: the data, in a sentence.
        training: options of ``train`` that make the file where there is none.
    """

    checkpoint: str
    data: str
    calibration: str
    about: str
    options: tuple[str, ...] = ()
    training: tuple[str, ...] = ()


FASHION = "idx:assets/fashion-mnist"
OF_FASHION = (
    "trained for 5 epochs on Fashion-MNIST; calibrated on images of its training split, judged on 4,000 "
    "of its test split"
)
CROPS = "build/benchmarks/crops"
OF_CROPS = (
    "ImageNet weights; calibrated on random crops of 7 photographs and 10 ImageNet images, judged on 200 "
    "random crops of 10 other ones: they tell how near the outputs stay, and little of accuracy"
)


def _of_fashion(name: str, arch: str, rate: str) -> Network:
    """A network that is trained on Fashion-MNIST where it is not there yet."""
    data = ("--train", f"{FASHION}?split=train", "--data", FASHION)
    loop = ("--epochs", "5", "--lr", rate, "--warmup", "1", "--amp")
    return Network(
        f"build/benchmarks/low_bits/{name}.safetensors",
        FASHION,
        f"{FASHION}?split=train",
        OF_FASHION,
        training=("--arch", arch, *data, *loop),
    )


NETWORKS = {
    "Fashion-MNIST resnet20": _of_fashion("resnet20", "builtin:resnet20?in_channels=1", "0.2"),
    "Fashion-MNIST MobileNetV2": _of_fashion("mobilenet", "benchmarks.real.fashion:mobilenet", "0.1"),
    "MobileNetV2": Network(
        "assets/mobilenet/mobilenet_v2-b0353104.pth",
        f"npz:{CROPS}/test.npz",
        f"npz:{CROPS}/calibration.npz",
        OF_CROPS,
    ),
    "EfficientNet-Lite0": Network(
        "assets/efficientnet-lite0.pth",
        f"npz:{CROPS}/test.npz",
        f"npz:{CROPS}/calibration.npz",
        OF_CROPS,
        options=(
            *("--arch", "assets/efficientnet_lite0.py:make", "--input-size", "224", "--resize", "224"),
            *("--crop", "0.875", "--interpolation", "bicubic", "--mean", "0.49803922", "--std", "0.50196078"),
        ),
    ),
}


@dataclass(frozen=True)
class Setting:
    """A row of the table: widths, rounding, and how much is looked at."""

    widths: str
    rounding: str
    steps: int
    samples: int

    @property
    def options(self) -> tuple[str, ...]:
        """Options of ``quantize``."""
        weights, activations = self.widths.split("/")
        steps = ("--rounding-steps", str(self.steps)) if ROUNDINGS[self.rounding].learned else ()
        return (
            *("--weight-bits", weights, "--act-bits", activations, "--rounding", self.rounding, *steps),
            *("--calibration-samples", str(self.samples)),
        )

    @property
    def name(self) -> str:
        """For the file."""
        return f"w{self.widths.replace('/', 'a')}-{self.rounding}-{self.steps}-{self.samples}"

    @classmethod
    def of(cls, name: str) -> "Setting":
        """The setting with this name."""
        widths, rounding, steps, samples = name.split("-")
        return cls(widths[1:].replace("a", "/"), rounding, int(steps), int(samples))


def slug(name: str) -> str:
    """A network's name in those of files."""
    return name.replace(" ", "-").lower()


def modelopt(verb: str, *options: str) -> dict[str, Any]:
    """What a command prints with ``--json``, its processor time in seconds and its memory in GB.

    Raises:
        RuntimeError: it fails.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    common = ("--json", "-q", "--force", "--threads", "1", "--latency-runs", "0")
    command = [sys.executable, "-m", "modelopt_cli", verb, *options, *common]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    figures = {"seconds": used.ru_utime - before, "gigabytes": used.ru_maxrss / (1 << 20)}
    return {**json.loads(done.stdout), **figures, "measured": f"{datetime.date.today()}, {cpu_name()}"}


def measured(name: str, setting: Setting, folder: Path, limit: int) -> dict[str, Any]:
    """The figures of one row, or those that were measured before."""
    network = NETWORKS[name]
    stem = folder / f"{slug(name)}-{setting.name}"
    result = stem.with_suffix(".json")
    if not result.exists():
        if CROPS in network.data and not (ROOT / CROPS).exists():
            make_crops(ROOT / CROPS)
        if network.training and not (ROOT / network.checkpoint).exists():
            modelopt("train", *network.training, "-o", network.checkpoint)
        data = ("--data", network.data, "--limit", str(limit), "--calibration", network.calibration)
        output = ("-o", str(stem.with_suffix(".safetensors")))
        command = (network.checkpoint, *network.options, *data, *setting.options, *output)
        result.write_text(json.dumps(modelopt("quantize", *command)))
    figures: dict[str, Any] = json.loads(result.read_text())
    return figures


def cells(found: dict[str, Any]) -> Iterator[str]:
    """The columns of a row, from the accuracy on."""
    before, after = found["evaluation"]["models"]
    against = found["evaluation"]["comparisons"][0]
    drop = against["drops"]["top1"]
    yield f"{before['metrics']['top1']:.2f}"
    yield f"{after['metrics']['top1']:.2f}"
    yield f"{drop['drop']:.2f} ({drop['low']:.2f} to {drop['high']:.2f})"
    yield f"{100 * against['agreement']:.1f} %"
    yield "" if against["snr_db"] is None else f"{against['snr_db']:.1f}"
    yield f"{against['ratio']:.1f}x"
    yield f"{found['seconds'] / 60:.1f}"
    yield f"{found['gigabytes']:.1f}"


def row(name: str, setting: Setting, found: dict[str, Any]) -> str:
    """A row of the table."""
    weights, activations = setting.widths.split("/")
    learned = f"{setting.steps}" if ROUNDINGS[setting.rounding].learned else ""
    about = (name, f"W{weights}A{activations}", setting.rounding, learned, f"{setting.samples}")
    return f"| {' | '.join((*about, *cells(found)))} |"


def results(name: str, folder: Path) -> dict[Setting, dict[str, Any]]:
    """All results of a network in a folder, the most bits first."""
    stem = f"{slug(name)}-"
    paths = {Setting.of(path.stem.removeprefix(stem)): path for path in folder.glob(f"{stem}w*.json")}
    order = sorted(
        paths, key=lambda each: ([-int(n) for n in each.widths.split("/")], each.rounding != "nearest")
    )
    return {each: json.loads(paths[each].read_text()) for each in order}


def page(folder: Path) -> Iterator[str]:
    """The page of all results in a folder, line by line."""
    yield f"torch {version('torch')}, `python -m benchmarks.low_bits`, one thread"
    yield ""
    yield (
        "| network | widths | rounding | steps | samples | float | top-1 | drop, 95 % interval "
        "| same answers | dB | ratio | minutes | GB |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|---|"
    notes = []
    for name, network in NETWORKS.items():
        known = results(name, folder)
        yield from (row(name, setting, found) for setting, found in known.items())
        if days := dict.fromkeys(found["measured"] for found in known.values()):
            notes.append(f"- **{name}** ({'; '.join(days)}): {network.about}.")
    yield ""
    yield (
        "The first and the last layer have 8 bits. Minutes are processor time of one thread, the comparison "
        "of both networks included; the machine was busy, so that the clock showed more. GB is the peak of "
        "the process, of which `nearest` shows what comes without learning."
    )
    yield ""
    yield from notes


def main() -> None:
    """Measure what is missing and print the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--widths", nargs="+", default=WIDTHS)
    parser.add_argument("--roundings", nargs="+", default=("nearest", "block"), choices=ROUNDINGS)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--limit", type=int, default=4000, help="samples to judge by")
    parser.add_argument("--folder", type=Path, default=BUILD)
    parser.add_argument("--output", type=Path, help="write all results of the folder here")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    settings = [
        Setting(widths, rounding, options.steps, options.samples)
        for widths in options.widths
        for rounding in options.roundings
    ]
    for name in options.networks or NETWORKS:
        for setting in settings:
            print(row(name, setting, measured(name, setting, options.folder, options.limit)), flush=True)
    if options.output is not None:
        options.output.write_text("\n".join(page(options.folder)) + "\n")


if __name__ == "__main__":
    main()
