"""int8 calibrated on images next to int8 calibrated on samples learned from what batch norms recorded.

    make assets && python -m benchmarks.without_data [NETWORK ...] [--images N] [--test N] [--output FILE]

The networks, the images to calibrate on and those to judge by are those of ``benchmarks.rivals``; one thread.
"""

import argparse
import datetime
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import modelopt_cli
from benchmarks.crops import make_crops
from benchmarks.rivals.networks import CASES, CROPS, Case
from modelopt_cli.api.opening import ModelFile, known_input
from modelopt_cli.data import open_data
from modelopt_cli.kernels import prepare
from modelopt_cli.measure.environment import cpu_name
from modelopt_cli.program import Program

NETWORKS = ("MobileNetV2", "EfficientNet-Lite0", "resnet20, Fashion-MNIST")
BATCH = 10
OPTIONS: dict[str, dict[str, str]] = {
    "defaults": {},
    "`--bias-correction analytic`": {"bias_correction": "analytic"},
}
"""Options of ``quantize``, by their name in the table."""


def samples(case: Case, program: Program, spec: str, most: int) -> tuple[Tensor, Tensor]:
    """Images and labels of a data spec, at most so many, drawn at seed 0."""
    data = open_data(spec, input_spec=program.input, overrides=case.network.preprocess).sample(most)
    images, labels = zip(*data.batches(BATCH), strict=True)
    return torch.cat(images), torch.cat(labels)


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """Logits, float64."""
    return torch.cat([model(batch) for batch in images.split(BATCH)]).double()


def rows(name: str, options: list[str], most: int, judged: int) -> Iterator[str]:
    """Rows of the table for a network.

    Args:
        name: of the network.
        options: keys of ``OPTIONS``.
        most: images to calibrate on.
        judged: images to judge by.
    """
    case = CASES[name]
    file, arch = case.network.checkpoint, case.network.arch
    spec = known_input([ModelFile.of(file)], arch, case.network.data, case.network.preprocess)
    program = modelopt_cli.load(file, arch=arch, input_spec=spec).eval()
    images, _ = samples(case, program, case.network.calib, most)
    test, labels = samples(case, program, case.network.data, judged)
    wanted = outputs(program, test)
    for title in options:
        for source, calibration in ((f"{len(images)} images", images), ("none", "none")):
            begin = time.process_time()
            made = modelopt_cli.quantize(program, calibration=calibration, **OPTIONS[title]).program
            seconds = time.process_time() - begin
            found = outputs(prepare(made), test)
            db = 10 * torch.log10(wanted.square().sum() / (wanted - found).square().sum())
            answers = [each.argmax(1) for each in (wanted, found)]
            pairs = ((answers[1], answers[0]), (answers[0], labels), (answers[1], labels))
            percent = " | ".join(f"{100 * (a == b).double().mean():.2f} %" for a, b in pairs)
            yield f"| {name} | {title} | {source} | {db:.1f} dB | {percent} | {seconds:.0f} s |"


def main() -> None:
    """Measure and print the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", default=NETWORKS, metavar="NETWORK")
    parser.add_argument("--options", nargs="*", default=list(OPTIONS), choices=OPTIONS, metavar="OPTIONS")
    parser.add_argument("--images", type=int, default=64, help="to calibrate on, at most")
    parser.add_argument("--test", type=int, default=1000, help="images to judge by, at most")
    parser.add_argument("--output", type=Path, help="also write the page to this Markdown file")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if not (CROPS / "test.npz").exists():
        make_crops(CROPS, calibration=4, test=10)
    lines = [
        f"{datetime.date.today()}, {cpu_name()}, one thread, torch {torch.__version__}",
        "",
        "| network | options | calibration | outputs | same answers | top-1, float | top-1 | processor |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for name in asked.networks:
        for row in rows(name, asked.options, asked.images, asked.test):
            print(row, flush=True)
            lines.append(row)
    if asked.output is not None:
        asked.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
