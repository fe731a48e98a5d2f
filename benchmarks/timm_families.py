"""Every module of timm's networks, its smallest published one: captured, quantized, pruned, written and read.

    python -m benchmarks.timm_families [MODULE ...] [--capture-only] [--state FILE] [--output FILE]

Weights are as timm initialises them, save those that begin as zero or nearly so, such as scales at the end
of a residual branch (``shake``); batch norms have the statistics of their inputs (``settle``). Images are
random with the spectrum of photographs, and as small as the network takes them. Each network is

- captured, and compared with timm's own at batch size 2 bit for bit;
- quantized to int8 on 4 images: how much of its layers, and the outputs' signal-to-noise on 4 others, next to
  that of the float32 network whose inputs have noise of 40 dB added: random networks amplify noise;
- pruned of 30 % of the channels of every group (the rule of ``benchmarks/channels.py``) and compared, in
  float64 (float32 where the network casts to it), with the dense network with those channels zeroed;
- written and read in all three forms, which has to give the same outputs bit for bit.

Each runs in a process of its own with a limit on its processor time and memory. What is done is kept in
``--state``, from which a later call goes on; modules named on the command line are done again.
"""

import argparse
import contextlib
import datetime
import json
import multiprocessing
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modelopt_cli  # noqa: F401  makes torchvision importable next to a CPU-only torch

RATIO = 0.3
SAMPLES = 4
MEMORY = 14 << 30
FORK = multiprocessing.get_context("fork")  # importing torch and timm takes longer than many networks
SIDES = (64, 112, 128, 126, 160, 192, 224)
"""Heights and widths to try, smallest first, before the network's own."""
REDUCED = {
    "deepseek_vit": ({"depth": 2}, "2 of its layers"),
    "gemma4_vit": ({"depth": 2}, "2 of its layers"),
}
"""Too large for the limits: fewer blocks of the same kind."""
TESTS = Path(__file__).parent.parent / "tests"
Found = dict[str, Any]


def smallest(module: str) -> str:
    """The network of a timm module with the fewest parameters, timm's own test networks left out."""
    import timm
    from program_networks import _no_initialisation

    sizes = {}
    for name in timm.list_models(module=module):
        if not name.startswith("test_"):
            with torch.device("meta"), _no_initialisation():
                sizes[name] = sum(p.numel() for p in timm.create_model(name).parameters())
    return min(sizes, key=lambda name: (sizes[name], name))


def build(module: str, name: str) -> tuple[nn.Module, int]:
    """The network in evaluation mode, and a height and width that it takes."""
    import timm

    config = timm.get_pretrained_cfg(name)
    given = REDUCED.get(module, ({}, ""))[0]
    native = config.input_size[-1]
    model = None
    for side in (*(s for s in SIDES if s < native), native):
        size = {"img_size": side} if config.fixed_input_size and side != native else {}
        try:
            if model is None or config.fixed_input_size:
                model = timm.create_model(name, **given, **size).eval()
                shake(model)
            settle(model, side)
            model(images(1, side))
        except (RuntimeError, AssertionError, ValueError, TypeError):  # a size that does not go through
            if side == native:
                raise
            continue
        return model, side
    raise AssertionError


def images(count: int, side: int, seed: int = 0) -> Tensor:
    """Random images with equally much contrast in every octave, as photographs have (Field, 1987)."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for size in (2, 4, 8, 16, 32, 64, 128):
        coarse = torch.randn(count, 3, min(size, side), min(size, side), generator=generator)
        layers.append(F.interpolate(coarse, size=(side, side), mode="bilinear"))
    mixed = torch.stack([layer / layer.std() for layer in layers]).sum(0)
    return mixed / mixed.std()


def shake(model: nn.Module) -> None:
    """Give weights that begin as zero, or nearly so, the size that they have after training."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if not name.endswith("bias") and weight.abs().max() < 1e-3:
            if weight.numel() == max(weight.shape):  # a scale for each channel
                weight.copy_(0.1 + 0.4 * torch.rand(weight.shape, generator=generator))
            else:
                weight.copy_(0.02 * torch.randn(weight.shape, generator=generator))


def settle(model: nn.Module, side: int) -> None:
    """Give every batch norm the statistics of its inputs."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum, norm.training = None, True
    try:
        model(images(SAMPLES, side, seed=3))
    finally:
        for norm in norms:
            norm.momentum, norm.training = 0.1, False


def measure(module: str, name: str, capture_only: bool) -> Iterator[Found]:
    """Findings of a family, stage by stage."""
    from modelopt_cli.program import InputSpec
    from modelopt_cli.program.capture import capture

    model, side = build(module, name)
    yield {"side": side, "parameters": sum(p.numel() for p in model.parameters())}
    program = capture(model, InputSpec((3, side, side)))
    x = images(2, side)
    _require(torch.equal(program(x), model(x)), "what was captured computes something else")
    _require_reload(program, x)
    yield {"captured": True}
    if capture_only:
        return
    del model
    yield quantized(program)
    yield pruned(program)


def quantized(program: Any) -> Found:
    """int8: layers covered, signal-to-noise of the outputs."""
    from quantize_networks import Images

    from modelopt_cli.measure.output_comparison import snr_db
    from modelopt_cli.methods.context import Context
    from modelopt_cli.methods.quantize.apply import apply
    from modelopt_cli.methods.quantize.config import QuantizeConfig

    side = program.input.shape[-1]
    context: Any = Context(data=Images(images(SAMPLES, side, seed=1)))
    result = apply(program, QuantizeConfig(scheme="int8"), context).program
    x = images(SAMPLES, side, seed=2)
    read, wanted = _require_reload(result, x), program(x)
    shaken = program(x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(4)))
    (entry,) = result.history
    return {"coverage": entry["coverage"], "snr": snr_db(wanted, read), "shaken": snr_db(wanted, shaken)}


def pruned(program: Any) -> Found:
    """Channels: parameters left, and how far off the dense network with those channels zeroed."""
    from channels_oracle import masked, prune_ours

    result, found, keep = prune_ours(program, RATIO)
    count = [sum(p.numel() for p in network.parameters()) for network in (result, program)]
    x = images(2, program.input.shape[-1])
    _require_reload(result, x)
    dense, limit = masked(found, keep), 1e-9
    del found
    try:
        wanted, got = dense.double()(x.double()), result.double()(x.double())
    except RuntimeError:  # a network that casts to float32 inside
        wanted, got, limit = dense.float()(x), result.float()(x), 1e-4
    apart = float((got - wanted).abs().max() / wanted.abs().max())
    _require(apart < limit, f"pruned, it differs from the dense network by {apart:.1e} of the largest output")
    return {"left": count[0] / count[1], "apart": apart}


def _require_reload(program: Any, x: Tensor) -> Tensor:
    """The outputs of what is read again, which have to be the same."""
    from modelopt_cli import artifact
    from modelopt_cli.kernels import prepare

    with tempfile.TemporaryDirectory() as folder:
        artifact.write_program(program, Path(folder) / "net.safetensors")
        again = artifact.read_program(Path(folder) / "net.safetensors")
    outputs: Tensor = prepare(again)(x)
    _require(torch.equal(outputs, prepare(program)(x)), "comes back different from its file")
    return outputs


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RuntimeError(otherwise)


def child(module: str, name: str, options: argparse.Namespace, send: Connection) -> None:
    """Measure one network and send what is found, stage by stage, or what went wrong."""
    resource.setrlimit(resource.RLIMIT_CPU, (options.limit, options.limit + 5))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        with torch.no_grad():
            for found in measure(module, name, options.capture_only):
                send.send(found)
    except Exception as error:  # whatever a stage fails with goes into the table
        send.send({"error": f"{type(error).__name__}: {error}".split("\n")[0][:200]})


def attempt(module: str, name: str, options: argparse.Namespace) -> Found:
    """One network in a process of its own; what went wrong is under ``error``."""
    head = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    found: Found = {"network": name, "code": head.stdout.strip() or "-"}
    start = time.monotonic()
    receive, send = FORK.Pipe(duplex=False)
    process = FORK.Process(target=child, args=(module, name, options, send))
    process.start()
    send.close()
    with contextlib.suppress(EOFError):
        while True:
            found |= receive.recv()
    process.join()
    if process.exitcode:
        found["error"] = f"stopped by its limit of {options.limit} s or {MEMORY >> 30} GiB"
    return found | {"seconds": round(time.monotonic() - start)}


COLUMNS: dict[str, Callable[[str, Found], str]] = {
    "module": lambda module, f: module,
    "network": lambda module, f: f.get("network", "-") + (" *" if module in REDUCED else ""),
    "side": lambda module, f: str(f.get("side", "-")),
    "parameters": lambda module, f: f"{f['parameters'] / 1e6:.1f} M" if "parameters" in f else "-",
    "captured": lambda module, f: "yes" if f.get("captured") else "no",
    "int8 layers": lambda module, f: "{compressed} of {total}".format(**f["coverage"]) if "snr" in f else "-",
    "int8, dB": lambda module, f: f"{f['snr']:.1f}" if "snr" in f else "-",
    "noisy input, dB": lambda module, f: f"{f['shaken']:.1f}" if "snr" in f else "-",
    "pruned: parameters left": lambda module, f: f"{100 * f['left']:.1f} %" if "left" in f else "-",
    "against dense, zeroed": lambda module, f: f"{f['apart']:.0e}" if "apart" in f else "-",
    "code": lambda module, f: f.get("code", "-"),
    "fell short": lambda module, f: f.get("error", "").replace("|", "/"),
}


def report(state: dict[str, Found]) -> list[str]:
    """The Markdown page."""
    import timm

    from modelopt_cli.measure.environment import cpu_name

    count = {key: sum(key in found for found in state.values()) for key in ("captured", "snr", "left")}
    whole = sum("snr" in found or "error" in found for found in state.values())
    noisy = sum(found.get("snr", 99.0) < 20 for found in state.values())
    notes = [f"\\* {module}: {why}" for module, (_, why) in REDUCED.items() if module in state]
    return [
        f"{datetime.date.today()}, {cpu_name()}, torch {torch.__version__}, timm {timm.__version__}, one "
        "thread; made by `python -m benchmarks.timm_families`, which says how.",
        "",
        f"Of {len(state)} modules the smallest network of each: captured bit for bit, and read again from "
        f"its file, {count['captured']}.",
        f"{whole} went through the other methods. Quantized to int8 and read again bit for bit: "
        f"{count['snr']}, {noisy} of them under 20 dB. Pruned of 30 % of the channels of each group, equal "
        f"to the dense network with those zeroed, and read again: {count['left']}."
        + (" The others have only been captured." if whole < len(state) else ""),
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *(
            "| " + " | ".join(cell(module, state[module]) for cell in COLUMNS.values()) + " |"
            for module in sorted(state)
        ),
        *(["", *notes] if notes else []),
    ]


def main() -> None:
    """Measure what is not measured yet, and write the table."""
    sys.path[:0] = [str(TESTS / "program"), str(TESTS / "methods")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("modules", nargs="*")
    parser.add_argument("--limit", type=int, default=240, help="seconds of processor time for each")
    parser.add_argument("--state", type=Path, default=Path("timm_families.part"))
    parser.add_argument("--capture-only", action="store_true", help="leave out int8 and pruning")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    import timm

    state: dict[str, Found] = json.loads(options.state.read_text()) if options.state.exists() else {}
    done = {module for module, found in state.items() if "seconds" in found}
    for module in options.modules or sorted(set(timm.list_modules()) - done):
        name = state.get(module, {}).get("network") or smallest(module)
        state[module] = attempt(module, name, options)
        print(module, json.dumps(state[module]), flush=True)
        options.state.write_text(json.dumps(state))
    if options.output is not None:
        options.output.write_text("\n".join(report(state)) + "\n")


if __name__ == "__main__":
    main()
