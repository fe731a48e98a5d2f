"""Dynamic int8: embeddings, and linear layers whose inputs are rounded at every call, by their own range."""

import copy

from torch import nn

from modelopt_cli.methods.context import Context, MethodResult
from modelopt_cli.methods.quantize.candidates import select_candidates, shared_weights
from modelopt_cli.methods.quantize.config import QuantizeConfig
from modelopt_cli.methods.quantize.conversion import fill, fill_recurrent
from modelopt_cli.methods.quantize.layer_forms import LAYER_FORMS
from modelopt_cli.methods.quantize.layer_widths import edge_layers, layer_widths, widths_note
from modelopt_cli.methods.quantize.rounding import require_nonzero
from modelopt_cli.methods.quantize.widths import Widths
from modelopt_cli.program import Program
from modelopt_cli.program.channels import layered
from modelopt_cli.program.fold import inference_form
from modelopt_cli.program.quantized import Quantized, Weighted
from modelopt_cli.program.quantized_linear import DynamicLinear
from modelopt_cli.program.quantized_recurrent import QuantizedRecurrent


def quantize_dynamic(program: Program, config: QuantizeConfig, context: Context) -> MethodResult:
    """Replace the linear layers of a Program by dynamic int8 ones, and its embeddings by int8 ones.

    Raises:
        UsageError: a glob matches no layer.
        NothingCompressed: not one layer could be quantized.
    """
    floats = layered(inference_form(program))
    ready = copy.deepcopy(floats)
    selected, skipped = select_candidates(ready, config, _obstacle)
    shared = shared_weights(program, ready)
    widths = layer_widths(selected, edge_layers(ready), config)
    for name in selected:
        module = ready.get_submodule(name)
        layer, multiplies = _integer_form(module, widths[name])
        if isinstance(layer, QuantizedRecurrent):
            fill_recurrent(layer, module, {own for own in shared if own.rpartition(".")[0] == name})
        else:
            assert isinstance(layer, Weighted)
            fill(layer, module, shared=f"{name}.weight" in shared, bounded=multiplies)
            require_nonzero(f"{name}.weight", module.get_parameter("weight"), layer.weight)
        ready.set_submodule(name, layer)
    notes = widths_note(widths, config)
    return MethodResult(ready.eval(), skipped, notes=notes, floats=floats)


def _integer_form(module: nn.Module, widths: Widths) -> tuple[Quantized, bool]:
    """The integer layer of a float one, its tensors to be filled, and whether it multiplies integers."""
    if isinstance(module, nn.Linear):
        sizes = (module.in_features, module.out_features, module.bias is not None)
        assert widths.activation is not None
        return DynamicLinear(*sizes, widths.weight, widths.activation), True
    return LAYER_FORMS[type(module)].make(module, widths), False


def _obstacle(module: nn.Module) -> str | None:
    if isinstance(module, nn.Linear):
        return None
    form = LAYER_FORMS.get(type(module))
    if form is not None and not form.multiplies:
        return form.obstacle(module)
    return f"dynamic int8 serves Linear and Embedding, not {type(module).__name__}"
