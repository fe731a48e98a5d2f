"""A metric of one's own: ``FILE.py:CALLABLE``.

It is called with the network's outputs for a batch and the batch's targets, and returns one number for each
sample, whose mean is the metric. Attributes of the callable may say more: ``higher_is_better`` (True),
``unit`` ("") and ``digits`` (4) of the table, and ``loss``, a function of the same arguments to a scalar, by
which a network can be trained.
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate
from torchvision import tv_tensors

from modelopt_cli.data.decode import ImageFile
from modelopt_cli.data.moving import OUTSIDE, Motion, Scaled
from modelopt_cli.data.targets import RawTarget, TargetFormat, Targets
from modelopt_cli.errors import DataError, InputError, ModeloptError, UsageError
from modelopt_cli.settings import option
from modelopt_cli.tasks.detection import BoxTargets
from modelopt_cli.tasks.restoration import ImageTargets
from modelopt_cli.tasks.segmentation import MaskTargets
from modelopt_cli.tasks.task import Misfit
from modelopt_cli.user_code import load_callable


class AnyTargets(TargetFormat):
    """Targets as the data has them: stacked where they are numbers or of one shape, else a list.

    Image files are masks of class ids ``(H, W)``, or pictures ``(C, H, W)`` from 0 to 1.
    """

    def place(self, raw: RawTarget, picture: Image.Image) -> Any:
        """The part of the target that lies in a picture, by its form; see :class:`TargetFormat`."""
        if isinstance(raw, ImageFile):
            return (_MASKS if raw.is_mask else _IMAGES).place(raw, picture)
        return _BOXES.place(raw, picture) if isinstance(raw, dict) and "boxes" in raw else raw

    def check(self, raw: RawTarget, inputs: Any, classes: int | None) -> Any:
        """The target itself; see :class:`TargetFormat`."""
        if raw is None:
            raise DataError("has no target")
        if isinstance(raw, Scaled):
            return _IMAGES.check(raw, inputs, None)
        if isinstance(raw, dict) and isinstance(raw.get("boxes"), tv_tensors.BoundingBoxes):
            return _BOXES.check(raw, inputs, None)
        return raw.as_subclass(Tensor).long() if isinstance(raw, tv_tensors.Mask) else raw

    def moved(self, targets: Targets, motion: Motion) -> Targets:
        """Masks, pictures and boxes of moved pictures, by their form; numbers stay as they are."""
        if isinstance(targets, Tensor):
            if targets.dim() < 3:
                return targets
            form = targets.dim(), targets.is_floating_point()
            move = {(3, False): motion.masks, (4, True): motion.pictures}.get(form)
            if move is not None and tuple(targets.shape[-2:]) == motion.size:
                return move(targets)
        elif isinstance(targets, list) and all(
            isinstance(each, dict) and "boxes" in each for each in targets
        ):
            return [motion.target(place, each) for place, each in enumerate(targets)]
        hint = "leave it out, or augment in a dataset of your own"
        raise UsageError("does not know how these targets move", where=option("augment"), hint=hint)

    def collate(self, targets: Sequence[Any]) -> Targets:
        """Targets of a batch."""
        try:
            collated = default_collate(list(targets))
        except (TypeError, RuntimeError, KeyError):
            return list(targets)
        return collated if isinstance(collated, Tensor | dict) else list(targets)


_MASKS, _IMAGES, _BOXES = MaskTargets(OUTSIDE), ImageTargets(1.0), BoxTargets()


def targets(names: tuple[str, ...] | None = None) -> AnyTargets:
    """The format of the targets."""
    return AnyTargets()


def judged(outputs: Any, wanted: Targets, inputs: Any) -> Any:
    """The network's outputs as they are."""
    return outputs


def load(text: str) -> Any:
    """The callable that ``FILE.py:CALLABLE`` names."""
    place, _, name = text.rpartition(":")
    return load_callable(place, name, InputError)


def called(function: Any, name: str, outputs: Any, wanted: Targets) -> Any:
    """Call a metric, or its loss, for a batch; raises InputError where it fails."""
    try:
        return function(outputs, wanted)
    except ModeloptError:
        raise
    except Exception as error:  # the user's own code may raise anything
        first = next(iter(str(error).splitlines()), "")
        raise InputError(f"failed: {type(error).__name__}: {first}", where=name) from error


def scores(metric: Any, outputs: Any, wanted: Targets, samples: int, name: str = "the metric") -> Tensor:
    """The numbers that a metric gives the samples of a batch, ``(N,)``, float64.

    Raises:
        InputError: it fails, or returns something else.
        Misfit: a number is NaN.
    """
    result = called(metric, name, outputs, wanted)
    try:
        numbers = torch.as_tensor(result).detach().double().cpu()
    except (TypeError, ValueError, RuntimeError):
        numbers = torch.empty(0, 0)
    if numbers.shape != (samples,):
        form = tuple(numbers.shape) if numbers.dim() != 2 else type(result).__name__
        message = f"returned {form} for {samples} samples where one number for each should be"
        raise InputError(message, where=name, hint="return a tensor of as many numbers as samples")
    undefined = torch.isnan(numbers).nonzero().flatten()
    if undefined.numel():
        hint = "have it return a number for each sample"
        raise Misfit(int(undefined[0]), f"{name} returned NaN for this sample", hint)
    return numbers
