"""Grammar of ``--loss``, and every row of the table of losses."""

import math
from collections.abc import Callable

import pytest
import torch
from distill_cases import normal
from torch import Tensor, nn

from modelopt_cli.errors import UsageError
from modelopt_cli.methods.distill.losses import LOSSES, Loss, Term, parse_terms
from modelopt_cli.training import StepInputs

CE = Term("ce", 1.0)
PARSED = [
    ("kd", "ce:1+kd:0.9", (CE, Term("kd", 0.9))),
    ("ce:0.1+kd:0.9", "ce:0.1+kd:0.9", (Term("ce", 0.1), Term("kd", 0.9))),
    ("kd+ce", "kd:0.9+ce:1", (Term("kd", 0.9), CE)),
    ("ce:0 + kd:1e+3", "ce:0+kd:1000", (Term("ce", 0.0), Term("kd", 1000.0))),
    ("kd:0.9+hint:50@layer3", "ce:1+kd:0.9+hint:50@layer3",
     (CE, Term("kd", 0.9), Term("hint", 50.0, ("layer3",), ("layer3",)))),
    ("hint@layer2=layer3", "ce:1+hint:1@layer2=layer3",
     (CE, Term("hint", 1.0, ("layer2",), ("layer3",)))),
    ("at:1000", "ce:1+at:1000", (CE, Term("at", 1000.0))),
    ("at@a.0,b*=c.?,d", "ce:1+at:1000@a.0,b*=c.?,d", (CE, Term("at", 1000.0, ("a.0", "b*"), ("c.?", "d")))),
    ("at@a,b=a,b", "ce:1+at:1000@a,b", (CE, Term("at", 1000.0, ("a", "b"), ("a", "b")))),
    ("hint:1@a+hint:2@b", "ce:1+hint:1@a+hint:2@b",
     (CE, Term("hint", 1.0, ("a",), ("a",)), Term("hint", 2.0, ("b",), ("b",)))),
    ("rkd@pool", "ce:1+rkd:25@pool", (CE, Term("rkd", 25.0, ("pool",), ("pool",)))),
    ("kd:0.1234567890123+mse:1e-30+std:2e300", "ce:1+kd:0.1234567890123+mse:1e-30+std:2e+300",
     (CE, Term("kd", 0.1234567890123), Term("mse", 1e-30), Term("std", 2e300))),
    ("kd:-0", "ce:1+kd:0", (CE, Term("kd", 0.0))),
]  # fmt: skip


@pytest.mark.parametrize(("text", "canonical", "terms"), PARSED)
def test_distill_terms_are_parsed_and_written_again(
    text: str, canonical: str, terms: tuple[Term, ...]
) -> None:
    found = parse_terms(text)
    assert found == terms
    assert str(found) == canonical
    assert parse_terms(canonical) == terms


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kdd", "unknown loss 'kdd'; did you mean 'kd'?"),
        ("HINT@a", "unknown loss 'HINT'; did you mean 'hint'?"),
        (
            "wasserstein",
            f"unknown loss 'wasserstein'; there are {', '.join(LOSSES)}",
        ),
        ("", "unknown loss ''"),
        ("kd+", "unknown loss ''"),
        ("kd++at", "unknown loss ''"),
        ("kd+5", "unknown loss 'kd+5'"),
        (":0.9", "unknown loss ''"),
        ("kd:", "'' is no weight of kd; give a number from 0"),
        ("kd:much", "'much' is no weight of kd"),
        ("kd:-1", "'-1' is no weight of kd"),
        ("kd:inf", "'inf' is no weight of kd"),
        ("ce:1e999", "'1e999' is no weight of ce"),
        ("kd:nan", "'nan' is no weight of kd"),
        ("kd:0.9:1", "'0.9:1' is no weight of kd"),
        ("kd@layer3", "kd looks at logits, not at a layer; leave out @layer3"),
        ("ce@layer3", "ce looks at logits, not at a layer; leave out @layer3"),
        ("hint@layer3:50", "'hint@layer3:50' has its weight after the layer; write hint:WEIGHT@LAYER"),
        ("hint@", "'hint@' names no layers"),
        ("hint@=a", "'hint@=a' names no layers"),
        ("hint@a=", "'hint@a=' names no layers"),
        ("hint@a,,b", "'hint@a,,b' names no layers"),
        ("hint@a=b=c", "'hint@a=b=c' names no layers; write @LAYER,... or @STUDENT,...=TEACHER,..."),
        (
            "hint@a,b=c",
            "'hint@a,b=c' has 2 of the student's layers and 1 of the teacher's; give equally many",
        ),
        ("kd:0.5+kd:0.4", "kd is there twice; give it once, with its full weight"),
        ("ce+kd+ce", "ce is there twice"),
        ("hint@a+hint@a=a", "hint is there twice"),
        ("ce:0+kd:0", "all weights are 0"),
    ],
)
def test_distill_terms_refuse(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_terms(text)
    assert str(caught.value).startswith(f"loss: {said}")


def comparison(loss: Loss, labels: Tensor) -> tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]:
    """The loss as a function of the student's and the teacher's values, and the shape of a sample's."""
    if loss.looks_at == "labels":
        on_labels = loss.make(0.0)
        return lambda student, _: on_labels(student, labels, StepInputs(torch.empty(0))), (5,)
    if loss.looks_at == "logits":
        return lambda student, teacher: loss.make(student, teacher, labels, 4.0), (5,)
    shape = (3, 4, 4) if loss.looks_at == "features" else (7,)
    return loss.make(shape, shape, 100), shape


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_finite_has_a_gradient_and_is_0_for_equal_values(name: str) -> None:
    """Losses that learn compare values that they transform: those they do not make equal by themselves."""
    loss, labels = LOSSES[name], torch.arange(6) % 5
    assert 0 < loss.weight < math.inf
    assert loss.help
    assert loss.paper
    compare, shape = comparison(loss, labels)
    learning = list(compare.parameters()) if isinstance(compare, nn.Module) else []
    certain = 60.0 * torch.nn.functional.one_hot(labels, 5).double()
    teacher = certain if loss.looks_at == "labels" else normal(6, *shape)
    student = normal(6, *shape, seed=1).requires_grad_(True)
    value = compare(student, teacher)
    assert value.dim() == 0
    assert 0 < float(value.detach()) < math.inf
    for gradient in torch.autograd.grad(value, [student, *learning]):
        assert bool(torch.isfinite(gradient).all())
        assert float(gradient.abs().max()) > 0
    if not learning:
        assert float(compare(teacher.clone(), teacher)) == pytest.approx(0, abs=1e-10)
