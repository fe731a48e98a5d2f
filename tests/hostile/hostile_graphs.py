"""Programs as data that ask for too much, and layers with impossible hyperparameters."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from modelopt_cli.program import InputSpec
from modelopt_cli.program.capture import capture
from modelopt_cli.program.program import Program
from modelopt_cli.program.quantization import QParams
from modelopt_cli.program.quantized_convolutions import (
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConvTranspose2d,
)
from modelopt_cli.program.quantized_embedding import QuantizedEmbedding
from modelopt_cli.program.quantized_linear import DynamicLinear, QuantizedLinear
from modelopt_cli.program.quantized_operations import (
    Dequantize,
    Quantize,
    QuantizedAdd,
    QuantizedAvgPool1d,
    QuantizedAvgPool2d,
    QuantizedMaxPool1d,
    QuantizedMaxPool2d,
    QuantizedMul,
)
from modelopt_cli.program.quantized_recurrent import QuantizedGRU, QuantizedLSTMCell
from modelopt_cli.program.serialization import to_data

X = {"node": "x"}
Call = tuple[str, list[Any], dict[str, Any]]


def prev(back: int = 1) -> dict[str, int]:
    """Stands for the result ``back`` calls before."""
    return {"back": back}


def graph(calls: list[Call], shape: tuple[int, ...] = (3, 8, 8)) -> dict[str, Any]:
    """A Program's data form: calls of functions (``torch.add``) and methods (``add``), one after another."""

    def filled(value: Any, at: int) -> Any:
        if isinstance(value, dict) and "back" in value:
            return {"node": f"n{at - value['back']}"}
        if isinstance(value, dict):
            return {key: filled(item, at) for key, item in value.items()}
        return [filled(item, at) for item in value] if isinstance(value, list) else value

    nodes = [{"op": "placeholder", "name": "x", "target": "x", "args": [], "kwargs": {}}]
    for at, (target, args, kwargs) in enumerate(calls):
        op = "call_function" if "." in target or target == "getattr" else "call_method"
        node = {"op": op, "name": f"n{at}", "target": target}
        nodes.append(node | {"args": filled(args, at), "kwargs": filled(kwargs, at)})
    last = {"node": f"n{len(calls) - 1}"}
    nodes.append({"op": "output", "name": "output", "target": "output", "args": [last], "kwargs": {}})
    header = {
        "input": {"shape": list(shape), "preprocess": None},
        "labels": None,
        "history": [],
        "arch": None,
    }
    return {**header, "modules": {}, "attributes": {}, "tensors": {}, "tied": {}, "nodes": nodes}


SIZE: Call = ("size", [X, 0], {})
WIDTH: Call = ("size", [X, 3], {})
HUGE = 10**9

GRAPHS: dict[str, list[Call]] = {
    "power": [SIZE, ("operator.pow", [prev(), HUGE], {}), ("operator.mul", [X, prev()], {})],
    "power of powers": [
        WIDTH,
        ("operator.pow", [prev(), 20], {}),
        ("operator.pow", [prev(), prev()], {}),
        ("operator.mul", [X, prev()], {}),
    ],
    "products": [WIDTH, *[("operator.mul", [prev(), prev()], {})] * 40, ("operator.mul", [X, prev()], {})],
    "list repeated": [
        ("getattr", [X, "shape"], {}),
        ("operator.mul", [prev(), HUGE], {}),
        ("reshape", [X, prev()], {}),
    ],
    "list doubled": [
        ("getattr", [X, "shape"], {}),
        *[("operator.add", [prev(), prev()], {})] * 40,
        ("reshape", [X, prev()], {}),
    ],
    "repeat": [("repeat", [X, HUGE, 1, 1, 1], {})],
    "tile": [("torch.tile", [X, {"tuple": [1, HUGE, 1]}], {})],
    "expand": [("unsqueeze", [X, 0], {}), ("expand", [prev(), HUGE, -1, -1, -1, -1], {})],
    "broadcast": [("torch.broadcast_to", [X, [HUGE, 1, 3, 8, 8]], {})],
    "zeros": [("torch.zeros", [HUGE, HUGE], {}), ("operator.add", [prev(), X], {})],
    "zeros on the CPU": [("torch.zeros", [[HUGE, 100]], {"device": {"device": "cpu"}})],
    "ones like": [("expand", [X, HUGE, -1, -1, -1], {}), ("torch.ones_like", [prev()], {})],
    "full": [("torch.full", [[HUGE, 100], 1.0], {})],
    "new zeros": [("new_zeros", [X, [HUGE, 100]], {})],
    "arange": [("torch.arange", [0, HUGE, 1e-9], {})],
    "one hot": [("long", [X], {}), ("F.one_hot", [prev(), HUGE], {})],
    "one hot by values": [("long", [X], {}), ("F.one_hot", [prev()], {})],
    "pad": [("F.pad", [X, [HUGE, HUGE, HUGE, HUGE]], {})],
    "interpolate": [("F.interpolate", [X], {"size": [10**7, 10**7]})],
    "interpolate by scale": [("F.interpolate", [X], {"scale_factor": 1e6})],
    "upsample": [("F.upsample", [X], {"scale_factor": 1e9})],
    "repeat_interleave": [("torch.repeat_interleave", [X, HUGE], {})],
    "repeat_interleave by values": [
        ("long", [X], {}),
        ("flatten", [prev()], {}),
        ("torch.repeat_interleave", [prev()], {}),
    ],
    "cat that doubles": [*[("torch.cat", [[X, X]], {})], *[("torch.cat", [[prev(), prev()]], {})] * 60],
    "stack that doubles": [("torch.stack", [[X, X]], {}), *[("torch.stack", [[prev(), prev()]], {})] * 50],
    "outer product": [
        ("flatten", [X], {}),
        *[("torch.einsum", ["a,b-> ab", prev(), prev()], {}), ("flatten", [prev()], {})] * 5,
    ],
    "cosine similarity": [
        ("repeat", [X, 300, 1, 1, 1], {}),
        ("reshape", [prev(), 1, -1, 1], {}),
        ("reshape", [prev(), -1, 1, 1], {}),
        ("F.cosine_similarity", [prev(1), prev(2)], {"dim": -1}),
    ],
    "matrix products": [
        ("F.interpolate", [X], {"size": [30000, 30000]}),
        *[("torch.matmul", [prev(), prev()], {})] * 300,
    ],
    "unbind": [
        ("F.interpolate", [X], {"size": [10**6, 8]}),
        ("unbind", [prev(), 2], {}),
        ("torch.stack", [prev()], {}),
    ],
    "split": [
        ("F.interpolate", [X], {"size": [10**6, 8]}),
        ("split", [prev(), 1, 2], {}),
        ("torch.cat", [prev()], {}),
    ],
    "unfold": [("F.interpolate", [X], {"size": [4000, 4000]}), ("F.unfold", [prev(), [200, 200]], {})],
    "adaptive pooling": [("F.adaptive_avg_pool2d", [X, [10**6, 10**6]], {})],
    "grid": [
        ("torch.zeros", [1, 2, 3], {}),
        ("F.affine_grid", [prev(), [1, 3, 10**6, 10**6]], {}),
    ],
    "rotations": [("torch.rot90", [X, HUGE, [2, 3]], {}), ("F.pad", [prev(), [0, HUGE * 1000]], {})],
    "division by zero": [
        SIZE,
        ("operator.sub", [prev(), prev()], {}),
        ("operator.floordiv", [8, prev()], {}),
    ],
    "view that does not fit": [("view", [X, 3, 7, 11], {})],
    "einsum that is none": [("torch.einsum", ["ab->ab", X], {})],
    "attribute that is not there": [SIZE, ("getattr", [prev(), "mT"], {})],
    "method of a number": [SIZE, ("flatten", [prev()], {})],
    "shuffle of no groups": [("torch.channel_shuffle", [X, 0], {})],
    "pixels by zero": [("F.pixel_unshuffle", [X, 0], {})],
    "pooling by zero": [("F.max_pool2d", [X, 0], {})],
    "stride of zero": [("F.avg_pool2d", [X, 2, 0], {})],
    "a negative size": [("torch.zeros", [[-1]], {})],
    "division of the window by zero": [("F.avg_pool2d", [X, 2], {"divisor_override": 0})],
    "fold of no stride": [("F.unfold", [X, 2], {"stride": 0})],
}

GOOD: dict[str, list[Call]] = {
    "sizes and powers": [
        WIDTH,
        ("operator.pow", [prev(), 2], {}),
        ("operator.floordiv", [prev(), 4], {}),
        ("reshape", [X, -1, prev()], {}),
    ],
    "tuples": [
        ("getattr", [X, "shape"], {}),
        ("operator.getitem", [prev(), {"slice": [0, 2, None]}], {}),
        ("operator.add", [prev(), {"tuple": [-1]}], {}),
        ("reshape", [X, prev()], {}),
    ],
    "a mask": [("operator.gt", [X, 0], {}), ("operator.getitem", [X, prev()], {})],
    "one sample only": [("reshape", [X, {"tuple": [1, 192]}], {})],
    "on the CPU": [
        ("getattr", [X, "device"], {}),
        ("torch.arange", [8], {"device": prev()}),
        ("to", [prev(), "cpu"], {}),
        ("operator.add", [prev(), X], {}),
    ],
    "repeat a little": [
        ("repeat", [X, 2, 1, 1, 1], {}),
        ("torch.repeat_interleave", [prev(), 2], {"dim": 1}),
    ],
}


class _Quantized(nn.Module):
    """Every kind of quantized layer once."""

    def __init__(self) -> None:
        super().__init__()
        q, other = QParams(0.02, 128), QParams(0.03, 0)
        self.enter = Quantize(q)
        self.conv = QuantizedConv2d(3, 4, (3, 3), (2, 2), (1, 1), (1, 1), 1, True, q, other, "relu")
        square = ((1, 1), (1, 1), (0, 0), (1, 1), 2, False)
        self.summed = QuantizedConv2d(4, 4, *square, other, q, "none", other)
        self.pool = QuantizedMaxPool2d((2, 2), (2, 2), (0, 0), (1, 1), False)
        self.add = QuantizedAdd(q, q, other)
        self.leave = Dequantize(other)
        self.mul = QuantizedMul(q)
        self.average = QuantizedAvgPool2d(q, other, kernel_size=(2, 2), stride=(1, 1))
        self.adaptive = QuantizedAvgPool2d(other, q, output_size=(1, 1), keepdim=False)
        self.rows = QuantizedConv1d(4, 4, (3,), (1,), (1,), (1,), 2, True, q, other, "relu", q)
        self.row_pool = QuantizedMaxPool1d((2,), (1,), (0,), (1,), False)
        self.row_average = QuantizedAvgPool1d(other, other, kernel_size=(2,), stride=(1,))
        turned = ((3, 3), (2, 2), (1, 1), (1, 1), 2, True, other, q, "relu", (1, 1))
        self.turned = QuantizedConvTranspose2d(4, 4, *turned)
        self.linear = QuantizedLinear(4, 5, True, q, None)
        self.dynamic = DynamicLinear(5, 2, True)
        self.words = QuantizedEmbedding(5, 2)
        self.gru = QuantizedGRU(2, 2, 1, True, True, False, q)
        self.cell = QuantizedLSTMCell(2, 2, True, None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(N, 3, 8, 8)`` to ``(N, 2)``."""
        x = self.conv(self.enter(x))
        x = self.pool(self.summed(x, x))
        x = self.leave(self.turned(self.add(x, x))[..., ::2, 1::2])
        x = self.mul(x, x)
        rows = self.row_average(self.row_pool(self.rows(x.flatten(2), x.flatten(2))))
        x = self.adaptive(torch.cat([self.average(x), rows.unsqueeze(2)], 3))
        x = self.linear(x)
        x = self.dynamic(x) + self.words(x.argmax(1))
        rows, _ = self.gru(x.unsqueeze(1))
        return self.cell(rows[:, 0])[0]  # type: ignore[no-any-return]


def quantized_program() -> Program:
    """A small network with every kind of quantized layer, weights drawn."""
    module = _Quantized().eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for layer in module.modules():
            if isinstance(getattr(layer, "weight", None), torch.Tensor):
                layer.weight.random_(-50, 50)  # type: ignore[union-attr, operator]
    return capture(module, InputSpec((3, 8, 8)))


ODD: list[Any] = [
    None, True, 0, 1, -1, 2, 3, 2**31, 2**62, 2**70, 0.0, -0.5, 1e-300, 1e300, "", "relu", "zeros",
    [], [0, 0], [-1, -1], [1], [1, 1, 1], [2**40, 2**40], [1.5, 1.5], [None, None], ["a", "b"], [0.0, 0],
    [-1.0, 0], [0.02, 256], [0.02, -1], [0.02, 1.0], [1e-300, 0], [1e300, 0], [[1], [1]], {"float": "nan"},
    {"float": "inf"}, {},
]  # fmt: skip
"""Values that few hyperparameters may have."""


def malformed_layers(program: Program) -> Iterator[tuple[str, dict[str, Any]]]:
    """The Program's data once for each hyperparameter of each layer and each odd value for it."""
    data = to_data(program)
    for path, entry in data["modules"].items():
        for name, value in entry["config"].items():
            for odd in ODD:
                if odd == value and type(odd) is type(value):
                    continue
                changed = deepcopy(data)
                changed["modules"][path]["config"][name] = odd
                yield f"{path}.{name} = {odd!r}", changed
