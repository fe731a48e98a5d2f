"""Accuracy and size of int8 recipes in ``configs/``, as in the README: ``python -m benchmarks.accuracy``."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = ("ccexam-mnist", "efficientnet-lite0")


def measure(recipe: Path, folder: str) -> str:
    """Run the recipe and return the table's row."""
    command = [sys.executable, "-m", "modelopt_cli", "run", str(recipe)]
    command += ["-o", f"{folder}/{recipe.stem}.safetensors", "--threads", "1", "--json", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=CONFIGS.parent)
    found = json.loads(done.stdout)
    (before, after), (against,) = found["models"], found["comparisons"]
    return (
        f"| {recipe.stem} | {after['samples']} | {before['file_bytes'] / 1e6:.2f} to "
        f"{after['file_bytes'] / 1e6:.2f} MB | {before['top1']:.2f} % | {after['top1']:.2f} % "
        f"| {against['drop_pp']:.2f} ({against['low']:.2f} to {against['high']:.2f}) pp "
        f"| {100 * after['coverage']:.0f} % |"
    )


def main() -> None:
    """Print the table, row by row."""
    print("| recipe | samples | file | top-1 before | top-1 after | drop, 95 % interval | layers int8 |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in RECIPES:
            print(measure(CONFIGS / f"{name}.yaml", folder), flush=True)


if __name__ == "__main__":
    main()
