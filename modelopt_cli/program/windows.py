"""Taking torchvision's windowed attention apart, so that its projections are ordinary linear layers."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from modelopt_cli.program.calls import arguments, operation
from modelopt_cli.program.program import Program
from modelopt_cli.program.shapes import value_shapes

_FUNCTION = "shifted_window_attention"
_MASKED = -100.0
_LARGEST_SCALE = math.log(100.0)


def split_windows(program: Program) -> Program:
    """Write out the attention of Swin (Liu et al., ICCV 2021) and Swin v2 (Liu et al., CVPR 2022).

    The function that torchvision calls with fetched weights becomes padding, shifting and cutting into
    windows, a linear layer for query, key and value, the attention within windows, a linear layer, and
    the way back. The layers have the names their weights had. Sizes of windows become literals for the
    Program's input size. The dropout inside is left out.

    Args:
        program: in inference form; it is not changed.

    Returns:
        The Program itself where there is no such attention.
    """
    if not any(_is_plain(node) for node in program.graph.nodes):
        return program
    shapes = value_shapes(program, 1)
    program = copy.deepcopy(program)
    for node in [n for n in program.graph.nodes if _is_plain(n)]:
        bound = arguments(node)
        size = shapes[bound["input"].name]
        _split(program, node, _Windows.of(bound, int(size[1]), int(size[2])), bound)
    program.graph.eliminate_dead_code()
    program.recompile()
    return program


def _is_plain(node: fx.Node) -> bool:
    if operation(node) != _FUNCTION:
        return False
    bound = arguments(node)
    sizes = [*bound["window_size"], *bound["shift_size"], bound["num_heads"]]
    weights = [_layer(bound[f"{name}_weight"], bound[f"{name}_bias"]) for name in ("qkv", "proj")]
    return all(type(size) is int for size in sizes) and all(weights) and bound["training"] is False


def _layer(weight: Any, bias: Any) -> str | None:
    """The path at which these two are fetched as ``weight`` and ``bias``, and by nobody else."""
    path = str(weight.target).removesuffix(".weight")
    for tensor, name in ((weight, "weight"), (bias, "bias")):
        if tensor is None:
            continue
        own = (
            isinstance(tensor, fx.Node) and tensor.op == "get_attr" and str(tensor.target) == f"{path}.{name}"
        )
        if not own or len(tensor.users) > 1:
            return None
    return path


@dataclass(frozen=True)
class _Windows:
    """Geometry of the windows: padded ``(height, width)``, window and shift sizes, heads."""

    size: tuple[int, int]
    padded: tuple[int, int]
    window: tuple[int, int]
    shift: tuple[int, int]
    heads: int

    @classmethod
    def of(cls, bound: Mapping[str, Any], height: int, width: int) -> "_Windows":
        window = (bound["window_size"][0], bound["window_size"][1])
        padded = (-(-height // window[0]) * window[0], -(-width // window[1]) * window[1])
        shift = [0 if w >= p else s for s, w, p in zip(bound["shift_size"], window, padded, strict=True)]
        return cls((height, width), padded, window, (shift[0], shift[1]), bound["num_heads"])

    @property
    def counts(self) -> tuple[int, int]:
        return self.padded[0] // self.window[0], self.padded[1] // self.window[1]

    def regions(self) -> Tensor:
        """A number for each place of each window; places attend to those of the same number only."""
        regions = torch.zeros(self.padded, dtype=torch.int8)
        count = 0
        bounds = [((0, -w), (-w, -s), (-s, None)) for w, s in zip(self.window, self.shift, strict=True)]
        for top, bottom in bounds[0]:
            for left, right in bounds[1]:
                regions[top:bottom, left:right] = count
                count += 1
        (rows, columns), (height, width) = self.counts, self.window
        return regions.view(rows, height, columns, width).transpose(1, 2).reshape(-1, height * width)


class _Writer:
    """Appends calls to a graph, one after another."""

    def __init__(self, graph: fx.Graph, after: fx.Node) -> None:
        self.graph, self.cursor = graph, after

    def method(self, name: str, *args: Any) -> fx.Node:
        return self._add("call_method", name, args)

    def call(self, function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self._add("call_function", function, args, kwargs)

    def layer(self, path: str, value: fx.Node) -> fx.Node:
        return self._add("call_module", path, (value,))

    def fetch(self, path: str) -> fx.Node:
        return self._add("get_attr", path, ())

    def _add(self, op: str, target: Any, args: Any, kwargs: dict[str, Any] | None = None) -> fx.Node:
        with self.graph.inserting_after(self.cursor):
            self.cursor = self.graph.create_node(op, target, args, kwargs or {})
        return self.cursor


def _split(program: Program, node: fx.Node, windows: _Windows, bound: Mapping[str, Any]) -> None:
    qkv = str(bound["qkv_weight"].target).removesuffix(".weight")
    proj = str(bound["proj_weight"].target).removesuffix(".weight")
    for path, zero_keys in ((qkv, bound["logit_scale"] is not None), (proj, False)):
        _replace(program, path, zero_keys)
    write = _Writer(program.graph, node)
    x = _cut(write, bound["input"], windows)
    x = write.layer(qkv, x)
    x = _attend(write, program, x, windows, bound, qkv.rpartition(".")[0])
    x = write.layer(proj, x)
    node.replace_all_uses_with(_join(write, x, windows))
    program.graph.erase_node(node)


def _cut(write: _Writer, x: fx.Node, windows: _Windows) -> fx.Node:
    """``(N, H, W, C)`` to ``(N * windows, places, C)``."""
    extra = [p - s for p, s in zip(windows.padded, windows.size, strict=True)]
    if any(extra):
        x = write.call(F.pad, x, [0, 0, 0, extra[1], 0, extra[0]])
    if sum(windows.shift):
        x = write.call(torch.roll, x, [-s for s in windows.shift], [1, 2])
    x = write.method("unflatten", x, 2, (windows.counts[1], windows.window[1]))
    x = write.method("unflatten", x, 1, (windows.counts[0], windows.window[0]))
    x = write.call(torch.permute, x, (0, 1, 3, 2, 4, 5))
    return write.call(torch.flatten, write.call(torch.flatten, x, 0, 2), 1, 2)


def _attend(
    write: _Writer, program: Program, x: fx.Node, windows: _Windows, bound: Mapping[str, Any], path: str
) -> fx.Node:
    """Multi-head attention within each window, with the relative position bias."""
    packed = program.get_submodule(str(bound["qkv_weight"].target).removesuffix(".weight"))
    width = int(packed.out_features) // (3 * windows.heads)  # type: ignore[arg-type]
    x = write.method("unflatten", x, -1, (3, windows.heads, width))
    parts = write.call(torch.unbind, write.call(torch.permute, x, (2, 0, 3, 1, 4)), 0)
    q, k, v = (write.call(getitem, parts, i) for i in range(3))
    if bound["logit_scale"] is None:
        q = write.call(torch.mul, q, width**-0.5)
        scores = write.call(torch.matmul, q, write.call(torch.transpose, k, -2, -1))
    else:
        q, k = (write.call(F.normalize, part, dim=-1) for part in (q, k))
        scores = write.call(torch.matmul, q, write.call(torch.transpose, k, -2, -1))
        scale = write.call(torch.exp, write.call(torch.clamp, bound["logit_scale"], max=_LARGEST_SCALE))
        scores = write.call(torch.mul, scores, scale)
    scores = write.call(torch.add, scores, bound["relative_position_bias"])
    if sum(windows.shift):
        scores = _masked(write, program, scores, windows, path)
    weights = write.call(F.softmax, scores, dim=-1)
    mixed = write.call(torch.transpose, write.call(torch.matmul, weights, v), 1, 2)
    return write.call(torch.flatten, mixed, 2)


def _masked(write: _Writer, program: Program, scores: fx.Node, windows: _Windows, path: str) -> fx.Node:
    """Mask scores between places that only the shift put next to each other."""
    regions = windows.regions()
    device = next((p.device for p in program.parameters()), regions.device)
    program.get_submodule(path).register_buffer("window_regions", regions.to(device))
    number = write.fetch(f"{path}.window_regions")
    apart = write.call(torch.ne, write.method("unsqueeze", number, 1), write.method("unsqueeze", number, 2))
    mask = write.method("unsqueeze", write.call(torch.mul, apart, _MASKED), 1)
    scores = write.method("unflatten", scores, 0, (-1, math.prod(windows.counts)))
    return write.call(torch.flatten, write.call(torch.add, scores, mask), 0, 1)


def _join(write: _Writer, x: fx.Node, windows: _Windows) -> fx.Node:
    """``(N * windows, places, C)`` back to ``(N, H, W, C)``."""
    x = write.method("unflatten", x, 1, windows.window)
    x = write.method("unflatten", x, 0, (-1, *windows.counts))
    x = write.call(torch.permute, x, (0, 1, 3, 2, 4, 5))
    x = write.call(torch.flatten, write.call(torch.flatten, x, 3, 4), 1, 2)
    if sum(windows.shift):
        x = write.call(torch.roll, x, list(windows.shift), [1, 2])
    for dim, (size, padded) in enumerate(zip(windows.size, windows.padded, strict=True), 1):
        if size < padded:
            x = write.call(torch.narrow, x, dim, 0, size)
    return write.method("contiguous", x)


def _replace(program: Program, path: str, zero_keys: bool) -> None:
    """A linear layer in place of its bare weights; Swin v2 computes with keys that have no bias."""
    bare: Any = program.get_submodule(path)
    bias = getattr(bare, "bias", None)
    outputs, inputs = bare.weight.shape
    layer = nn.Linear(inputs, outputs, bias is not None, device="meta")
    layer.weight = bare.weight
    if bias is not None:
        layer.bias = bias
        if zero_keys:
            third = len(bias) // 3
            values = bias.detach().clone()
            values[third : 2 * third] = 0.0
            layer.bias = nn.Parameter(values, bias.requires_grad)
    program.set_submodule(path, layer.train(program.training))
