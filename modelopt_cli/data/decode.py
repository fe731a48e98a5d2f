"""Decoding of image files."""

import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from typing import IO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from modelopt_cli.errors import DataError
from modelopt_cli.regular import open_regular

GREY = ("1", "L", "LA")
"""Pillow's modes of grey images of at most 8 bits."""
_FEW = 64
"""Different values that a mask has at most, where nothing else says if a grey image is one."""
TO_8_BITS = "convert it to 8 bits per channel"


def decode(file: str | IO[bytes], *, wide: bool = False) -> Image.Image:
    """Decode an image file, or what is open as one, whole.

    Args:
        file: its path, or the open file.
        wide: True if grey images of 16 bits will do.

    Raises:
        DataError: missing, unreadable, truncated, not an image, or too large to be meant. Where what is open
            lies, the caller must say.
    """
    path = file if isinstance(file, str) else None
    try:
        with open_regular(file, DataError) if isinstance(file, str) else nullcontext(file) as stream:
            return _decoded(stream, wide)
    except DataError as error:
        error.where = error.where or path
        raise
    except UnidentifiedImageError:
        raise DataError("is not an image", where=path, hint="remove it or fetch it again") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = Image.MAX_IMAGE_PIXELS or 0
        raise DataError(
            f"has more than {limit // 10**6} million pixels", where=path, hint="shrink it"
        ) from None
    except OSError as error:
        reason = error.strerror or "is truncated or damaged"
        raise DataError(reason, where=path, hint="remove it or fetch it again") from None
    except (
        Exception
    ) as error:  # Pillow's decoders raise SyntaxError, ValueError, struct.error, IndexError, ...
        raise DataError(
            f"cannot be decoded ({type(error).__name__})", where=path, hint="remove it or fetch it again"
        ) from None


def _decoded(stream: IO[bytes], wide: bool) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(stream) as image:
            # Pillow keeps the upper byte of a 16-bit colour image, and never says so.
            is_wide = any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
            if is_wide and not (wide and image.mode.startswith("I")):
                raise DataError(f"has 16 bits per channel ({image.mode})", hint=TO_8_BITS)
            image.load()
            return image


@dataclass(frozen=True)
class ImageFile:
    """An image that is somebody's target: decoded only where targets are read.

    Attributes:
        path: of the file.
        kind: ``mask`` or ``image``, where the user says so; else empty.
        values: the pixel value of each class in a mask; empty where values are classes.
    """

    path: str
    kind: str = ""
    values: tuple[int, ...] = ()

    @property
    def is_mask(self) -> bool:
        """True of a mask: said to be one, or with a palette, 16 bits or few greys, but no JPEG."""
        if self.kind:
            return self.kind == "mask"
        image = self.decode()
        if image.mode not in GREY:
            return image.mode.startswith(("P", "I"))
        return image.format != "JPEG" and len(np.unique(np.asarray(image.convert("L")))) <= _FEW

    def decode(self) -> Image.Image:
        """The image, grey ones of 16 bits too; raises as :func:`decode`."""
        return decode(self.path, wide=True)

    def classes(self, pixels: NDArray[np.int32]) -> NDArray[np.int32]:
        """The class of each pixel of a mask; raises DataError where a value is that of none."""
        if not self.values:
            return pixels
        unknown = ~np.isin(pixels, self.values)
        if unknown.any():
            known = ",".join(map(str, self.values))
            raise DataError(
                f"mask holds {pixels[unknown][0]}, and ?classes={known} does not", where=self.path
            )
        order = np.argsort(self.values)
        places = np.searchsorted(self.values, pixels, sorter=order)
        return order[places].astype(np.int32)
