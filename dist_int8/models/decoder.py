"""A contiguous run of decoder blocks as one module, with embedding and head where they belong."""

from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_int8.int8 import ops
from dist_int8.int8.embedding import Int8Embedding
from dist_int8.int8.kv import Cache
from dist_int8.models.block import DecoderBlock, Norm, PositionTables
from dist_int8.models.block_calls import BlockCalls
from dist_int8.models.rotary import alibi_slopes, make_rotary_tables
from dist_int8.models.run_blocks import run_blocks
from dist_int8.models.spec import ModelSpec
from dist_int8.models.stage_slice import StageSlice
from dist_int8.models.token_batch import TokenBatch


class LayerCaches(Protocol):
    """What a stage needs from a KV cache."""

    def layer(self, index: int) -> tuple[Cache, Cache]:
        """Returns the caches of the stage's block `index` (from 0).

        Key [S, KV, D, L] and value [S, KV, L, D], or both as `Int8KV`.
        """
        ...


class DecoderStage(nn.Module):
    """One slice of a model; the first stage embeds tokens, the last returns logits.

    Parameter names use the block's number in the whole model (`blocks.17.qkv.weight`), whatever
    the stage, so a state dict does not depend on how a model was split.

    Args:
        spec: the model.
        stage_slice: the part of it that this stage holds.
        dtype: dtype of parameters and hidden states.
        max_tokens: longest sequence the position tables serve; None: the model's max_positions.
        device: of the parameters. Each layer is told: what changes torch for a while, as
            accelerate's init_empty_weights does, changes it for the caller's other threads too.

    Raises:
        ValueError: blocks outside the model, or max_tokens beyond what the model's positions allow.
    """

    rotary_cos: Tensor | None
    rotary_sin: Tensor | None
    alibi_slopes: Tensor | None

    def __init__(
        self,
        spec: ModelSpec,
        stage_slice: StageSlice,
        dtype: torch.dtype = torch.float32,
        max_tokens: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        _check(spec, stage_slice.blocks, max_tokens)
        self.spec = spec
        self.slice = stage_slice
        self.dtype = dtype
        if stage_slice.first:
            self._add_embedding(device)
        self.blocks = nn.ModuleDict(
            {str(i): DecoderBlock(spec.blocks[i], device) for i in stage_slice.blocks}
        )
        self._block_calls = BlockCalls()
        if stage_slice.last:
            self._add_head(device)
        self.to(dtype).requires_grad_(False)
        self._add_position_tables(max_tokens)

    @classmethod
    def empty(
        cls,
        spec: ModelSpec,
        stage_slice: StageSlice,
        dtype: torch.dtype = torch.float32,
        max_tokens: int | None = None,
    ) -> Self:
        """Makes the stage with all parameters on the meta device (position tables are real)."""
        return cls(spec, stage_slice, dtype, max_tokens, device="meta")

    def _add_embedding(self, device: torch.device | str | None) -> None:
        spec = self.spec
        table = nn.Embedding(spec.vocab_size, spec.embedding_size, device=device)
        self.embedding: nn.Embedding | Int8Embedding = table
        if spec.num_position_rows:
            shape = (spec.num_position_rows, spec.hidden_size)
            self.positions = nn.Embedding(*shape, device=device)
        if spec.embedding_norm:
            self.embedding_norm = self._make_norm(device)
        if spec.has_projections:
            self.project_in = nn.Linear(
                spec.embedding_size, spec.hidden_size, bias=False, device=device
            )

    def _add_head(self, device: torch.device | str | None) -> None:
        spec = self.spec
        if spec.final_norm:
            self.final_norm = self._make_norm(device)
        if spec.has_projections:
            self.project_out = nn.Linear(
                spec.hidden_size, spec.embedding_size, bias=False, device=device
            )
        self.lm_head = nn.Linear(spec.embedding_size, spec.vocab_size, bias=False, device=device)

    def make_embedding_int8(self) -> None:
        """Replaces the embedding of a first stage with an `Int8Embedding` without content."""
        if self.slice.first:
            shape = (self.spec.vocab_size, self.spec.embedding_size)
            self.embedding = Int8Embedding(*shape, device="meta")

    def _make_norm(self, device: torch.device | str | None) -> Norm:
        block = self.spec.blocks[0]
        return Norm(self.spec.hidden_size, block.norm, block.norm_eps, device)

    def _add_position_tables(self, max_tokens: int | None) -> None:
        cos = sin = slopes = None
        if self.spec.rotary is not None:
            num_positions = max_tokens or self.spec.max_positions
            assert num_positions is not None, "a rotary model has max_positions"
            cos, sin = make_rotary_tables(self.spec.rotary, num_positions)
        if self.spec.alibi:
            slopes = alibi_slopes(self.spec.blocks[0].num_heads)
        self.register_buffer("rotary_cos", cos, persistent=False)
        self.register_buffer("rotary_sin", sin, persistent=False)
        self.register_buffer("alibi_slopes", slopes, persistent=False)

    def move_tables(self, device: torch.device | str) -> None:
        """Moves the position tables, which are real even while the parameters are meta."""
        for name, table in self.named_buffers(recurse=False):
            setattr(self, name, table.to(device))

    def _embed(self, batch: TokenBatch) -> Tensor:
        assert batch.token_ids is not None, "the first stage needs token ids"
        table = self.embedding
        if isinstance(table, Int8Embedding):
            hidden = table(batch.token_ids, self.dtype)
        else:
            hidden = F.embedding(batch.token_ids, table.weight).to(self.dtype)
        if self.spec.embedding_norm:
            hidden, _ = self.embedding_norm(hidden, None)
        if self.spec.has_projections:
            hidden = self.project_in(hidden)
        if self.spec.num_position_rows:
            rows = batch.positions + self.spec.position_offset
            hidden = hidden + F.embedding(rows, self.positions.weight)
        return hidden

    def _logits(self, x: Tensor, residual: Tensor | None, rows: Tensor | None) -> Tensor:
        if rows is not None:
            if rows.shape[0] == 0:  # a prefill chunk before the last
                return x.new_empty((0, self.spec.vocab_size), dtype=torch.float32)
            # not x[rows], for which torch wakes threads that then spin beside those of our kernels
            x = x.index_select(0, rows)
            residual = None if residual is None else residual.index_select(0, rows)
        x = self.before_head(x, residual)
        head = self.lm_head
        if type(head) is nn.Linear:  # its weight may be in 16 bits below fp32 hidden states
            return ops.linear(x, head.weight).float()
        return head(x).float()

    def before_head(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Computes the input of the head: x + residual [R, hidden] -> [R, embedding]."""
        if self.spec.final_norm:
            x, _ = self.final_norm(x, residual)
        elif residual is not None:
            x = x + residual
        if self.spec.has_projections:
            x = self.project_out(x)
        return x

    def check(self, batch: TokenBatch, kv_cache: LayerCaches) -> None:
        """Raises ValueError for tokens outside the caches or the tables, without a look at a GPU.

        Ops on CPUs check this themselves.
        """
        keys, _ = kv_cache.layer(0)
        ops.check_segments(batch.segments.rows, keys, self.rotary_cos)

    def forward(
        self, batch: TokenBatch, hidden_states: Tensor | None, kv_cache: LayerCaches
    ) -> Tensor:
        """Runs one micro-batch through the stage, extending the KV cache in place.

        Args:
            batch: T tokens; positions must be below the stage's max_tokens and the cache's length.
            hidden_states: [T, hidden] from the previous stage; None on the first stage.
            kv_cache: caches of this stage's blocks.

        Returns:
            Hidden states [T, hidden] in the stage's dtype or, on the last stage, logits fp32 [R,
            vocab] of `batch.logit_rows`.
        """
        first = self.slice.first
        assert (hidden_states is None) == first, "all but the first stage get hidden states"
        tables = PositionTables(self.rotary_cos, self.rotary_sin, self.alibi_slopes)
        x = self._embed(batch) if hidden_states is None else hidden_states
        blocks: Any = self.blocks.values()
        x, residual = run_blocks(
            blocks, x, batch.segments, kv_cache.layer, tables, self._block_calls
        )
        if self.slice.last:
            return self._logits(x, residual, batch.logit_rows)
        return x if residual is None else x + residual


def _check(spec: ModelSpec, blocks: range, max_tokens: int | None) -> None:
    if blocks.step != 1 or blocks.start < 0 or blocks.stop > spec.num_blocks:
        raise ValueError(
            f"DecoderStage: blocks must be contiguous within 0..{spec.num_blocks - 1}, got "
            f"{blocks}; plan the stages again for this model"
        )
    limit = spec.max_positions
    if max_tokens is not None and limit is not None and max_tokens > limit:
        raise ValueError(
            f"DecoderStage: max_tokens must be at most {limit} for this {spec.model_type} "
            f"model, got {max_tokens}; {spec.limit_advice}"
        )
