"""Matrix products and attention on labels."""

from typing import Any

from torch import Tensor, fx

from modelopt_cli.program.channels.ties import nothing
from modelopt_cli.program.channels.trace import Fetched, Trace

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def einsum(t: Trace, node: fx.Node, bound: dict[str, Any]) -> Any:
    """``torch.einsum`` of two operands, written out with an arrow."""
    equation, operands = str(bound["equation"]).replace(" ", ""), bound["operands"]
    inputs, arrow, output = equation.partition("->")
    terms = inputs.split(",")
    plain = arrow and "." not in equation and len(terms) == len(operands) == 2
    if not plain or any(len(set(term)) < len(term) for term in terms):
        return t.unsupported(node, bound)
    a, b = (t.labels(operand) for operand in operands)
    return contract(t, (terms[0], a), (terms[1], b), output, t.shapes[node.name])


def matmul(t: Trace, node: fx.Node, bound: dict[str, Any]) -> Any:
    """``a @ b`` of values with two dimensions or more; a fetched ``b`` is a linear layer's weight."""
    a, b = bound["input"], bound["mat2" if "mat2" in bound else "other"]
    is_weight = isinstance(b, Fetched) and b.tensor.dim() == 2 and t.name_of(b) not in t.called
    if is_weight and not isinstance(a, Fetched):
        outputs = t.ties.fresh(f"columns {b.path}", b.tensor.shape[1])
        t.slot(b.path, 0, t.ties.line(a, -1), "in")
        t.slot(b.path, 1, outputs, "out")
        return outputs.expand(t.shapes[node.name])
    a, b = t.labels(a), t.labels(b)
    if min(a.dim(), b.dim()) < 2:
        return t.unsupported(node, bound)
    return product(t, a, b, t.shapes[node.name])


def added_product(t: Trace, node: fx.Node, bound: dict[str, Any]) -> Any:
    """``addmm`` and ``baddbmm``: a product, and what is added to it."""
    first, second = ("mat1", "mat2") if "mat1" in bound else ("batch1", "batch2")
    outputs = matmul(t, node, {"input": bound[first], "mat2": bound[second]})
    return t.ties.combine(outputs, t.labels(bound["input"])).expand(t.shapes[node.name])


def product(t: Trace, a: Tensor, b: Tensor, shape: Any, *, transposed: bool = False) -> Tensor:
    """Labels of ``a @ b``, or of ``a @ b.mT``, with the leading dimensions broadcast."""
    batch = _LETTERS[: len(shape) - 2]
    terms = []
    for labels, last in ((a, "yz"), (b, "xz" if transposed else "zx")):
        lead = labels.dim() - 2
        sizes = [(d, batch[len(batch) - lead + d]) for d in range(lead)]
        repeated = [d for d, letter in sizes if labels.shape[d] < shape[batch.index(letter)]]
        if repeated:
            t.ties.freeze(labels, "is broadcast in a product")
            labels = nothing(labels.shape)
        for d in reversed(repeated):
            labels = labels.squeeze(d)
            sizes.pop(d)
        terms.append(("".join(letter for _, letter in sizes) + last, labels))
    return contract(t, terms[0], terms[1], f"{batch}yx", shape)


def contract(t: Trace, a: tuple[str, Tensor], b: tuple[str, Tensor], output: str, shape: Any) -> Tensor:
    """Labels of a sum of products over the dimensions that ``output`` does not name.

    What both operands have along a shared dimension is tied. Where they have parallel dimensions, too,
    as attention has its heads (Vaswani et al., NeurIPS 2017, section 3.2), those are what can be removed.

    Args:
        t: the trace.
        a: a letter for each dimension, and the labels.
        b: as ``a``.
        output: the letters of the result.
        shape: of the result.
    """
    terms = dict(zip((0, 1), (a, b), strict=True))
    shared = [letter for letter in a[0] if letter in b[0]]
    parallel = [letter for letter in shared if letter in output]
    heads = any(_varies(t, term, parallel) for term in terms.values())
    for i, (letters, labels) in terms.items():
        single = [letters.index(x) for x in letters if x not in output and (heads or x not in shared)]
        terms[i] = (letters, t.ties.mix(labels, single, "is summed over"))
    for letter in shared:
        lines = [_along(t, term, letter) for term in terms.values()]
        if any(t.ties.varying(line) for line in lines):
            if letter in parallel:
                terms = {i: _one_line(t, term, letter) for i, term in terms.items()}
                lines = [_along(t, term, letter) for term in terms.values()]
            t.ties.same(*lines)
    return _result(t, list(terms.values()), output, shape)


def _varies(t: Trace, term: tuple[str, Tensor], letters: list[str]) -> bool:
    return any(term[0][d] in letters for d in t.ties.varying(term[1]))


def _one_line(t: Trace, term: tuple[str, Tensor], letter: str) -> tuple[str, Tensor]:
    """The labels, tied along all dimensions but this one."""
    letters, labels = term
    return letters, t.ties.mix(labels, [d for d, own in enumerate(letters) if own != letter])


def _along(t: Trace, term: tuple[str, Tensor], letter: str) -> Tensor:
    d = term[0].index(letter)
    return term[1][tuple(slice(None) if i == d else 0 for i in range(term[1].dim()))]


def _result(t: Trace, terms: list[tuple[str, Tensor]], output: str, shape: Any) -> Tensor:
    """The labels of the operand that has channels left in the result; only one may have its own."""
    placed = []
    for letters, labels in terms:
        if not _varies(t, (letters, labels), list(output)):
            continue
        summed = [d for d, letter in enumerate(letters) if letter not in output]
        labels = t.ties.mix(labels, summed)
        kept = labels[tuple(0 if d in summed else slice(None) for d in range(labels.dim()))]
        own = [letter for letter in letters if letter in output]
        kept = kept.permute([own.index(letter) for letter in output if letter in own])
        index = tuple(slice(None) if letter in letters else None for letter in output)
        placed.append(kept[index].expand(shape))
    if len(placed) == 2:
        if t.ties.varying(placed[0]) != t.ties.varying(placed[1]):
            for labels in placed:
                t.ties.freeze(labels, "is multiplied with other channels")
            return nothing(shape)
        t.ties.same(*placed)
    return placed[0] if placed else nothing(shape)


def attention(t: Trace, node: fx.Node, bound: dict[str, Any]) -> Any:
    """``F.scaled_dot_product_attention``."""
    q, k, v = (t.labels(bound[name]) for name in ("query", "key", "value"))
    shape = t.shapes[node.name]
    if not q.dim() == k.dim() == v.dim():
        return t.unsupported(node, bound)
    if bound["enable_gqa"]:  # each head of keys and values serves several neighbouring ones of queries
        k, v = (part.repeat_interleave(q.shape[-3] // part.shape[-3], -3) for part in (k, v))
    scores = product(t, q, k, (*shape[:-1], k.shape[-2]), transposed=True)
    mask = bound["attn_mask"]
    if mask is not None:
        scores = t.ties.combine(scores, t.labels(mask))
    return product(t, scores, v, shape)
