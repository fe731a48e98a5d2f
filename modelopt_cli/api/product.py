"""The product of a method, compared with the original network and ready to be written."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from modelopt_cli import artifact
from modelopt_cli.api.guard import Given, Held
from modelopt_cli.artifact.coding import Code
from modelopt_cli.checkpoint import Opened
from modelopt_cli.program import Encoding, Program
from modelopt_cli.program.coverage import Coverage, coverage


def about_tensors(opened: Opened) -> dict[str, Any]:
    """What a file of opened tensors says beside them: keyword arguments of ``artifact.write_tensors``."""
    about: dict[str, Any] = {"history": opened.tensors.history if opened.tensors is not None else ()}
    if (architecture := opened.architecture) is not None:
        about |= {"arch": architecture.spec, "input": architecture.input, "labels": architecture.labels}
    return about


def _with_entry(opened: Opened, entry: dict[str, Any]) -> dict[str, Any]:
    about = about_tensors(opened)
    return {**about, "history": (*about["history"], entry)}


@dataclass(frozen=True)
class Product:
    """A Program or a state dict with what its file should say, ready to be written.

    Each way to make one runs it against what it was made from (``guard.Given``), and raises BrokenResult
    where it fails, returns something else, or is not finite any more: so nothing broken is ever written.

    Attributes:
        coverage: what became of each layer.
        subject: the Program, or tensors by name, or a stream of them.
        encodings: how tensors are stored, where there is no Program.
        about: history, architecture, input and labels, where there is no Program.
        held: what was found when it was run.
    """

    coverage: Coverage
    subject: Program | artifact.Stream | dict[str, Tensor]
    encodings: dict[str, Encoding]
    about: dict[str, Any]
    held: Held = field(default_factory=Held)

    @classmethod
    def of_program(cls, program: Program, given: Given) -> "Product":
        """A Program says everything itself."""
        before = given.network if isinstance(given.network, Program) else None
        return cls(coverage(program, given=before), program, {}, {}, given.hold(program))

    @classmethod
    def of_tensors(
        cls,
        opened: Opened,
        state: Mapping[str, Tensor],
        encodings: Mapping[str, Encoding],
        covered: Coverage,
        entry: dict[str, Any],
        given: Given,
    ) -> "Product":
        """Tensors that were made of those of ``opened``; ``entry`` is added to its history."""
        about = _with_entry(opened, entry)
        held = given.hold_state(state, encodings, about["history"])
        return cls(covered, dict(state), dict(encodings), about, held)

    @classmethod
    def of_stream(
        cls,
        opened: Opened,
        stream: artifact.Stream,
        covered: Coverage,
        entry: dict[str, Any],
        given: Given,
    ) -> "Product":
        """As :meth:`of_tensors`; where there is no network, the tensors are made while they are written."""
        about = _with_entry(opened, entry)
        if given.network is None:
            return cls(covered, given.hold_stream(stream), {}, about)
        items = list(stream.items())
        state = {name: tensor for name, tensor, _ in items}
        state |= {name: state[owner] for name, owner in stream.tied.items()}
        held = given.hold_state(state, {name: encoding for name, _, encoding in items}, about["history"])
        return cls(covered, artifact.Stream(lambda: iter(items), stream.tied), {}, about, held)

    def recording(self, **figures: Any) -> "Product":
        """The same, with figures in the newest entry of its history."""
        if isinstance(self.subject, Program):
            history = self.subject.history
            self.subject.history = (*history[:-1], history[-1] | figures)
            return self
        history = self.about["history"]
        return replace(self, about=self.about | {"history": (*history[:-1], history[-1] | figures)})

    def predicted_bytes(self, code: Code = "plain") -> int:
        """Length of the file."""
        if isinstance(self.subject, Program):
            return artifact.predicted_bytes(self.subject, code=code)
        return artifact.predicted_bytes(self.subject, self.encodings, code=code, **self.about)

    def write(self, output: str | Path, force: bool, code: Code = "plain") -> artifact.Written:
        """Write the file; raises as ``artifact.write_program``."""
        path = Path(output)
        if isinstance(self.subject, Program):
            return artifact.write_program(self.subject, path, force=force, code=code)
        if isinstance(self.subject, artifact.Stream):
            return artifact.write_stream(self.subject, path, force=force, code=code, **self.about)
        about = self.about
        return artifact.write_tensors(self.subject, self.encodings, path, force=force, code=code, **about)
