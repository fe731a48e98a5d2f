"""Losses on embeddings: how the samples of a batch lie to each other.

An embedding is what a network's last layer gets, flattened: ``(N, D)``, where the student's ``D`` may differ
from the teacher's. All return a scalar in float32 or, if an embedding is float64, in float64. The samples are
those of the batch that a process has.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modelopt_cli.methods.distill.feature_losses import Shape
from modelopt_cli.methods.distill.logit_losses import full_precision

RKD_DISTANCE = 1.0
"""Share of the distances in ``Relational``."""
RKD_ANGLE = 2.0
"""Share of the angles: the paper has twice that of the distances throughout."""
CRD_WIDTH = 128
"""Numbers that ``Contrastive`` compares, as in its authors' code."""
CRD_TEMPERATURE = 0.07
"""``tau``, that cosines are divided by in ``Contrastive``, as in its authors' code."""
CHUNK_ELEMENTS = 2**20
"""Angles held at a time, in float64."""
_ROUNDING = 1e-12
"""Squared distance, relative to the two points' own squares, below which they count as the same."""


class Relational(nn.Module):
    """Distances between two samples, and angles between three, as the teacher has them.

    Distances are divided by their mean over all pairs; an angle is its cosine. Differences go through
    Huber's loss, ``x^2 / 2`` up to 1 and ``|x| - 1/2`` beyond. W. Park et al., Relational Knowledge
    Distillation, CVPR 2019, sections 3.2.1 and 3.2.2, with the mean over all pairs and triples of distinct
    samples where the paper has a sum, so that the weight does not depend on the batch. A cosine is 0 where
    two of the samples are the same; batches of one sample have no distances, and batches of two no angles:
    they count as 0.

    Time grows with ``N^2 D + N^3``, memory with ``N D + N^2``: dot products of differences follow from those
    of the embeddings, so that the ``N^2 D`` numbers of the differences are never there, and the ``N^3``
    cosines are computed a part at a time, and again for the gradient. As products of matrices cancel where
    samples are close, all this is done in float64.
    """

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss, without a unit."""
        with full_precision(student, teacher) as (student, teacher):
            products = _products(student), _products(teacher)
            distances = _distances(products[0]), _distances(products[1])
            loss = RKD_DISTANCE * _distance_loss(*distances) + RKD_ANGLE * _angle_loss(products, distances)
            return loss.to(student.dtype)


class Contrastive(nn.Module):
    """Loss of telling pairs of embeddings of one sample from pairs of different samples.

    Both go through a linear layer to ``CRD_WIDTH`` numbers, and to length 1. With the cosine ``c`` of the
    two, ``h = e^(c / tau) / (e^(c / tau) + N / M)`` is the probability that they belong together if there are
    ``N`` that do not, and ``M`` training samples. The loss is the mean over the batch of ``-log h`` of the
    pair, less the sum of ``log(1 - h)`` over the ``N`` others, once with the teacher's embedding as what the
    others are compared with and once with the student's. Y. Tian, D. Krishnan and P. Isola, Contrastive
    Representation Distillation, ICLR 2020, section 3.

    The ``N`` are the other samples of the batch. The bound on the mutual information that the paper derives
    (its section 3) holds for every ``N``, and becomes tighter as it grows; it has a memory of earlier
    embeddings so that ``N`` can be large where batches are not. That memory would be as long as the training
    data, a part of the state of a training, and out of date. For a batch of one sample the loss is 0.

    Args:
        student: ``(D,)``.
        teacher: ``(D,)``.
        samples: ``M``.
    """

    def __init__(self, student: Shape, teacher: Shape, samples: int) -> None:
        super().__init__()
        self.student = nn.Linear(student[0], CRD_WIDTH)
        self.teacher = nn.Linear(teacher[0], CRD_WIDTH)
        self.samples = samples

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss, in nats."""
        with full_precision(student, teacher) as (student, teacher):
            alike = _projected(self.teacher, teacher) @ _projected(self.student, student).T / CRD_TEMPERATURE
            if len(alike) == 1:
                return 0 * alike.sum()
            odds = alike - math.log((len(alike) - 1) / self.samples)
            same = torch.eye(len(odds), dtype=torch.bool, device=odds.device)
            # Over a batch, all pairs of different samples are the same whichever of the two is compared with.
            return -2 * F.logsigmoid(torch.where(same, odds, -odds)).sum() / len(odds)


def _projected(head: nn.Linear, embedding: Tensor) -> Tensor:
    return F.normalize(F.linear(embedding, head.weight.to(embedding.dtype), head.bias.to(embedding.dtype)))


def _products(embedding: Tensor) -> Tensor:
    """Dot products of all pairs, from the mean of all: float64 ``(N, N)``."""
    centred = embedding.double() - embedding.double().mean(0)
    return centred @ centred.T


def _distances(products: Tensor) -> Tensor:
    """``(N, N)``; 0, with gradient 0, between samples that are the same up to rounding."""
    squares = products.diagonal()[:, None] + products.diagonal()
    between = squares - 2 * products
    apart = between > _ROUNDING * squares
    return torch.where(apart, between, 1).sqrt() * apart


def _distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    pairs = max(1, len(student) * (len(student) - 1))
    means = (distances.sum() / pairs for distances in (student, teacher))
    scales = (torch.where(mean > 0, mean, 1) for mean in means)
    return F.smooth_l1_loss(student / next(scales), teacher / next(scales), reduction="sum") / pairs


def _angle_loss(products: tuple[Tensor, Tensor], distances: tuple[Tensor, Tensor]) -> Tensor:
    n = len(products[0])
    inverse = [torch.where(d > 0, 1 / torch.where(d > 0, d, 1), 0) for d in distances]
    triples = max(1, n * (n - 1) * (n - 2))
    total = products[0].new_zeros(())
    for vertices in torch.arange(n, device=total.device).split(max(1, CHUNK_ELEMENTS // n**2)):
        total = total + checkpoint(
            _angle_part, *products, *inverse, vertices, use_reentrant=False, preserve_rng_state=False
        )
    return total / triples


def _angle_part(
    student: Tensor, teacher: Tensor, student_inverse: Tensor, teacher_inverse: Tensor, vertices: Tensor
) -> Tensor:
    """Huber's loss of the cosines at some samples, summed over the pairs of others."""
    mine, theirs = _cosines(student, student_inverse, vertices), _cosines(teacher, teacher_inverse, vertices)
    itself, too = (cosines.diagonal(dim1=1, dim2=2) for cosines in (mine, theirs))
    return F.smooth_l1_loss(mine, theirs, reduction="sum") - F.smooth_l1_loss(itself, too, reduction="sum")


def _cosines(products: Tensor, inverse: Tensor, vertices: Tensor) -> Tensor:
    """``[j, i, k]``: of the angle at sample ``vertices[j]`` between samples i and k; 0 if one is there, too.

    Args:
        products: of all pairs, ``(N, N)``.
        inverse: of the distances of all pairs, ``(N, N)``; 0 for samples that are the same.
        vertices: int64 ``(v,)``.
    """
    # The product of x_i - x_j and x_k - x_j is that of x_i and x_k, less one number for i and one for k.
    less = products[vertices] - products.diagonal()[vertices, None] / 2
    dots = products - less[:, :, None] - less[:, None, :]
    return dots * inverse[vertices, :, None] * inverse[vertices, None, :]
