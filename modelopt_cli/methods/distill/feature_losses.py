"""Losses on feature maps, from inside the networks.

All are made from the shapes of the two features without the batch: ``(C, H, W)`` of maps, ``(T, C)`` of
sequences of tokens or ``(C,)`` of vectors. Called with the two features, ``(N, *shape)``, they return a
scalar, the mean over the batch, in float32 or, if a feature is float64, in float64. Where the heights or
widths of maps differ, the larger ones are averaged down to the smaller ones (adaptive average pooling).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from modelopt_cli.errors import UsageError
from modelopt_cli.methods.distill.logit_losses import full_precision
from modelopt_cli.settings import option

Shape = tuple[int, ...]
"""Shape of a feature, without the batch."""
_KINDS = {1: "a vector", 2: "a sequence of tokens", 3: "maps"}


class Hint(nn.Module):
    """The squared difference of the teacher's feature and the student's through an adapter that learns.

    The mean is over samples, channels and positions. A. Romero et al., FitNets: Hints for Thin Deep Nets,
    ICLR 2015, section 2.2, where the adapter is a larger convolution; here it is a 1x1 convolution, for
    tokens and vectors a linear layer, as became usual. There is one even between equally many channels: two
    networks that were trained apart have them in no common order. It begins as the identity there, since
    those of a student that was made from its teacher do correspond.

    Raises:
        UsageError: the features cannot be compared.
    """

    def __init__(self, student: Shape, teacher: Shape) -> None:
        super().__init__()
        _check(student, teacher)
        self.adapter = nn.Linear(_channels(student), _channels(teacher))
        if _channels(student) == _channels(teacher):
            nn.init.eye_(self.adapter.weight)
            nn.init.zeros_(self.adapter.bias)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss, in squared units of the teacher's feature."""
        with full_precision(student, teacher) as (student, teacher):
            student, teacher = _pooled(student, teacher)
            weight, bias = self.adapter.weight.to(student.dtype), self.adapter.bias.to(student.dtype)
            if student.dim() == 4:
                return F.mse_loss(F.conv2d(student, weight[:, :, None, None], bias), teacher)
            return F.mse_loss(F.linear(student, weight, bias), teacher)


class Attention(nn.Module):
    """The squared difference of attention maps, which are large where features are.

    The map is the sum over the channels of their squares, divided by its length (L2 norm); 0 where all are 0.
    The mean is over samples and positions. It has no parameters, and any two numbers of channels will do.
    S. Zagoruyko and N. Komodakis, Paying More Attention to Attention, ICLR 2017, section 3.1, with the
    squared norm and the mean of its authors' code, which belong to the weight 1000.

    Raises:
        UsageError: the features cannot be compared, or are vectors, which have no positions.
    """

    def __init__(self, student: Shape, teacher: Shape) -> None:
        super().__init__()
        _check(student, teacher)
        if len(student) == 1:
            raise UsageError(
                "at compares positions, and a vector has none",
                where=option("loss"),
                hint="name another layer, or use another loss",
            )

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss, from 0 to 2 divided by the number of positions."""
        with full_precision(student, teacher) as (student, teacher):
            student, teacher = _pooled(student, teacher)
            return F.mse_loss(_attention(student), _attention(teacher))


def _attention(feature: Tensor) -> Tensor:
    """``(N, positions)``, of length 1."""
    return F.normalize(feature.square().sum(1 if feature.dim() == 4 else 2).flatten(1))


def _channels(shape: Shape) -> int:
    return shape[0] if len(shape) == 3 else shape[-1]


def _check(student: Shape, teacher: Shape) -> None:
    """Raise UsageError unless both are of one kind, and sequences of one length."""
    for who, shape in (("student", student), ("teacher", teacher)):
        if len(shape) not in _KINDS:
            raise UsageError(
                f"the {who}'s feature has the shape {shape}",
                where=option("loss"),
                hint="name a layer that gives (C, H, W), (T, C) or (C,)",
            )
    kinds = _KINDS[len(student)], _KINDS[len(teacher)]
    if kinds[0] != kinds[1]:
        raise UsageError(
            f"the student's feature is {kinds[0]}, the teacher's {kinds[1]}",
            where=option("loss"),
            hint="name layers of one kind",
        )
    if len(student) == 2 and student[0] != teacher[0]:
        raise UsageError(
            f"the student has {student[0]} tokens, the teacher {teacher[0]}",
            where=option("loss"),
            hint="name layers with equally many",
        )


def _pooled(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Maps of the smaller height and the smaller width; others as they are."""
    if student.dim() != 4 or student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    height, width = (min(student.shape[i], teacher.shape[i]) for i in (2, 3))
    return (
        F.adaptive_avg_pool2d(student, (height, width)),
        F.adaptive_avg_pool2d(teacher, (height, width)),
    )
