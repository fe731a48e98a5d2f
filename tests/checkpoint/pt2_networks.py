"""Networks that are exported and read back."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, export, save


class Small(nn.Module):
    """Convolutions, batch norm, a buffer that is not saved, a constant, and arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.down, self.norm = (
            nn.Conv2d(8, 8, 3, stride=2, groups=2, bias=False),
            nn.BatchNorm2d(8, affine=False),
        )
        self.fc = nn.Linear(8, 5)
        self.register_buffer("scale", torch.rand(8, 1, 1), persistent=False)
        with torch.no_grad():
            for norm in (self.bn, self.norm):
                norm.running_mean.uniform_()
                norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.bn(self.conv(x))) * self.scale
        x = nn.functional.hardswish(self.norm(self.down(x)), inplace=True) + torch.tensor(0.5)
        return self.fc(x.mean((2, 3)).view(x.shape[0], -1))


class Residual(nn.Module):
    """Blocks with shortcuts, pools of both kinds and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        )
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.up, self.head = nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        for _ in range(2):
            y = self.block(x)
            y += x
            x = nn.functional.silu(y)
        return self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(self.up(x), 1), 1))


class Block(nn.Module):
    """A transformer's block of either kind on token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.position = nn.Embedding(40, 16), nn.Parameter(torch.randn(1, 6, 16))
        self.first = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.attention, self.norm = nn.MultiheadAttention(16, 4, batch_first=True), nn.LayerNorm(16)
        self.cls, self.head = nn.Parameter(torch.randn(1, 1, 16)), nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.position
        x = torch.cat([self.cls.expand(ids.shape[0], -1, -1), self.first(x)], 1)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.head(nn.functional.gelu(x[:, 0]))


class Two(nn.Module):
    """Two inputs of two types by name, and a dictionary with containers in it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv = nn.Embedding(9, 4), nn.Conv1d(2, 4, 3)

    def forward(self, ids: Tensor, wave: Tensor, scale: float = 2.0) -> dict[str, Any]:
        a, b = self.table(ids).mean(1) * scale, self.conv(wave).amax(-1)
        return {"logits": a + b, "parts": (a, [b, None]), "best": (a + b).argmax(1)}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.lstm = (
            nn.GRU(4, 6, batch_first=True),
            nn.LSTM(6, 5, batch_first=True, bidirectional=True),
        )
        self.fc = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(self.gru(x)[0])[0][:, -1])


def image(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 3, 12, 12),)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, ...]]]] = {
    "batch norm": (Small, image),
    "residual": (Residual, image),
    "transformer": (Block, lambda n: (torch.randint(40, (n, 6)),)),
    "two inputs": (Two, lambda n: (torch.randint(9, (n, 5)), torch.randn(n, 2, 7))),
    "recurrent": (Recurrent, lambda n: (torch.randn(n, 7, 4),)),
}


def exported(
    network: nn.Module, inputs: tuple[Tensor, ...], path: Path, *, free: bool = True, core: bool = False
) -> Path:
    dynamic = tuple({0: Dim("batch")} for _ in inputs) if free else None
    program = export(network.eval(), inputs, dynamic_shapes=dynamic)
    save(program.run_decompositions() if core else program, path)
    return path


def document(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        (entry,) = (name for name in archive.namelist() if name.endswith("models/model.json"))
        return json.loads(archive.read(entry))  # type: ignore[no-any-return]
