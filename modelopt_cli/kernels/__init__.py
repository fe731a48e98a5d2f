"""int8 execution: the only package that names a torch int8 operator."""

from modelopt_cli.kernels.dispatch import BACKENDS, prepare, require_device
from modelopt_cli.kernels.saturation import never_saturates

__all__ = ["BACKENDS", "never_saturates", "prepare", "require_device"]
