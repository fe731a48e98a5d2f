"""A compressed model, compared with the original and ready to be written."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from modelopt_cli import artifact
from modelopt_cli.api.guard import Checked, Original
from modelopt_cli.artifact.coding import PLAIN_CODE, Code
from modelopt_cli.checkpoint import Opened
from modelopt_cli.measure.coverage import coverage
from modelopt_cli.measure.layer_status import Coverage
from modelopt_cli.methods.context import TensorsResult
from modelopt_cli.program import Encoding, Program


def about_tensors(opened: Opened) -> dict[str, Any]:
    """Description of opened tensors for their file: keyword arguments of ``artifact.write_tensors``."""
    about: dict[str, Any] = {"history": opened.tensors.history if opened.tensors is not None else ()}
    if (architecture := opened.architecture) is not None:
        about |= {"arch": architecture.spec, "input_spec": architecture.input, "labels": architecture.labels}
    return about


def with_entry(opened: Opened, entry: dict[str, Any]) -> dict[str, Any]:
    """The same with one more entry in the history."""
    about = about_tensors(opened)
    return {**about, "history": (*about["history"], entry)}


@dataclass(frozen=True)
class CompressedModel:
    """A Program or a state dict with the description for its file, ready to be written.

    Each way to make one compares it with the original (``guard.Original``), and raises BrokenResult where
    it fails, returns something else, or is not finite any more: so nothing broken is ever written.

    Attributes:
        coverage: what became of each layer.
        content: the Program, or tensors by name, or a stream of them.
        encodings: how tensors are stored, where there is no Program.
        about: history, architecture, input and labels, where there is no Program.
        checked: outcome of the comparison.
    """

    coverage: Coverage
    content: Program | artifact.TensorStream | dict[str, Tensor]
    encodings: dict[str, Encoding]
    about: dict[str, Any]
    checked: Checked = field(default_factory=Checked)

    @classmethod
    def of_program(cls, program: Program, original: Original) -> "CompressedModel":
        """A Program, which describes itself."""
        before = original.network if isinstance(original.network, Program) else None
        return cls(coverage(program, given=before), program, {}, {}, original.check(program))

    @classmethod
    def of_tensors(cls, opened: Opened, made: TensorsResult, original: Original) -> "CompressedModel":
        """Tensors that were made of those of ``opened``, whose history grows by one entry.

        Those of a stream are made while they are written where there is no network to run them in.
        """
        about = with_entry(opened, made.entry)
        if not isinstance(made.tensors, artifact.TensorStream):
            checked = original.check_state(made.tensors, made.encodings, about["history"])
            return cls(made.coverage, dict(made.tensors), dict(made.encodings), about, checked)
        stream = made.tensors
        if original.network is None:
            return cls(made.coverage, original.check_stream(stream), {}, about)
        items = list(stream.items())
        state = {name: tensor for name, tensor, _ in items}
        state |= {name: state[owner] for name, owner in stream.tied.items()}
        encodings = {name: encoding for name, _, encoding in items}
        checked = original.check_state(state, encodings, about["history"])
        return cls(made.coverage, artifact.TensorStream(lambda: iter(items), stream.tied), {}, about, checked)

    def recording(self, **figures: Any) -> "CompressedModel":
        """The same, with figures in the newest entry of its history."""
        if isinstance(self.content, Program):
            history = self.content.history
            self.content.history = (*history[:-1], history[-1] | figures)
            return self
        history = self.about["history"]
        return replace(self, about=self.about | {"history": (*history[:-1], history[-1] | figures)})

    def predicted_bytes(self, code: Code = PLAIN_CODE) -> int:
        """Length of the file."""
        if isinstance(self.content, Program):
            return artifact.predicted_bytes(self.content, code=code)
        return artifact.predicted_bytes(self.content, self.encodings, code=code, **self.about)

    def write(self, output: str | Path, force: bool, code: Code = PLAIN_CODE) -> artifact.Written:
        """Write the file; raises as ``artifact.write_program``."""
        path = Path(output)
        if isinstance(self.content, Program):
            return artifact.write_program(self.content, path, force=force, code=code)
        if isinstance(self.content, artifact.TensorStream):
            return artifact.write_stream(self.content, path, force=force, code=code, **self.about)
        about = self.about
        return artifact.write_tensors(self.content, self.encodings, path, force=force, code=code, **about)
