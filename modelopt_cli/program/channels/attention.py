"""Attention modules written out, so that their projections are layers with channels."""

from modelopt_cli.program.attention import split_attention
from modelopt_cli.program.program import Program
from modelopt_cli.program.windows import split_windows


def prepare(program: Program) -> Program:
    """The Program with its attention taken apart into linear layers; itself if there is none.

    ``analyse`` and ``remove`` do this, too: call it first where parameter names have to be those that
    groups refer to. Doing it twice changes nothing more.
    """
    return split_windows(split_attention(program))
