"""Nearness of the outputs of two networks, without labels; streamed over the data."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modelopt_cli.measure.output_comparison import LIMIT_DB
from modelopt_cli.program.output_structure import flatten
from modelopt_cli.tasks import CLASSIFY, TaskSpec
from modelopt_cli.text import listing

SOLE = "output"
"""Name of the output of a network that returns one tensor."""


@dataclass(frozen=True)
class Fidelity:
    """Likeness of a network's outputs to the baseline's, by the name of the output.

    Attributes:
        snr_db: signal-to-noise ratio in dB, ``10 log10(sum(expected^2) / sum((expected - found)^2))`` over
        all
            samples, within ``LIMIT_DB`` on either side.
        cosine: cosine of the two outputs of a sample, the mean over the samples. Outputs of one number a
            sample are one vector of all samples, since a number alone has no more than a sign; left out
            where there is no second sample.
        kl: of logits, KL(expected || found) of their probabilities in nats, the mean over samples, pixels or
            tokens.
    """

    snr_db: Mapping[str, float]
    cosine: Mapping[str, float]
    kl: Mapping[str, float] = field(default_factory=dict)

    @property
    def least_snr_db(self) -> float:
        """The signal-to-noise ratio of the output that has the least."""
        return min(self.snr_db.values())

    @property
    def least_cosine(self) -> float | None:
        """The cosine of the output that has the least; None where none has one."""
        return min(self.cosine.values(), default=None)


@dataclass
class _Sums:
    """Sums over all samples of one output.

    Of its ``numbers``, ``missing`` are NaN in the baseline; ``apart`` are not finite in one alone. Samples of
    one number are no ``vectors`` but ``single``, with the sums of squares and products of both outputs.
    """

    numbers: int = 0
    missing: int = 0
    apart: int = 0
    signal: float = 0.0
    noise: float = 0.0
    cosines: float = 0.0
    vectors: int = 0
    single: int = 0
    squares: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def cosine(self) -> float | None:
        """The mean cosine; None where there is no more than one number."""
        cosines, counted = self.cosines, self.vectors
        if self.single > 1:
            cosines, counted = cosines + self.single * _cosine(*self.squares), counted + self.single
        return cosines / counted if counted else None

    def add_cosines(self, expected: Tensor, output: Tensor) -> None:
        """Add rows ``(N, D)`` of both outputs."""
        if expected.shape[1] > 1:
            self.cosines += float(cosines(expected, output).sum())
            self.vectors += len(expected)
            return
        products = (expected * expected, output * output, expected * output)
        before, own, other, both = self.squares, *(float(each.sum()) for each in products)
        self.squares = before[0] + own, before[1] + other, before[2] + both
        self.single += len(expected)


class FidelityTally:
    """Collects the likeness of two networks' outputs, batch by batch.

    Args:
        task: says which output stands for probabilities.
    """

    def __init__(self, task: TaskSpec = CLASSIFY) -> None:
        self._task = task
        self._sums: dict[str, _Sums] = {}
        self._nats: dict[str, tuple[float, int]] = {}
        self._differing: dict[str, str] = {}

    def add(self, expected: Any, outputs: Any, samples: int, counted: Tensor | None = None) -> None:
        """Compare the outputs for one batch.

        Args:
            expected: of the baseline, of any structure.
            outputs: of the other network. Outputs that only one has, or of another shape, are left out.
            samples: number of samples in the batch.
            counted: bool ``(N, T)``, the tokens that count in outputs ``(N, T, ...)``; None for all.
        """
        self.add_parts(expected, outputs, samples, counted)
        self._add_nats(expected, outputs, counted)

    def add_parts(self, expected: Any, outputs: Any, samples: int, counted: Tensor | None = None) -> None:
        """Compare values that are not the networks' own outputs; arguments are those of :meth:`add`."""
        ours, theirs = flatten(outputs), flatten(expected)
        for name in dict.fromkeys([*theirs, *ours]):
            reference, output = theirs.get(name), ours.get(name)
            if reference is None or output is None or reference.shape != output.shape:
                self._differing.setdefault(
                    name, f"the baseline returned {_form(theirs)}, the other {_form(ours)}"
                )
            elif reference.is_floating_point():
                counts = _counts(reference, counted)
                if bool(counts.any()):
                    self._compare(self._sums.setdefault(name, _Sums()), reference, output, samples, counts)

    def result(self) -> Fidelity | None:
        """Join the batches; None where the networks have no output in common, or one is all NaN."""
        sums = {name: each for name, each in self._in_common.items() if each.vectors or each.single}
        if not sums or self._all_missing:
            return None
        return Fidelity(
            {name or SOLE: ratio_db(each.signal, each.noise) for name, each in sums.items()},
            {name or SOLE: cosine for name, each in sums.items() if (cosine := each.cosine()) is not None},
            {name or SOLE: _positive(nats / rows) for name, (nats, rows) in self._nats.items() if rows},
        )

    def not_numbers(self) -> str | None:
        """A line on the baseline's outputs that are no numbers, and what is compared; None where all are."""
        of = [f"output {name}" if name else "the output" for name in self._all_missing]
        if of:
            return f"signal to noise and cosine not measured: {of[0]} of the baseline is not a number (NaN)"
        if self._in_common and not any(each.vectors or each.single for each in self._in_common.values()):
            return "signal to noise and cosine not measured: the baseline gives no finite number"
        missing = sum(each.missing for each in self._in_common.values())
        if not missing:
            return None
        share = 100 * missing / sum(each.numbers for each in self._in_common.values())
        line = f"{share:.3g} % of the baseline's outputs are not a number (NaN)"
        if any(each.apart for each in self._in_common.values()):
            return f"{line}, and not all of these are in both networks: that is an endless error"
        return f"{line}; the others are compared"

    @property
    def unlike(self) -> str | None:
        """Reason why no output is compared: what the two return where they differ; None where one is."""
        if self._in_common or not self._differing:
            return None
        return f"{next(iter(self._differing.values()))} for the same samples, so no output is in both"

    @property
    def left_out(self) -> str | None:
        """A line on outputs that only one network has or that differ in shape, where others are compared."""
        if not (self._in_common and self._differing):
            return None
        return f"signal to noise and cosine leave out {listing(list(self._differing))}: of another shape"

    @property
    def _in_common(self) -> dict[str, _Sums]:
        return {name: each for name, each in self._sums.items() if name not in self._differing}

    @property
    def _all_missing(self) -> list[str]:
        """Outputs of which the baseline gives nothing but NaN."""
        return [name for name, each in self._in_common.items() if each.missing == each.numbers]

    def _compare(self, sums: _Sums, expected: Tensor, output: Tensor, samples: int, counts: Tensor) -> None:
        # NaN of both cannot be compared; the same infinity, of a mask say, is equal; all else is an error.
        alike = torch.where(expected.isnan(), output.isnan(), expected.isinf() & (expected == output))
        alike = alike | ~counts
        finite = torch.isfinite(expected) & counts
        reference = torch.where(finite, expected, 0).double()
        compared = torch.where(alike, 0, torch.where(finite, output, math.nan)).double()
        sums.numbers += int(counts.sum())
        sums.missing += int((expected.isnan() & counts).sum())
        sums.apart += int((~alike & ~(finite & output.isfinite())).sum())
        sums.signal += float(reference.square().sum())
        sums.noise += float((reference - compared).square().sum())
        rows = samples if reference.dim() > 0 and len(reference) == samples else 1
        reference, compared, alike = (x.reshape(rows, -1) for x in (reference, compared, alike))
        counted = ~alike.all(1)
        sums.add_cosines(reference[counted], compared[counted])

    def _add_nats(self, expected: Any, outputs: Any, counted: Tensor | None) -> None:
        logits = self._task.row.logits
        reference, compared = self._task.logits(expected), self._task.logits(outputs)
        if logits is None or reference is None or compared is None or reference.shape != compared.shape:
            return
        output = self._task.find(expected)
        name = next((name for name, tensor in flatten(expected).items() if tensor is output), "")
        before, rows = self._nats.get(name, (0.0, 0))
        rows_counted = ~(reference.isnan() & compared.isnan()).any(1)
        if counted is not None and _is_of_tokens(output, counted):
            rows_counted &= counted.to(rows_counted.device).flatten()
        reference, compared = reference[rows_counted], compared[rows_counted]
        lost = bool(reference.isnan().any())  # to the other, which gives numbers there
        nats = math.inf if lost else float(divergence(reference, compared, exclusive=logits.exclusive))
        self._nats[name] = before + nats, rows + len(reference)


def _form(outputs: Mapping[str, Tensor]) -> str:
    """Names and shapes of outputs, for a message."""
    each = [f"{name or SOLE} {tuple(tensor.shape)}" for name, tensor in outputs.items()]
    return ", ".join(each) or "nothing"


def _is_of_tokens(output: Tensor, counted: Tensor) -> bool:
    """True of outputs ``(N, T, ...)`` of the tokens ``(N, T)``."""
    return output.dim() > 2 and output.shape[:2] == counted.shape


def _counts(output: Tensor, counted: Tensor | None) -> Tensor:
    """Numbers of an output that count, bool, in its shape: those of tokens that do, or all."""
    if counted is None or not _is_of_tokens(output, counted):
        return torch.ones_like(output, dtype=torch.bool)
    ends = (1,) * (output.dim() - 2)
    return counted.to(output.device).reshape(*counted.shape, *ends).expand_as(output)


def _positive(nats: float) -> float:
    """A divergence, which rounding may leave a little below 0; that of NaN is endless."""
    return math.inf if math.isnan(nats) else max(0.0, nats)


def mean_cosine(a: Tensor, b: Tensor) -> float:
    """Mean cosine of the rows of two outputs ``(N, D)``; of rows of one number, that of all as one vector."""
    a, b = (a.T, b.T) if a.shape[1] == 1 else (a, b)
    return float(cosines(a, b).mean())


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of each row of one with that of the other, ``(N,)``; 1 where both are zero."""
    lengths = a.norm(dim=1) * b.norm(dim=1)
    cosine = (a * b).sum(1) / lengths.clamp(min=torch.finfo(lengths.dtype).tiny)
    return torch.where(lengths > 0, cosine.clamp(-1, 1), ((a == 0) & (b == 0)).all(1).to(cosine.dtype))


def _cosine(expected: float, output: float, product: float) -> float:
    """Cosine of two vectors, from the sums of their squares and of their product; 1 where both are zero."""
    lengths = math.sqrt(expected * output)
    if not 0 < lengths < math.inf:
        return float(expected == output == 0)
    return max(-1.0, min(1.0, product / lengths))


def divergence(expected: Tensor, output: Tensor, *, exclusive: bool = True) -> Tensor:
    """Sum over rows of logits ``(M, classes)`` of KL(expected || found) of their probabilities, in nats.

    Args:
        expected: logits of the baseline.
        output: logits of the other network.
        exclusive: True for the softmax of a row, False for the sigmoid of each logit.
    """
    reference, compared = expected.double(), output.double()
    if exclusive:
        return _nats(reference.log_softmax(1), compared.log_softmax(1))
    there = _nats(F.logsigmoid(reference), F.logsigmoid(compared))
    return there + _nats(F.logsigmoid(-reference), F.logsigmoid(-compared))


def _nats(expected: Tensor, output: Tensor) -> Tensor:
    """The sum of ``p (log p - log q)`` of log-probabilities, in which what is impossible counts nothing."""
    likely = expected.exp()
    return torch.where(likely > 0, likely * (expected - output), 0).sum()


def ratio_db(signal: float, noise: float) -> float:
    """Ratio of two sums of squares in dB, within ``LIMIT_DB`` on either side; that of NaN is the least."""
    if not noise:
        return LIMIT_DB
    ratio = 10 * math.log10(signal / noise) if signal and math.isfinite(noise) else -LIMIT_DB
    return max(-LIMIT_DB, min(LIMIT_DB, ratio)) if not math.isnan(ratio) else -LIMIT_DB
