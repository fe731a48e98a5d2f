"""W8A8 next to other quantizers, on the same networks and samples: ``python -m benchmarks.rivals``.

All of it runs in an environment of its own, ``build/benchmarks/rivals/venv``, which the first call makes: the
other quantizers are no dependencies of this project. Figures are kept in ``build/benchmarks/rivals``: only
rows whose options or package version are others are measured again, and those of ``--again``.

    make assets && python -m benchmarks.rivals [NETWORK ...] [--only QUANTIZER ...] [--again] [--output FILE]
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "benchmarks" / "rivals"
RIVALS = ("onnx", "onnxruntime", "onnxscript", "nncf", "openvino", "torchao")
"""Packages of the environment besides this project."""
Results = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Figures by network and quantizer."""


def enter(module: str = "benchmarks.rivals") -> None:
    """Go on with a module in the environment with the other quantizers; make it first where it is missing."""
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
    os.execv(python, [python, "-m", module, *sys.argv[1:]])


def measure(name: str, only: set[str], again: bool) -> dict[str, dict[str, Any]]:
    """Figures of a network by quantizer: kept ones, and those of rows that have changed."""
    from benchmarks.rivals.comparison import Comparison
    from benchmarks.rivals.networks import CASES
    from benchmarks.rivals.quantizers import QUANTIZERS

    kept = FOLDER / f"{name}.json"
    figures = json.loads(kept.read_text()) if kept.exists() else {}
    comparison = None
    for quantizer, row in QUANTIZERS.items():
        asked = not only or quantizer in only
        known = figures.get(quantizer, {}).get("made_by") == row.made_by
        if not asked or (known and not again) or (row.classifiers and not CASES[name].classifies):
            continue
        comparison = comparison or Comparison(CASES[name])
        figures[quantizer] = {"made_by": row.made_by, **comparison.figures(row)}
        figures["float"] = comparison.about()
        print(name, quantizer, figures[quantizer], file=sys.stderr, flush=True)
        kept.write_text(json.dumps(figures, indent=1))
    return {row: figures[row] for row in ("float", *QUANTIZERS) if row in figures}


def page(results: Results) -> Iterator[str]:
    """The page, line by line."""
    from modelopt_cli.measure.environment import cpu_name

    packages = ", ".join(f"{each} {version(each)}" for each in ("torch", "onnxruntime", *RIVALS[3:]))
    yield f"{datetime.date.today()}, {cpu_name()}, one thread, {packages}"
    yield from ("", "Signal to noise of the outputs in dB, the best of each network in bold:", "")
    yield from overview(results)
    for name, rows in results.items():
        about = rows["float"]
        yield from ("", f"## {name}", "")
        yield f"Calibrated on {about['calibration']} samples, judged on {about['test']} others."
        yield f"Float: {about['metric']} {about['float']}."
        yield ""
        metric = about["metric"]
        yield f"| quantizer | outputs | same answers | {metric} | loss, 95 % interval | processor time |"
        yield "|---|---|---|---|---|---|"
        for quantizer, row in rows.items():
            if row is not about:
                yield f"| {quantizer} | {' | '.join(cells(row))} |"


def overview(results: Results) -> Iterator[str]:
    """A table of all quantizers and networks."""
    decibels = {
        name: {quantizer: f"{row['db']:.1f}" for quantizer, row in rows.items() if "db" in row}
        for name, rows in results.items()
    }
    yield f"| quantizer | {' | '.join(decibels)} |"
    yield "|---|" + "---|" * len(decibels)
    for quantizer in dict.fromkeys(each for values in decibels.values() for each in values):
        shown = []
        for values in decibels.values():
            text = values.get(quantizer, "")
            best = text and text == max(values.values(), key=float)
            shown.append(f"**{text}**" if best else text)
        yield f"| {quantizer} | {' | '.join(shown)} |"


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row of the table without its name."""
    if "error" in row:
        return [row["error"], "", "", "", ""]
    same = "" if row["agreement"] is None else f"{100 * row['agreement']:.2f} %"
    loss = f"{row['loss']} ({row['interval']})"
    return [f"{row['db']:.1f} dB", same, row["value"], loss, f"{row['seconds']:.0f} s"]


def main() -> None:
    """Measure what is missing and print the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", metavar="NETWORK")
    parser.add_argument("--only", nargs="*", default=(), metavar="QUANTIZER")
    parser.add_argument("--again", action="store_true", help="measure kept rows, too")
    parser.add_argument("--output", type=Path, help="also write the page to this Markdown file")
    options = parser.parse_args()
    enter()
    from benchmarks.rivals.networks import CASES

    os.chdir(ROOT)
    names = options.networks or list(CASES)
    results = {name: measure(name, set(options.only), options.again) for name in names}
    lines = list(page(results))
    print("\n".join(lines))
    if options.output is not None:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
