"""Sources held in memory as arrays: NumPy files, MNIST-family IDX files, the bundled digits."""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from modelopt_cli.data.data_spec import DataSpec, choice
from modelopt_cli.data.idx import find_idx, read_idx
from modelopt_cli.data.source import Raw, Source
from modelopt_cli.data.targets import RawTarget, raw_target
from modelopt_cli.errors import DataError, EnvironmentFailure
from modelopt_cli.regular import open_regular

DIGITS = Path(__file__).parent / "digits" / "digits.npz"

_IMAGE_KEYS = ("x", "images", "data")
_LABEL_KEYS = ("y", "labels")


class ArraySource(Source):
    """8-bit images ``(N, H, W)`` or ``(N, H, W, C)``, or ready float samples ``(N, ...)``."""

    def __init__(
        self, name: str, images: NDArray[Any], labels: NDArray[Any] | DataError, where: str | None = None
    ) -> None:
        self.name = name
        self.images = images
        self.ready = images.dtype.kind == "f" or images.ndim == 2
        self.channels = 3 if images.ndim == 4 and images.shape[-1] == 3 else 1
        self._where = where or name
        if len(images) == 0:
            hint = "give data with at least one sample"
            raise DataError("holds no images", where=self._where, hint=hint)
        self.unusable = (
            labels if isinstance(labels, DataError) else wrong_labels(labels, len(images), self._where)
        )
        if self.unusable is not None or isinstance(labels, DataError):
            labels = np.full(len(images), -1)
        elif labels.ndim == 1 and labels.dtype.kind in "iu":
            self.num_classes = int(labels.max()) + 1
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def where(self, index: int) -> str:
        """The file and the row."""
        return f"{self._where} row {index}"

    def load(self, index: int) -> tuple[Raw, RawTarget]:
        """Return a PIL image, or a tensor: float32 of a float array, int64 of rows of integers."""
        array, label = self.images[index], self.unusable or raw_target(self.labels[index])
        if self.ready:
            kind = np.float32 if array.dtype.kind == "f" else np.int64
            return torch.from_numpy(np.array(array, dtype=kind)), label
        if array.ndim == 3 and array.shape[-1] == 1:
            array = array[..., 0]
        return Image.fromarray(np.ascontiguousarray(array)), label


def wrong_labels(labels: NDArray[Any], count: int, where: str) -> DataError | None:
    """Reason why labels are no targets, one for every image, or None; classes begin at 0."""
    if labels.shape[:1] != (count,):
        return DataError(f"{count} images, but labels of shape {labels.shape}", where=where)
    if labels.dtype.kind not in "biuf":
        return DataError(f"labels are {labels.dtype}, not numbers", where=where)
    if labels.ndim == 1 and labels.dtype.kind in "iu" and labels.min() < 0:
        row = int(labels.argmin())
        return DataError(f"label {labels[row]} is below 0", where=f"{where} row {row}")
    return None


def open_idx(spec: DataSpec) -> Source:
    """``idx:DIR``: the test split, or ``?split=train``."""
    split = choice(spec, "split", ("train", "test"))
    images_path = find_idx(Path(spec.target), split, "images")
    images = read_idx(images_path)
    labels: NDArray[Any] | DataError
    try:
        labels = read_idx(find_idx(Path(spec.target), split, "labels"))
    except DataError as error:  # of no concern where labels are not read
        labels = error
    if images.ndim != 3:
        raise DataError(f"holds {images.ndim}-dimensional data, not images", where=str(images_path))
    return ArraySource(spec.text, images, labels, str(images_path))


def open_digits(spec: DataSpec) -> Source:
    """``digits``: the 1,797 8x8 digits of UCI; of each class the last fifth is the test split.

    E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository,
    1998, CC BY 4.0. The stored 0..16 become 0..255.
    """
    split = choice(spec, "split", ("train", "test", "all"))
    with np.load(DIGITS, allow_pickle=False) as stored:
        images, labels = stored["images"], stored["labels"]
    chosen = np.ones(len(labels), dtype=bool)
    if split != "all":
        test = np.zeros(len(labels), dtype=bool)
        for digit in range(10):
            members = np.flatnonzero(labels == digit)
            test[members[len(members) * 4 // 5 :]] = True
        chosen = test if split == "test" else ~test
    scaled = np.rint(images[chosen] * (255.0 / 16.0)).astype(np.uint8)
    return ArraySource(spec.text, scaled, labels[chosen])


def open_npz(spec: DataSpec) -> Source:
    """``npz:FILE``: 8-bit images to preprocess, or float samples used as they are."""
    images, labels = _read_npz(Path(spec.target))
    if images.dtype.kind == "f" or (images.dtype.kind in "iu" and images.ndim == 2):
        return ArraySource(spec.text, images, labels, spec.target)
    return ArraySource(
        spec.text, _channels_last(_to_uint8(images, spec.target), spec.target), labels, spec.target
    )


def _read_npz(path: Path) -> tuple[NDArray[Any], NDArray[Any] | DataError]:
    hint = "save plain arrays with numpy.savez"
    try:
        with open_regular(path, DataError) as stream:
            if not zipfile.is_zipfile(stream):
                raise DataError("is not an .npz archive", where=str(path), hint=hint)
            stream.seek(0)
            stored = np.load(stream, allow_pickle=False)
            images = _member(stored, _IMAGE_KEYS, path)
            try:
                return images, _member(stored, _LABEL_KEYS, path)
            except DataError as error:  # of no concern where labels are not read
                return images, error
    except OSError as error:
        raise DataError(error.strerror or "cannot be read", where=str(path)) from None
    except MemoryError:
        raise EnvironmentFailure("needs more memory than there is", where=str(path)) from None
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        reason = "holds Python objects" if "pickle" in str(error).lower() else "is a damaged .npz archive"
        raise DataError(reason, where=str(path), hint=hint) from None


def _member(stored: Any, keys: tuple[str, ...], path: Path) -> NDArray[Any]:
    present = [key for key in keys if key in stored.files]
    if len(present) == 1:
        array: NDArray[Any] = stored[present[0]]
        return array
    problem = (
        f"holds more than one of {', '.join(present)}"
        if present
        else f"holds no array called {' or '.join(keys)}"
    )
    raise DataError(problem, where=str(path), hint="save one array x (images) and one array y (labels)")


def _to_uint8(images: NDArray[Any], where: str) -> NDArray[np.uint8]:
    if images.dtype.kind not in "iub":
        raise DataError(f"images are {images.dtype}", where=where, hint="save uint8 images or float inputs")
    if images.dtype != np.uint8 and images.size and (images.min() < 0 or images.max() > 255):
        raise DataError(
            "integer images go beyond 0..255", where=where, hint="save uint8 images or float inputs"
        )
    return images.astype(np.uint8, copy=False)


def _channels_last(images: NDArray[np.uint8], where: str) -> NDArray[np.uint8]:
    if images.ndim == 3:
        return images
    last, first = (
        images.ndim == 4 and images.shape[3] in (1, 3),
        images.ndim == 4 and images.shape[1] in (1, 3),
    )
    if last == first:
        shape = "x".join(map(str, images.shape))
        why = "could be NHWC or NCHW" if last else "is not NxHxW, NxHxWxC or NxCxHxW with 1 or 3 channels"
        raise DataError(f"an image array of shape {shape} {why}", where=where)
    return images if last else images.transpose(0, 2, 3, 1)
