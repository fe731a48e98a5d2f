"""One image as the input of a network, exactly as an image file of a data set becomes one."""

from os import PathLike, fspath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from modelopt_cli.data.config import PreprocessOverrides
from modelopt_cli.data.decode import decode
from modelopt_cli.data.preprocess import ImageTransform, resolve_preprocess
from modelopt_cli.errors import DataError
from modelopt_cli.program.input_spec import InputSpec


def preprocess_image(spec: InputSpec, image: Any) -> Tensor:
    """An image as a float tensor.

    Args:
        spec: shape and preprocessing of a sample.
        image: a PIL image; the path of an image file; 8-bit values as an array ``(H, W)`` or ``(H, W, C)``
            or a tensor ``(C, H, W)`` with 1 or 3 channels; or a list of these.

    Returns:
        ``(C, H, W)``, and of a list ``(N, C, H, W)``.

    Raises:
        DataError: the network takes no images, or this is none.
    """
    preprocess, _ = resolve_preprocess(spec, PreprocessOverrides())
    transform = ImageTransform(preprocess)
    if isinstance(image, list | tuple):
        if not image:
            raise DataError("there is no image in the list", hint="give at least one")
        return torch.stack([transform(_image(each)) for each in image])
    return transform(_image(image))


def _image(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, str | PathLike):
        return decode(str(fspath(image)))
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.dim() == 3:
        image = image.detach().cpu().permute(1, 2, 0).numpy()
    if isinstance(image, np.ndarray) and image.dtype == np.uint8:
        if image.ndim == 3 and image.shape[-1] == 1:
            image = image[..., 0]
        if image.ndim == 2 or (image.ndim == 3 and image.shape[-1] == 3):
            return Image.fromarray(np.ascontiguousarray(image))
    shape = f" of shape {tuple(image.shape)} and type {image.dtype}" if hasattr(image, "dtype") else ""
    hint = "give a PIL image, a path, or 8-bit values as an array (H, W, C) or a tensor (C, H, W)"
    raise DataError(f"{type(image).__name__}{shape} is no image", hint=hint)
