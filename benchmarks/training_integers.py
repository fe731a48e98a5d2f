"""Quantization-aware training of few bits, with three seeds: ``python -m benchmarks.training_integers``.

The Fashion-MNIST resnet20 of ``benchmarks.low_bits`` is rounded to each pair of widths and trained with
``modelopt quantize --train`` on a part of the training images; each row is one command on one thread, whose
processor time is noted, the comparison of both networks on the 10,000 test images included. With ``--agree``
the integers of the first seed are then compared with their float32 simulation, which is what training sees:
test images that the reference backend and the simulation put into the same class. A command whose result is
in the folder already is not repeated.

    make assets
    python -m benchmarks.training_integers [WIDTHS ...] [--seeds N ...] [--agree] [--folder DIR]
        [--output FILE.md]
"""

import argparse
import copy
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.distillation import data
from benchmarks.low_bits import NETWORKS, ROOT, modelopt
from modelopt_cli.artifact import read_program
from modelopt_cli.data import open_data
from modelopt_cli.kernels import prepare
from modelopt_cli.methods.quantize.learning import qat
from modelopt_cli.program import Program

BUILD = ROOT / "build" / "benchmarks" / "training_integers"
NETWORK = NETWORKS["Fashion-MNIST resnet20"]
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Recipe:
    """How two widths are learned.

    Attributes:
        images: of the training split, as ``benchmarks.distillation.data`` names their number.
        epochs: over them.
    """

    images: str
    epochs: int

    @property
    def about(self) -> str:
        """For the table."""
        return f"{self.images} images, {self.epochs} epoch{'s' * (self.epochs > 1)}"


RECIPES = {"8/8": Recipe("3,000", 1), "4/4": Recipe("12,000", 1), "2/2": Recipe("12,000", 2)}
"""By the bits of weights and activations."""


def stem(widths: str, seed: int) -> str:
    """The name of a row's files."""
    return f"w{widths.replace('/', 'a')}-{seed}"


def measured(widths: str, seed: int, folder: Path) -> dict[str, Any]:
    """The figures of one row, or those that were measured before."""
    recipe = RECIPES[widths]
    weights, activations = widths.split("/")
    made = folder / f"{stem(widths, seed)}.safetensors"
    result = made.with_suffix(".json")
    if not result.exists():
        if not (ROOT / NETWORK.checkpoint).exists():
            modelopt("train", *NETWORK.training, "-o", NETWORK.checkpoint)
        bits = ("--weight-bits", weights, "--act-bits", activations)
        train = ("--train", data(folder, recipe.images), "--epochs", str(recipe.epochs))
        how = ("--batch-size", "64", "--calibration-samples", "256", "--seed", str(seed))
        judge = ("--data", NETWORK.data, "-o", str(made))
        result.write_text(json.dumps(modelopt("quantize", NETWORK.checkpoint, *bits, *train, *how, *judge)))
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def same_answers(widths: str, seed: int, folder: Path) -> dict[str, int]:
    """How many test images integers and their simulation put into the same class, and the images."""
    made = folder / f"{stem(widths, seed)}.safetensors"
    result = made.with_suffix(".same.json")
    if not result.exists():
        result.write_text(json.dumps(_same_answers(made)))
    found: dict[str, int] = json.loads(result.read_text())
    return found


def _same_answers(made: Path) -> dict[str, int]:
    program = read_program(made)
    exact = prepare(copy.deepcopy(program).eval(), "cpu", "reference")
    simulated = qat.prepare(program).eval()
    same, images = 0, 0
    # Few at a time, so that the windows of a convolution in float64 stay in the cache.
    with torch.inference_mode():
        for batch, _ in open_data(NETWORK.data, input_spec=program.input).batches(8):
            same += int((_classes(exact, batch) == _classes(simulated, batch)).sum())
            images += len(batch)
    return {"same": same, "images": images}


def _classes(network: Program, batch: Tensor) -> Tensor:
    logits: Tensor = network(batch)
    return logits.argmax(1)


def drop(found: dict[str, Any]) -> dict[str, float]:
    """What a result lost of its float network's top-1, in points, with its paired interval."""
    of: dict[str, float] = found["evaluation"]["comparisons"][0]["drops"]["top1"]
    return of


def row(widths: str, seed: int, found: dict[str, Any]) -> str:
    """A row of the table."""
    before, after = (model["metrics"]["top1"] for model in found["evaluation"]["models"])
    lost = drop(found)
    cells = (
        f"W{widths.replace('/', 'A')}",
        f"{seed}",
        RECIPES[widths].about,
        f"{before:.2f} %",
        f"{after:.2f} %",
        f"{lost['drop']:.2f} ({lost['low']:.2f} to {lost['high']:.2f}) pp",
        f"{found['seconds']:.0f} s",
    )
    return f"| {' | '.join(cells)} |"


def results(folder: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """All results in a folder, by widths and seed."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for widths in RECIPES:
        known = {seed: folder / f"{stem(widths, seed)}.json" for seed in SEEDS}
        found[widths] = {seed: json.loads(path.read_text()) for seed, path in known.items() if path.exists()}
    return {widths: seeds for widths, seeds in found.items() if seeds}


def page(folder: Path) -> Iterator[str]:
    """The page of all results in a folder, line by line."""
    found = results(folder)
    days = dict.fromkeys(each["measured"] for seeds in found.values() for each in seeds.values())
    yield f"{'; '.join(days)}, torch {version('torch')}, `python -m benchmarks.training_integers`, one thread"
    yield ""
    yield "| widths | seed | training | float | trained | drop, 95 % interval | time |"
    yield "|---|---|---|---|---|---|---|"
    for widths, seeds in found.items():
        yield from (row(widths, seed, each) for seed, each in seeds.items())
    yield ""
    yield (
        "The first and the last layer have 8 bits. Drops are of all 10,000 test images, none of which was "
        "trained on. Time is the processor's, of one thread, with the comparison of both networks."
    )
    yield ""
    for widths, seeds in found.items():
        drops = [drop(each)["drop"] for each in seeds.values()]
        count = f"{len(drops)} seed{'s' * (len(drops) > 1)}"
        line = f"- W{widths.replace('/', 'A')}, {count}: {statistics.mean(drops):.2f} points lost, "
        line += f"{min(drops):.2f} to {max(drops):.2f}"
        path = folder / f"{stem(widths, SEEDS[0])}.same.json"
        if path.exists():
            same = json.loads(path.read_text())
            line += f"; integers and simulation agree on {same['same']:,} of {same['images']:,} test images"
        yield f"{line}."


def main() -> None:
    """Measure what is missing and print the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("widths", nargs="*", metavar="WIDTHS", help=f"of {', '.join(RECIPES)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--agree", action="store_true", help="compare integers with their simulation")
    parser.add_argument("--folder", type=Path, default=BUILD)
    parser.add_argument("--output", type=Path, help="write all results of the folder here")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for seed in options.seeds:
        for widths in options.widths or RECIPES:
            print(row(widths, seed, measured(widths, seed, options.folder)), flush=True)
    for widths in (options.widths or RECIPES) if options.agree else ():
        print(widths, same_answers(widths, SEEDS[0], options.folder), flush=True)
    if options.output is not None:
        options.output.write_text("\n".join(page(options.folder)) + "\n")


if __name__ == "__main__":
    main()
