"""Stages that a network goes through: captured, quantized, pruned, each written to a file and read again."""

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.networks.network import SAMPLES, TRAINING, Network
from modelopt_cli import artifact
from modelopt_cli.api.parts_notes import PartsSummary
from modelopt_cli.errors import CaptureError, ModeloptError
from modelopt_cli.kernels import prepare
from modelopt_cli.measure import count_macs
from modelopt_cli.measure.coverage import coverage
from modelopt_cli.measure.layer_comparison import steepest_fall
from modelopt_cli.measure.output_comparison import snr_db
from modelopt_cli.methods.context import Context
from modelopt_cli.methods.quantize.apply import apply
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.capture import capture
from modelopt_cli.program.input_batch import Inputs, call, each_of, select, tensors_of
from modelopt_cli.program.output_structure import flatten
from modelopt_cli.program.parted import code_of, joined, reaching
from modelopt_cli.program.partition import capture_parts
from modelopt_cli.text import first_line

Found = dict[str, Any]
RATIO = 0.3
"""Share of the channels of each group that is removed."""
LOW_DB = 30.0
"""Signal-to-noise below which the layer that loses the most is named."""
ROUNDING = 1e-5
"""Largest difference, of the largest output, that adding the same numbers in another order makes."""


@dataclass
class Samples:
    """Calibration data out of a batch, with what ``quantize`` uses of ``Data``."""

    inputs: Inputs
    count: int
    name: str = "random"

    @property
    def size(self) -> int:
        return self.count

    def sample(self, n: int, seed: int = 0) -> "Samples":
        """All of them."""
        return self

    def batches(self, size: int, **_: Any) -> Iterator[tuple[Inputs, Tensor]]:
        """A few samples at a time, without labels."""
        for start in range(0, self.count, SAMPLES):
            yield select(self.inputs, slice(start, start + SAMPLES)), torch.zeros(SAMPLES, dtype=torch.int64)


def measure(network: Network) -> Iterator[Found]:
    """Findings on a network, stage by stage; what a stage fails with is under ``error``."""
    model = network.model
    yield {
        "input": network.shapes,
        "parameters": sum(p.numel() for p in model.parameters()),
        "note": network.note,
        "network": network.kind,
    }
    try:
        program, share = captured(model, network.input)
        x = network.batch(2, 0)
        apart = difference(call(model, x), call(program, x))
        _require(apart <= ROUNDING, f"what was captured differs by {apart:.1e} of the largest output")
        yield {"captured": {**share, "apart": apart, "reloaded": reloads(program, x)[0]}}
    except Exception as error:  # whatever it fails with goes into the table
        yield {"captured": failure(error)}
        return
    for name, stage in (("int8", quantized), ("pruned", pruned)):
        try:
            yield {name: stage(program, network)}
        except Exception as error:
            yield {name: failure(error)}


def captured(model: nn.Module, spec: InputSpec) -> tuple[Program, Found]:
    """The network as a graph, or with its largest parts as graphs, and their share of the FLOPs."""
    try:
        return capture(model, spec), {"whole": True}
    except CaptureError as error:
        parted = capture_parts(model, spec, error)
        summary = PartsSummary.of(parted)
        if parted is None or summary is None:
            raise
        return parted, {"part": summary.flops, "parts": list(summary.submodules), "reason": summary.reason}


def failure(error: Exception) -> Found:
    """The reason why a stage did not end, in one line."""
    if isinstance(error, ModeloptError):
        return {"error": f"{error.where}: {error.message}" if error.where else error.message}
    return {"error": f"{type(error).__name__}: {first_line(error)}"}


def quantized(program: Program, network: Network) -> Found:
    """Static int8: layers and weights covered, signal-to-noise of the outputs, the layer that loses most.

    Of a network that is captured in parts the outputs are those of its parts: its own may be of any number.
    """
    context: Any = Context(data=Samples(network.batch(network.calibration, TRAINING), network.calibration))
    result = apply(program, QuantizeConfig(scheme="int8"), context).program
    covered, batch = coverage(result, given=program), network.batch(SAMPLES, 2)
    reloaded, again = reloads(result, batch)
    (x, *_), graph = reaching(program, batch), joined(program)
    wanted, outputs = call(graph, x), call(joined(again), x)
    found: Found = {
        "layers": [covered.compressed, covered.total],
        "weights": covered.byte_fraction,
        "left_out": [[reason, len(layers)] for reason, layers in covered.left_out],
        "snr": snr_db(wanted, outputs),
        "noisy": snr_db(wanted, call(graph, noisy(x))) if _has_floats(x) else None,
        "reloaded": reloaded,
    }
    if found["snr"] is not None and found["snr"] < LOW_DB:
        fall = steepest_fall(graph, joined(again), x)
        found["fall"] = [fall.layer, fall.before, fall.after] if fall is not None else None
    return found


def _has_floats(inputs: Inputs) -> bool:
    return any(tensor.is_floating_point() for tensor in tensors_of(inputs))


def noisy(inputs: Inputs) -> Inputs:
    """The same inputs with noise 40 dB below them; token ids and masks as they are."""
    generator = torch.Generator().manual_seed(4)

    def disturbed(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        return x + 0.01 * x.std() * torch.randn(x.shape, generator=generator)

    return each_of(inputs, disturbed)


def pruned(program: Program, network: Network) -> Found:
    """Channels removed: parameters and FLOPs left, and how far off the dense network with them zeroed."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "program"))
    from channels_oracle import masked, prune_ours

    result, found, keep = prune_ours(program, RATIO)
    reasons = sorted(set(found.frozen.values()), key=list(found.frozen.values()).count, reverse=True)
    _require(bool(found.groups), f"nothing can be pruned: {', '.join(reasons[:2])}")
    batch, dense = network.batch(2, 0), masked(found, keep)
    reloaded, _ = reloads(result, batch)
    before, after = (count_macs(each, program.input, calls_of=program).total for each in (program, result))
    left = [sum(p.numel() for p in each.parameters()) for each in (program, result)]
    del found
    (x, *_), pair = reaching(program, batch), (joined(dense), joined(result))
    apart, limit = _apart(*pair, x)
    _require(apart < limit, f"pruned, it differs from the dense network by {apart:.1e} of the largest output")
    return {
        "parameters": left[1] / left[0],
        "flops": after / before if before else 1.0,
        "apart": apart,
        "reasons": reasons[:3],
        "reloaded": reloaded,
    }


def _apart(dense: Any, result: Any, x: Inputs) -> tuple[float, float]:
    """Difference in float64 and what it may be; in float32 where the network casts to it."""
    if any("float32" in str(node.kwargs.get("dtype")) for node in result.graph.nodes):
        return difference(call(dense, x), call(result, x)), 1e-4
    double = each_of(x, lambda each: each.double() if each.is_floating_point() else each)
    return difference(call(dense.double(), double), call(result.double(), double)), 1e-9


def difference(wanted: Any, got: Any) -> float:
    """Largest difference of any output, as a fraction of that output's largest value."""
    one, other = flatten(wanted), flatten(got)
    _require(one.keys() == other.keys(), f"the outputs are {', '.join(other)}, not {', '.join(one)}")
    worst = 0.0
    for name, expected in one.items():
        _require(expected.shape == other[name].shape, f"output {name} has another shape")
        a, b = expected.double(), other[name].double()
        apart = (a - b).abs().nan_to_num(0).max() if a.numel() else torch.zeros(())
        worst = max(
            worst, float(apart / a.nan_to_num(0, 0, 0).abs().max().clamp(min=1e-30)) if apart else 0.0
        )
    return worst


def reloads(program: Program, x: Inputs) -> tuple[bool, nn.Module]:
    """True if the outputs of what is read from its file are the same to the last bit; and what is read."""
    with tempfile.TemporaryDirectory() as folder:
        artifact.write_program(program, Path(folder) / "net.safetensors")
        again = prepare(artifact.read_program(Path(folder) / "net.safetensors", code_of(program)))
    return difference(call(prepare(program), x), call(again, x)) == 0, again


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise RuntimeError(otherwise)
