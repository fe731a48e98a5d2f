"""Dynamic int8: linear layers whose inputs are rounded at every call, by their own range."""

import copy

from torch import nn

from modelopt_cli.methods.context import Context, MethodResult
from modelopt_cli.methods.quantize.candidates import select_candidates, shared_weights
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.conversion import fill
from modelopt_cli.program import Program
from modelopt_cli.program.layered import layered
from modelopt_cli.program.quantized import DynamicLinear


def quantize_dynamic(program: Program, config: QuantizeConfig, context: Context) -> MethodResult:
    """Replace the linear layers of a Program by dynamic int8 ones.

    Raises:
        UsageError: a glob matches no layer.
        NothingCompressed: not one layer could be quantized.
    """
    ready = copy.deepcopy(layered(program))
    selected, skipped = select_candidates(ready, config, _obstacle)
    shared = shared_weights(program, ready)
    for name in selected:
        linear = ready.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        layer = DynamicLinear(linear.in_features, linear.out_features, linear.bias is not None)
        fill(layer, linear, shared=f"{name}.weight" in shared)
        ready.set_submodule(name, layer)
    return MethodResult(ready.eval(), skipped)


def _obstacle(module: nn.Module) -> str | None:
    if isinstance(module, nn.Linear):
        return None
    return f"dynamic int8 serves Linear, not {type(module).__name__}"
