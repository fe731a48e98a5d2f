"""Losses on logits: the student's against the teacher's.

All take the student's and the teacher's logits ``(N, C)``, labels, ``(N,)`` int64 or ``(N, C)`` probabilities
where samples are mixed, and the temperature ``T``. They return a scalar, the mean over the batch, in float32
or, if the logits are float64, in float64. What a loss has no use for it ignores. Logits may be as large as
they like, and all the same: neither the loss nor its gradient becomes NaN.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from modelopt_cli.errors import UsageError
from modelopt_cli.settings import option

DKD_ALPHA = 1.0
"""Weight in ``dkd`` of the probability of the label's class."""
DKD_BETA = 8.0
"""Weight in ``dkd`` of those of the others: the default of its authors' code, which has 0.5 for ImageNet."""
DIST_BETA = 1.0
"""Share of the correlation over the classes of a sample in ``dist``."""
DIST_GAMMA = 1.0
"""Share of the correlation over the samples of a class in ``dist``."""
LEAST_SPREAD = 0.01
"""Smallest standard deviation that numbers are divided by, in place of a smaller one, so that gradients grow
at most 100-fold: in ``std`` in units of the logits, in ``dist`` relative to the numbers' root mean square. A
network's logits may be all the same, when it begins with a last layer of zeros."""
_LEAST_SQUARE = 1e-30
"""Keeps the division safe where probabilities are so small that their squares are 0."""


def kd(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))``, in nats.

    ``T^2`` keeps the gradients' size whatever the temperature. G. Hinton, O. Vinyals and J. Dean, Distilling
    the Knowledge in a Neural Network, 2015, section 2.
    """
    with full_precision(student, teacher) as (student, teacher):
        return temperature**2 * _divergence(student / temperature, teacher / temperature)


def mse(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """The squared difference of the logits, its mean over samples and classes.

    J. Ba and R. Caruana, Do Deep Nets Really Need to be Deep?, NeurIPS 2014, section 2.2; T. Kim et al.,
    Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge Distillation, IJCAI 2021.
    """
    with full_precision(student, teacher) as (student, teacher):
        return F.mse_loss(student, teacher)


def dkd(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """``T^2 (alpha TCKD + beta NCKD)``, in nats: the label's class and the others apart.

    TCKD is the divergence of the probabilities of the label's class and of all others together, NCKD that of
    the probabilities of the others among themselves. In plain ``kd`` the less a teacher doubts, the less NCKD
    counts. B. Zhao et al., Decoupled Knowledge Distillation, CVPR 2022, equation 7.

    Raises:
        UsageError: labels are probabilities.
    """
    if labels.dim() != 1:
        raise UsageError(
            "dkd needs one label for each sample, and mixed samples have several",
            where=option("loss"),
            hint=f"leave out {option('mixup')}, or use another loss",
        )
    with full_precision(student, teacher) as (student, teacher):
        target_logits, non_target_logits = zip(
            *(_decoupled(z / temperature, labels) for z in (student, teacher)), strict=True
        )
        tckd, nckd = _divergence(*target_logits), _divergence(*non_target_logits)
        return temperature**2 * (DKD_ALPHA * tckd + DKD_BETA * nckd)


def std(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """``kd`` of z-scores: from the logits of a sample their mean is taken, and they are divided by their root
    mean square.

    So the student is free in the size of its logits. S. Sun et al., Logit Standardization in Knowledge
    Distillation, CVPR 2024, section 4 and algorithm 1, which divides by ``C``, not by ``C - 1``.
    """
    with full_precision(student, teacher) as (student, teacher):
        return kd(_z_scores(student), _z_scores(teacher), labels, temperature)


def dist(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """``T^2 (beta (1 - r over classes) + gamma (1 - r over samples))``, from 0 to ``2 T^2 (beta + gamma)``.

    ``r over classes`` is the mean over the samples of Pearson's correlation of the student's and the
    teacher's softened probabilities of a sample, ``r over samples`` the mean over the classes of that of the
    probabilities of a class. The correlation of equal numbers with anything is 0, so that a batch of one
    sample has no correlation over samples. T. Huang et al., Knowledge Distillation from A Stronger Teacher,
    NeurIPS 2022, section 3; ``T^2`` as in its authors' code.
    """
    with full_precision(student, teacher) as (student, teacher):
        p, q = ((z / temperature).softmax(1) for z in (student, teacher))
        inter, intra = 1 - _correlation(p, q), 1 - _correlation(p.T, q.T)
        return temperature**2 * (DIST_BETA * inter + DIST_GAMMA * intra)


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """``KL(softmax(teacher) || softmax(student))``, its mean over the samples."""
    logs = F.log_softmax(student, 1), F.log_softmax(teacher, 1)
    return F.kl_div(*logs, reduction="batchmean", log_target=True)


def _decoupled(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits ``(N, 2)`` of the label's class and of all others together, and ``(N, C)`` without it."""
    column = labels[:, None]
    # Not -inf: the divergence has differences of logarithms, and that of two of -inf is NaN.
    non_target = logits.scatter(1, column, torch.finfo(logits.dtype).min)
    return torch.cat([logits.gather(1, column), non_target.logsumexp(1, keepdim=True)], 1), non_target


def _z_scores(logits: Tensor) -> Tensor:
    """The logits of each sample less their mean, with root mean square 1."""
    centred = logits - logits.mean(1, keepdim=True)
    return centred / centred.square().mean(1, keepdim=True).clamp_min(LEAST_SPREAD**2).sqrt()


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of the rows of ``a`` with those of ``b``, its mean over the rows."""
    return (_standardised(a) * _standardised(b)).sum(1).mean()


def _standardised(rows: Tensor) -> Tensor:
    """The rows less their means, each of length 1; 0 where a row is constant."""
    centred = rows - rows.mean(1, keepdim=True)
    square, least = (x.square().sum(1, keepdim=True) for x in (centred, LEAST_SPREAD * rows))
    return centred / torch.maximum(square, least).clamp_min(_LEAST_SQUARE).sqrt()


@contextmanager
def full_precision(*tensors: Tensor) -> Iterator[Sequence[Tensor]]:
    """Gives the tensors in one floating-point type, and switches autocast off while they are used.

    The type is the widest of theirs, and at least float32: bfloat16 becomes float32, float64 stays. Autocast
    would make each product of matrices bfloat16 again.
    """
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)
    with torch.autocast(tensors[0].device.type, enabled=False):
        yield [t.to(dtype) for t in tensors]
