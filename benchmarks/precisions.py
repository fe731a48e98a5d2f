"""``quantize --precision auto`` next to one precision for all layers, and to falling back layer by layer.

    python -m benchmarks.precisions drop CHECKPOINT FASHION_MNIST [--weight-bits N] [--max-drop D] [...]
    python -m benchmarks.precisions speed [NETWORK ...] [--runs N]

``drop``: of a network for Fashion-MNIST, chosen on samples of its training images, half of which verify the
choice, and judged on its 10,000 test images, which nothing was chosen by. The greedy fallback is that of
accuracy controls: all layers in the fewest bits, and the layers that lose most alone go back to int8 and then
to float, one after the other, until the same samples show that no more is lost than allowed.

``speed``: ``--prefer speed`` on torchvision networks with random weights; one thread, one image, rounds in
turn, timed by the clock of the thread. Results: benchmarks/precisions.md.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import modelopt_cli as mo
from modelopt_cli.artifact import predicted_bytes
from modelopt_cli.data import open_data
from modelopt_cli.kernels import prepare
from modelopt_cli.kernels.fp32 import prepack
from modelopt_cli.measure.differences import difference
from modelopt_cli.measure.environment import cpu_name
from modelopt_cli.measure.latency import sample_input
from modelopt_cli.measure.statistics import Interval
from modelopt_cli.measure.tally import predict
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.quantize.apply import apply, narrow_encodings
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.precision.precision_allocation import Allocation
from modelopt_cli.methods.quantize.precision.precision_choice import PrecisionChoice
from modelopt_cli.methods.quantize.sensitivity.layer_precisions import INT8
from modelopt_cli.methods.share.metric_drop import MetricDrop
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.capture import capture
from modelopt_cli.program.input_batch import tensors_of

SHAPE = (3, 224, 224)


def compare_drops(checkpoint: Path, folder: Path, bits: int, most: float, samples: int) -> list[str]:
    """Lines of a table: precisions, bytes of the file, and what is lost on the test images."""
    program = mo.load(checkpoint)
    data = open_data(f"idx:{folder}?split=train", input_spec=program.input).sample(samples, 0)
    test = open_data(f"idx:{folder}?split=test", input_spec=program.input)
    context = Context(data=data, batch_size=64, code="packed")
    config = QuantizeConfig(precision="auto", max_drop=most, weight_bits=bits)
    judge = MetricDrop.of(program, test, context)
    rows = [f"| float32 | | {predicted_bytes(program):,} | | |"]

    def add(title: str, network: Program, layers: str, seconds: float) -> None:
        network.encodings |= narrow_encodings(network)
        network.history = program.history  # what the choice recorded would count against one row alone
        lost, size = _lost(judge, network), predicted_bytes(network, code="packed")
        interval = f"{lost.drop:.2f} ({lost.low:.2f} to {lost.high:.2f})"
        rows.append(f"| {title} | {layers} | {size:,} | {interval} | {seconds:.0f} |")
        print(rows[-1], flush=True)

    start = time.perf_counter()
    choice = PrecisionChoice(program, config, context)
    for number in (choice.choices.index(INT8), len(choice.choices) - 1):
        network = choice.network(Allocation((number,) * len(choice.found.layers), 0, 0))
        assert network is not None
        add(f"all {choice.choices[number].name}", network, "", 0)
    measured = time.perf_counter() - start
    start = time.perf_counter()
    chosen = greedy(choice, most)
    network = choice.network(Allocation(tuple(chosen), 0, 0))
    assert network is not None
    add("greedy fallback", network, _layers(choice, chosen), time.perf_counter() - start + measured)
    start = time.perf_counter()
    made = apply(program, config, context)
    found: dict[str, str] = made.program.history[-1]["precisions"]
    counts = ", ".join(f"{list(found.values()).count(name)} {name}" for name in dict.fromkeys(found.values()))
    add("auto", prepare(made.program), counts, time.perf_counter() - start)
    return [*rows, *made.notes]


def greedy(choice: PrecisionChoice, most: float) -> list[int]:
    """Numbers of the precisions of all layers after falling back, worst first, until no more is lost."""
    layers = choice.found.layers
    fewest, eight = len(choice.choices) - 1, choice.choices.index(INT8)
    by_loss = sorted(range(len(layers)), key=lambda i: -(layers[i].losses[fewest].divergence or 0.0))
    steps = [(i, eight) for i in by_loss] + [(i, 0) for i in by_loss]
    drops = [MetricDrop.of(choice.program, part, choice.context) for part in choice.parts if part is not None]

    def after(count: int) -> list[int]:
        chosen = [fewest] * len(layers)
        for i, precision in steps[:count]:
            chosen[i] = precision
        return chosen

    def holds(count: int) -> bool:
        network = choice.network(Allocation(tuple(after(count)), 0, 0))
        return network is None or all(drop.upper(network) <= most for drop in drops)

    low, high = -1, len(steps)
    while high - low > 1:  # as if going one by one, which loses less and less
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return after(high)


def _layers(choice: PrecisionChoice, chosen: list[int]) -> str:
    names = [choice.choices[i].name for i in chosen]
    return ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))


def _lost(judge: MetricDrop, network: Program) -> Interval:
    predictions = predict(network.eval(), judge.data, 64, task=judge.context.task)
    name, metric = next(iter(judge.original.rows.items()))
    return difference(metric, judge.original.scores[name], predictions.scores[name])


class _Noise:
    """Images of noise, with what ``quantize`` uses of data."""

    name, labelled = "noise", False

    def __init__(self, images: Tensor) -> None:
        self.images, self.size = images, len(images)

    def sample(self, n: int, seed: int = 0) -> "_Noise":
        return _Noise(self.images[:n])

    def batches(self, size: int, **more: Any) -> Any:
        return ((batch, torch.zeros(len(batch), dtype=torch.int64)) for batch in self.images.split(size))


def compare_speed(name: str, runs: int) -> str:
    """A line of a table: thread milliseconds of the float, the all-int8 and the mixed network."""
    from torchvision import models

    torch.manual_seed(0)
    program = capture(models.get_model(name).eval(), InputSpec(SHAPE), verify=False)
    context = Context(data=_Noise(torch.rand(4, *SHAPE)))  # type: ignore[arg-type]
    made = apply(program, QuantizeConfig(precision="auto", prefer="speed"), context).program
    integer = apply(program, QuantizeConfig(), context).program
    networks = [prepack(program), prepare(integer), prepare(made)]
    inputs = tensors_of(sample_input(program.input, 1))
    times: list[list[float]] = [[] for _ in networks]
    with torch.inference_mode():
        for done in range(runs + 3):
            for number, network in enumerate(networks):
                start = time.thread_time_ns()
                network(*inputs)
                if done >= 3:
                    times[number].append((time.thread_time_ns() - start) / 1e6)
    medians = [statistics.median(each) for each in times]
    ratios = sorted(a / b for a, b in zip(times[0], times[-1], strict=True))
    middle = statistics.median(ratios)
    precisions = list(made.history[-1]["precisions"].values())
    layers = f"{precisions.count(INT8.name)} of {len(precisions)}"
    shown = " | ".join(f"{each:.2f}" for each in medians)
    spread = f"{ratios[runs // 4]:.3f} to {ratios[-1 - runs // 4]:.3f}"
    return f"| {name} | {shown} | {layers} | {middle:.3f} ({spread}) |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    drop = kinds.add_parser("drop")
    drop.add_argument("checkpoint", type=Path)
    drop.add_argument("folder", type=Path)
    drop.add_argument("--weight-bits", type=int, default=4)
    drop.add_argument("--max-drop", type=float, default=0.5)
    drop.add_argument("--samples", type=int, default=20_000)
    speed = kinds.add_parser("speed")
    speed.add_argument("networks", nargs="*", default=["mobilenet_v3_large", "efficientnet_b0"])
    speed.add_argument("--runs", type=int, default=40)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{cpu_name()}, torch {torch.__version__}, one thread")
    if given.kind == "drop":
        lines = compare_drops(
            given.checkpoint, given.folder, given.weight_bits, given.max_drop, given.samples
        )
        print("\n".join(lines))
    else:
        for name in given.networks:
            print(compare_speed(name, given.runs), flush=True)


if __name__ == "__main__":
    main()
