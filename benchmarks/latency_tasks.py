"""int8 next to the best float32 form, on networks of other tasks than ImageNet classification; one thread.

    python -m benchmarks.latency_tasks [NETWORK ...] [--runs N] [--output FILE]
    python -m benchmarks.latency_tasks --profile [NETWORK ...]

The float32 forms are those that ``modelopt eval`` tries (``measure.variants``), and the fastest counts.
Weights and inputs are random: latency depends on neither. Rounds are interleaved and timed by the clock of
the thread, which stands still while another process has the processor; a ratio is the median of those
within a round, with its 95 % interval. ``--profile`` says instead which operations a pass spends its time
in. BERT needs transformers. Results: benchmarks/latency_tasks.md.
"""

import argparse
import datetime
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

import modelopt_cli as mo
from modelopt_cli.errors import CaptureError
from modelopt_cli.kernels.fp32 import Prepacked
from modelopt_cli.measure.environment import cpu_name
from modelopt_cli.measure.latency import sample_input
from modelopt_cli.measure.speedup import paired_speedup
from modelopt_cli.measure.variants import equivalent_variants, fastest_variant
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.calls import operation
from modelopt_cli.program.capture import capture
from modelopt_cli.program.input_batch import Inputs, call, tensors_of
from modelopt_cli.program.partition import capture_parts

TOKENS = 128


@dataclass(frozen=True)
class Case:
    """A network and how it is measured.

    Attributes:
        title: what it is, in the table.
        make: the network with random weights.
        sample: one input.
        schemes: of ``modelopt quantize``.
        batch_sizes: that are timed.
        backbone: the part of it whose batch norms get statistics.
    """

    title: str
    make: Callable[[], nn.Module]
    sample: InputSpec
    schemes: tuple[str, ...] = ("int8",)
    batch_sizes: tuple[int, ...] = (1,)
    backbone: Callable[[nn.Module], nn.Module] = lambda network: network


def bert() -> nn.Module:
    """BERT-base (Devlin et al., NAACL 2019): 12 layers of 768, 110 million parameters."""
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(), add_pooling_layer=True)


def deeplab() -> nn.Module:
    """Segmentation at an eighth of the resolution; its first output alone."""
    from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

    return deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None)


def ssdlite() -> nn.Module:
    """torchvision's SSDlite320, of whose random boxes none passes the threshold of scores."""
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    return ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, score_thresh=0.5)


def m5() -> nn.Module:
    """M5 of Dai et al. (ICASSP 2017): one second of speech at 8 kHz, convolutions over the waveform."""
    layers: list[nn.Module] = []
    for before, after, kernel, stride in (
        (1, 128, 80, 4),
        (128, 128, 3, 1),
        (128, 256, 3, 1),
        (256, 512, 3, 1),
    ):
        conv = nn.Conv1d(before, after, kernel, stride)
        layers += [conv, nn.BatchNorm1d(after), nn.ReLU(), nn.MaxPool1d(4)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(512, 35))


class _TemporalBlock(nn.Module):
    """A residual block of TC-ResNet: two convolutions of 9 taps."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(before, after, 9, 2, 4, bias=False)
        self.first_norm = nn.BatchNorm1d(after)
        self.second = nn.Conv1d(after, after, 9, 1, 4, bias=False)
        self.second_norm = nn.BatchNorm1d(after)
        self.shortcut = nn.Conv1d(before, after, 1, 2, bias=False)
        self.shortcut_norm = nn.BatchNorm1d(after)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first_norm(self.first(x)).relu()
        return (self.second_norm(self.second(y)) + self.shortcut_norm(self.shortcut(x)).relu()).relu()


def tc_resnet8() -> nn.Module:
    """TC-ResNet8 of Choi et al. (Interspeech 2019): 40 mel coefficients of 98 frames, 66,000 parameters."""
    blocks = [_TemporalBlock(before, after) for before, after in ((16, 24), (24, 32), (32, 48))]
    first = nn.Conv1d(40, 16, 3, padding=1, bias=False)
    return nn.Sequential(first, *blocks, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(48, 12))


class _Recurrent(nn.Module):
    """Two GRU layers over 80 mel coefficients and a linear layer at each frame."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.gru = nn.GRU(80, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, 64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.gru(x)[0])
        return y


_TOKENS = InputSpec((TOKENS,), dtype="int64", name="input_ids")
_MASKED = replace(_TOKENS, others=(replace(_TOKENS, name="attention_mask"),))
_BOTH = ("int8", "int8-dynamic")

CASES = {
    "bert-base": Case(f"BERT-base, {TOKENS} tokens", bert, _MASKED, _BOTH, (1, 8)),
    "deeplabv3": Case("deeplabv3_mobilenet_v3_large, 512x512", deeplab, InputSpec((3, 512, 512))),
    "ssdlite320": Case(
        "ssdlite320_mobilenet_v3_large, 320x320",
        ssdlite,
        InputSpec((3, 320, 320)),
        backbone=attrgetter("backbone"),
    ),
    "m5": Case("M5, 8,000 samples", m5, InputSpec((1, 8000)), batch_sizes=(1, 16)),
    "tc-resnet8": Case("TC-ResNet8, 98 frames", tc_resnet8, InputSpec((40, 98)), batch_sizes=(1, 16)),
    "gru": Case("2 GRUs of 1,024, 100 frames", lambda: _Recurrent(1024), InputSpec((100, 80)), _BOTH, (1, 8)),
}


def settle(network: nn.Module, sample: InputSpec) -> None:
    """Give its batch norms the statistics of a batch."""
    if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in network.modules()):
        with torch.inference_mode():
            network.train()(sample_input(sample, 4))


def captured(case: Case) -> Program:
    """The network with random weights as a Program, a detector in parts."""
    torch.manual_seed(0)
    network = case.make()
    settle(case.backbone(network), case.sample)
    try:
        return capture(network.eval(), case.sample)
    except CaptureError as error:
        parted = capture_parts(network, case.sample, error)
        assert parted is not None
        return parted


def quantized(program: Program, scheme: str) -> tuple[Program, str]:
    """Its int8 form, and how many of its layers are int8."""
    data = None if scheme == "int8-dynamic" else [sample_input(program.input, 4, seed=1)]
    result = mo.quantize(program, scheme=scheme, observer="minmax", calibration=data)
    assert isinstance(result.program, Program)
    return result.program, f"{result.coverage.compressed} of {result.coverage.total}"


def interleaved(calls: Sequence[Callable[[], object]], runs: int) -> list[list[float]]:
    """Milliseconds of this thread in each round, for each call; three rounds before are not counted."""
    times: list[list[float]] = [[] for _ in calls]
    with torch.inference_mode():
        for done in range(runs + 3):
            for call, taken in zip(calls, times, strict=True):
                begin = time.thread_time_ns()
                call()
                if done >= 3:
                    taken.append((time.thread_time_ns() - begin) / 1e6)
    return times


def rows(case: Case, runs: int) -> Iterator[str]:
    """Lines of the table."""
    program = captured(case)
    forms = [(scheme, *quantized(program, scheme)) for scheme in case.schemes]
    for batch_size in case.batch_sizes:
        inputs = sample_input(program.input, batch_size)
        floats = equivalent_variants(program, inputs)
        calls = [partial(call, form, inputs) for form in (*(v for v, _ in floats), *(f for _, f, _ in forms))]
        times = interleaved(calls, runs)
        best = min(range(len(floats)), key=lambda place: statistics.median(times[place]))
        for (scheme, _, layers), taken in zip(forms, times[len(floats) :], strict=True):
            speed = paired_speedup(times[best], taken)
            cells = (
                case.title,
                batch_size,
                scheme,
                layers,
                f"{statistics.median(times[best]):.2f} ({floats[best][1]})",
                f"{statistics.median(taken):.2f}",
                f"{speed.ratio:.2f}x ({speed.low:.2f} to {speed.high:.2f})",
            )
            yield f"| {' | '.join(map(str, cells))} |"


class _Clocked(fx.Interpreter):
    """Runs a graph and adds up the time of each kind of node."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.spent: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def run_node(self, n: fx.Node) -> Any:
        begin = time.thread_time_ns()
        value = super().run_node(n)
        taken = (time.thread_time_ns() - begin) / 1e6
        layer = n.op == "call_module"
        kind = type(self.fetch_attr(str(n.target))).__name__ if layer else operation(n) or n.op
        self.spent[kind] += taken
        self.calls[kind] += 1
        return value


def profile(program: Any, inputs: Inputs, runs: int) -> str:
    """Median milliseconds and number of calls of each kind of node, longest first."""
    clocked = [_Clocked(program.program if isinstance(program, Prepacked) else program) for _ in range(runs)]
    with torch.inference_mode():
        for run in clocked:
            run.run(*tensors_of(inputs))
    kinds = {kind: statistics.median(run.spent[kind] for run in clocked) for kind in clocked[0].spent}
    longest = sorted(kinds, key=kinds.__getitem__, reverse=True)[:20]
    return "\n".join(f"{kinds[kind]:9.3f} ms {clocked[0].calls[kind]:5} {kind}" for kind in longest)


def print_profiles(case: Case, runs: int) -> None:
    """Print a profile of each form of a network."""
    program = captured(case)
    forms = [(scheme, quantized(program, scheme)[0]) for scheme in case.schemes]
    for batch_size in case.batch_sizes:
        inputs = sample_input(program.input, batch_size)
        best, variant = fastest_variant(program, inputs)
        for name, form in ((f"fp32 {variant}", best), *forms):
            print(f"\n{case.title}, batch {batch_size}, {name}\n{profile(form, inputs, runs)}", flush=True)


def table(names: Sequence[str], runs: int) -> str:
    """A Markdown table of these networks, printed as it grows."""
    isa = torch.backends.cpu.get_cpu_capability()
    lines = [
        f"{datetime.date.today()}, {cpu_name()} ({isa}), torch {torch.__version__}, one thread, "
        f"{runs} interleaved rounds, median ms of the thread",
        "",
        "| network | batch | scheme | layers int8 | best fp32 | int8 | speedup, 95 % interval |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for name in names:
        for row in rows(CASES[name], runs):
            print(row, flush=True)
            lines.append(row)
    load = f"Load of the machine meanwhile: {os.getloadavg()[2]:.0f} on {os.cpu_count()} processors."
    return "\n".join([*lines, "", load, ""])


def main() -> None:
    """Measure and print a Markdown table, or profiles."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(CASES))
    parser.add_argument("--runs", type=int, default=51)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.profile:
        for name in options.networks:
            print_profiles(CASES[name], options.runs)
        return
    written = table(options.networks, options.runs)
    if options.output is not None:
        options.output.write_text(written)


if __name__ == "__main__":
    main()
