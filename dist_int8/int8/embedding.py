"""`Int8Embedding`: a table of token embeddings in int8."""

import torch
from torch import Tensor

from dist_int8.int8 import packing
from dist_int8.int8.module import Int8Module


class Int8Embedding(Int8Module):
    """Rows of weight_int8 * col_scale.

    Buffers: `weight_int8` int8 [V, E] and `col_scale` fp32 [V], one scale per token: what an
    `Int8Linear` of a tied head has too, so that the two share their memory. Made directly it is all
    zeros (or on the meta device, without storage).
    """

    weight_int8: Tensor
    col_scale: Tensor

    def __init__(
        self, num_embeddings: int, embedding_dim: int, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        shape = (num_embeddings, embedding_dim)
        self.register_buffer("weight_int8", torch.zeros(shape, dtype=torch.int8, device=device))
        self.register_buffer(
            "col_scale", torch.zeros(num_embeddings, dtype=torch.float32, device=device)
        )

    def forward(self, token_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """token_ids int64 [T] -> [T, E] in `dtype`, rounded to it once."""
        weight_int8 = self._buffers["weight_int8"]
        assert weight_int8 is not None
        rows = packing.rows_of(weight_int8, token_ids).float()
        return (rows * self.col_scale[token_ids, None]).to(dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"
