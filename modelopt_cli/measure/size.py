"""Size of a model: bytes on disk, parameters, non-zeros, bits per weight.

A *parameter* is one learned number of the network: weights, biases, embeddings, class tokens, and the
scales and shifts of its norms. The int8 weight of a quantized layer counts as the layer it replaces.
Not parameters: quantization scales and zero points, running statistics, other buffers. A norm that was
folded into a convolution is gone, and its parameters with it. A tensor shared by two layers counts once.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from modelopt_cli.artifact.dtypes import count_nonzero
from modelopt_cli.checkpoint.state_file import state_bytes
from modelopt_cli.measure.evaluated_model import EvaluatedModel
from modelopt_cli.program.quantized import Quantized

# What a quantized layer keeps in a buffer because integers cannot be nn.Parameters.
_WEIGHT_KEYS = frozenset({"weight", "bias", "in_proj_weight", "in_proj_bias"})
# Tensors of a bare state dict that are no parameters.
_STATISTICS = frozenset({"running_mean", "running_var", "num_batches_tracked"})
_LENGTH_BYTES = 8  # a safetensors file starts with the length of its header
_MAX_HEADER = 100 << 20


@dataclass(frozen=True)
class Size:
    """Size of one model.

    Attributes:
        file_bytes: length of its file.
        parameters: logical parameters, see the module's docstring.
        nonzero: parameters that are not zero.
        bits_per_weight: ``8 * tensor bytes in the file / parameters``. Everything the file stores in
            tensors counts, so scales, indices and running statistics make it honest; the header does
            not. None if there are no parameters.
        tensor_bytes: of the network's tensors in the file, without an optimizer's or other things; None
            where that is not known.
    """

    file_bytes: int
    parameters: int
    nonzero: int
    bits_per_weight: float | None
    tensor_bytes: int | None = None


def measure_size(evaluated: EvaluatedModel) -> Size:
    """Size of the evaluated's file and model."""
    # Counted as they come: the tensors of a bare state dict may be more than fits into memory.
    counts = list(map(_count, _logical_tensors(evaluated)))
    parameters = sum(count for count, _ in counts)
    stored = evaluated.tensor_bytes
    if stored is None:
        stored = safetensors_bytes(Path(evaluated.path))
    if stored is None:
        stored = state_bytes(_state(evaluated))
    return Size(
        file_bytes=evaluated.file_bytes,
        parameters=parameters,
        nonzero=sum(nonzero for _, nonzero in counts),
        bits_per_weight=8 * stored / parameters if parameters else None,
        tensor_bytes=stored,
    )


def times_smaller(size: Size, base: Size) -> float | None:
    """Return how many times smaller a model is than the baseline; None where it has no bytes.

    The ratio of the files or of the network's tensors, whichever is less: an optimizer's state in the
    baseline is no gain, and a header that outweighs small tensors is a loss.
    """
    ratios = [(base.file_bytes, size.file_bytes)]
    if base.tensor_bytes is not None and size.tensor_bytes is not None:
        ratios.append((base.tensor_bytes, size.tensor_bytes))
    return min((before / after for before, after in ratios if after), default=None)


def logical_parameters(model: nn.Module) -> Iterator[Tensor]:
    """Yield every parameter of ``model`` once, those of quantized layers included."""
    yield from model.parameters()
    seen: set[int] = set()
    for module in model.modules():
        if not isinstance(module, Quantized):
            continue
        for name, buffer in module.named_buffers(recurse=False):
            if name in _WEIGHT_KEYS and id(buffer) not in seen:
                seen.add(id(buffer))
                yield buffer


def safetensors_bytes(path: Path) -> int | None:
    """Bytes of tensor data in a safetensors file (every artifact is one); None if it is not one."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            opens = file.read(1) == b"{"
            total = os.fstat(file.fileno()).st_size
    except OSError:
        return None
    data_bytes = total - _LENGTH_BYTES - length
    return data_bytes if opens and 0 < length <= _MAX_HEADER and data_bytes >= 0 else None


def _logical_tensors(evaluated: EvaluatedModel) -> Iterable[Tensor]:
    if evaluated.model is not None:
        return logical_parameters(evaluated.model)
    state = evaluated.state or {}
    return (state[name] for name in state if name.rpartition(".")[2] not in _STATISTICS)


def _count(tensor: Tensor) -> tuple[int, int]:
    return tensor.numel(), count_nonzero(tensor)


def _state(evaluated: EvaluatedModel) -> Mapping[str, Tensor]:
    if evaluated.model is not None:
        return evaluated.model.state_dict()
    return evaluated.state or {}
