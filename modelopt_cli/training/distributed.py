"""Several processes, started by torchrun, that train one network together.

Every process holds the whole network and sees its part of each batch. What they exchange is summed so that
the result is that of one process on the whole batch, up to rounding, whatever the batch's size.
"""

import atexit
import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch import distributed as dist

from modelopt_cli.data import Data
from modelopt_cli.errors import EnvironmentFailure, UsageError


@dataclass(frozen=True)
class World:
    """The processes of this run, as one of them sees it. All methods but part and shard are collective.

    Attributes:
        rank: of this process, from 0.
        size: number of processes.
        device: where this one computes.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def main(self) -> bool:
        """True for the process that prints and writes."""
        return self.rank == 0

    def part(self, total: int) -> slice:
        """Range of ``total`` things in a row that this process takes; the parts differ by one at most."""
        return slice(total * self.rank // self.size, total * (self.rank + 1) // self.size)

    def shard(self, data: Data) -> Data | None:
        """Samples of an evaluation that are this process's, none in two; None where it has nothing to do.

        An iterable-style dataset is not split: the main process reads all of it.
        """
        if self.size == 1:
            return data
        if data.size is None:
            return data if self.main else None
        indices = (data.indices if data.indices is not None else range(data.size))[self.part(data.size)]
        return replace(data, indices=indices) if len(indices) else None

    def sum(self, *figures: float) -> tuple[float, ...]:
        """Each figure summed over the processes, in float64: integers stay exact below 2**53."""
        if self.size == 1:
            return figures
        sums = torch.tensor(figures, dtype=torch.float64, device=_exchange())
        reduce(sums)
        return tuple(sums.tolist())

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients over the processes, in place.

        With each process's mean loss weighted by its share of the batch (``Batch.weight``), the sum is the
        gradient of the mean over the whole batch.
        """
        if self.size == 1:
            return
        gradients: dict[torch.dtype, list[Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is not None:
                gradients.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for group in gradients.values():
            flat = torch.cat([gradient.reshape(-1) for gradient in group])
            reduce(flat)
            parts = flat.split([gradient.numel() for gradient in group])
            for gradient, part in zip(group, parts, strict=True):
                gradient.copy_(part.view(gradient.shape))

    def broadcast(self, module: nn.Module) -> None:
        """Give every process the main one's parameters and buffers."""
        if self.size == 1:
            return
        for tensor in (*module.parameters(), *module.buffers()):
            raw = tensor.detach().to(_exchange()).contiguous().clone()
            with collective():
                dist.broadcast(raw.view(-1).view(torch.uint8), src=0)
            with torch.no_grad():
                tensor.copy_(raw)

    def gather(self, tensor: Tensor) -> Tensor:
        """The processes' tensors one after another; they may differ in their first dimension."""
        if self.size == 1:
            return tensor
        counts = [int(n) for n in self.sum(*(len(tensor) * (rank == self.rank) for rank in range(self.size)))]
        padded = tensor.new_zeros((max(counts), *tensor.shape[1:]), device=_exchange())
        padded[: len(tensor)] = tensor
        everyone = [torch.empty_like(padded) for _ in counts]
        with collective():
            dist.all_gather(everyone, padded)
        parts = [part[:count] for part, count in zip(everyone, counts, strict=True)]
        return torch.cat(parts).to(tensor.device)

    def barrier(self) -> None:
        """Wait until every process has come here."""
        self.sum(0)


def world(device: str = "cpu") -> World:
    """The processes torchrun has started, joined on the first call; elsewhere this process alone.

    They talk through nccl on CUDA and gloo elsewhere, and part when the process ends.

    Args:
        device: ``cuda`` becomes this process's own GPU, by its ``LOCAL_RANK``.

    Raises:
        UsageError: torchrun's variables are incomplete, or there are fewer GPUs than processes.
        EnvironmentFailure: the other processes cannot be reached.
    """
    if not (dist.is_available() and dist.is_initialized()):
        if _variable("WORLD_SIZE", 1) == 1:
            return World(device=device)
        _join(device)
    if device == "cuda":
        device = f"cuda:{_variable('LOCAL_RANK', 0)}"
    return World(dist.get_rank(), dist.get_world_size(), device)


def leave() -> None:
    """Part from the other processes."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def collective() -> Iterator[None]:
    """Around an exchange: where another process is gone, that is what the error says."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise EnvironmentFailure(
            "another process of this run has ended", where="torchrun", hint="its own message says why"
        ) from error


def reduce(tensor: Tensor) -> None:
    """Sum a contiguous tensor over the processes, in place; all get the same bits."""
    with collective():
        dist.all_reduce(tensor)


def _exchange() -> str:
    """Device that tensors must be on to be exchanged."""
    return f"cuda:{torch.cuda.current_device()}" if dist.get_backend() == "nccl" else "cpu"


def _join(device: str) -> None:
    on_gpu = device.startswith("cuda")
    if not dist.is_available():
        raise EnvironmentFailure("this torch cannot train in several processes", where="torchrun")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UsageError(f"WORLD_SIZE is set but {name} is not", hint="start with torchrun")
    if on_gpu:
        local, gpus = _variable("LOCAL_RANK", 0), torch.cuda.device_count()
        if local >= gpus:
            raise UsageError(f"process {local} finds {gpus} GPUs", where="torchrun", hint="start fewer")
        torch.cuda.set_device(local)
    with collective():
        _meet("nccl" if on_gpu else "gloo")
    atexit.register(leave)


def _meet(backend: str) -> None:
    """Make the group of processes.

    When one has died, torchrun starts all of them again and has them meet in the store they met in before
    (torch 2.13), which still holds the addresses of the dead: whoever reads one waits for half an hour. So
    every start has names of its own. Of several launchers each counts its own restarts: no names agree there.
    """
    start = _variable("TORCHELASTIC_RESTART_COUNT", 0)
    if start == 0 or _variable("GROUP_WORLD_SIZE", 1) > 1:
        dist.init_process_group(backend)
        return
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://"))
    store = PrefixStore(f"start-{start}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)


def _variable(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UsageError(f"{name} is {text!r}, not an integer", hint="start with torchrun")
    return int(text)
