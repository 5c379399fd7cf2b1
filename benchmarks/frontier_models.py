"""transformers' fp32 model whose linears are computed at a point of the frontier, and back."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from frontier_points import Features, Point, PointLinear, total_cost
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dist_int8.checkpoint.calibrate import NUM_TOKENS, WINDOW
from dist_int8.evaluation.host import Host
from dist_int8.evaluation.outlier_features import inject_outlier_features
from dist_int8.int8 import reference
from dist_int8.int8.rotation import rotate, rotation_block
from dist_int8.models import load_config

# the second linear of an MLP, by the names that transformers has for it
DOWN = ("down_proj", "dense_4h_to_h", "fc2", "c_proj")
INT8_KV = "frontier_int8_kv"


def rounds_kv(folder: str | Path) -> bool:
    """Whether the model's attention can be replaced by one that rounds keys and values."""
    return load_config(folder).model_type != "bloom"  # its ALiBi is in code of its own


class Subject:
    """A model that is measured at one point after the other."""

    def __init__(self, folder: str | Path, seed: int | None) -> None:
        """Loads the model, injects features if there is a seed, and runs random tokens through."""
        self._host = Host(folder)
        model = self._host.model
        if seed is not None:
            inject_outlier_features(model, seed)
        self._head: nn.Linear = model.get_output_embeddings()
        self._features: dict[nn.Linear, Features] = {}
        self._made: dict[Point, dict[nn.Linear, PointLinear]] = {}
        self._calibrate()

    def logits(self, token_ids: Tensor) -> Tensor:
        """token_ids int64 [T] -> fp32 [T, vocab]."""
        return self._host.logits(token_ids[None])[0]

    @contextlib.contextmanager
    def computing(self, point: Point) -> Iterator[None]:
        """Makes the model compute at the point within the context."""
        changed: list[nn.Module] = []
        layers: dict[Any, Any] = dict(self._layers(point))
        model, attention = self._host.model, self._host.model.config._attn_implementation
        if point.int8_embedding:
            embedding = model.get_input_embeddings()
            layers[embedding] = _rounded_embedding(embedding)
        if point.int8_kv:
            _register_kv(point.rotation)
            model.set_attn_implementation(INT8_KV)
        try:
            for module, forward in layers.items():
                module.forward = forward  # an attribute of the instance hides the method
                changed.append(module)
            yield
        finally:
            for module in changed:
                del module.forward
            if point.int8_kv:
                model.set_attn_implementation(attention)

    def cost(self, point: Point) -> dict[str, float]:
        """What the linears of the blocks cost at the point, after they have run."""
        made = [linear for key, linear in self._layers(point).items() if key is not self._head]
        return total_cost(made).figures()

    def forget(self, points: Iterable[Point]) -> None:
        """Frees the weights of points that are finished."""
        for point in points:
            self._made.pop(point, None)

    def _layers(self, point: Point) -> dict[nn.Linear, PointLinear]:
        if point not in self._made:
            linears = dict(self._host.linears)
            if point.int8_head:
                linears["head"] = self._head
            self._made[point] = {
                linear: PointLinear(linear, point, self._features[linear], name.endswith(DOWN))
                for name, linear in linears.items()
            }
        return self._made[point]

    @torch.inference_mode()
    def _calibrate(self) -> None:
        """Sees the inputs of every linear on the random tokens of `checkpoint.calibrate`."""

        def note(linear: nn.Linear, x: Tensor) -> None:
            rows = x.reshape(-1, x.shape[-1]).float()
            absmax, square_sum = rows.abs().amax(0), rows.square().sum(0)
            if (seen := self._features.get(linear)) is not None:
                absmax = torch.maximum(absmax, seen.absmax)
                square_sum = square_sum + seen.square_sum
            self._features[linear] = Features(absmax, square_sum)

        config = self._host.model.config
        generator = torch.Generator().manual_seed(0)
        token_ids = torch.randint(config.vocab_size, (NUM_TOKENS,), generator=generator)
        hooks = [
            linear.register_forward_pre_hook(lambda module, inputs: note(module, inputs[0]))
            for linear in (*self._host.linears.values(), self._head)
        ]
        longest = getattr(config, "max_position_embeddings", None) or WINDOW
        for ids in token_ids.split(min(WINDOW, longest)):
            self.logits(ids)
        for hook in hooks:
            hook.remove()


def _rounded_embedding(embedding: nn.Embedding) -> Any:
    """One scale per token, as `Int8Embedding`."""
    weight = reference.dequantize_weight(*reference.quantize_weight(embedding.weight.detach()))
    return lambda token_ids: nn.functional.embedding(token_ids, weight)


def _register_kv(rotation: int) -> None:
    """Registers an attention that rounds keys (rotated, with the queries) and values to int8."""

    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any
    ) -> Any:
        block = rotation_block(key.shape[-1], rotation)
        query, key = rotate(query, rotation) / block, rotate(key, rotation)
        return sdpa_attention_forward(
            module, query, _rounded_heads(key), _rounded_heads(value), mask, **options
        )

    AttentionInterface.register(INT8_KV, forward)
    AttentionMaskInterface.register(INT8_KV, sdpa_mask)


def _rounded_heads(heads: Tensor) -> Tensor:
    """heads [..., D] -> the same in 255 steps, one scale per token and head."""
    rows = heads.reshape(-1, heads.shape[-1])
    return reference.dequantize_weight(*reference.quantize_weight(rows)).view_as(heads)
