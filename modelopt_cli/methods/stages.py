"""The parts of a long command: each is done once, even if the command is interrupted and resumed."""

from collections.abc import Callable
from dataclasses import dataclass

from modelopt_cli.program import Program
from modelopt_cli.training import Training, distributed


@dataclass(frozen=True)
class Stages:
    """Does the parts of a long command, each once, even if it is interrupted and resumed in between."""

    training: Training | None

    def once(self, name: str, make: Callable[[], Program]) -> Program:
        """The Program that ``make`` returns, or returned before the interruption.

        It is read back from its file in either case, so that a resumed run goes on from the same bits
        in the same memory layout as one that was never interrupted.
        """
        run = self.training.run if self.training is not None else None
        if run is None:
            return make()
        if (program := run.finished(name)) is not None:
            return program
        run.finish(name, make())
        distributed.world().barrier()
        program = run.finished(name)
        assert program is not None
        return program
