"""Codecs: how a parameter is stored. One file each, one row each in the table."""

from modelopt_cli.artifact.codecs.affine import Affine
from modelopt_cli.artifact.codecs.base import Codec, PartSpec
from modelopt_cli.artifact.codecs.cast import Cast
from modelopt_cli.artifact.codecs.codebook import Codebook
from modelopt_cli.artifact.codecs.entropy import Entropy
from modelopt_cli.artifact.codecs.narrow import NARROW
from modelopt_cli.artifact.codecs.packed import Packed
from modelopt_cli.artifact.codecs.raw import PLAIN, Raw
from modelopt_cli.artifact.codecs.sparse import SPARSE
from modelopt_cli.artifact.codecs.wrapper import Wrapper

_AFFINE, _CODEBOOK, _RAW = Affine(), Codebook(), Raw()
_WRAPPERS = (Packed((_AFFINE, _CODEBOOK, NARROW)), Entropy((_AFFINE, _CODEBOOK, NARROW, _RAW, SPARSE)))
WRAPPERS: dict[str, Wrapper] = {codec.name: codec for codec in _WRAPPERS}
"""Codecs that store the integers of others, by name."""
_ROWS = (_AFFINE, Cast(), _CODEBOOK, NARROW, _RAW, SPARSE, *_WRAPPERS)
_ROWS = (_AFFINE, Cast(), _CODEBOOK, NARROW, _RAW, SPARSE, *_WRAPPERS)
CODECS: dict[str, Codec] = {codec.name: codec for codec in _ROWS}
"""Every codec, by name."""

__all__ = ["CODECS", "PLAIN", "WRAPPERS", "Codec", "PartSpec"]
