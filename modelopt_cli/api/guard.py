"""Comparison of a method's result with the original network, before a file is written."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_cli.api.network_as_run import apart, as_run, graph_as_run
from modelopt_cli.artifact import TensorStream
from modelopt_cli.artifact.lazy import described
from modelopt_cli.artifact.stream import Item
from modelopt_cli.checkpoint import Opened
from modelopt_cli.checkpoint.integer_layers import restore_integer_layers
from modelopt_cli.checkpoint.tensor_checks import count_not_finite
from modelopt_cli.data import Data
from modelopt_cli.errors import BrokenResult, DataError, EnvironmentFailure, InputError, ModeloptError
from modelopt_cli.measure import accuracy
from modelopt_cli.measure.layer_comparison import (
    Fall,
    failing_layer,
    first_fault,
    require_in_range,
    steepest_fall,
)
from modelopt_cli.measure.output_comparison import least_snr_db, nan_share, stays_finite, stays_nan, structure
from modelopt_cli.measure.rounding_fault import refuse_fault_of_rounding
from modelopt_cli.program import Encoding, Program
from modelopt_cli.program.input_batch import Inputs, batch_size, call, clone, sample_shapes, select, to
from modelopt_cli.program.parted import PartedProgram, reaching
from modelopt_cli.program.verification import random_input
from modelopt_cli.text import first_line

SAMPLES = 8
_CALLS = 3
"""Calls of a network without a graph that show whether it returns one structure."""
_LARGEST = 400_000
"""Numbers in a batch of several samples: those of two images of 224x224."""


@dataclass(frozen=True)
class Checked:
    """Outcome of a comparison that was passed.

    Attributes:
        network: the compressed network; None where there is none.
        snr_db: signal-to-noise in dB of the output that has the least; None where it could not be run.
    """

    network: nn.Module | None = None
    snr_db: float | None = None


@dataclass(frozen=True)
class Original:
    """The original network, and its outputs on one batch.

    Attributes:
        network: a Program or another module; None of bare tensors.
        state: its tensors by name.
        device: where networks are run.
        batches: the inputs: several samples, and one; none where the network cannot be run. Of a network that
            was captured in parts, those of its parts: its own outputs may have other sizes after any change.
        outputs: of the network or its parts, one for each batch.
        whole: inputs of the network itself.
        refusal: of a network that gives nothing but NaN on its data, raised when a result is checked: before,
            a method that runs the network says in which layer that begins.
    """

    network: nn.Module | None
    state: Mapping[str, Tensor]
    device: str
    batches: tuple[Inputs, ...] = ()
    outputs: tuple[Any, ...] = ()
    whole: Inputs | None = None
    refusal: InputError | None = None

    @classmethod
    def of(
        cls, opened: Opened, *, data: Data | None = None, seed: int = 0, device: str = "cpu"
    ) -> "Original":
        """Run what was opened, before a method changes it.

        Args:
            opened: a Program is run on samples of its ``input``; a module where it is known what it takes.
            data: samples to run it on; without it they are noise.
            seed: of which samples are drawn.
            device: where the result will be run.

        Raises:
            DataError: a Program does not run on such samples.
            EnvironmentFailure: the memory does not suffice.
        """
        network = opened.network
        sample = data.input if data is not None else opened.input
        alone = cls(network, opened.state, device)
        if network is None or sample is None:
            return alone
        numbers = sum(torch.Size(each.shape).numel() for each in sample.tensors)
        samples = max(1, min(SAMPLES, _LARGEST // max(1, numbers)))
        if data is not None:
            batch: Inputs = next(inputs for inputs, _ in data.sample(samples, seed).batches(samples))
        else:
            batch = random_input(network, sample, samples)
        batch = to(batch, device)
        try:
            whole, batch = batch, next(iter(reaching(as_run(network, device), batch)), batch)
            batches = (batch, select(batch, slice(1))) if batch_size(batch) > 1 else (batch,)
            running = graph_as_run(network, device)
            outputs = tuple(_run(running, x, opened.path or "the network") for x in batches)
        except EnvironmentFailure:
            raise
        except Exception:
            if opened.program is not None:
                raise
            return alone  # a module that needs no graph needs no input either
        refusal = None
        if data is not None and nan_share(outputs) == 1:
            problem = "the network's output is not a number (NaN)"
            refusal = InputError(problem, where=opened.path or None, hint="check its weights")
        return replace(alone, whole=whole, batches=batches, outputs=outputs, refusal=refusal)

    @property
    def nan_share(self) -> float:
        """Share of the outputs, 0 to 1, that are NaN and so are not compared."""
        return nan_share(self.outputs[0]) if self.outputs else 0.0

    def check(self, made: nn.Module) -> Checked:
        """Run what a method made on the same batches, as it will be run once it is read from its file.

        Args:
            made: a Program, or a module of the same kind as what was given.

        Raises:
            BrokenResult: it fails, its outputs have another structure, or are not finite where they were, or
                numbers where they were NaN.
            DataError: values are so large that their products leave float32.
            InputError: a network that has no graph returns another structure in another call, the original
                gives nothing but NaN on its data, or a function takes no rounded values.
            EnvironmentFailure: the memory does not suffice.
        """
        if self.refusal is not None:
            raise self.refusal
        if not self.batches:
            return Checked(made)
        try:
            running = graph_as_run(made, self.device)
            outputs = [_output(running, x) for x in self.batches]
            if isinstance(made, PartedProgram) and self.whole is not None:
                _output(as_run(made, self.device), self.whole)
        except Exception as error:  # nothing that a result of ours raises is the user's fault
            if accuracy.is_out_of_memory(error) or isinstance(error, EnvironmentFailure):
                raise
            reason = error.message if isinstance(error, ModeloptError) else first_line(error)
            problem = f"the result fails on samples of {sample_shapes(self.batches[0])}: {reason}"
            where = getattr(error, "where", None) or self._fault(made)
            raise BrokenResult(problem, where=where) from error
        for expected, output in zip(self.outputs, outputs, strict=True):
            if (form := structure(output)) != (wanted := structure(expected)):
                if (other := self._other_structure()) is not None:
                    raise other
                raise BrokenResult(f"the result returns {form} where the original returns {wanted}")
            if not stays_finite(expected, output):
                if isinstance(self.network, Program) and isinstance(made, Program):
                    original = graph_as_run(self.network, self.device)
                    refuse_fault_of_rounding(original, running, self.batches)
                fault = self._fault(made)
                require_in_range(graph_as_run(self.network or made, self.device), self.batches, fault)
                problem = "the result gives NaN or infinity where the original does not"
                raise BrokenResult(problem, where=fault)
            if not stays_nan(expected, output):
                raise BrokenResult("the result gives numbers where the original gives NaN")
        return Checked(made, least_snr_db(self.outputs[0], outputs[0]))

    def check_state(
        self,
        state: Mapping[str, Tensor],
        encodings: Mapping[str, Encoding],
        history: tuple[dict[str, Any], ...],
    ) -> Checked:
        """Check, as :meth:`check` does, a network without a graph as it is rebuilt from these tensors.

        Raises:
            BrokenResult: as :meth:`check`; a tensor is missing, of another shape, or not finite any more.
        """
        if self.refusal is not None:
            raise self.refusal
        shapes = described(self.state)
        for name, tensor in state.items():
            self._check_tensor(name, tensor, shapes)
        self._require_names(state)
        if self.network is None or not self.batches:
            return Checked()
        made = apart(self.network)
        try:
            made.load_state_dict(dict(state), assign=True)
            restore_integer_layers(made, history, encodings)
        except Exception as error:
            raise BrokenResult(f"the result cannot be loaded: {first_line(error)}") from error
        return self.check(made)

    def check_stream(self, stream: TensorStream) -> TensorStream:
        """The same tensors, each held against what it was made of, on its way into the file.

        Raises:
            BrokenResult: when its turn comes: a tensor is missing, of another shape, or not finite any more.
        """

        def items() -> Iterator[Item]:
            seen, shapes = set(stream.tied), described(self.state)

            def checked(name: str, tensor: Tensor, encoding: Encoding) -> Item:
                self._check_tensor(name, tensor, shapes)
                seen.add(name)
                return name, tensor, encoding

            def end() -> Iterator[Item]:
                self._require_names(seen)
                yield from ()

            # Unlike a loop's variable, starmap holds no tensor while the next one is made.
            return itertools.chain(itertools.starmap(checked, stream.items()), end())

        return TensorStream(items, stream.tied)

    def steepest_fall(self, checked: Checked) -> Fall | None:
        """The layer after which a result that passed loses the most; None where that cannot be said."""
        if self.network is None or checked.network is None or not self.batches:
            return None
        original, made = graph_as_run(self.network, self.device), graph_as_run(checked.network, self.device)
        return steepest_fall(original, made, self.batches[0])

    def _other_structure(self) -> InputError | None:
        """The error for a network whose own code returns now this, now that; None of any other."""
        if self.network is None or isinstance(self.network, Program):
            return None
        running = graph_as_run(self.network, self.device)
        for x, expected in [*zip(self.batches, self.outputs, strict=True)] * _CALLS:
            if (form := structure(_output(running, x))) != (wanted := structure(expected)):
                hint = "let it return the same structure in every call, whatever its weights and inputs are"
                problem = f"returns {wanted} in one call and {form} in another"
                return InputError(problem, where="the network", hint=hint)
        return None

    def _fault(self, made: nn.Module) -> str | None:
        """The layer at which a result goes wrong."""
        try:
            running = graph_as_run(made, self.device)
            healthy = graph_as_run(self.network or made, self.device)
        except Exception:  # then it went wrong there
            return None
        # What was given may have been trained in place: then it is as wrong as the result.
        for x, reference in itertools.product(self.batches, (healthy, None)):
            if layer := first_fault(running, x, reference):
                return f"layer {layer}"
        return None

    def _check_tensor(self, name: str, tensor: Tensor, shapes: Mapping[str, Tensor]) -> None:
        before = structure(shapes[name]) if name in shapes else "not there"
        if structure(tensor) != before:
            raise BrokenResult(f"is {structure(tensor)} in the result, {before} in the original", where=name)
        if (count := count_not_finite(tensor)) and count > count_not_finite(self.state[name]):
            raise BrokenResult("is NaN or infinite in the result, and not in the original", where=name)

    def _require_names(self, names: Iterable[str]) -> None:
        if missing := set(self.state) - set(names):
            raise BrokenResult("is missing in the result", where=min(missing))


def _run(network: nn.Module, x: Inputs, where: str) -> Any:
    """Outputs of what was given; whatever it raises is the fault of the input or of the file."""
    try:
        with accuracy.failing_in_one_line(x, where):
            return _output(network, x)
    except DataError as error:
        if (layer := failing_layer(network, x)) is not None:
            error.where = f"{where}: layer {layer}"
        raise


def _output(network: nn.Module, x: Inputs) -> Any:
    """Outputs without gradients; what is random in them is the same in every call."""
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return call(network, clone(x))  # which it may change
