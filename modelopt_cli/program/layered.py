"""The form of a Program in which all that computes with weights is a layer."""

from modelopt_cli.program.attention import split_attention
from modelopt_cli.program.attention_functions import split_attention_functions
from modelopt_cli.program.constant_layers import constant_layers
from modelopt_cli.program.fold import inference_form
from modelopt_cli.program.program import Program
from modelopt_cli.program.windows import split_windows


def layered(program: Program) -> Program:
    """The Program in inference form, its attention taken apart and products with constants as layers."""
    ready = constant_layers(split_attention_functions(inference_form(program)))
    return split_windows(split_attention(ready))
