"""Codecs: how a parameter is stored. One file each, one row each in the table."""

from modelopt_cli.artifact.codecs.affine import Affine
from modelopt_cli.artifact.codecs.base import Codec, PartSpec
from modelopt_cli.artifact.codecs.codebook import Codebook
from modelopt_cli.artifact.codecs.entropy import Entropy, entropy_encoding
from modelopt_cli.artifact.codecs.packed import Packed, packed_encoding
from modelopt_cli.artifact.codecs.raw import Raw
from modelopt_cli.artifact.codecs.sparse import Sparse

CODECS: dict[str, Codec] = {
    "affine": Affine(),
    "codebook": Codebook(),
    "entropy": Entropy(),
    "packed": Packed(),
    "raw": Raw(),
    "sparse": Sparse(),
}
"""Every codec, by the name used in ``Encoding.codec`` and in files."""

WRAPPERS = {"entropy": entropy_encoding, "packed": packed_encoding}
"""Those that store the integers of another codec: each offers an encoding around that of a tensor."""

__all__ = ["CODECS", "WRAPPERS", "Codec", "PartSpec"]
