"""One decoder block for every family, described by `BlockSpec`.

Between blocks the residual stream travels as a pair (x, residual): the sum is the hidden state.
The next norm adds and normalizes in one op (`ops.add_norm`), so a Llama block is eight calls:
add_norm, qkv, attention, attention_output, add_norm, gate_up, silu_mul, down.

On a GPU, a norm, an activation or the attention in front of an `Int8Linear` also quantizes its
rows, so that they never travel through memory in floating point. On CPUs `int8_linear` quantizes
inside, and blocks like Llama's run in one call (`run_blocks.py`), with the same result.
"""

from functools import partial
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from dist_int8.int8 import ops
from dist_int8.int8.activations import ACTIVATIONS
from dist_int8.int8.attention_args import AttentionArgs
from dist_int8.int8.kv import Cache
from dist_int8.int8.linear import Int8Linear
from dist_int8.models.spec import BlockSpec, NormKind

# Types of devices where norms and activations quantize for the linear after them.
FUSED_DEVICES = {"cuda"}

Input = Tensor | ops.QuantizedRows  # of a linear: QuantizedRows only for an Int8Linear


def _takes_rows(linear: nn.Module, x: Tensor) -> TypeGuard[Int8Linear]:
    return isinstance(linear, Int8Linear) and x.device.type in FUSED_DEVICES


class PositionTables(NamedTuple):
    """What attention needs to know about positions, shared by the blocks of a stage."""

    cos: Tensor | None  # fp32 [P, R/2]
    sin: Tensor | None  # fp32 [P, R/2]
    alibi_slopes: Tensor | None  # fp32 [num_heads]


class Norm(nn.Module):
    """RMSNorm or LayerNorm over rows of [T, hidden], fused with the addition of the residual."""

    def __init__(
        self, hidden_size: int, kind: NormKind, eps: float, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.kind = kind
        self.eps = eps

        def make() -> nn.Parameter:
            return nn.Parameter(torch.empty(hidden_size, device=device), requires_grad=False)

        self.weight = make()
        self.register_parameter("bias", make() if kind == "layer" else None)

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns (norm(x + residual), x + residual), both [T, hidden]."""
        # Not self.weight and self.bias: nn.Module.__getattr__ costs about 1 us for each.
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        assert weight is not None
        return ops.add_norm(x, residual, weight, bias, self.eps, self.kind)

    def before(self, linear: nn.Module, x: Tensor, residual: Tensor | None) -> tuple[Input, Tensor]:
        """Returns (norm(x + residual) as `linear` takes it, x + residual [T, hidden])."""
        if not _takes_rows(linear, x):
            return self(x, residual)
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        assert weight is not None
        return ops.add_norm_quantize(
            x, residual, weight, bias, self.eps, self.kind, *linear.quantization
        )

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, kind={self.kind}, eps={self.eps}"


class DecoderBlock(nn.Module):
    """Attention and MLP of one layer.

    Linears are named `qkv` (rows: all query heads, all key heads, all value heads),
    `attention_output`, `gate_up` (rows: gate, up) or `up`, and `down`; `convert` replaces them by
    `Int8Linear`.
    """

    def __init__(self, spec: BlockSpec, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.spec = spec
        linear = partial(nn.Linear, device=device)
        hidden, inner = spec.hidden_size, spec.intermediate_size
        self.scale = spec.head_dim**-0.5
        self.attention_norm = Norm(hidden, spec.norm, spec.norm_eps, device)
        self.qkv = linear(hidden, spec.qkv_size, bias=spec.qkv_bias)
        self.attention_output = linear(
            spec.num_heads * spec.head_dim, hidden, bias=spec.attention_output_bias
        )
        self.mlp_norm = Norm(hidden, spec.norm, spec.norm_eps, device)
        if spec.gated:
            assert spec.activation == "silu", "the gated MLP is silu_mul"
            self.gate_up = linear(hidden, 2 * inner, bias=spec.mlp_bias)
        else:
            self.up = linear(hidden, inner, bias=spec.mlp_bias)
            self.activation = ACTIVATIONS[spec.activation]
        self.down = linear(inner, hidden, bias=spec.mlp_bias)

    def _attention(
        self,
        x: Input,
        segments: ops.Segments,
        key_cache: Cache,
        value_cache: Cache,
        tables: PositionTables,
    ) -> Tensor:
        spec = self.spec
        args = AttentionArgs(
            spec.num_heads, spec.num_kv_heads, self.scale, *tables, window=spec.window
        )
        qkv, output = self.qkv(x), self.attention_output
        if _takes_rows(output, qkv):
            rows = ops.attention_quantize(
                qkv, key_cache, value_cache, segments, args, *output.quantization
            )
            return output(rows)
        return output(ops.attention(qkv, key_cache, value_cache, segments, args))

    @property
    def _first_of_mlp(self) -> nn.Module:
        return self.gate_up if self.spec.gated else self.up

    def _mlp(self, x: Input) -> Tensor:
        inner = self._first_of_mlp(x)
        if _takes_rows(self.down, inner):
            down: Int8Linear = self.down
            if self.spec.gated:
                return down(ops.silu_mul_quantize(inner, *down.quantization))
            return down(ops.activation_quantize(inner, self.spec.activation, *down.quantization))
        return self.down(ops.silu_mul(inner) if self.spec.gated else self.activation(inner))

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        segments: ops.Segments,
        key_cache: Cache,
        value_cache: Cache,
        tables: PositionTables,
    ) -> tuple[Tensor, Tensor | None]:
        """Runs the block and writes this micro-batch's keys and values into the caches.

        Args:
            x: [T, hidden].
            residual: [T, hidden] still to be added to x, or None.
            segments: which tokens the rows of x are.
            key_cache: [S, KV, D, L], changed in place; or in int8.
            value_cache: [S, KV, L, D], changed in place; or in int8.
            tables: the stage's position tables.

        Returns:
            The pair (x, residual) for the next block; their sum is the hidden state.
        """
        spec = self.spec
        if spec.norm_after:
            hidden = x if residual is None else x + residual
            attended = self._attention(hidden, segments, key_cache, value_cache, tables)
            hidden, _ = self.attention_norm(attended, hidden)
            hidden, _ = self.mlp_norm(self._mlp(hidden), hidden)
            return hidden, None
        if spec.residual_from_norm:
            normed, _ = self.attention_norm(x, residual)
            attended = self._attention(normed, segments, key_cache, value_cache, tables)
            normed, _ = self.mlp_norm(attended, normed)
            return self._mlp(normed), normed
        rows, total = self.attention_norm.before(self.qkv, x, residual)
        attended = self._attention(rows, segments, key_cache, value_cache, tables)
        if spec.parallel_residual:
            rows, _ = self.mlp_norm.before(self._first_of_mlp, total, None)
            return self._mlp(rows) + attended, total
        rows, total = self.mlp_norm.before(self._first_of_mlp, attended, total)
        return self._mlp(rows), total
