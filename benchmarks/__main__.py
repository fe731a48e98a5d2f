"""``make bench``: int8 next to float32 channels-last and next to the best float32 form, one thread, batch 1.

Random weights with calibrated batch norms, random images: latency does not depend on either. Rounds are
interleaved and medians compared, so that a neighbour on the machine slows all of them alike.

    python -m benchmarks [NETWORK ...] [--runs N] [--batch-size N] [--output FILE]
"""

import argparse
import copy
import datetime
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import modelopt_cli  # noqa: F401  makes torchvision importable next to a CPU-only torch

NETWORKS = ("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "googlenet")
SHAPE = (3, 224, 224)


def contenders(name: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """The same network in three forms, each a callable on an NCHW batch."""
    import torchvision

    from modelopt_cli.data import open_data
    from modelopt_cli.kernels import prepare
    from modelopt_cli.kernels.fp32 import prepack
    from modelopt_cli.methods.context import Context
    from modelopt_cli.methods.quantize.apply import apply
    from modelopt_cli.methods.quantize.config import QuantizeConfig
    from modelopt_cli.program import InputSpec
    from modelopt_cli.program.capture import capture

    torch.manual_seed(0)
    extra = {"init_weights": True} if name == "googlenet" else {}
    net = torchvision.models.get_model(name, weights=None, **extra).train()
    with torch.inference_mode():
        for _ in range(2):
            net(torch.randn(8, 3, 128, 128))
    program = capture(net.eval(), InputSpec(SHAPE))
    data = open_data("synthetic:3x224x224?n=8", input_spec=program.input)
    int8 = prepare(apply(program, QuantizeConfig(observer="minmax"), Context(data=data)).program)
    channels_last = copy.deepcopy(net).to(memory_format=torch.channels_last)
    return {
        "fp32 channels-last": lambda x: channels_last(x.contiguous(memory_format=torch.channels_last)),
        "fp32 best": prepack(program),
        "int8": int8,
    }


def medians(forms: dict[str, Callable[[Tensor], Tensor]], x: Tensor, runs: int) -> dict[str, float]:
    """Median milliseconds of each form over interleaved rounds."""
    taken: dict[str, list[float]] = {name: [] for name in forms}
    with torch.inference_mode():
        for round_number in range(runs + 3):
            for name, form in forms.items():
                begin = time.perf_counter()
                form(x)
                if round_number >= 3:
                    taken[name].append((time.perf_counter() - begin) * 1e3)
    return {name: statistics.median(times) for name, times in taken.items()}


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("networks", nargs="*", default=NETWORKS)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    from modelopt_cli.measure.environment import cpu_name

    isa = torch.backends.cpu.get_cpu_capability()
    lines = [
        f"{datetime.date.today()}, {cpu_name()} ({isa}), torch {torch.__version__}, one thread, "
        f"batch {options.batch_size}, {options.runs} interleaved rounds, median ms",
        "",
        "| network | fp32 channels-last | fp32 best | int8 | over channels-last | over best |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for name in options.networks:
        found = medians(contenders(name), torch.randn(options.batch_size, *SHAPE), options.runs)
        slow, best, int8 = found.values()
        row = f"| {name} | {slow:.1f} | {best:.1f} | {int8:.1f} | {slow / int8:.2f}x | {best / int8:.2f}x |"
        print(row, flush=True)
        lines.append(row)
    if options.output is not None:
        options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
