"""The codec ``packed``: cases for the contract of codecs; ``test_codec_codebook`` has its refusals."""

from test_codec_affine import CASES as AFFINE
from test_codec_codebook import CASES as CODEBOOK
from test_codec_narrow import CASES as NARROW

from modelopt_cli.artifact.codecs import WRAPPERS


def offered(make):
    tensor, encoding = make()
    return tensor, WRAPPERS["packed"].offer(tensor, encoding)


CASES = {name: lambda make=make: offered(make) for name, make in (AFFINE | CODEBOOK | NARROW).items()}
