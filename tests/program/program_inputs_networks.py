"""Networks with several inputs, and with outputs of every form."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modelopt_cli.program import InputSpec

WORDS = 11
IMAGE = InputSpec((3, 8, 8), name="image")
IDS = InputSpec((5,), dtype="int64", name="ids")
MASK = InputSpec((5,), dtype="bool", name="mask")


def spec(*inputs: InputSpec) -> InputSpec:
    first, *others = inputs
    return InputSpec(first.shape, first.preprocess, first.dtype, first.name, first.free, tuple(others))


class Captioned(nn.Module):
    """An image and a text, and optionally which of its words count; ``form`` makes the outputs."""

    def __init__(self, form: Any = lambda logits, features: logits) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.conv = nn.Conv2d(12, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.words = nn.Embedding(WORDS, 6)
        self.hidden = nn.Linear(12, 16)
        self.head = nn.Linear(16, 4)
        self.form = form
        self.eval()

    def forward(self, image: Tensor, ids: Tensor, mask: Tensor | None = None, scale: float = 1.5) -> Any:
        features = self.norm(self.conv(self.stem(image).relu())).relu()
        words = self.words(ids)
        if mask is not None:
            words = words * mask.unsqueeze(-1)
        both = torch.cat((features.mean((2, 3)), words.mean(1)), 1)
        return self.form(self.head(self.hidden(both).relu()) * scale, features)


class Keywords(Captioned):
    """The same with inputs that go by name alone, in another order."""

    def forward(self, *, ids: Tensor, image: Tensor) -> Any:  # type: ignore[override]
        return super().forward(image, ids)


class Named(NamedTuple):
    logits: Tensor
    features: Tensor


@dataclass
class Fields:
    logits: Tensor
    features: Tensor | None = None


@dataclass
class ModelOutput(OrderedDict):  # type: ignore[type-arg]
    """As that of Hugging Face: a dataclass whose items are those of its fields that are not None."""

    logits: Tensor | None = None
    hidden: Tensor | None = None
    attentions: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("logits", "hidden", "attentions"):
            if vars(self)[name] is not None:
                self[name] = vars(self)[name]


FORMS: dict[str, Any] = {
    "one": lambda logits, features: logits,
    "tuple": lambda logits, features: (logits, features),
    "list": lambda logits, features: [features, logits],
    "dict": lambda logits, features: {"out": logits, "aux": features},
    "ordered-dict": lambda logits, features: OrderedDict([("0", features), ("pool", logits)]),
    "named-tuple": Named,
    "dataclass": Fields,
    "model-output": lambda logits, features: ModelOutput(logits=logits, hidden=features),
    "none": lambda logits, features: (logits, None, {"features": features, "nothing": None}),
    "pyramid": lambda logits, features: {"levels": [features, (features[:, :, ::2, ::2], logits)]},
    "twice": lambda logits, features: (logits, {"again": logits}),
    "parts": lambda logits, features: logits.chunk(2, 1),
    "largest": lambda logits, features: logits.topk(2),
    "changed": lambda logits, features: (features.mul_(2), logits.add_(1)),
    "integers": lambda logits, features: {"logits": logits, "label": logits.argmax(1)},
}
