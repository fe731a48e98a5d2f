"""int8 calibrated on images next to int8 calibrated on what batch norms recorded.

    make assets && python -m benchmarks.without_data [NETWORK ...] [--output FILE]

The networks, the images to calibrate on and those to judge by are those of ``benchmarks.rivals``; one thread.
"""

import argparse
import datetime
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

import modelopt_cli
from benchmarks.crops import make_crops
from benchmarks.rivals.__main__ import compared, samples
from benchmarks.rivals.networks import CASES, CROPS
from benchmarks.rivals.quantizers import BATCH, full_batches
from modelopt_cli.api.opening import ModelFile, known_input
from modelopt_cli.kernels import prepare
from modelopt_cli.measure.environment import cpu_name

NETWORKS = ("MobileNetV2", "EfficientNet-Lite0", "resnet20, Fashion-MNIST")
OPTIONS: dict[str, dict[str, str]] = {
    "defaults": {},
    "`--bias-correction analytic`": {"bias_correction": "analytic"},
}
"""Options of ``quantize``, by their name in the table."""


def rows(name: str, titles: Iterable[str], most: int, judged: int) -> Iterator[str]:
    """Rows of the table for a network: with so many images to calibrate on and to judge by."""
    case = CASES[name]
    network = case.network
    file = ModelFile.of(network.checkpoint)
    spec = known_input([file], network.arch, network.data, network.preprocess)
    program = modelopt_cli.load(network.checkpoint, arch=network.arch, input_spec=spec).eval()
    images, _ = samples(case, network.calib, program, most)
    test, labels = samples(case, network.data, program, judged)
    test = test[: len(test) // BATCH * BATCH]
    assert labels is not None
    labels = labels[: len(test)]

    @torch.no_grad()
    def outputs(model: Any) -> Any:
        return torch.cat([model(batch) for batch in full_batches(test)]).double()

    wanted = outputs(program)
    for title in titles:
        options = OPTIONS[title]
        for source, calibration in ((f"{len(images)} images", images), ("none", "none")):
            begin = time.process_time()
            made = modelopt_cli.quantize(program, calibration=calibration, **options).program
            seconds = time.process_time() - begin
            found = compared(wanted, outputs(prepare(made)), labels)
            percent = " | ".join(f"{found[key]:.2f} %" for key in ("agreement", "float", "top1"))
            yield f"| {name} | {title} | {source} | {found['db']:.1f} dB | {percent} | {seconds:.0f} s |"


def main() -> None:
    """Measure and print the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", default=NETWORKS, metavar="NETWORK")
    parser.add_argument("--options", nargs="*", default=tuple(OPTIONS), choices=OPTIONS, metavar="OPTIONS")
    parser.add_argument("--images", type=int, default=64, help="to calibrate on, at most")
    parser.add_argument("--test", type=int, default=1000, help="images to judge by, at most")
    parser.add_argument("--output", type=Path, help="also write the page to this Markdown file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not (CROPS / "test.npz").exists():
        make_crops(CROPS, calibration=4, test=10)
    lines = [
        f"{datetime.date.today()}, {cpu_name()}, one thread, torch {torch.__version__}",
        "",
        "| network | options | calibration | outputs | same answers | top-1, float | top-1 | time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for name in options.networks:
        for row in rows(name, options.options, options.images, options.test):
            print(row, flush=True)
            lines.append(row)
    if options.output is not None:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
