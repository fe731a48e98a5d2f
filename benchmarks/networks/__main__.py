"""Networks of timm, torchvision and transformers: captured, quantized, pruned, written and read.

    python -m benchmarks.networks [FAMILY | FAMILY:NAME ...] [--state FILE] [--output FILE]

Weights are as the library initialises them, save those that begin as zero or nearly so, such as scales at the
end of a residual branch; batch norms have the statistics of their inputs. Images are random with the spectrum
of photographs, and as small as the network takes them; token ids are random, and masks leave out a fifth of
every other sample. Detectors keep 10 boxes of each image, of any score: those of random weights are alike.
Seeds are fixed. Each network is

- captured, and compared with the library's own at batch size 2: bit for bit, or to 1e-5 of the largest
  output where the graph is that of torch.export;
- quantized to static int8 on 16 samples (32 of transformers), those that gave batch norms their
  statistics: how much of its layers and weights, and the outputs' signal-to-noise on 4 others, next to
  that of the float32 network whose inputs have noise of 40 dB added: random networks amplify noise;
  below 30 dB with the layer after which it falls the most. Of a network that is captured in parts, the
  outputs are those of its parts;
- pruned of 30 % of the channels of every group (the rule of ``benchmarks/channels.py``) and compared, in
  float64 (float32 where the network casts to it), with the dense network with those channels zeroed. The
  FLOPs left of a network in parts are those of the original's calls of the parts: the weights decide how
  many boxes its code finds;
- written and read in all three forms, which has to give the same outputs bit for bit.

Each runs in a process of its own with a limit on its processor time and memory. What is done is kept in
``--state``, a line for each network, from which a later call goes on; networks named on the command line are
done again.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import resource
import subprocess
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

import modelopt_cli  # noqa: F401  makes torchvision importable beside a CPU-only torch
from benchmarks.networks import huggingface, page, timm_networks, torchvision_networks
from benchmarks.networks.network import Network
from benchmarks.networks.stages import Found, failure, measure
from modelopt_cli.measure.environment import cpu_name

FORK = multiprocessing.get_context("fork")  # importing torch and timm takes longer than many networks


class Family(NamedTuple):
    """Networks of one library and kind: their names, and how one is built."""

    names: Callable[[], list[str]]
    build: Callable[[str, str | None], Network]


def _torchvision(part: str, build: Callable[[str, str | None], Network]) -> Family:
    return Family(lambda: torchvision_networks.names(part), build)


FAMILIES = {
    "huggingface": Family(huggingface.names, huggingface.build),
    "segmentation": _torchvision("segmentation", torchvision_networks.segmentation),
    "video": _torchvision("video", torchvision_networks.video),
    "optical_flow": _torchvision("optical_flow", torchvision_networks.optical_flow),
    "classification": _torchvision("classification", torchvision_networks.classification),
    "detection": _torchvision("detection", torchvision_networks.detection),
    "timm": Family(timm_networks.names, timm_networks.build),
}


class Limits(NamedTuple):
    """What one network may take: seconds of processor time, and GiB of memory."""

    seconds: int
    gib: int


def child(family: str, name: str, kind: str | None, limits: Limits, send: Connection) -> None:
    """Measure one network and send what is found, stage by stage, or what went wrong."""
    resource.setrlimit(resource.RLIMIT_CPU, (limits.seconds, limits.seconds + 5))
    resource.setrlimit(resource.RLIMIT_AS, (limits.gib << 30, limits.gib << 30))
    try:
        with torch.no_grad():
            for found in measure(FAMILIES[family].build(name, kind)):
                send.send(found)
    except Exception as error:  # a network that cannot be built is a row, too
        send.send(failure(error))


def attempt(family: str, name: str, kind: str | None, limits: Limits) -> Found:
    """One network in a process of its own; what went wrong is under ``error``."""
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    code = head.stdout.strip() or "-"
    found: Found = {"family": family, "name": name, "code": code, "cpu": cpu_name()}
    start = time.monotonic()
    receive, send = FORK.Pipe(duplex=False)
    process = FORK.Process(target=child, args=(family, name, kind, limits, send))
    process.start()
    send.close()
    with contextlib.suppress(EOFError):
        while True:
            found |= receive.recv()
    process.join()
    if process.exitcode:
        found["error"] = f"stopped by its limit of {limits.seconds} s or {limits.gib} GiB"
    return found | {"seconds": round(time.monotonic() - start)}


def read_state(path: Path) -> dict[tuple[str, str], Found]:
    """The newest line of each network."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {(found["family"], found["name"]): found for found in map(json.loads, lines)}


def chosen(arguments: list[str], state: dict[tuple[str, str], Found]) -> list[tuple[str, str]]:
    """The networks to measure: those named, or those of the families named that are not done."""
    named = [tuple(each.split(":", 1)) for each in arguments if ":" in each]
    families = [each for each in arguments if ":" not in each] or ([] if named else list(FAMILIES))
    left = [(family, name) for family in families for name in FAMILIES[family].names()]
    return [*named, *(each for each in left if "seconds" not in state.get(each, {}))]  # type: ignore[list-item]


def main() -> None:
    """Measure what is not measured yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("networks", nargs="*")
    parser.add_argument("--limit", type=int, default=240, help="seconds of processor time for each")
    parser.add_argument("--memory", type=int, default=12, help="GiB of memory for each")
    parser.add_argument("--state", type=Path, default=Path("build/networks.jsonl"))
    parser.add_argument("--output", type=Path, help="page to write; with it nothing is measured")
    parser.add_argument("--note", default="", help="a paragraph for the page")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    state = read_state(options.state)
    if options.output is not None:
        expected = {name: len(family.names()) for name, family in FAMILIES.items()}
        how = str(__doc__).partition("FILE]\n\n")[2].replace("``", "`").strip()
        rows = [found for found in state.values() if "seconds" in found]
        options.output.write_text(page.page(rows, expected, f"{how}\n\n{options.note}".strip()))
        return
    os.nice(19)
    from modelopt_cli.program import exported  # noqa: F401  loads torch's compiler, once for all children

    options.state.parent.mkdir(parents=True, exist_ok=True)
    for family, name in chosen(options.networks, state):
        kind = state.get((family, name), {}).get("network")
        found = attempt(family, name, kind, Limits(options.limit, options.memory))
        print(json.dumps(found), flush=True)
        with options.state.open("a") as file:
            file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
