"""Channel pruning at a ratio of 0.3 on all of torchvision's classification networks, next to Torch-Pruning.

    python -m benchmarks.channels [NETWORK ...] [--limit SECONDS] [--output FILE]

Of every group of coupled channels both keep the same number, `int(units * 0.7)`, without rounding, and
leave the layers that give the logits alone. Torch-Pruning gets the options its own examples give these
networks (`tests/program/channels_oracle.py`); its success is that pruning changes shapes and the network
still runs. Ours must run, come back from its file bit for bit, and equal the dense network in float64 with
those channels zeroed. Inputs are small and four huge networks reduced (`tests/program/program_networks.py`).
Each side runs in a process of its own, with a limit on its processor time, so that neighbours on the machine
do not matter. The author of Torch-Pruning lists Swin and ShuffleNet as not prunable, too
(`examples/torchvision_models` there).
"""

import argparse
import datetime
import json
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import modelopt_cli  # noqa: F401  makes torchvision importable next to a CPU-only torch

RATIO = 0.3
TESTS = Path(__file__).parent.parent / "tests" / "program"
Found = dict[str, Any]


def theirs(name: str) -> Found:
    """Prune a network with Torch-Pruning: shapes of its parameters, once it has run."""
    from channels_oracle import prune_theirs, shapes_of
    from program_networks import build, side

    model = build(name)
    dense, example = shapes_of(model), torch.randn(1, 3, side(name), side(name))
    prune_theirs(model, example, RATIO)
    with torch.no_grad():
        model(example)
    shapes = shapes_of(model)
    if shapes == dense:
        raise RuntimeError("nothing was pruned")
    return {"shapes": shapes, "left": _count(shapes) / _count(dense)}


def ours(name: str) -> Found:
    """Prune it with modelopt, checked against the dense network and through a file."""
    from channels_oracle import masked, multiple_of, prune_ours, shapes_of
    from program_networks import build, side

    from modelopt_cli import artifact
    from modelopt_cli.program import InputSpec
    from modelopt_cli.program.capture import capture

    model = build(name)
    program = capture(model, InputSpec((3, side(name), side(name))), verify=False)
    dense = shapes_of(program)
    pruned, found, keep = prune_ours(program, RATIO, multiple_of(model))
    shapes, x = shapes_of(pruned), torch.randn(2, *program.input.shape)
    if shapes == dense:
        raise RuntimeError("nothing was pruned")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        artifact.write_program(pruned, Path(folder) / "net.safetensors")
        again = artifact.read_program(Path(folder) / "net.safetensors")
        if not torch.equal(again(x), pruned(x)):
            raise RuntimeError("comes back different from its file")
        del again
        wanted = masked(found, keep).double()(x.double())
        actual = pruned.double()(x.double())
    apart = float((actual - wanted).abs().max() / wanted.abs().max())
    if not apart < 1e-9:
        raise RuntimeError(f"differs from the dense network by {apart:.1e} of the largest logit")
    return {"shapes": shapes, "left": _count(shapes) / _count(dense), "apart": apart}


def _count(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def attempt(side: str, name: str, limit: int) -> Found:
    """One side on one network in a process of its own; what went wrong is under ``error``."""
    command = [sys.executable, "-m", "benchmarks.channels", name, "--side", side, "--limit", str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return {"error": f"not done after {limit} s, or out of memory"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["killed"])[-1][:120]}
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def row(name: str, left: Found, right: Found) -> str:
    """The table's line for one network."""
    from channels_oracle import compare

    shapes = "-"
    if "error" not in left and "error" not in right:
        sides = [{n: tuple(s) for n, s in found["shapes"].items()} for found in (left, right)]
        found = compare(*sides)
        shapes = f"{found.same} / {found.smaller} / {len(found.larger)}"
    apart = f"{left['apart']:.0e}" if "apart" in left else "-"
    return f"| {name} | {_cell(right)} | {_cell(left)} | {shapes} | {apart} |"


def _cell(found: Found) -> str:
    return found["error"].replace("|", "/") if "error" in found else f"{100 * found['left']:.1f} %"


def report(names: list[str], limit: int) -> list[str]:
    """The table, printed as it grows, with the counts above it."""
    from modelopt_cli.measure.environment import cpu_name

    head = [
        "| network | Torch-Pruning: parameters left | ours: parameters left "
        "| shapes equal / ours smaller / ours larger | ours against dense, zeroed |",
        "|---|---|---|---|---|",
    ]
    print("\n".join(head), flush=True)
    rows, counts = [], {"ours": 0, "theirs": 0}
    for name in names:
        both = {side: attempt(side, name, limit) for side in counts}
        for side, found in both.items():
            counts[side] += "error" not in found
        rows.append(row(name, both["ours"], both["theirs"]))
        print(rows[-1], flush=True)
    from torch_pruning import __version__ as version

    return [
        f"{datetime.date.today()}, {cpu_name()}, torch {torch.__version__}, Torch-Pruning {version}, "
        f"ratio {RATIO}, at most {limit} s of processor time for each network and side",
        "",
        f"Pruned and ran: Torch-Pruning {counts['theirs']} of {len(names)}. Pruned, ran, reloaded from the "
        f"file and equal to the dense network with those channels zeroed: ours {counts['ours']} of "
        f"{len(names)}.",
        "",
        "Shapes are compared over the parameters that both have; the auxiliary heads of GoogLeNet and "
        "Inception, which do not run in evaluation, are in Torch-Pruning's network only.",
        "",
        *head,
        *rows,
    ]


def main() -> None:
    """Measure and print a Markdown table."""
    sys.path.insert(0, str(TESTS))
    from program_networks import NAMES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("networks", nargs="*")
    parser.add_argument("--limit", type=int, default=180, help="seconds of processor time")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--side", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.side:
        resource.setrlimit(resource.RLIMIT_CPU, (options.limit, options.limit + 5))
        print(json.dumps({"ours": ours, "theirs": theirs}[options.side](*options.networks)))
        return
    lines = report(options.networks or NAMES, options.limit)
    print(lines[2])
    if options.output is not None:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
