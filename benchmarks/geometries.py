"""Search for shapes that int8 kernels get wrong, on each instruction set that oneDNN can be held to.

Every case is a layer drawn from a seed (awkward ones on purpose: few channels, strides that differ, windows
in the padding, dilation) with extreme integers, compared with the same sums in float64. oneDNN reads memory
that nobody has written where it errs, so malloc is told to fill it. A case that kills the process counts as
wrong.

    python -m benchmarks.geometries search [--count N] [--seed N] [--isa NAME ...]
                                           [--kernel operator|rule|prepared] [--folder DIR]
    python -m benchmarks.geometries common      torchvision's convolutions that the rule takes round

``operator`` is oneDNN's own, ``rule`` the way ``kernels.routes`` takes it, ``prepared`` adds the trial of
``kernels.trials``. Interrupted, a search goes on where it was: DIR holds a line of JSON for each wrong case
and for each hundred tried. Results: benchmarks/geometries.md.
"""

import argparse
import json
import os
import random
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelopt_cli.kernels import onednn, routes, trials
from modelopt_cli.program.quantization import QParams
from modelopt_cli.program.quantized_convolutions import QuantizedConv2d
from modelopt_cli.program.quantized_linear import QuantizedLinear

ISAS = ("AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI", "DEFAULT")
CHANNELS = (1, 1, 1, 2, 3, 4, 5, 7, 8, 12, 15, 16, 17, 24, 31, 32, 33, 47, 48, 64, 65)
KERNELS = (1, 1, 2, 3, 3, 3, 4, 5, 7, 9)
STRIDES = (1, 1, 2, 2, 3, 4, 5)
OUTPUTS = (1, 1, 2, 3, 4, 5, 8, 16, 30, 60)
MOST_PRODUCTS = 5_000_000
FILL = {"MALLOC_PERTURB_": "165", "MALLOC_MMAP_THRESHOLD_": str(1 << 30), "OMP_NUM_THREADS": "1"}
QUIET = QParams(1.0, 0)
STEP = 100


def draw(case: int, seed: int) -> dict[str, Any]:
    """A layer and an input of a case, as plain numbers."""
    r = random.Random(f"{seed}/{case}")
    if r.random() < 0.1:
        return {
            "rows": r.choice([1, 2, 5, 16, 33]),
            "inputs": r.randint(1, 400),
            "outputs": r.randint(1, 200),
        }
    while True:
        form = _draw_conv(r)
        if form["products"] <= MOST_PRODUCTS:
            return form


def _draw_conv(r: random.Random) -> dict[str, Any]:
    kind = r.choice(["dense", "dense", "grouped", "depthwise"])
    groups = 1 if kind == "dense" else r.choice([2, 3, 4, 8, 15, 16, 17, 32, 48])
    inputs, outputs = (1, 1) if kind == "depthwise" else (r.choice(CHANNELS), r.choice(CHANNELS))
    kernel, stride = ([r.choice(choices) for _ in "hw"] for choices in (KERNELS, STRIDES))
    dilation = [r.choice([1, 1, 1, 2, 3]) for _ in "hw"]
    extent = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    padding = [r.choice([0, e // 2, r.randint(0, e - 1), r.randint(0, e + 2)]) for e in extent]
    size = []
    for axis in (0, 1):
        wanted = (r.choice(OUTPUTS) - 1) * stride[axis] + extent[axis] - 2 * padding[axis]
        size.append(max(wanted + r.randint(0, stride[axis] - 1), extent[axis] - 2 * padding[axis], 1))
    places = [(n + 2 * p - e) // s + 1 for n, p, e, s in zip(size, padding, extent, stride, strict=True)]
    form: dict[str, Any] = {
        "groups": groups,
        "inputs": inputs,
        "outputs": outputs,
        "kernel": kernel,
        "stride": stride,
    }
    form |= {"padding": padding, "dilation": dilation, "size": size, "batch": r.choice([1, 1, 2, 3])}
    form |= {"zero_point": r.choice([0, 128, 255, r.randint(1, 254)])}
    form |= {"layout": r.choice(["last", "last", "first"])}
    form |= {"after": r.choice(["none", "none", "relu", "silu", "sum"])}
    products = groups * inputs * outputs * kernel[0] * kernel[1] * places[0] * places[1]
    return {**form, "products": products * form["batch"]}


def is_wrong(case: int, seed: int) -> dict[str, Any] | None:
    """The fault of a case, or None."""
    form = draw(case, seed)
    g = torch.Generator().manual_seed(case)
    layer, x = _linear(form, g) if "rows" in form else _conv(form, g)
    if isinstance(layer, QuantizedConv2d):
        geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        exact = F.conv2d(x.double() - layer.input.zero_point, layer.weight.double(), None, *geometry)
        residual = _integers(g, 0, 256, *exact.shape) if layer.residual is not None else None
        run = onednn.conv2d(layer, may_overwrite_residual=False)
        got = run(x, *([] if residual is None else [residual]))
        expected = exact if residual is None else exact + residual.double()
    else:
        exact = expected = (x.double() - layer.input.zero_point) @ layer.weight.double().t()
        got = onednn.linear(layer)(x)
    if layer.activation == "relu":
        expected = expected.relu()
    elif layer.activation == "silu":
        expected = F.silu(expected)
    if layer.output is not None:
        expected = expected.clamp(0, 255)
    error = (got.double() - expected).abs()
    wrong = int((error > expected.abs() * 1e-5 + 1e-3).sum())
    return {"wrong": wrong, "of": got.numel(), "error": float(error.max()), **form} if wrong else None


def _conv(form: dict[str, Any], g: torch.Generator) -> tuple[QuantizedConv2d, Tensor]:
    groups = form["groups"]
    channels = (groups * form["inputs"], groups * form["outputs"])
    geometry = (tuple(form[name]) for name in ("kernel", "stride", "padding", "dilation"))
    after = form["after"]
    layer = QuantizedConv2d(
        *(*channels, *geometry, groups, False, QParams(1.0, form["zero_point"])),
        output=QUIET if after == "sum" else None,
        activation="none" if after == "sum" else after,
        residual=QUIET if after == "sum" else None,
    )
    layer.weight.copy_(_weights(g, *layer.weight.shape))
    x = _integers(g, 0, 256, form["batch"], channels[0], *form["size"])
    last = form["layout"] == "last"
    return layer, x.contiguous(memory_format=torch.channels_last) if last else x


def _linear(form: dict[str, Any], g: torch.Generator) -> tuple[QuantizedLinear, Tensor]:
    layer = QuantizedLinear(form["inputs"], form["outputs"], False, QParams(1.0, 77), None)
    layer.weight.copy_(_weights(g, *layer.weight.shape))
    return layer, _integers(g, 0, 256, form["rows"], form["inputs"])


def _integers(g: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    """Integers of which half are the extremes."""
    drawn = torch.randint(2 * low - high // 2, 2 * high - high // 2, shape, generator=g)
    return drawn.clamp_(low, high - 1).to(torch.uint8)


def _weights(g: torch.Generator, *shape: int) -> Tensor:
    """int8 within the bound on pairs."""
    return torch.randint(-128, 129, shape, generator=g).clamp_(-64, 64).to(torch.int8)


def _try_cases(options: argparse.Namespace, begin: int, at: Path) -> None:
    """The child: try cases, one after the other, and say each before it is tried."""
    torch.set_num_threads(1)
    always = mock.patch.multiple(trials, conv2d=lambda *_: True, linear=lambda *_: True)
    with torch.inference_mode(), at.open("wb", buffering=0) as mark, options.log.open("a") as log:
        if options.kernel != "prepared":
            always.start()
        if options.kernel == "operator":
            mock.patch.object(onednn, "route", return_value=routes.Route()).start()
        for case in range(begin, options.count):
            mark.seek(0)
            mark.write(f"{case:12d}".encode())
            found = is_wrong(case, options.seed)
            if found is not None:
                log.write(json.dumps({"case": case, **found}) + "\n")
            if (case + 1) % STEP == 0 or case + 1 == options.count:
                log.write(json.dumps({"tried": case + 1}) + "\n")
            log.flush()


def search(options: argparse.Namespace) -> None:
    """Try all cases on each instruction set; print the counts."""
    options.folder.mkdir(parents=True, exist_ok=True)
    for isa in options.isa:
        log = options.folder / f"{options.kernel}-{isa}-{options.seed}.jsonl"
        at = log.with_suffix(".at")
        environment = {**os.environ, **FILL, "ONEDNN_MAX_CPU_ISA": isa}
        begin = _next_case(log)
        while begin < options.count:
            arguments = ["child", "--begin", str(begin), "--count", str(options.count), "--log", str(log)]
            arguments += ["--seed", str(options.seed), "--kernel", options.kernel]
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.geometries", *arguments], env=environment, check=False
            )
            if done.returncode > 0:
                raise SystemExit(done.returncode)
            begin = int(at.read_text()) + 1
            if done.returncode < 0:
                with log.open("a") as lines:
                    form = draw(begin - 1, options.seed)
                    lines.write(json.dumps({"case": begin - 1, "signal": -done.returncode, **form}) + "\n")
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        wrong = {row["case"]: row for row in rows if "case" in row and row["case"] < options.count}
        kinds = Counter(_kind(row) for row in wrong.values())
        print(f"{isa}, {options.kernel}: {len(wrong)} of {options.count} wrong", dict(kinds), flush=True)


def _next_case(log: Path) -> int:
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return max((row.get("tried", row.get("case", -1) + 1) for row in rows), default=0)


def _kind(row: dict[str, Any]) -> str:
    if "signal" in row:
        return f"killed by signal {row['signal']}"
    return "linear" if "rows" in row else "one channel a group" if row["inputs"] == 1 else "convolution"


def common() -> None:
    """Print how many of the convolutions of torchvision's networks do not go straight to the operator."""
    import torchvision
    from torch._subclasses.fake_tensor import DataDependentOutputException

    total: Counter[str] = Counter()
    networks, left_out = 0, []
    for name in torchvision.models.list_models():
        kind = torchvision.models.get_model_builder(name).__module__.split(".")[2]
        if kind in ("video", "optical_flow", "quantization", "detection"):
            left_out.append(name)  # other inputs, the same layers, or decisions by values
            continue
        found: Counter[str] = Counter()
        try:
            _run_fake(torchvision.models, name, kind, found)
        except DataDependentOutputException:
            left_out.append(name)
            continue
        networks += 1
        total += found
        if set(found) - {"straight"}:
            print(name, dict(found))
    print(f"{networks} networks: {dict(total)}; not tried: {', '.join(left_out)}")


def _run_fake(models: Any, name: str, kind: str, found: Counter[str]) -> None:
    """Run a network on shapes alone; initialisation that looks at values is left out."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode(), mock.patch.object(nn.init, "trunc_normal_"):
        extra = {"weights_backbone": None} if kind == "segmentation" else {}
        net = models.get_model(name, weights=None, **extra).eval()
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(partial(_count, found))
        net(torch.randn(1, 3, *(299, 299) if name == "inception_v3" else (224, 224)))


def _count(found: Counter[str], conv: nn.Module, args: tuple[Tensor]) -> None:
    assert isinstance(conv, nn.Conv2d)
    found[_way(conv, args[0])] += 1


def _way(conv: nn.Conv2d, x: Tensor) -> str:
    options = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride)
    padding = (0, 0) if isinstance(conv.padding, str) else conv.padding
    with torch.device("meta"):
        layer = QuantizedConv2d(*options, padding, conv.dilation, conv.groups, False, QUIET, None)
    way = routes.route(layer, x.shape[2], x.shape[3])
    return "reference" if way is None else "padded first" if way.sides else "straight"


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("verb", choices=["search", "common", "child"])
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--isa", nargs="+", default=ISAS)
    parser.add_argument("--kernel", choices=["operator", "rule", "prepared"], default="prepared")
    parser.add_argument("--folder", type=Path, default=Path("geometries"))
    parser.add_argument("--begin", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--log", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.verb == "common":
        common()
    elif options.verb == "search":
        search(options)
    else:
        _try_cases(options, options.begin, options.log.with_suffix(".at"))


if __name__ == "__main__":
    main()
