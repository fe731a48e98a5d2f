"""Quantized embeddings."""

from typing import Self

import torch.nn.functional as F
from torch import Tensor, nn

from modelopt_cli.program.quantization import BITS
from modelopt_cli.program.quantized import WEIGHT_BITS, Weighted


class QuantizedEmbedding(Weighted):
    """Embedding: int8 rows with a scale each, indices in, float32 ``(..., embedding_dim)`` out.

    A row is its integers times its scale, one multiplication in float32, on every device.
    """

    fields = f"num_embeddings:count embedding_dim:count {WEIGHT_BITS}"
    float_layer = nn.Embedding
    restored = ("int8-dynamic",)
    multiplies = False

    def __init__(self, num_embeddings: int, embedding_dim: int, weight_bits: int = BITS) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.activation, self.output, self.weight_bits = "none", None, weight_bits
        self._allocate((num_embeddings, embedding_dim), num_embeddings, bias=False)

    @classmethod
    def of_float(
        cls, layer: nn.Embedding, scale: Tensor, weight_bits: int = BITS, input_bits: int = BITS
    ) -> Self:
        return cls(layer.num_embeddings, layer.embedding_dim, weight_bits)._fill(layer, scale)

    def emulate(self, *args: Tensor) -> Tensor:
        rows, scale = F.embedding(args[0], self.weight), F.embedding(args[0], self.scale.unsqueeze(1))
        return rows.float() * scale
