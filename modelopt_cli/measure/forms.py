"""The fastest way in which torch runs a float model, so that a speedup is never one over a straw man.

Candidates: the model as it is, its weights in channels-last order, and, for a Program on a CPU, its
convolutions and linears packed and fused ahead of time by ``modelopt_cli.kernels.fp32``. A candidate
counts only if it answers what the model itself answers.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from modelopt_cli.kernels.fp32 import prepack
from modelopt_cli.measure.latency import Call, time_interleaved
from modelopt_cli.measure.subject import Subject, is_quantized
from modelopt_cli.program.program import Program

AS_LOADED = "as loaded"
_WARMUP, _RUNS = 2, 7


def best_form(subject: Subject, x: Tensor, *, seed: int = 0) -> tuple[Call, str]:
    """The fastest equivalent of the subject's model on ``x``, and its name.

    A model with int8 layers is timed as it was loaded: its kernels were chosen then.
    """
    model = subject.model
    assert model is not None
    if is_quantized(model):
        return model, AS_LOADED
    forms = candidates(model, subject.program, x)
    if len(forms) == 1:
        return forms[0]
    times = time_interleaved([(form, x) for form, _ in forms], warmup=_WARMUP, runs=_RUNS, seed=seed)
    # The fastest pass is the steadiest figure that so few runs can give.
    return min(zip(forms, times, strict=True), key=lambda pair: min(pair[1]))[0]


def candidates(model: nn.Module, program: Program | None, x: Tensor) -> list[tuple[Call, str]]:
    """All forms that run on ``x`` and agree with the model as it is, which comes first."""
    makers: list[tuple[str, Callable[[], Call]]] = []
    if x.dim() == 4:
        makers.append(("channels-last", lambda: _channels_last(model)))
    if program is not None and x.device.type == "cpu":
        makers.append(("prepacked", lambda: prepack(program)))
    forms: list[tuple[Call, str]] = [(model, "eager")]
    with torch.inference_mode():
        expected = model(x.clone())  # a network may change what it is given
    for name, make in makers:
        form = agreeing(make, x, expected)
        if form is not None:
            forms.append((form, name))
    return forms


def agreeing(make: Callable[[], Call], x: Tensor, expected: object) -> Call | None:
    """A faster form of a network, if it can be made, runs, and can be trusted.

    Args:
        make: makes it.
        x: a batch.
        expected: outputs of the network itself on ``x``.
    """
    try:
        form = make()
        with torch.inference_mode():
            return form if _same(form(x.clone()), expected) else None
    except Exception:  # whatever it is: the network itself remains
        return None


def _same(found: object, expected: object) -> bool:
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor) or found.shape != expected.shape:
        return False
    scale = float(expected.abs().max()) if expected.numel() else 1.0
    return torch.allclose(found.float(), expected.float(), rtol=1e-3, atol=1e-3 * scale, equal_nan=True)


def _channels_last(model: nn.Module) -> nn.Module:
    form = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert isinstance(form, nn.Module)
    return form.eval()
