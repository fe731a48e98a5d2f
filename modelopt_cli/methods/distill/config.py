"""Settings of ``distill``."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar

from modelopt_cli.artifact.coding import PLAIN_CODE, Code
from modelopt_cli.errors import UsageError
from modelopt_cli.methods.distill.losses import LOSSES, Terms, parse_terms
from modelopt_cli.settings import Config, Setting, option

LOSS = "ce:0.1+kd:0.9"


@dataclass(frozen=True)
class DistillConfig(Config, title="Distillation"):
    """Settings of ``distill``, besides those of training."""

    method: ClassVar[str] = "distill"
    """Name of the command, in the history and in ``METHODS``."""
    code: ClassVar[Code] = PLAIN_CODE
    """Coding of the file where none is asked for."""
    loss: Annotated[
        str,
        Setting(f"Sum of losses such as {LOSS}+hint:1@layer3, of {', '.join(LOSSES)}.", metavar="TERMS"),
    ] = LOSS
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
        """Terms of the loss."""
        return parse_terms(self.loss)
