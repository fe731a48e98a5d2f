"""File codings: how tightly a file is written beyond what methods ask for. Imports no torch.

Coding changes no value and promises nothing: it is chosen again each time a file is written, and undone when
it is read. Methods never see it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelopt_cli.errors import ModeloptError, UsageError
from modelopt_cli.settings import not_one_of, option

if TYPE_CHECKING:
    from torch import Tensor

    from modelopt_cli.program.program import Encoding

Code = str
"""A key of ``CODINGS``."""
PLAIN_CODE: Code = "plain"
"""The coding that any safetensors reader reads; where nothing says another, files are written so."""


@dataclass(frozen=True)
class Coding:
    """One way to write a file.

    Attributes:
        name: in ``--code``.
        help: one line.
        wrappers: codecs tried around the one that a parameter's method asked for; the smallest wins.
        compressed_header: the header is compressed, too.
    """

    name: str
    help: str
    wrappers: tuple[str, ...] = ()
    compressed_header: bool = False


_ROWS = (
    Coding(PLAIN_CODE, "bytes, as any safetensors reader sees them"),
    Coding("packed", "integers in just as many bits as they need", wrappers=("packed",)),
    Coding(
        "entropy",
        "integers in as many bits as they are surprising, the header compressed",
        wrappers=("packed", "entropy"),
        compressed_header=True,
    ),
)
CODINGS = {row.name: row for row in _ROWS}
"""By name, from the largest files to the smallest."""


def require_code(code: str) -> None:
    """Raise UsageError unless there is such a coding."""
    if code not in CODINGS:
        raise UsageError(not_one_of(code, CODINGS), where=option("code"))


def stored_encoding(tensor: "Tensor", encoding: "Encoding", code: Code) -> "Encoding":
    """The smallest encoding of a parameter that a coding offers.

    Args:
        tensor: the parameter, on the CPU.
        encoding: as a method asks for it.
        code: a key of ``CODINGS``.

    Raises:
        ModeloptError: there is no such codec.
    """
    from modelopt_cli.artifact.codecs import CODECS, WRAPPERS

    def size(offer: "Encoding") -> int:
        shape = tuple(tensor.shape)
        return CODECS[offer.codec].predicted_bytes(shape, tensor.dtype, offer.params, tuple(offer.parts))

    if encoding.codec not in CODECS:
        raise ModeloptError(f"unknown codec {encoding.codec!r}")
    encoding = CODECS[encoding.codec].as_changed(tensor, encoding)
    wrapped = [WRAPPERS[name].offer(tensor, encoding) for name in CODINGS[code].wrappers]
    offers = [encoding, *(offer for offer in wrapped if offer is not None)]
    return min(offers, key=size) if len(offers) > 1 else encoding


def base_encoding(encoding: "Encoding") -> "Encoding":
    """The encoding that a method asked for when a parameter was stored so."""
    from modelopt_cli.artifact.codecs import CODECS, WRAPPERS
    from modelopt_cli.program.program import Encoding

    if encoding.codec not in WRAPPERS:
        return encoding
    codec = CODECS[encoding.codec]
    parts = {name: part for name, part in encoding.parts.items() if name not in codec.payload}
    return Encoding(encoding.params["codec"], dict(encoding.params["params"]), parts)
