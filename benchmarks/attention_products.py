"""Products of attention by the operators of torch on a CPU: ``python -m benchmarks.attention_products``.

Queries, keys and values are random: attention takes as long whatever they hold. Of int8 attention the parts
are measured: its two products, from int8 to int32, of integers as int8 projections could hand them on, and
the softmax and rounding between these. It takes at least as long as both. torch has no int8 product of
batches on CPUs, so its operators are called head by head.

    python -m benchmarks.attention_products [--runs N] [--output FILE]
"""

import argparse
import datetime
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.rounds import shortest
from modelopt_cli.measure.environment import cpu_name

SHAPES = {
    "ViT-B, 197 tokens": (1, 12, 197, 64),
    "ViT-B, 197 tokens, batch 8": (8, 12, 197, 64),
    "MiniLM, 128 tokens": (1, 12, 128, 32),
    "MiniLM, 128 tokens, batch 8": (8, 12, 128, 32),
}
"""Samples, heads, tokens and features of a head."""
STEPS = 127
"""Steps that probabilities are rounded to."""


def forms(shape: tuple[int, int, int, int]) -> dict[str, Callable[[], object]]:
    """Ways to compute attention or its parts, of queries, keys and values that are alike."""
    samples, heads, tokens, width = shape
    torch.manual_seed(0)
    floats = torch.randn(shape)
    half = floats.bfloat16()
    integers = torch.randint(-127, 128, (samples * heads, tokens, width), dtype=torch.int8)
    scores = torch.randint(-9999, 9999, (samples * heads, tokens, tokens), dtype=torch.int32)
    weights = rounded(scores)
    unsigned, unsigned_weights = integers.view(torch.uint8), weights.view(torch.uint8)

    def of_linears() -> None:
        for head in range(len(integers)):
            _qlinear(unsigned[head], integers[head])
            _qlinear(unsigned_weights[head], integers[head].t())

    return {
        "float32, fused": lambda: F.scaled_dot_product_attention(floats, floats, floats),
        "bfloat16, fused": lambda: F.scaled_dot_product_attention(half, half, half),
        "int8 products alone, `_int_mm`": lambda: (
            products(integers, integers.transpose(1, 2)),
            products(weights, integers),
        ),
        "softmax and rounding between them": lambda: rounded(scores),
        "int8 products alone, `qlinear_pointwise`": of_linears,
    }


def products(a: Tensor, b: Tensor) -> Tensor:
    """int8 matrices times int8 matrices, ``(heads, ...)``, into int32."""
    sums = torch.empty(len(a), a.shape[1], b.shape[2], dtype=torch.int32)
    for head in range(len(a)):
        torch._int_mm(a[head], b[head], out=sums[head])
    return sums


def rounded(scores: Tensor) -> Tensor:
    """The probabilities of int32 scores, as int8."""
    return scores.float().mul_(1e-4).softmax(-1).mul_(STEPS).round_().to(torch.int8)


def _qlinear(x: Tensor, weight: Tensor) -> Tensor:
    """uint8 ``(rows, K)`` times int8 ``(columns, K)``, packed at every call, as activations would be."""
    packed = torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)
    scales, zeros = torch.ones(len(weight)), torch.zeros(len(weight), dtype=torch.int8)
    plain = (None, 1.0, 0, torch.float32, "none", [], "")
    result: Tensor = torch.ops.onednn.qlinear_pointwise(x, 1.0, 0, packed, scales, zeros, *plain)
    return result


def rows(runs: int) -> Iterator[str]:
    """The lines of the table."""
    for number, (name, shape) in enumerate(SHAPES.items()):
        taken = shortest(forms(shape), runs)
        if not number:
            yield f"| | {' | '.join(taken)} |"
            yield f"|---|{'---|' * len(taken)}"
        yield f"| {name} | {' | '.join(f'{ms:.2f}' for ms in taken.values())} |"


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    isa = torch.backends.cpu.get_cpu_capability()
    known = torch.cpu.get_capabilities()
    units = (
        ", ".join(unit for unit in ("avx512_vnni", "amx_int8", "amx_bf16") if known.get(unit)) or "no VNNI"
    )
    lines = [
        f"{datetime.date.today()}, {cpu_name()} ({isa}, {units}), torch {torch.__version__}, one thread, "
        f"`python -m benchmarks.attention_products`, {options.runs} rounds, processor time of the shortest "
        "in ms",
        "",
        *rows(options.runs),
    ]
    print("\n".join(lines))
    if options.output is not None:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
