"""The headers of a plain tar file, one member after the other, without its data.

Shards come from anywhere, so every size is checked before it is used. The header blocks are ``tarfile``'s to
understand; GNU and PAX extensions are read here, for ``tarfile`` reads them whatever their size and depth.
"""

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from modelopt_cli.errors import DataError
from modelopt_cli.text import short

BLOCK = tarfile.BLOCKSIZE

_LONGEST_EXTENSION = 2**20
_AT_ONCE = 2**20
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_EXTENSIONS = (*_PAX, *_LONG, tarfile.XGLTYPE)
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_AGAIN = "fetch it again"

Read = Callable[[int, int], bytes]


@dataclass(frozen=True)
class TarMember:
    """File in a tar file.

    Attributes:
        name: as it is stored.
        start: of its first header, in bytes.
        offset: of its data, in bytes.
        size: of its data, in bytes.
    """

    name: str
    start: int
    offset: int
    size: int


def members(read: Read, length: int, where: str) -> Iterator[TarMember]:
    """The files in order; folders are left out.

    Args:
        read: gives the bytes at an offset, so many; fewer where the file ends.
        length: of the tar file, in bytes.
        where: its path, for errors.

    Raises:
        DataError: compressed, not tar, damaged, truncated, with data after its end mark, or with a member
            that is a link, a device or a sparse file.
    """
    start = 0
    while read(start, BLOCK) != bytes(BLOCK):
        kind, member = _member(read, start, where)
        if kind == tarfile.DIRTYPE:
            start = member.offset
            continue
        name = f"{where}: {short(member.name)}"
        if kind not in _FILES:
            kind_of_file = (
                "a sparse file" if kind == tarfile.GNUTYPE_SPARSE else "a link, a device or the like"
            )
            raise DataError(f"is {kind_of_file}", where=name, hint="pack plain files only")
        if member.size > length - member.offset:
            raise DataError("goes on after the end of the file", where=name, hint=_AGAIN)
        yield member
        start = member.offset + _padded(member.size)
    _expect_nothing(read, start, length, where)


def name_at(read: Read, start: int, where: str) -> str:
    """The name of the member whose first header is there.

    Raises:
        DataError: there is none.
    """
    return _member(read, start, where)[1].name


def _member(read: Read, start: int, where: str) -> tuple[bytes, TarMember]:
    """Type of a member and the member, from its first header on."""
    offset, name, size = start, None, None
    while (info := _header(read, offset, where)).type in _EXTENSIONS:
        if offset + info.size - start > _LONGEST_EXTENSION:
            raise _damaged(offset, where)
        content = read(offset + BLOCK, info.size)
        if info.type == tarfile.GNUTYPE_LONGNAME:
            name = content.partition(b"\0")[0]
        elif info.type in _PAX:
            records = _records(content, offset, where)
            if any(key.startswith(b"GNU.sparse") for key in records):
                raise DataError("holds a sparse file", where=where, hint="pack plain files only")
            name = records.get(b"path", name)
            size = _size(records[b"size"], offset, where) if b"size" in records else size
        offset += BLOCK + _padded(info.size)
    text = info.name if name is None else name.decode("utf-8", "surrogateescape")
    return info.type, TarMember(text, start, offset + BLOCK, info.size if size is None else size)


def _header(read: Read, offset: int, where: str) -> tarfile.TarInfo:
    block = read(offset, BLOCK)
    if offset == 0:
        _check_magic(block, where)
    if len(block) < BLOCK:
        raise DataError("is truncated: it has no end mark", where=where, hint=_AGAIN)
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        if offset == 0:
            raise DataError("is not a tar file", where=where, hint="give plain tar shards") from None
        raise _damaged(offset, where) from None
    if info.size < 0:
        raise _damaged(offset, where)
    return info


def _check_magic(block: bytes, where: str) -> None:
    for magic, name in _COMPRESSED.items():
        if block.startswith(magic):
            raise DataError(
                f"is compressed with {name}", where=where, hint="decompress it: samples are read at any place"
            )
    if len(block) < BLOCK:
        raise DataError("is not a tar file", where=where, hint="give plain tar shards")


def _records(content: bytes, offset: int, where: str) -> dict[bytes, bytes]:
    """The records of a PAX header, each ``length key=value`` and a line feed."""
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(content) and content[at]:
        digits = content[at : at + 8].partition(b" ")[0]
        end = at + int(digits) if digits.isdigit() else at
        key, equals, value = content[at + len(digits) + 1 : end].partition(b"=")
        if end > len(content) or not equals or not value.endswith(b"\n"):
            raise _damaged(offset, where)
        records[key] = value[:-1]
        at = end
    return records


def _size(value: bytes, offset: int, where: str) -> int:
    if not value.isdigit() or len(value) > 18:
        raise _damaged(offset, where)
    return int(value)


def _expect_nothing(read: Read, start: int, length: int, where: str) -> None:
    """After the end mark only zeros: another tar file behind it would go unread."""
    for offset in range(start, length, _AT_ONCE):
        if read(offset, _AT_ONCE).strip(b"\0"):
            raise DataError("holds data after its end mark", where=where, hint="do not join tar files")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _damaged(offset: int, where: str) -> DataError:
    return DataError(f"has a damaged header at byte {offset}", where=where, hint=_AGAIN)
