"""Settings of ``distill``."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, ClassVar, Self

from modelopt_cli.artifact.coding import PLAIN_CODE, Code
from modelopt_cli.errors import UsageError
from modelopt_cli.methods.distill.losses import LOSSES, Terms, parse_terms
from modelopt_cli.settings import Config, Setting, option
from modelopt_cli.tasks import CLASSIFY, TaskSpec
from modelopt_cli.tasks.task import Task


@dataclass(frozen=True)
class DistillConfig(Config, title="Distillation"):
    """Settings of ``distill``, besides those of training."""

    method: ClassVar[str] = "distill"
    """Name of the command, in the history and in ``METHODS``."""
    code: ClassVar[Code] = PLAIN_CODE
    """Coding of the file where none is asked for."""
    loss: Annotated[
        str | None,
        Setting(
            f"Sum of losses such as {CLASSIFY.row.distilled_by}+hint:1@layer3, of {', '.join(LOSSES)}.",
            metavar="TERMS",
            default=f"that of the task, {CLASSIFY.row.distilled_by} where outputs are probabilities, "
            f"{Task.distilled_by} of other outputs",
        ),
    ] = None
    temperature: Annotated[
        float, Setting("Temperature that softens the logits of teacher and student.", above=0)
    ] = 4.0
    finetune_epochs: Annotated[
        int, Setting("Epochs on the labels alone that follow (0: none).", least=0, advanced=True)
    ] = 0
    finetune_lr: Annotated[
        float | None,
        Setting(
            "Largest learning rate of --finetune-epochs.",
            above=0,
            default="a tenth of the rate before",
            advanced=True,
        ),
    ] = None
    cache_top: Annotated[
        int,
        Setting(
            "Largest logits of each sample that --cache keeps, next to the sum of the others.",
            least=1,
            advanced=True,
        ),
    ] = 64

    def conflicts(self) -> Iterator[str]:
        """A loss that cannot be read, and a rate for no epochs."""
        if self.finetune_lr is not None and not self.finetune_epochs:
            yield f"{option('finetune_lr')}: has no meaning without {option('finetune_epochs')}"
        try:
            self.terms  # noqa: B018 -- raises where the loss cannot be read
        except UsageError as error:
            yield str(error)

    @cached_property
    def terms(self) -> Terms:
        """Terms of the loss; where none is given, those of the default task until :meth:`for_task`."""
        return parse_terms(self.loss or CLASSIFY.row.distilled_by or "")

    def for_task(self, task: TaskSpec) -> Self:
        """The same, with the loss of a task where none is given.

        Raises:
            UsageError: none is given, and the task has none.
        """
        if self.loss is not None:
            return self
        if task.row.distilled_by is None:
            raise UsageError(
                f"has no default for a network to {task.text}, which in training returns losses alone",
                where=option("loss"),
                hint="name losses on labels and features, such as ce+at@LAYER",
            )
        return replace(self, loss=task.row.distilled_by)
