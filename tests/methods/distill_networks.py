"""Small teachers and students for 1x8x8 images, and what they are trained with."""

import torch
from prune_cases import captured
from torch import Tensor, nn

from modelopt_cli.data import Data
from modelopt_cli.methods.distill.distill_context import DistillContext
from modelopt_cli.methods.distill.teacher import TeacherMember
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.training import TrainConfig, Training

SHAPE = (1, 8, 8)
CONFIG = TrainConfig(epochs=2, batch_size=16, lr=0.01)


class Small(nn.Module):
    """Two convolutions, a batch norm and a linear layer."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.mid, self.fc = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.mid(torch.relu(self.bn(self.conv(x)))))
        result: Tensor = self.fc(x.mean((2, 3)))
        return result


def fresh(width: int, *, classes: int = 10, seed: int = 0) -> Program:
    torch.manual_seed(seed)
    return captured(Small(width, classes), *SHAPE)


def within(data: Data, teacher: Program, config: TrainConfig = CONFIG) -> DistillContext:
    return DistillContext(
        training=Training(data, config=config),
        teachers=(TeacherMember(teacher, InputSpec(SHAPE), name="large"),),
    )
