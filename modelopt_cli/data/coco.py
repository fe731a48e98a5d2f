"""``coco:FILE@DIR``: images with boxes, as COCO's JSON describes them.

T. Lin et al., Microsoft COCO: Common Objects in Context, ECCV 2014; the format is that of
https://cocodataset.org/#format-data. Of annotations, ``bbox`` (left, top, width, height), ``category_id`` and
``iscrowd`` are read; masks and keypoints are not.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import torch

from modelopt_cli.data.data_spec import DataSpec, choice, sides
from modelopt_cli.data.decode import decode
from modelopt_cli.data.source import Raw, Source
from modelopt_cli.data.targets import RawTarget
from modelopt_cli.errors import DataError
from modelopt_cli.regular import read_regular
from modelopt_cli.text import short

ROUNDING = 1.0
"""Pixels that a box may reach over its image."""

_LARGEST = 1e9
_LARGEST_ID = 2**63 - 1

Entry = Mapping[str, Any]

_BY_NAME = "names"
_AS_THEY_ARE = "ids"
_IN_ORDER = "order"


@dataclass
class _Picture:
    """An image, and the boxes in it.

    Attributes:
        path: of its file.
        size: width and height, or None where the file does not say.
    """

    path: str
    size: tuple[float, float] | None
    boxes: list[tuple[float, ...]] = field(default_factory=list)
    categories: list[int] = field(default_factory=list)
    crowds: list[bool] = field(default_factory=list)


class CocoSource(Source):
    """Image files with boxes.

    Args:
        name: the spec.
        pictures: with their boxes.
        numbers: the label of each category, or None where its name decides.
        names: of the categories that go along for a network that has names for its classes.
        unusable: why there are no boxes, or None.
    """

    task = "detect"

    def __init__(
        self,
        name: str,
        pictures: list[_Picture],
        numbers: Mapping[int, int] | None,
        names: Mapping[int, str] | None,
        unusable: DataError | None,
    ) -> None:
        self.name, self.pictures, self.unusable = name, pictures, unusable
        self._numbers, self._names = numbers, names

    def __len__(self) -> int:
        return len(self.pictures)

    def where(self, index: int) -> str:
        """The image's path."""
        return self.pictures[index].path

    def load(self, index: int) -> tuple[Raw, RawTarget]:
        """The decoded image, and its boxes in pixels of it."""
        picture = self.pictures[index]
        image = decode(picture.path)
        if self.unusable is not None:
            return image, self.unusable
        if picture.size is not None and image.size != picture.size:
            sizes = ("{1:g}x{0:g}".format(*size) for size in (image.size, picture.size))
            return image, DataError("is {}, and {} in the table of images".format(*sizes))
        sides = torch.tensor(picture.boxes).reshape(-1, 4)
        target: dict[str, Any] = {
            "boxes": torch.cat([sides[:, :2], sides[:, :2] + sides[:, 2:]], 1),
            "iscrowd": torch.tensor(picture.crowds, dtype=torch.bool),
        }
        if self._numbers is not None:
            labels = [self._numbers[each] for each in picture.categories]
            target["labels"] = torch.tensor(labels, dtype=torch.int64)
        if self._names is not None:
            target["names"] = [self._names[each] for each in picture.categories]
        return image, target


def open_coco(spec: DataSpec) -> Source:
    """Open ``coco:FILE@DIR``: the annotations, and the folder that their file names start at.

    Raises:
        DataError: the file is no such JSON, or an image is missing. What is wrong with boxes is raised where
            they are read.
    """
    file, folder = sides(spec)
    numbering = choice(spec, "labels", ("", _BY_NAME, _AS_THEY_ARE, _IN_ORDER))
    content = _read(Path(file))
    pictures = _pictures(content, file, folder)
    unusable, names = None, {}
    try:
        names = _categories(content, file)
        _add_boxes(pictures, content, file, names)
    except DataError as error:  # of no concern where labels are not read
        unusable = error
    numbers = {each: place for place, each in enumerate(sorted(names))} if numbering == _IN_ORDER else {}
    return CocoSource(
        spec.text,
        list(pictures.values()),
        None if numbering == _BY_NAME else numbers or {each: each for each in names},
        names if numbering in ("", _BY_NAME) else None,
        unusable,
    )


def _read(file: Path) -> Entry:
    hint = "give COCO's JSON of images, annotations and categories"
    try:
        content = json.loads(read_regular(file, DataError))
    except OSError as error:
        raise DataError(error.strerror or "cannot be read", where=str(file)) from None
    except (ValueError, RecursionError):
        raise DataError("is not JSON", where=str(file), hint=hint) from None
    if not isinstance(content, dict):
        raise DataError("is no JSON object", where=str(file), hint=hint)
    return content


def _entries(content: Entry, key: str, file: str) -> list[Entry]:
    entries = content.get(key)
    if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
        raise DataError(f"has no list of {key}", where=file, hint="give COCO's JSON of object detection")
    return entries


def _pictures(content: Entry, file: str, folder: str) -> dict[int, _Picture]:
    """The images by their ids, in the order of the file."""
    pictures: dict[int, _Picture] = {}
    for number, entry in enumerate(_entries(content, "images", file)):
        where = f"{file}: image {number}"
        place, name = _new_id(entry, pictures, where), entry.get("file_name")
        if not isinstance(name, str) or not name:
            raise DataError("has no file_name", where=where)
        path = os.path.join(folder, name)
        if not _is_inside(folder, name):
            hint = f"give as DIR a folder that holds all images: coco:{file}@DIR"
            raise DataError(f"file_name {short(name)} leads outside {folder}", where=where, hint=hint)
        if not os.path.isfile(path):
            where = os.path.join(folder, short(name))
            raise DataError("no such file", where=where, hint=f"it is image {place} of {file}")
        pictures[place] = _Picture(path, _size(entry, where))
    if not pictures:
        raise DataError("holds no images", where=file)
    return pictures


def _is_inside(folder: str, name: str) -> bool:
    """True of the name of a file in a folder; links in it may lead anywhere, for its owner made them."""
    stays = ".." not in name.split("/")
    if stays and (not os.path.isabs(name) or Path(name).is_relative_to(os.path.abspath(folder))):
        return True
    return Path(os.path.realpath(os.path.join(folder, name))).is_relative_to(os.path.realpath(folder))


def _size(entry: Entry, where: str) -> tuple[float, float] | None:
    """Width and height of an image; None where one is left out."""
    sides = []
    for name in ("width", "height"):
        side = entry.get(name)
        if side is not None and not _is_number(side):
            problem = f"{name} is {short(repr(side))}, not a number"
            raise DataError(problem, where=where, hint="write the pixels, or leave it out")
        sides.append(side)
    width, height = sides
    return None if width is None or height is None else (width, height)


def _categories(content: Entry, file: str) -> dict[int, str]:
    """The names of the categories by their ids."""
    names: dict[int, str] = {}
    for number, entry in enumerate(_entries(content, "categories", file)):
        where = f"{file}: category {number}"
        place, name = _new_id(entry, names, where), entry.get("name")
        if not isinstance(name, str):
            raise DataError("has no name", where=where)
        names[place] = name
    return names


def _add_boxes(pictures: Mapping[int, _Picture], content: Entry, file: str, names: Mapping[int, str]) -> None:
    """Give each image its boxes."""
    for number, entry in enumerate(_entries(content, "annotations", file)):
        where = f"{file}: annotation {entry.get('id', number)}"
        picture = pictures[_known_id(entry, "image", pictures, where)]
        category = _known_id(entry, "category", names, where)
        picture.boxes.append(_box(entry.get("bbox"), picture, where))
        picture.categories.append(category)
        picture.crowds.append(_is_crowd(entry, where))


def _is_crowd(entry: Entry, where: str) -> bool:
    crowd = entry.get("iscrowd")
    if crowd not in (None, 0, 1):
        raise DataError(f"has iscrowd {short(repr(crowd))}", where=where, hint="give 0 or 1")
    return bool(crowd)


def _box(box: Any, picture: _Picture, where: str) -> tuple[float, ...]:
    """Left, top, width and height."""
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise DataError(
            "has no bbox of four finite numbers", where=where, hint="give left, top, width, height"
        )
    left, top, width, height = box
    text = ", ".join(f"{side:g}" for side in box)
    if width <= 0 or height <= 0:
        raise DataError(f"bbox {text} has no width or no height", where=where, hint="correct or remove it")
    reached = picture.size or (math.inf, math.inf)
    over = max(-left, -top, left + width - reached[0], top + height - reached[1])
    if over > ROUNDING:
        size = "{1:g}x{0:g}".format(*picture.size) if picture.size else "which begins at 0"
        hint = "correct or remove it"
        raise DataError(f"bbox {text} reaches outside image {picture.path}, {size}", where=where, hint=hint)
    return left, top, width, height


def _new_id(entry: Entry, known: Mapping[int, Any], where: str) -> int:
    """The entry's own id."""
    own = entry.get("id")
    if not _is_whole(own) or own < 0:
        raise DataError("has no id, an integer from 0", where=where)
    if own > _LARGEST_ID:
        raise DataError(f"has the id {short(own)}, above {_LARGEST_ID}", where=where, hint="number it anew")
    if own in known:
        raise DataError(f"has the id {own}, which another has", where=where)
    return own


def _known_id(entry: Entry, kind: str, known: Mapping[int, Any], where: str) -> int:
    """The id of the image or category that an annotation is of."""
    number = entry.get(f"{kind}_id")
    if not _is_whole(number) or number not in known:
        raise DataError(f"is of {kind} {short(repr(number))}, which is not in the file", where=where)
    return number


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> TypeGuard[float]:
    return (_is_whole(value) or isinstance(value, float)) and -_LARGEST < value < _LARGEST
