"""W8A8 next to other quantizers, on the same networks and images: ``python -m benchmarks.rivals``.

All of it runs in an environment of its own, ``build/benchmarks/rivals/venv``, which the first call makes: the
other quantizers are no dependencies of this project. The images to judge by are never calibrated on.
What is in the folder already is not measured again.

    make assets && python -m benchmarks.rivals [NETWORK ...] [--only QUANTIZER ...] [--output FILE]
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "benchmarks" / "rivals"
RIVALS = ("onnx", "onnxruntime", "onnxscript", "nncf", "openvino", "torchao")
"""Packages of the environment besides this project."""


def enter() -> None:
    """Go on in the environment with the other quantizers; make it first where it is missing."""
    python = FOLDER / "venv" / "bin" / "python"
    if Path(sys.executable) == python:
        return
    if not (FOLDER / "made").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", python.parents[1]], check=True)
        install = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt"]
        # First, and by its pin: see constraints.txt.
        subprocess.run([*install, "torch", "torchvision"], check=True)
        subprocess.run([*install, "-e", ROOT, *RIVALS], check=True)
        (FOLDER / "made").touch()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.execv(python, [python, "-m", "benchmarks.rivals", *sys.argv[1:]])


def samples(case: Any, spec: str, program: Any, count: int, skip: int = 0) -> Any:
    """Images of a data spec, and labels: at most so many, drawn at seed 0, behind the first ``skip``."""
    import torch

    from modelopt_cli.data import open_data

    how = {"input_spec": program.input, "overrides": case.network.preprocess, "labels": case.classes}
    data = open_data(spec, **how).sample(count + skip, 0)
    images, targets = zip(*data.batches(64), strict=True)
    return torch.cat(images)[skip:], torch.cat(targets)[skip:] if case.classes else None


def run(name: str, only: set[str]) -> list[dict[str, Any]]:
    """The figures of a network by each quantizer."""
    import torch

    import modelopt_cli
    from benchmarks.crops import make_crops
    from benchmarks.rivals.networks import CASES, CROPS
    from benchmarks.rivals.quantizers import BATCH, QUANTIZERS, full_batches
    from modelopt_cli.api.opening import ModelFile, known_input

    case = CASES[name]
    network, file = case.network, ROOT / case.network.checkpoint
    if case.training and not file.exists():
        command = [sys.executable, "-m", "modelopt_cli", "train", *case.training, "-o", file]
        subprocess.run(command, check=True)
    if not (CROPS / "test.npz").exists():
        make_crops(CROPS, calibration=4, test=10)
    spec = known_input([ModelFile.of(file)], network.arch, network.data, network.preprocess)
    program = modelopt_cli.load(file, arch=network.arch, input_spec=spec).eval()
    images, _ = samples(case, network.calib, program, case.calibration)
    same = len(images) if network.calib == network.data else 0
    test, labels = samples(case, network.data, program, case.test, same)
    test = test[: len(test) // BATCH * BATCH]
    labels = labels[: len(test)] if case.classes else None

    @torch.no_grad()
    def outputs(model: Any) -> Any:
        return torch.cat([model(batch) for batch in full_batches(test)]).double()

    wanted, found = None, []
    for quantizer, make in QUANTIZERS.items():
        if only and quantizer not in only:
            continue
        kept = FOLDER / f"{name}-{quantizer}.json".replace(" ", "-").replace(",", "").lower()
        if not kept.exists():
            wanted = outputs(program) if wanted is None else wanted
            begin = time.process_time()
            with tempfile.TemporaryDirectory() as folder:
                try:
                    model = make(program, images, Path(folder))
                    seconds = time.process_time() - begin
                    figures = compared(wanted, outputs(model), labels)
                except Exception as error:  # whatever another library raises is its result
                    figures, seconds = {"error": f"{type(error).__name__}: {error}".split("\n")[0][:120]}, 0.0
            about = {"quantizer": quantizer, "seconds": seconds, "images": len(images), "test": len(test)}
            kept.write_text(json.dumps({**about, **figures}))
        found.append(json.loads(kept.read_text()))
        print(name, found[-1], flush=True)
    return found


def compared(wanted: Any, outputs: Any, labels: Any) -> dict[str, Any]:
    """Signal-to-noise in dB and, of outputs that are classes, agreement and accuracy in percent."""
    import torch

    figures = {"db": float(10 * torch.log10(wanted.square().sum() / (wanted - outputs).square().sum()))}
    if labels is not None:
        before, after = wanted.argmax(1), outputs.argmax(1)
        hits = [(answers == labels) for answers in (before, after)]
        figures["agreement"] = 100 * float((before == after).double().mean())
        figures["float"], figures["top1"] = (100 * float(hit.double().mean()) for hit in hits)
    return figures


def page(results: Mapping[str, list[dict[str, Any]]]) -> Iterator[str]:
    """The page, line by line."""
    from modelopt_cli.measure.environment import cpu_name

    packages = ("torch", "onnxruntime", "nncf", "openvino", "torchao")
    yield f"{datetime.date.today()}, {cpu_name()}, one thread, " + ", ".join(
        f"{each} {version(each)}" for each in packages
    )
    yield ""
    yield "| network | quantizer | outputs | same answers | top-1, float | top-1 | processor time |"
    yield "|---|---|---|---|---|---|---|"
    for name, rows in results.items():
        for row in rows:
            if "error" in row:
                cells = [row["error"], "", "", "", ""]
            else:
                percent = [
                    f"{row[key]:.2f} %" if key in row else "" for key in ("agreement", "float", "top1")
                ]
                cells = [f"{row['db']:.1f} dB", *percent, f"{row['seconds']:.0f} s"]
            yield f"| {name} | {row['quantizer']} | {' | '.join(cells)} |"
    yield ""
    for name, rows in results.items():
        yield f"- **{name}**: calibrated on {rows[0]['images']} images, judged on {rows[0]['test']} others."


def main() -> None:
    """Measure what is missing and print the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", metavar="NETWORK")
    parser.add_argument("--only", nargs="*", default=(), metavar="QUANTIZER")
    parser.add_argument("--output", type=Path, help="also write the page to this Markdown file")
    options = parser.parse_args()
    enter()
    from benchmarks.rivals.networks import CASES

    os.chdir(ROOT)
    results = {name: run(name, set(options.only)) for name in options.networks or CASES}
    lines = list(page(results))
    print("\n".join(lines))
    if options.output is not None:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
