"""Samples learned from a network's batch norms, to calibrate on without data.

In training, a batch norm recorded the mean and the variance of each of its channels. Gradient descent changes
noise until a batch of it gives these again, in every norm (Cai et al., "ZeroQ: A Novel Zero Shot Quantization
Framework", CVPR 2020, section 3.1).

Two things make that take tens of steps in place of hundreds. Noise begins with the spectrum of photographs,
whose amplitude falls as 1/frequency (Field, 1987), and it is learned in coordinates in which that is white
(Olah et al., "Feature Visualization", Distill 2017). And what is lowered is the divergence of two normal
distributions, which counts every channel alike, however small its values are.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modelopt_cli.data.data_spec import DataSpec, whole_number
from modelopt_cli.data.in_memory import InMemory
from modelopt_cli.data.source import Source
from modelopt_cli.errors import DataError
from modelopt_cli.program import Program
from modelopt_cli.program.input_batch import Inputs, call, each_of, make_inputs, select, to
from modelopt_cli.program.input_spec import InputSpec, Preprocess
from modelopt_cli.program.samples import DTYPES
from modelopt_cli.settings import option

BATCH = 16
"""Samples that are learned together, and give one mean and variance."""
STEPS = 40
"""Steps of gradient descent for each batch."""
RATE = 0.1
"""Learning rate of Adam at the first step, in standard deviations of the noise; it falls as a cosine."""
CONTRAST = 0.25
"""Standard deviation of the pixels of noise, on the scale 0 to 1."""
PATCHES = 4
"""Times that a patch fits into a sample, along each of its dimensions."""
FARTHEST = 0.5
"""Divergence in nats that samples may end with: beyond, the norms have seen other inputs in training."""
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class ForNetwork:
    """The network that samples are made for.

    Attributes:
        program: with its batch norms; it is not changed.
        most: samples that will be looked at.
        instead: what needs no samples, for messages; empty where nothing does.
        device: to compute on.
        progress: called with the steps done and their total.
    """

    program: Program
    most: int | None = None
    instead: str = ""
    device: str = "cpu"
    progress: Callable[[int, int | None], None] | None = None


def open_norm_samples(
    spec: DataSpec, known: InputSpec | None, seed: int, network: ForNetwork | None
) -> Source:
    """``none`` or ``none?n=64``: so many samples, or fewer where fewer will be looked at.

    Raises:
        DataError: they are not for calibration, the network has no batch norms that they could be learned
            from, or it takes what cannot be learned.
    """
    if network is None:
        hint = f"give it as {option('calibration')}, and samples here"
        raise DataError("makes samples to calibrate on, and nothing else", where=spec.text, hint=hint)
    count = whole_number(spec, "n") or int(spec.row.defaults["n"])
    count = min(count, network.most or count)
    shape = known or network.program.input
    learner = _Learner(network, shape, spec.text)
    samples = learner.samples(count, seed)
    made = f"{count} samples learned from {learner.norms} batch norm{'s' * (learner.norms > 1)}"
    source = InMemory(f"no data: {made}", [(sample, None) for sample in samples])
    source.notes = (f"calibrated without data, on {made}",)
    if any(each.preprocess is None for each in shape.tensors):
        source.notes += ("no preprocessing is known: values of mean 0 and variance 1 are taken for inputs",)
    return source


class _Learner:
    """Gradient descent on the inputs of a network whose batch norms are watched."""

    def __init__(self, network: ForNetwork, shape: InputSpec, where: str) -> None:
        self.network, self.shape, self.where = network, shape, where
        self._require_floats()
        self.model = copy.deepcopy(network.program).eval().requires_grad_(False).to(network.device)
        norms = [each for each in self.model.modules() if _has_statistics(each)]
        if not norms:
            raise self._refusal(
                "the network has no batch norm whose statistics samples could be learned from"
            )
        self.norms = len(norms)
        self.divergences: list[Tensor] = []
        for norm in norms:
            norm.register_forward_pre_hook(self._watch, with_kwargs=True)

    def samples(self, count: int, seed: int) -> list[Inputs]:
        """So many samples on the CPU; the same for the same network, count and seed.

        Half of them are learned. The others are patches of those, repeated: norms do not say how much images
        differ in the mean over their places, which is more where each image shows one thing.
        """
        whole = math.ceil(count / 2) if any(len(each.shape) > 1 for each in self.shape.tensors) else count
        batches = math.ceil(whole / BATCH)
        sizes = [whole // batches + (place < whole % batches) for place in range(batches)]
        generator = torch.Generator().manual_seed(seed)
        learned = []
        for place, size in enumerate(sizes):
            batch = self._batch(size, generator, place * STEPS, batches * STEPS)
            learned += [select(batch, index) for index in range(size)]
        patches = [each_of(sample, lambda x: repeated(x, generator)) for sample in learned[: count - whole]]
        return learned + patches

    def _batch(self, size: int, generator: torch.Generator, done: int, total: int) -> Inputs:
        noise = {
            each.name: torch.randn(size, *each.shape, generator=generator).to(self.network.device)
            for each in self.shape.tensors
        }
        adam = torch.optim.Adam([each.requires_grad_() for each in noise.values()], lr=RATE)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, STEPS)
        for step in range(1, STEPS + 1):
            adam.zero_grad()
            with torch.enable_grad():
                self._divergence(noise).backward()
            adam.step()
            falling.step()
            if self.network.progress is not None:
                self.network.progress(done + step, total)
        with torch.no_grad():
            self._require_near(float(self._divergence(noise)))
            return to(self._inputs(noise), "cpu")

    def _require_near(self, divergence: float) -> None:
        if divergence > FARTHEST:
            by = f"they stay {divergence:.1f} nats apart"
            problem = f"no inputs of the network's preprocessing give what its batch norms recorded: {by}"
            otherwise = f"{option('calibration')} samples"
            hint = f"give {option('mean')} and {option('std')} as in training, or {otherwise}"
            raise DataError(problem, where=self.where, hint=hint)

    def _inputs(self, noise: Mapping[str, Tensor]) -> Inputs:
        return make_inputs(self.shape, lambda each: as_input(noise[each.name], each.preprocess))

    def _divergence(self, noise: Mapping[str, Tensor]) -> Tensor:
        """Mean over the norms, each time that one is called."""
        self.divergences.clear()
        call(self.model, self._inputs(noise))
        divergence = torch.stack(self.divergences).mean()
        if not divergence.isfinite():
            problem = "the network gives NaN or infinity on noise"
            raise DataError(problem, where=self.where, hint="check the checkpoint")
        return divergence

    def _watch(self, norm: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.divergences.append(divergence_of(norm, next(iter((*args, *kwargs.values())))))

    def _require_floats(self) -> None:
        for each in self.shape.tensors:
            if not DTYPES[each.dtype].is_floating_point:
                raise self._refusal(
                    f"the network's input {each.name} is {each.dtype}, and only floats can be learned"
                )

    def _refusal(self, problem: str) -> DataError:
        otherwise = f", or {self.network.instead}" if self.network.instead else ""
        return DataError(problem, where=self.where, hint=f"give {option('calibration')} samples{otherwise}")


def _has_statistics(layer: nn.Module) -> bool:
    return isinstance(layer, _NORMS) and layer.running_mean is not None and layer.running_var is not None


def divergence_of(norm: Any, x: Tensor) -> Tensor:
    """Kullback-Leibler divergence of a batch from what a norm recorded, both taken for normal distributions.

    Args:
        norm: a batch norm with running statistics.
        x: its input ``(N, C, ...)``.

    Returns:
        Mean over the channels, in nats.
    """
    variance, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
    # As the norm divides by it; no channel is divided by zero.
    ratio = (variance + norm.eps) / (norm.running_var + norm.eps)
    distance = (mean - norm.running_mean).square() / (norm.running_var + norm.eps)
    divergence: Tensor = (0.5 * (ratio - 1 - ratio.log() + distance)).mean()
    return divergence


def as_input(noise: Tensor, preprocess: Preprocess | None) -> Tensor:
    """The network's input that white noise stands for.

    Args:
        noise: ``(N, C, ...)`` of variance 1.
        preprocess: of an image, whose pixels lie between 0 and 1 before it; None leaves values unbounded.

    Returns:
        The same shape, with the spectrum of photographs along all dimensions behind ``C``.
    """
    coloured = _coloured(noise)
    if preprocess is None:
        return coloured
    mean, std = (noise.new_tensor(each).view(-1, 1, 1) for each in (preprocess.mean, preprocess.std))
    # Clipped as cameras clip: black and white stand for the ends of the input's range.
    return ((0.5 + CONTRAST * coloured).clamp(0, 1) - mean) / std


def repeated(sample: Tensor, generator: torch.Generator) -> Tensor:
    """A patch of a sample ``(C, ...)`` at a random place, repeated until it fills the sample."""
    patch = sample
    for dim, size in enumerate(sample.shape[1:], 1):
        part = math.ceil(size / PATCHES)
        begin = int(torch.randint(size - part + 1, (), generator=generator))
        places = begin + torch.arange(size) % part
        patch = patch.index_select(dim, places)
    return patch


def _coloured(noise: Tensor) -> Tensor:
    """White noise with amplitudes that fall as 1/frequency, of variance 1 again."""
    sizes = noise.shape[2:]
    if not sizes:
        return noise
    squares = torch.zeros(sizes, device=noise.device)
    for dim, size in enumerate(sizes):
        frequencies = torch.fft.fftfreq(size, device=noise.device).square()
        squares = squares + frequencies.view(-1, *[1] * (len(sizes) - 1 - dim))
    amplitudes = squares.clamp_min(1 / max(sizes) ** 2).rsqrt()
    amplitudes = amplitudes / amplitudes.square().mean().sqrt()
    dims = tuple(range(2, noise.dim()))
    coloured: Tensor = torch.fft.ifftn(torch.fft.fftn(noise, dim=dims) * amplitudes, dim=dims).real
    return coloured
