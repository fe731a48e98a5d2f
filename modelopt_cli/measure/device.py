"""Moving of models to the device on which they are measured."""

from modelopt_cli.errors import EnvironmentFailure
from modelopt_cli.kernels import prepare
from modelopt_cli.measure import accuracy
from modelopt_cli.measure.evaluated_model import EvaluatedModel
from modelopt_cli.program.program import Program
from modelopt_cli.program.quantized import Quantized
from modelopt_cli.settings import option


def to_device(evaluated: EvaluatedModel, device: str) -> None:
    """Put a model into evaluation mode and onto a device; build a kernel for each int8 layer without one.

    Args:
        evaluated: its model is changed.
        device: ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        EnvironmentFailure: the device cannot be used, or its memory does not suffice.
    """
    if evaluated.model is None:
        return
    evaluated.model.eval()
    try:
        if evaluated.program is not None and _lacks_kernels(evaluated.program, device):
            prepare(evaluated.program, device)
        elif device != "cpu":
            evaluated.model.to(device)
    except (RuntimeError, AssertionError) as error:
        if accuracy.is_out_of_memory(error):
            raise EnvironmentFailure("does not fit into the device's memory", where=evaluated.path) from error
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise EnvironmentFailure(f"cannot use {device}: {first}", where=option("device")) from error


def _lacks_kernels(program: Program, device: str) -> bool:
    layers = [module for module in program.modules() if isinstance(module, Quantized)]
    moves = any(tensor.device.type != device.partition(":")[0] for tensor in program.buffers())
    return bool(layers) and (moves or all(layer.kernel is None for layer in layers))
