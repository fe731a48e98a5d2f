"""Sizes at equal accuracy, next to NNCodec (ISO/IEC 15938-17): ``python -m benchmarks.nncodec``.

Both compress the same trained networks without training. NNCodec 2.1 is measured over a range of steps (QP)
with every setting of ``SETTINGS``, so that its best is among them; ours goes through the command line. What
comes out of either file is put into the same network and run on the same images: top-1, and the mean
Kullback-Leibler divergence of its outputs from those of the fp32 network, which is finer. NNCodec is no
dependency of this project and wants an older NumPy, so it has an environment of its own:

    python3 -m venv ENV && ENV/bin/pip install torch torchvision nncodec==2.1.0
    make assets && python -m benchmarks.pruning
    python -m benchmarks.nncodec --nncodec-python ENV/bin/python [--only NETWORK ...] [--output FILE.md]

Of EfficientNet-Lite0 there are 20 labelled images. Ours calibrates on ``CROPS`` random crops of each of them,
and once on twice as many of each in one half while it is judged on the other half. Which file happens to get
one image more or less right is chance to a good part; the divergence tells more.

A point that is in the folder already is not measured again, so that an interrupted run goes on.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import modelopt_cli
from benchmarks.compared_networks import COUNTER, ROOT, Comparison, Network
from benchmarks.curves import OURS, Curves, Point, comparison, table
from modelopt_cli.data import PreprocessOverrides
from modelopt_cli.measure.environment import cpu_name

FASHION = "idx:assets/fashion-mnist"
SHARE = ("share", "--bits", "auto")
"""Our command; ``--ratio``, ``--calibration`` and the network's own options follow."""
COMMON = {"nonweight_qp": -36, "cabac_unary_length_minus1": 6, "row_skipping": True}
"""NNCodec's default for what is no weight is far finer than these networks need, 1 kB of resnet8."""
SETTINGS: dict[str, dict[str, Any]] = {
    "dq": {"use_dq": True, **COMMON},
    "uniform": {"use_dq": False, **COMMON},
    "dq, lambda 1": {"use_dq": True, "lambda_scale": 1.0, **COMMON},
    "uniform, lambda 1": {"use_dq": False, "lambda_scale": 1.0, **COMMON},
    "uniform, lambda 4": {"use_dq": False, "lambda_scale": 4.0, **COMMON},
}
"""Options of ``nncodec.nnc.compress``; batch norms are folded (``bnf``)."""
CROPS = 4
"""Random crops of each ImageNet image, with its label, at seed 0 of torch's generator."""
CROPPED = "build/benchmarks/nncodec/crops"
"""All of them, in ``.npz``; in ``-half.npz`` those of every other image, the other ones in ``-half.csv``."""
PROBE = """
import modelopt_cli, nncodec.nnc
from importlib.metadata import version
print(version("nncodec"))
"""


LITE0 = "assets/efficientnet-lite0.pth"
LITE0_FORM = (
    "assets/efficientnet_lite0.py:make",
    PreprocessOverrides(
        input_size=224,
        resize=224,
        crop=0.875,
        interpolation="bicubic",
        mean=(0.49803922,),
        std=(0.50196078,),
    ),
)
LITE0_STEPS = range(-32, -22)


@dataclass(frozen=True)
class Case:
    """A network, and the range in which either tool is interesting.

    Attributes:
        network: what is compressed.
        ratios: how many times smaller our files are to be.
        qps: the steps of NNCodec, with all of ``SETTINGS``.
    """

    network: Network
    ratios: tuple[float, ...]
    qps: range


CASES = {
    "resnet8": Case(
        Network("build/benchmarks/pruning/resnet8-0.safetensors", FASHION, f"{FASHION}?split=train"),
        (10, 12, 14, 16, 18, 20, 22),
        range(-26, -17),
    ),
    "ccexam-mnist": Case(
        Network(
            "assets/ccexam/mnist.pth",
            "npz:assets/mnist5k.npz",
            "npz:assets/mnist5k.npz",
            "assets/ccexam_nets.py:mnist",
            PreprocessOverrides(input_size=28, channels=1, mean=(0.1307,), std=(0.3081,)),
        ),
        (30, 40, 50, 60, 70, 80),
        range(-15, -6),
    ),
    "efficientnet-lite0": Case(
        Network(LITE0, "csv:assets/imagenet20/labels.csv", f"npz:{CROPPED}.npz", *LITE0_FORM),
        (6, 7, 8, 9.5, 10, 10.5, 11),
        LITE0_STEPS,
    ),
    "efficientnet-lite0, other images": Case(
        Network(LITE0, f"csv:{CROPPED}-half.csv", f"npz:{CROPPED}-half.npz", *LITE0_FORM),
        (8,),
        LITE0_STEPS,
    ),
}


def crop_images() -> None:
    """Make what ``CROPPED`` names out of the 20 images."""
    from torchvision import transforms

    folder, target = ROOT / "assets" / "imagenet20", ROOT / CROPPED
    rows = [line.split(",") for line in (folder / "labels.csv").read_text().splitlines()[1:]]
    torch.manual_seed(0)
    bicubic = transforms.InterpolationMode.BICUBIC
    crop = transforms.RandomResizedCrop(256, scale=(0.25, 1), interpolation=bicubic)
    target.parent.mkdir(parents=True, exist_ok=True)
    for suffix, chosen, count in ((".npz", rows, CROPS), ("-half.npz", rows[::2], 2 * CROPS)):
        images = []
        for name, _ in chosen:
            with Image.open(folder / name) as image:
                whole = image.convert("RGB")
            images += [np.asarray(crop(whole)) for _ in range(count)]
        labels = np.repeat([int(label) for _, label in chosen], count)
        np.savez_compressed(f"{target}{suffix}", images=np.stack(images), labels=labels)
    others = [f"{os.path.relpath(folder / name, target.parent)},{label}" for name, label in rows[1::2]]
    Path(f"{target}-half.csv").write_text("\n".join(["path,label", *others]) + "\n")


class Codec:
    """NNCodec in the interpreter that has it."""

    def __init__(self, python: str, folder: Path) -> None:
        self.folder = folder
        try:
            found = subprocess.run(
                [python, "-c", PROBE], capture_output=True, text=True, cwd=ROOT, check=False
            )
        except OSError as error:
            sys.exit(f"{python}: {error.strerror}; --nncodec-python takes an interpreter that has nncodec")
        if found.returncode:
            why = (found.stderr.strip().splitlines() or ["it ended"])[-1]
            sys.exit(f"{python} has no NNCodec that works ({why}); see the top of benchmarks/nncodec.py")
        self.version = found.stdout.split()[-1]
        command = [python, "-m", "benchmarks.nncodec_worker"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=_one_thread()
        )

    def point(self, compared: Comparison, setting: str, qp: int) -> Point:
        """Encode, decode and compare."""
        state, decoded = self.folder / "state.npz", self.folder / "decoded.npz"
        kept = {n: t.numpy() for n, t in compared.state.items() if not n.endswith(COUNTER)}
        np.savez(state, **kept)
        job = {
            "state": str(state),
            "decoded": str(decoded),
            "norms": compared.norms(),
            "options": SETTINGS[setting] | {"qp": qp},
        }
        found = self._ask(job)
        while "evaluate" in found:
            found = self._ask({"score": compared.score(np.load(decoded))})
        if "error" in found:
            raise RuntimeError(f"nncodec, {setting}, QP {qp}: {found['error']}")
        correct, divergence = compared.figures(compared.put(np.load(decoded)))
        return Point(setting, qp, found["bytes"], correct, divergence, found["encode_s"], found["decode_s"])

    def _ask(self, line: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(line), file=self.process.stdin, flush=True)
        found: dict[str, Any] = json.loads(self.process.stdout.readline() or '{"error": "the worker ended"}')
        return found


def ours(network: Network, compared: Comparison, ratio: float, output: Path) -> Point:
    """One file of ours, by the command line, and compared like theirs."""
    command = [sys.executable, "-m", "modelopt_cli", *SHARE, network.checkpoint, *network.options]
    command += ["--ratio", f"{ratio:g}", "--calibration", network.calib, "--data", network.data]
    command += ["-o", str(output), "--force", "--no-eval", "--threads", "1", "-q"]
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=_one_thread(), check=False)
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")
    begin = time.perf_counter()
    program = modelopt_cli.load(output)
    reading = time.perf_counter() - begin
    return Point(OURS, ratio, output.stat().st_size, *compared.figures(program), seconds, reading)


def _one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def measure(name: str, codec: Codec, folder: Path) -> Curves:
    """Both curves of a network."""
    case = CASES[name]
    network = case.network
    curves = Curves(folder / f"{name}.json")
    curves.read()
    compared = Comparison(network)
    curves.about = {
        "images": len(compared.labels),
        "correct": compared.correct,
        "parameters": sum(each.numel() for each in compared.state.values()),
        "bytes": (ROOT / network.checkpoint).stat().st_size,
    }
    for ratio in case.ratios:
        curves.add(
            OURS,
            ratio,
            lambda ratio=ratio: ours(network, compared, ratio, folder / f"{name}-{ratio:g}x.safetensors"),
        )
    for setting in SETTINGS:
        for qp in case.qps:
            curves.add(setting, qp, lambda setting=setting, qp=qp: codec.point(compared, setting, qp))
    return curves


def main() -> None:
    """Measure what is missing and print the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--nncodec-python", required=True, metavar="PATH", help="an interpreter that has nncodec"
    )
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "benchmarks" / "nncodec")
    parser.add_argument("--output", type=Path, help="also write the record to this Markdown file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.chdir(ROOT)
    options.folder.mkdir(parents=True, exist_ok=True)
    if not Path(f"{ROOT / CROPPED}-half.csv").exists():
        crop_images()
    codec = Codec(options.nncodec_python, options.folder)
    all_curves = {name: measure(name, codec, options.folder) for name in options.only}
    lines = [
        f"{datetime.date.today()}, {cpu_name()}, one thread, torch {version('torch')}, "
        f"modelopt {modelopt_cli.__version__}, NNCodec {codec.version}",
        "",
        *comparison(all_curves),
    ]
    for name, curves in all_curves.items():
        lines += ["", *table(name, curves)]
    print("\n".join(lines))
    if options.output is not None:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
