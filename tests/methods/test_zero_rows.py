"""Rows of zeros that nobody pruned, such as the padding of an embedding, whatever is done to the network."""

import pytest
import torch
from torch import Tensor, nn

import modelopt_cli as mo
from modelopt_cli.artifact.encodings import is_pruned
from modelopt_cli.methods.quantize.schemes import SCHEMES
from modelopt_cli.methods.share.apply import apply_to_state
from modelopt_cli.methods.share.config import ShareConfig
from modelopt_cli.program import InputSpec, Program
from modelopt_cli.program.capture import capture

PADDING = 3


class Reader(nn.Module):
    """Adds up the embeddings of tokens, of which the padding counts nothing, and classifies the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.fc = nn.Embedding(60, 16, padding_idx=PADDING), nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(self.words(ids).sum(1))


@pytest.fixture
def reader() -> Program:
    torch.manual_seed(0)
    network = Reader().eval()
    with torch.no_grad():
        network.words.weight[7, :5] = 0  # zeros among other numbers
    return capture(network, InputSpec((5,), name="ids", dtype="int64"))


def data() -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [(torch.randint(0, 60, (16, 5), generator=draw), torch.randint(0, 4, (16,), generator=draw))]


def embedded(program: Program) -> Tensor:
    """What the padding is embedded as: the sum of none but paddings, before the linear layer."""
    return program.words(torch.tensor([PADDING]))


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 3},
        {"bits": 3, "scope": "channels", "group": 8},
        {"bits": 3, "scope": "network"},
        {"bits": 3, "weighting": "fisher"},
        {"bits": 3, "rate": 0.1},
        {"bits": "auto", "ratio": 6.0},
        {"bits": 3, "train": data(), "epochs": 3, "lr": 0.1},
    ],
    ids=str,
)
def test_share_leaves_them_zero(settings, reader):
    calibrated = {} if "train" in settings else {"calibration": data()}
    result = mo.share(reader, evaluate=False, **calibrated, **settings)
    assert not result.coverage.layers[0].reason
    assert result.program.words.weight.unique().numel() <= 2**8
    assert not embedded(result.program).any()
    assert is_pruned(result.program.encodings["words.weight"])
    assert not is_pruned(result.program.encodings["fc.weight"])


def test_share_leaves_them_zero_without_a_graph(reader):
    made = apply_to_state(dict(reader.state_dict()), ShareConfig(bits=2))
    tensors = {name: tensor for name, tensor, _ in made.stream.items()}
    assert not tensors["words.weight"][PADDING].any()
    assert tensors["words.weight"].unique().numel() <= 4


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantize_leaves_them_zero(scheme, reader):
    result = mo.quantize(reader, calibration=data(), scheme=scheme, evaluate=False)
    assert not embedded(result.program).any()


@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": 0.5, "structure": "unstructured"},
        {"flops": 0.5},
        {"sparsity": 0.5, "structure": "unstructured", "train": data(), "epochs": 2, "lr": 0.1},
    ],
    ids=str,
)
def test_prune_leaves_them_zero(settings, reader):
    result = mo.prune(reader, evaluate=False, **settings)
    assert not embedded(result.program).any()


def test_a_weight_without_such_rows_uses_all_its_centroids(reader):
    with torch.no_grad():
        reader.words.weight[PADDING] = 1.0
    result = mo.share(reader, evaluate=False, bits=3, calibration=data())
    assert not is_pruned(result.program.encodings["words.weight"])
    assert result.program.words.weight.count_nonzero() == result.program.words.weight.numel()
