"""Codecs: how a parameter is stored. One file each, one row each in the table."""

from modelopt_cli.artifact.codecs.affine import Affine
from modelopt_cli.artifact.codecs.base import Codec, PartSpec
from modelopt_cli.artifact.codecs.codebook import Codebook
from modelopt_cli.artifact.codecs.entropy import Entropy
from modelopt_cli.artifact.codecs.packed import Packed
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

__all__ = ["CODECS", "Codec", "PartSpec"]
