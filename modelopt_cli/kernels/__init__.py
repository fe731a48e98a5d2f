"""int8 execution: the only package that names a torch int8 operator."""

from modelopt_cli.kernels.bounds import never_saturates
from modelopt_cli.kernels.select import Backend, prepare, require_device

__all__ = ["Backend", "never_saturates", "prepare", "require_device"]
