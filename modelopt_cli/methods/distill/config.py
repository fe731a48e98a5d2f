"""How a student learns from a teacher."""

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from modelopt_cli.errors import UsageError
from modelopt_cli.methods.distill.terms import Term, parse_terms

LOSS = "ce:0.1+kd:0.9"


@dataclass(frozen=True)
class DistillConfig:
    """Settings of ``distill``, beside those of training.

    Attributes:
        loss: a sum of terms, each ``NAME:WEIGHT@STUDENT_LAYER=TEACHER_LAYER``; see ``terms``.
        temperature: softens the answers of both, in the losses that soften them.
        finetune_epochs: epochs on the labels alone that follow.
        finetune_lr: their largest learning rate; None means a tenth of that of the distillation.
        cache_top: how many logits of each answer are kept, where answers are kept at all; the largest ones.

    Raises:
        UsageError: a setting that cannot be used.
    """

    loss: str = LOSS
    temperature: float = 4.0
    finetune_epochs: int = 0
    finetune_lr: float | None = None
    cache_top: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise UsageError("is out of range", where="--temperature", hint="give a number above 0")
        if self.cache_top < 1:
            raise UsageError("is out of range", where="--cache-top", hint="give at least 1")
        if self.finetune_epochs < 0:
            raise UsageError("is out of range", where="--finetune-epochs", hint="give 0 or more")
        if self.finetune_lr is not None:
            if not 0 < self.finetune_lr < float("inf"):
                raise UsageError("is out of range", where="--finetune-lr", hint="give a number above 0")
            if not self.finetune_epochs:
                raise UsageError("has no meaning without --finetune-epochs", where="--finetune-lr")
        self.terms  # noqa: B018 -- raises where the loss cannot be read

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        """The parts of the loss."""
        return parse_terms(self.loss)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form, for the history."""
        return asdict(self)
