"""Checks of tensors from untrusted files, before anything computes with them."""

from collections.abc import Callable, Mapping

import torch

from modelopt_cli.artifact.lazy import described
from modelopt_cli.errors import CheckpointError
from modelopt_cli.text import short

DTYPES = frozenset(
    {
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    }
)  # fmt: skip

MAX_TENSORS = 100_000
"""Ten times as many as the largest networks have; counted before anything is done with each."""

# Tied weights and slices of one flat buffer share storage honestly; beyond this factor the sharing is
# there to make us write or convert far more than the file holds.
_SHARING = 16
_SHARING_FLOOR = 1 << 20


def check_tensors(state: Mapping[str, torch.Tensor], file_bytes: int, where: str) -> None:
    """Refuse tensors that claim more than the file holds, or that are not plain CPU arrays.

    ``weights_only`` lets a 1.6 KB file make a 4 TB view with a stride of 0, and a legacy file make
    tensors over memory that was never read from it.

    Raises:
        CheckpointError: names the tensor.
    """
    if len(state) > MAX_TENSORS:
        raise CheckpointError(f"holds {len(state):,} tensors; {MAX_TENSORS:,} can be read", where=where)
    storages: dict[int, int] = {}
    claimed = 0
    for name, tensor in state.items():
        _check_one(name, tensor, where)
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        claimed += tensor.numel() * tensor.element_size()
    if sum(storages.values()) > file_bytes:
        raise CheckpointError(
            f"its tensors take {sum(storages.values()):,} bytes, but the file has {file_bytes:,}", where=where
        )
    if claimed > _SHARING * file_bytes + _SHARING_FLOOR:
        raise CheckpointError(
            f"its tensors add up to {claimed:,} bytes over {file_bytes:,} stored ones", where=where
        )


def check_types(described: Mapping[str, torch.Tensor], where: str) -> None:
    """Refuse element types that are not supported; the tensors may be on the meta device.

    Raises:
        CheckpointError: names the tensor.
    """
    for name, tensor in described.items():
        if tensor.dtype not in DTYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(f"tensor '{short(name)}' is {kind}, which is not supported", where=where)


def _kind(tensor: torch.Tensor) -> str | None:
    """A word for a tensor that is not what its storage holds, element by element; None for a dense one."""
    for word, applies in _UNUSUAL.items():
        if applies(tensor):
            return word
    return None if tensor.layout is torch.strided else str(tensor.layout).removeprefix("torch.")


_UNUSUAL: dict[str, Callable[[torch.Tensor], bool]] = {
    "nested": lambda tensor: tensor.is_nested,
    "quantized": lambda tensor: tensor.is_quantized,
    "a negative view": lambda tensor: tensor.is_neg(),
    "a conjugate view": lambda tensor: tensor.is_conj(),
}


def _check_one(name: str, tensor: torch.Tensor, where: str) -> None:
    kind = _kind(tensor)
    if kind is not None:
        raise CheckpointError(
            f"tensor '{short(name)}' is {kind}; only dense tensors can be read", where=where
        )
    if tensor.device.type != "cpu":
        raise CheckpointError(
            f"tensor '{short(name)}' has no data ({tensor.device.type} device)", where=where
        )
    check_types({name: tensor}, where)
    have, need = tensor.untyped_storage().nbytes(), tensor.numel() * tensor.element_size()
    if need > have:
        raise CheckpointError(
            f"tensor '{short(name)}' claims {need:,} bytes and stores {have:,}",
            where=where,
            hint="if it was expanded, save its .clone()" if 0 in tensor.stride() else None,
        )


_BLOCK = 1 << 20


def check_finite(state: Mapping[str, torch.Tensor], where: str, *, masks: bool = False) -> None:
    """Refuse NaN and infinite weights.

    Args:
        state: tensors by name.
        where: the file, for messages.
        masks: let tensors pass that hold only 0 and minus infinity, as attention masks do.

    Raises:
        CheckpointError: names the first such tensor and how many values are affected.
    """
    for name in state:
        count = count_not_finite(state[name], masks)
        if count:
            raise CheckpointError(
                f"'{short(name)}' has {count:,} values that are NaN or infinite",
                where=where,
                hint="the training diverged; take an earlier checkpoint",
            )


def check_range(state: Mapping[str, torch.Tensor], where: str) -> None:
    """Refuse float64 tensors that float32 would make infinite, or zero as a whole.

    Raises:
        CheckpointError: names the first such tensor and its largest magnitude.
    """
    limits = torch.finfo(torch.float32)
    for name, described_one in described(state).items():
        if described_one.dtype != torch.float64 or not described_one.numel():
            continue
        values = state[name]
        largest = float(values[values.isfinite()].abs().max()) if bool(values.isfinite().any()) else 0.0
        if largest > limits.max or 0 < largest < limits.tiny:
            raise CheckpointError(
                f"'{short(name)}' has values up to {largest:.2g}, which float32 cannot hold",
                where=where,
                hint="scale the weights, or take an earlier checkpoint if the training diverged",
            )


def count_not_finite(tensor: torch.Tensor, masks: bool = False) -> int:
    """Number of NaN and infinite values of a tensor; 0 where ``masks`` lets it pass as a mask."""
    if not tensor.is_floating_point():
        return 0
    values = tensor if tensor.element_size() > 1 else tensor.float()  # float8 lacks most operators
    # A tenth of the time of looking at each; in blocks, because a sum of halves makes float32 of them all.
    if all(torch.isfinite(some.sum(dtype=torch.float32)) for some in values.reshape(-1).split(_BLOCK)):
        return 0
    bad = ~torch.isfinite(values)
    if masks and bool((values[bad] == -torch.inf).all()) and not bool(values[~bad].any()):
        return 0
    return int(bad.sum())
