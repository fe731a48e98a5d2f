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
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.real.networks import NETWORKS, Network
from modelopt_cli.measure.environment import cpu_name

ROOT = Path(__file__).parent.parent
Found = dict[str, Any]
"""What a command prints with ``--json``."""

CALIBRATING = ("quantize", "prune", "share")
"""Commands that take data to calibrate on."""


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
    stem = folder / f"{name}-{method}".replace(" ", "-").replace(".", "-").lower()
    result = stem.with_suffix(".json")
    if not result.exists():
        if network.training and not (ROOT / network.checkpoint).exists():
            modelopt("train", *network.training, "-o", network.checkpoint)
        result.write_text(json.dumps(compressed(network, method, folder, stem.with_suffix(".safetensors"))))
    found: Found = json.loads(result.read_text())
    return found


def compressed(network: Network, method: str, folder: Path, output: Path) -> Found:
    """Compress a network, and judge it by its own task, by whichever task it was trained.

    Args:
        network: a row of ``NETWORKS``.
        method: name of one of its methods.
        folder: where the results of its other methods are, which options name as ``{folder}``.
        output: the file to write.
    """
    verb, *options = (part.format(folder=folder) for part in network.methods[method])
    own = ("--calibration", network.calibration) if verb in CALIBRATING else ()
    done = modelopt(verb, network.checkpoint, *network.options, *own, *options, "-o", str(output))
    found: Found = json.loads(done)
    found["measured"] = f"{datetime.date.today()}, {cpu_name()}"
    if "--task" in options:
        judged = modelopt("eval", network.checkpoint, str(output), *network.options)
        found["evaluation"] = json.loads(judged)
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


def rows(name: str, folder: Path) -> list[str]:
    """The rows of a network and, last, the note on it."""
    network, table = NETWORKS[name], []
    for method in network.methods:
        found = run(name, method, folder)
        samples = found["evaluation"]["models"][0]["samples"]
        row = (name, method, f"{network.metric}, {samples}", *cells(found, network.metric))
        table.append(f"| {' | '.join(row)} |")
        print(table[-1], flush=True)
    return [*table, f"- **{name}** ({found['measured']}): {network.data}. {network.note}".rstrip()]


def page(measured: Mapping[str, list[str]], before: str) -> Iterator[str]:
    """The page, line by line, with the lines of the page ``before`` for networks that were not measured."""
    yield f"torch {version('torch')}, `python -m benchmarks.real_networks`"
    yield ""
    yield "| network | | metric | fp32 | compressed | drop, 95 % interval | lost | outputs | file | layers |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    notes = []
    for name in NETWORKS:
        marks = (f"| {name} |", f"- **{name}** ")
        lines = [line for line in before.splitlines() if line.startswith(marks)]
        *table, note = measured.get(name) or lines or [""]
        yield from table
        notes.append(note)
    yield ""
    yield from filter(None, notes)


def main() -> None:
    """Run what is missing and print the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "benchmarks" / "real_networks")
    parser.add_argument(
        "--output",
        type=Path,
        help="write the page to this Markdown file; networks not named keep their lines",
    )
    options = parser.parse_args()
    if unknown := [name for name in options.networks if name not in NETWORKS]:
        parser.error(f"no network is called {unknown[0]}; there are {', '.join(NETWORKS)}")
    options.folder.mkdir(parents=True, exist_ok=True)
    measured = {name: rows(name, options.folder) for name in options.networks or NETWORKS}
    if output := options.output:
        before = output.read_text() if output.exists() else ""
        output.write_text("\n".join(page(measured, before)) + "\n")


if __name__ == "__main__":
    main()
