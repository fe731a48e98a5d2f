"""How parameters are written beyond what methods ask for: plainly, packed, or down to their entropy.

Coding changes no value and promises nothing: it is chosen anew each time a file is written, and undone when
it is read. Methods never see it.
"""

from typing import Literal

from torch import Tensor

from modelopt_cli.artifact.codecs import CODECS, packed
from modelopt_cli.artifact.codecs.entropy import entropy_encoding
from modelopt_cli.errors import UsageError
from modelopt_cli.program.program import Encoding

Code = Literal["plain", "packed", "entropy"]
CODINGS: dict[Code, str] = {
    "plain": "bytes, as any safetensors reader sees them",
    "packed": "integers in just as many bits as they need",
    "entropy": "integers in as many bits as they are surprising, the header compressed",
}


def require_code(code: str) -> None:
    """Raise UsageError unless there is such a coding."""
    if code not in CODINGS:
        raise UsageError(f"unknown code {code!r}", hint=f"one of {', '.join(CODINGS)}")


def stored_encoding(tensor: Tensor, encoding: Encoding, code: Code) -> Encoding:
    """How a parameter is really stored: the smallest of what a coding offers.

    Args:
        tensor: the parameter, on the CPU.
        encoding: as a method asks for it.
        code: a key of ``CODINGS``.
    """
    if code == "plain":
        return encoding
    offers = [encoding]
    if encoding.codec in packed.CODECS:
        inner = {"codec": encoding.codec, "params": dict(encoding.params)}
        offers.append(Encoding("packed", inner, dict(encoding.parts)))
    if code == "entropy" and (coded := entropy_encoding(tensor, encoding)) is not None:
        offers.append(coded)
    return min(offers, key=lambda offer: _size(tensor, offer))


def base_encoding(encoding: Encoding) -> Encoding:
    """What a method asked for when a parameter was stored so."""
    if encoding.codec not in ("packed", "entropy"):
        return encoding
    codec = CODECS[encoding.codec]
    parts = {name: part for name, part in encoding.parts.items() if name not in codec.payload}
    return Encoding(encoding.params["codec"], dict(encoding.params["params"]), parts)


def _size(tensor: Tensor, encoding: Encoding) -> int:
    codec, given = CODECS[encoding.codec], tuple(encoding.parts)
    shape = tuple(tensor.shape)
    return codec.predicted_bytes(shape, tensor.dtype, encoding.params, given)
