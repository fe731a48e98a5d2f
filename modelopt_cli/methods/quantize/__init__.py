"""quantize: int8 weights and activations, dynamic int8, and int8 storage."""

from modelopt_cli.methods.quantize.apply import apply
from modelopt_cli.methods.quantize.config import QuantizeConfig

__all__ = ["QuantizeConfig", "apply"]
