"""Models given as Python objects, which become files for as long as a command is at work."""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from modelopt_cli import artifact
from modelopt_cli.api.opening import untraced_note
from modelopt_cli.api.result import Measured
from modelopt_cli.checkpoint.open_path import HELD_NETWORKS
from modelopt_cli.errors import ArchitectureError, CaptureError, DataError, UsageError, a_or_an
from modelopt_cli.measure import Evaluation
from modelopt_cli.option_names import in_python, rephrase
from modelopt_cli.option_types import not_of_type
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.capture import capture, require_inputs
from modelopt_cli.program.input_batch import Inputs, make_inputs, named
from modelopt_cli.program.input_spec import INPUT_NAME, INPUT_TYPE, InputType, place_names
from modelopt_cli.program.parted import code_of
from modelopt_cli.program.partition import capture_parts
from modelopt_cli.program.samples import DTYPES
from modelopt_cli.program.verification import random_input, require_runnable

Model = str | PathLike[str] | nn.Module | Program
"""A checkpoint or artifact, a network, or a Program."""


def several(models: Model | Iterable[Any]) -> list[Any]:
    """Models of which there may be one alone."""
    return [models] if isinstance(models, str | PathLike | nn.Module) else list(models)


@dataclass(frozen=True)
class Example:
    """The inputs of a module, and the argument that says so.

    Attributes:
        sample: what a sample looks like.
        argument: the one that says so, for messages.
        batch: samples to run on; None where there is a shape alone.
    """

    sample: InputSpec
    argument: str
    batch: Inputs | None = None


class Workspace:
    """A folder of temporary files, and the names to show in their place.

    Each model in memory is written as an artifact, so that a command works on a file in any case, and the
    object that was given is never changed.

    Attributes:
        notes: one line for each thing worth knowing of the models.
        untraced: why a model has no graph, where one cannot be traced.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._names: dict[str, str] = {}
        self.untraced: str | None = None
        self._stack = ExitStack()
        self._folder: Path | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        if error is not None:
            rephrase(error, self.shown)

    def new(self, name: str) -> Path:
        """Path of a temporary file that is shown as ``name``."""
        if self._folder is None:
            self._folder = Path(self._stack.enter_context(TemporaryDirectory(prefix="modelopt-")))
        folder = self._folder / str(len(self._names))
        folder.mkdir()
        path = folder / f"{name}.safetensors"
        self._names[str(path)] = name
        return path

    def file(self, model: Any, example: Callable[[], Example | None], argument: str = "model") -> str | Path:
        """The file of a model.

        Args:
            model: a path, a Program or another module.
            example: says what a module that is no Program takes.
            argument: name of the argument, for messages.

        Raises:
            UsageError: it is none of these, or a module that cannot run on the example.
            ArchitectureError: nothing says what the input of a module is.
        """
        if (problem := not_of_type(model, Model)) is not None:
            raise UsageError(problem, where=argument)
        if isinstance(model, str | PathLike):
            return Path(model)
        path = self.new(type(model).__name__)
        if isinstance(model, Program):
            return self._written(model, path)
        if (taken := example()) is None:
            hint = "give example_inputs, one batch: a tensor, or several in a tuple or by name"
            raise ArchitectureError("nothing says what its input is", where=argument, hint=hint)
        try:
            return self._written(capture(_in_float32(model), taken.sample), path)
        except CaptureError as error:
            reason = _reason(model, taken, error)
            if (parted := capture_parts(_in_float32(model), taken.sample, error)) is not None:
                return self._written(parted, path)
            self.untraced = f"the network cannot be traced: {reason}"
            self.notes.append(untraced_note(self.untraced))
            artifact.write_tensors(dict(model.state_dict()), {}, path)
        return path

    def _written(self, program: Program, path: Path) -> Path:
        artifact.write_program(program, path)
        if (network := code_of(program)) is not None:
            self._hold(path, network)
        return path

    def share_code(self, source: str | Path | None, output: Path) -> None:
        """Let the file of a result be opened with the code of the network that it is made of."""
        if (network := HELD_NETWORKS.get(str(source))) is not None:
            self._hold(output, network)

    def _hold(self, path: Path, network: nn.Module) -> None:
        HELD_NETWORKS[str(path)] = network
        self._stack.callback(HELD_NETWORKS.pop, str(path), None)

    @contextmanager
    def telling_why(self) -> Iterator[None]:
        """Work that may need a graph: where a model has none, an error says why."""
        try:
            yield
        except (UsageError, ArchitectureError, DataError) as error:
            if self.untraced is not None:
                error.hint = f"{self.untraced}; or {error.hint}" if error.hint else self.untraced
            raise

    def shown(self, text: str) -> str:
        """A message without the paths of temporary files, and with arguments in place of options."""
        for path, name in self._names.items():
            text = text.replace(path, name)
        return in_python(text)

    def renamed(self, evaluation: Evaluation | None) -> Measured | None:
        """An evaluation with the names of models in place of temporary files."""
        if evaluation is None:
            return None
        models = tuple(replace(model, path=self.shown(model.path)) for model in evaluation.models)
        notes = tuple(map(self.shown, evaluation.notes))
        return Measured.of(replace(evaluation, models=models, notes=notes))


EXAMPLE_HINT = "give one batch, such as torch.rand(1, 3, 224, 224), or several tensors in a tuple or by name"


def example_like(example: Tensor | tuple[Tensor, ...] | Mapping[str, Tensor] | None) -> Example | None:
    """The batch that a user gives, and what a sample of it looks like.

    Args:
        example: a tensor ``(N, ...)``; several by place in a tuple or by name in a mapping; None.

    Raises:
        UsageError: it is no batch, has no sample, or is several batches of different lengths.
    """
    if example is None:
        return None
    by_name = {INPUT_NAME: example} if isinstance(example, Tensor) else example
    if not len(by_name):
        raise UsageError("holds no tensor", where="example_inputs", hint=EXAMPLE_HINT)
    if not isinstance(by_name, Mapping):
        by_name = dict(zip(place_names(len(by_name)), by_name, strict=True))
    least = 2 if len(by_name) == 1 else 1  # the length of a sentence may come next to it
    for name, each in by_name.items():
        if not isinstance(each, Tensor):
            problem = f"{name!r} is {a_or_an(type(each).__name__)}, not a tensor"
            raise UsageError(problem, where="example_inputs", hint=EXAMPLE_HINT)
        if each.dim() < least:
            problem = f"is a tensor of shape {tuple(each.shape)}, which is no batch"
            raise UsageError(problem, where="example_inputs", hint=EXAMPLE_HINT)
        if not len(each):
            problem = f"is a tensor of shape {tuple(each.shape)}, which holds no sample"
            raise UsageError(problem, where="example_inputs", hint=EXAMPLE_HINT)
    if len({len(each) for each in by_name.values()}) != 1:
        counts = " and ".join(str(len(each)) for each in by_name.values()) or "no"
        raise UsageError(f"has inputs of {counts} samples", where="example_inputs", hint=EXAMPLE_HINT)
    first, *others = (_described(each, name) for name, each in by_name.items())
    sample = replace(first, others=tuple(others))
    batch = make_inputs(sample, lambda each: by_name[each.name].to(DTYPES[each.dtype]))
    return Example(sample, "example_inputs", batch)


def _described(example: Tensor, name: str) -> InputSpec:
    dtype = next((known for known, each in DTYPES.items() if each == example.dtype), INPUT_TYPE)
    return InputSpec(tuple(example.shape[1:]), dtype=cast(InputType, dtype), name=name)


def _reason(model: nn.Module, example: Example, error: CaptureError) -> CaptureError:
    """The reason why a module cannot be traced; an example that it does not take is refused."""
    try:
        require_inputs(model, example.sample)
    except CaptureError as refusal:
        raise UsageError(refusal.message, where=example.argument, hint=refusal.hint) from error
    if any(each.is_meta for each in model.parameters()):
        return error
    try:
        network, batch = _in_float32(model), example.batch
        batch = random_input(network, example.sample, 2) if batch is None else batch
        require_runnable(network, named(batch, example.sample))
    except CaptureError as refusal:
        hint = "give samples such as the network takes"
        raise UsageError(refusal.message, where=example.argument, hint=hint) from error
    return error


def _in_float32(model: nn.Module) -> nn.Module:
    """The module itself, or a copy of one with other floats."""
    floats = {p.dtype for p in (*model.parameters(), *model.buffers()) if p.is_floating_point()}
    return model if floats <= {torch.float32} else copy.deepcopy(model).float()
