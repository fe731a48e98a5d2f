"""The grammar of ``--loss``, and the table behind it."""

import math

import pytest
import torch
from distill_cases import normal

from modelopt_cli.errors import UsageError
from modelopt_cli.methods.distill.table import LOSSES
from modelopt_cli.methods.distill.terms import Term, parse_terms

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
            "unknown loss 'wasserstein'; there are ce, kd, mse, dkd, std, dist, hint, at, rkd, crd",
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
        ("kd:0.5+kd:0.4", "kd is there twice; give it once, with its whole weight"),
        ("ce+kd+ce", "ce is there twice"),
        ("hint@a+hint@a=a", "hint is there twice"),
        ("ce:0+kd:0", "all weights are 0"),
    ],
)
def test_distill_terms_refuse(text: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_terms(text)
    assert str(caught.value).startswith(f"loss: {said}")


@pytest.mark.parametrize("name", LOSSES)
def test_distill_table_makes_losses_that_are_0_for_the_teacher_itself_or_learn(name: str) -> None:
    loss = LOSSES[name]
    assert "ce" not in LOSSES
    assert 0 < loss.weight < math.inf
    assert loss.help
    if loss.looks_at == "logits":
        answers = normal(6, 5)
        assert float(loss.make(answers, answers, torch.arange(6) % 5, 4.0)) == pytest.approx(0, abs=1e-12)
        return
    shape = (3, 4, 4) if loss.looks_at == "features" else (3,)
    module, feature = loss.make(shape, shape, 100), normal(6, *shape)
    value = float(module(feature, feature).detach())
    assert value == pytest.approx(0, abs=1e-10) or (name == "crd" and value > 0)
