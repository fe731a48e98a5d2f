"""Images in tar shards, as WebDataset lays them out: ``0001.jpg`` and ``0001.cls`` are one sample.

The headers are read once. Of a sample 18 bytes are kept: where its image lies, how long it is, and its label.
Nothing is ever extracted.
"""

import io
import json
from array import array
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelopt_cli.data.data_spec import DataSpec
from modelopt_cli.data.decode import decode
from modelopt_cli.data.images import LABEL_DIGITS, SUFFIXES
from modelopt_cli.data.shards import Shards, find_shards
from modelopt_cli.data.source import Raw, Source
from modelopt_cli.data.tar_headers import BLOCK, TarMember, members, name_at
from modelopt_cli.data.targets import RawTarget
from modelopt_cli.errors import DataError
from modelopt_cli.text import short

_LARGEST_IMAGE = 2**31 - 1
_LARGEST_JSON = 2**20
_LARGEST_CLS = 64
_ADJACENT = "pack the files of a sample one after the other"


class TarSource(Source):
    """Images in tar files, decoded one at a time; any of them, in any order."""

    def __init__(self, name: str, paths: Sequence[str]) -> None:
        self.name = name
        self.shards = Shards(paths)
        index = _Index(self.shards)
        self.ends, self.offsets, self.sizes, self.labels, self.leads = index.arrays()
        self.unusable = index.unusable
        if len(self.labels) == 0:
            suffixes = ", ".join(SUFFIXES)
            raise DataError(f"holds no samples ({suffixes} next to .cls or .json)", where=name)
        self.num_classes = None if self.unusable else int(self.labels.max()) + 1

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, index: int) -> str:
        """The shard and the member, whose name is read again."""
        shard = self._shard(index)
        path = self.shards.paths[shard]
        start = int(self.offsets[index]) - BLOCK * int(self.leads[index])
        return f"{path}: {short(name_at(partial(self.shards.read, shard), start, path))}"

    def load(self, index: int) -> tuple[Raw, RawTarget]:
        """The decoded image. EXIF orientation is ignored, as in a folder."""
        size = int(self.sizes[index])
        data = self.shards.read(self._shard(index), int(self.offsets[index]), size)
        if len(data) < size:
            raise DataError("is shorter than when it was opened", where=self.shards.paths[self._shard(index)])
        return decode(io.BytesIO(data)), self.unusable or int(self.labels[index])

    def _shard(self, index: int) -> int:
        return int(np.searchsorted(self.ends, index, side="right"))


class _Index:
    """The samples of all shards, in order.

    Attributes:
        unusable: why the first label that cannot be used cannot be, or None.
    """

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        self.ends = array("q")
        self.offsets = array("q")
        self.sizes = array("i")
        self.labels = array("i")
        self.leads = array("H")
        self.unusable: DataError | None = None
        for shard in range(len(shards.paths)):
            self._add_shard(shard)
            self.ends.append(len(self.labels))

    def arrays(self) -> tuple[NDArray[Any], ...]:
        """Ends of the shards' samples; then of each sample its offset, size, label, and header blocks."""
        columns = (self.ends, self.offsets, self.sizes, self.labels, self.leads)
        return tuple(np.frombuffer(column, dtype=column.typecode) for column in columns)

    def _add_shard(self, shard: int) -> None:
        path = self.shards.paths[shard]
        current, parts = "", dict[str, TarMember]()
        for member in members(partial(self.shards.read, shard), self.shards.size(shard), path):
            key, part = _split(member.name)
            if key != current:
                self._add_sample(shard, parts)
                current, parts = key, {}
            if part in parts:
                message = "is a second image" if part == "image" else f"is a second .{part}"
                raise DataError(f"{message} of its sample", where=_name(path, member), hint=_ADJACENT)
            if part:
                parts[part] = member
        self._add_sample(shard, parts)

    def _add_sample(self, shard: int, parts: dict[str, TarMember]) -> None:
        if not parts:
            return
        path = self.shards.paths[shard]
        image, label = parts.get("image"), parts.get("cls") or parts.get("json")
        if image is None:
            raise self.unusable or DataError(
                "has no image", where=_name(path, next(iter(parts.values()))), hint=_ADJACENT
            )
        if image.size > _LARGEST_IMAGE:
            raise DataError("is larger than an image can be", where=_name(path, image))
        try:
            if label is None:
                raise DataError("has no label in a .cls or .json", where=_name(path, image), hint=_ADJACENT)
            self.labels.append(self._label(shard, label, "cls" in parts))
        except DataError as error:  # of no concern where labels are not read
            self.unusable = self.unusable or error
            self.labels.append(-1)
        self.offsets.append(image.offset)
        self.sizes.append(image.size)
        self.leads.append((image.offset - image.start) // BLOCK)

    def _label(self, shard: int, member: TarMember, plain: bool) -> int:
        where = _name(self.shards.paths[shard], member)
        if member.size > (_LARGEST_CLS if plain else _LARGEST_JSON):
            raise DataError("is larger than a label can be", where=where)
        content = self.shards.read(shard, member.offset, member.size)
        if plain:
            value: object = content.strip().decode("utf-8", "replace")
            return _whole(int(content) if content.strip().isdigit() else value, where)
        try:
            value = json.loads(content)
        except (ValueError, RecursionError):
            raise DataError("is not JSON", where=where) from None
        if not isinstance(value, dict) or "label" not in value:
            raise DataError("has no key label", where=where, hint='write {"label": 3}, or a .cls')
        return _whole(value["label"], where)


def open_tar(spec: DataSpec) -> Source:
    """``tar:PATTERN``: shards in sorted order, their samples as they lie there."""
    return TarSource(spec.text, find_shards(spec.target))


def _split(name: str) -> tuple[str, str]:
    """Split a name into the sample's key, and ``image``, ``cls``, ``json``, or nothing for other files.

    A hidden file belongs to no sample; its key is empty.
    """
    folder, slash, last = name.rpartition("/")
    base, _, suffix = last.partition(".")
    if not base:
        return "", ""
    suffix = suffix.lower()
    part = "image" if f".{suffix}" in SUFFIXES else suffix if suffix in ("cls", "json") else ""
    return f"{folder}{slash}{base}", part


def _whole(value: object, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 10**LABEL_DIGITS:
        raise DataError(f"label {short(repr(value))} is not an integer from 0", where=where)
    return value


def _name(path: str, member: TarMember) -> str:
    return f"{path}: {short(member.name)}"
