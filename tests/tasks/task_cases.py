"""A small network and samples with a rule to learn for each task."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from modelopt_cli.data import Data, open_data
from modelopt_cli.data.in_memory import as_samples
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.tasks import TaskSpec, parse_task

SAMPLES = 48
Sample = tuple[Tensor, Any]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Detector(nn.Module):
    """Finds one bright square by the mean place of what is bright; learns its class, its size and a score."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(1, 4, 3, padding=1)
        self.head = nn.Linear(4, 4)

    def forward(self, images: Tensor, targets: list[dict[str, Tensor]] | None = None) -> Any:
        weight = images.relu().flatten(2).softmax(2).unflatten(2, images.shape[2:])[:, 0]
        rows, columns = torch.arange(images.shape[2]) + 0.5, torch.arange(images.shape[3]) + 0.5
        y, x = (weight.sum(2) * rows).sum(1), (weight.sum(1) * columns).sum(1)
        found = self.head(self.features(images).relu().amax((2, 3)))
        half = 1 + nn.functional.softplus(found[:, 2])
        boxes = torch.stack([x - half, y - half, x + half, y + half], 1)
        if targets is not None:
            labels = torch.stack([target["labels"][0] for target in targets])
            wanted = torch.stack([target["boxes"][0] for target in targets])
            return {
                "class": nn.functional.cross_entropy(found[:, :2], labels),
                "box": nn.functional.smooth_l1_loss(boxes, wanted),
            }
        scores, labels = found[:, :2].softmax(1).max(1)
        return [
            {"boxes": box[None], "scores": score[None], "labels": label[None]}
            for box, score, label in zip(boxes, scores, labels, strict=True)
        ]


class Tokens(nn.Module):
    """Embeds tokens, mixes each with the one before, and answers at every place."""

    def __init__(self, tokens: int, outputs: int, *, pooled: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, 16)
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(16, outputs)
        self.pooled = pooled

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.mix(self.embedding(input_ids)).relu()
        return self.head(x.mean(1) if self.pooled else x)


def classes() -> list[Sample]:
    inputs = torch.randn(SAMPLES, 6, generator=seeded())
    return [(x, int(x[:3].argmax())) for x in inputs]


def several_labels() -> list[Sample]:
    inputs = torch.randn(SAMPLES, 6, generator=seeded())
    return [(x, (x[:3] > 0.3).long()) for x in inputs]


def numbers() -> list[Sample]:
    inputs = torch.randn(SAMPLES, 6, generator=seeded())
    return [(x, torch.stack([x[0] - 2 * x[1], x[2] + 1])) for x in inputs]


def masks() -> list[Sample]:
    inputs = torch.randn(SAMPLES, 3, 8, 8, generator=seeded())
    targets = inputs.argmax(1)
    targets[:, :2, :2] = 255
    return list(zip(inputs, targets, strict=True))


def squares() -> list[Sample]:
    generator, samples = seeded(), []
    for number in range(SAMPLES):
        top, left = (int(torch.randint(2, 9, (), generator=generator)) for _ in range(2))
        image = torch.zeros(1, 16, 16)
        image[:, top : top + 4, left : left + 4] = 10.0 + 10 * (number % 2)
        box = torch.tensor([[left, top, left + 4, top + 4]], dtype=torch.float32)
        samples.append((image, {"boxes": box, "labels": torch.tensor([number % 2])}))
    return samples


def pictures() -> list[Sample]:
    smooth = torch.rand(SAMPLES, 1, 4, 4, generator=seeded())
    clean = nn.functional.interpolate(smooth, size=(16, 16), mode="bilinear")
    noisy = clean + 0.1 * torch.randn(clean.shape, generator=seeded(1))
    return list(zip(noisy, clean, strict=True))


def texts() -> list[Sample]:
    tokens = torch.randint(0, 20, (SAMPLES, 6), generator=seeded())
    return [(row, int((row < 10).sum() > 3)) for row in tokens]


def similar_pairs() -> list[Sample]:
    inputs = torch.randn(SAMPLES, 6, generator=seeded())
    samples = []
    for number in range(SAMPLES):
        pair = number // 2
        one, other = inputs[2 * pair], inputs[2 * pair + 1]
        score = float(torch.cosine_similarity(one, other, 0))
        samples.append((inputs[number], {"pair": pair, "score": score}))
    return samples


def counting() -> list[Sample]:
    starts = torch.randint(0, 10, (SAMPLES, 1), generator=seeded())
    return [(row, None) for row in (starts + torch.arange(6)) % 10]


def spelled() -> list[Sample]:
    generator, samples = seeded(), []
    for _ in range(SAMPLES):
        ids = torch.randint(1, 4, (3,), generator=generator)
        frames = torch.zeros(4, 12)
        for place, each in enumerate(ids.tolist()):
            frames[each, 4 * place : 4 * place + 2] = 1.0
        samples.append((frames + 0.05 * torch.randn(frames.shape, generator=generator), ids))
    return samples


@dataclass(frozen=True)
class Case:
    """A task with a network for it.

    Attributes:
        task: as ``--task`` has it.
        network: makes it with fresh weights.
        samples: with a rule that it can learn.
        traced: False where it is no Program.
    """

    task: str
    network: Callable[[], nn.Module]
    samples: Callable[[], list[Sample]]
    traced: bool = True

    @property
    def spec(self) -> TaskSpec:
        return parse_task(self.task)

    def data(self, count: int = SAMPLES) -> Data:
        """The samples, as a command opens them."""
        inputs, targets = zip(*self.samples()[:count], strict=True)
        batch = (torch.stack(inputs), list(targets))
        opened = open_data(as_samples([batch], "data"), labels=False)
        return opened.with_targets(self.spec.targets())

    def made(self, seed: int = 0) -> nn.Module:
        """The network, as a Program where it can be one."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = self.network().eval()
        return program_of(network, self.samples()[0][0]) if self.traced else network


def program_of(network: nn.Module, sample: Tensor) -> Program:
    dtype = "float32" if sample.is_floating_point() else "int64"
    spec = InputSpec(tuple(sample.shape), dtype=dtype)
    return Program(network, fx.symbolic_trace(network).graph, input_spec=spec).eval()


class FramesFirst(nn.Module):
    """Classes of frames ``(N, T, C)``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv1d(4, 16, 3, padding=1), nn.ReLU(), nn.Conv1d(16, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).transpose(1, 2)


def mlp(outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, outputs))


def conv(inputs: int, outputs: int) -> nn.Module:
    layers = nn.Conv2d(inputs, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, outputs, 1)
    return nn.Sequential(*layers)


CASES: dict[str, Case] = {
    "classify": Case("classify", lambda: mlp(3), classes),
    "multilabel": Case("multilabel", lambda: mlp(3), several_labels),
    "regress": Case("regress", lambda: mlp(2), numbers),
    "segment": Case("segment", lambda: conv(3, 3), masks),
    "detect": Case("detect", Detector, squares, traced=False),
    "restore": Case("restore", lambda: conv(1, 1), pictures),
    "text": Case("text", lambda: Tokens(20, 2, pooled=True), texts),
    "embed": Case("embed", lambda: mlp(4), similar_pairs),
    "language": Case("language", lambda: Tokens(10, 10, pooled=False), counting),
    "sequence": Case("sequence", FramesFirst, spelled),
}
"""By the name of the row; that of one's own metric needs a file."""
