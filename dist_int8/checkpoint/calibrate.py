"""Hot columns: which input features of each linear keep exact weights, found on some tokens.

A few features are far larger than the rest, the same ones for all tokens (section 4 of the
LLM.int8() paper), so that a short run over any tokens finds them. The model streams past: a block
is read in floating point, the tokens' hidden states pass through it, and it is let go of before the
next one. Which tokens does not matter much; random ones will do.
"""

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dist_int8.checkpoint.load import load_stage
from dist_int8.int8.convert import is_skipped
from dist_int8.models.decoder import DecoderStage, TokenBatch
from dist_int8.models.spec import ModelSpec
from dist_int8.models.tokenizer import read_tokens

OFF, RANDOM = "off", "random"
NUM_TOKENS = 1024
# Tokens of a sequence at most.
WINDOW = 1024


@dataclass(frozen=True)
class Calibration:
    """What hot columns are found with.

    Attributes:
        token_ids: int64 [tokens].
        num_hot_columns: of each linear.
        source: "random", or "text" with the sum of its tokens.
    """

    token_ids: Tensor
    num_hot_columns: int
    source: str


def make_calibration(
    folder: str | Path, spec: ModelSpec, calibrate: str, num_hot_columns: int
) -> Calibration | None:
    """The calibration that the settings ask for; None: off, or without hot columns.

    Args:
        folder: of the checkpoint; its tokenizer reads a text.
        spec: `models.describe` of its config.
        calibrate: "random" (1,024 tokens, the same ones every time), a text file (its first 1,024
            tokens), or "off".
        num_hot_columns: of each linear.

    Raises:
        ValueError: no such file, or one without text, or no tokenizer, or more hot columns than a
            linear has input features.
    """
    if calibrate == OFF or num_hot_columns == 0:
        return None
    widths = [spec.embedding_size]
    for block in spec.blocks:
        widths += [block.hidden_size, block.num_heads * block.head_dim, block.intermediate_size]
    narrowest = min(widths)
    if num_hot_columns > narrowest:
        raise ValueError(
            f"calibrate: num_hot_columns must be at most the {narrowest} input features of the "
            f"narrowest linear, got {num_hot_columns}; 16 do"
        )
    if calibrate == RANDOM:
        seed = torch.Generator().manual_seed(0)
        token_ids = torch.randint(spec.vocab_size, (NUM_TOKENS,), generator=seed)
        return Calibration(token_ids, num_hot_columns, RANDOM)
    token_ids = read_tokens(folder, calibrate, NUM_TOKENS)
    if len(token_ids) == 0:
        raise ValueError(
            f"calibrate: calibrate must be a file with text, got {calibrate!r} without a token; "
            "name another, or random"
        )
    digest = hashlib.sha256(token_ids.numpy().tobytes()).hexdigest()
    return Calibration(token_ids, num_hot_columns, f"text {digest[:16]}")


@torch.inference_mode()
def find_hot_columns(
    folder: str | Path,
    spec: ModelSpec,
    calibration: Calibration,
    *,
    blocks: range | None = None,
    head: bool = False,
    skip: Collection[str] = (),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    allow_pickle: bool = False,
    progress: Callable[[int], object] | None = None,
) -> dict[str, list[int]]:
    """The input features with the largest magnitude over the tokens, of blocks' linears and head.

    Memory: one block in `dtype` and the hidden states [tokens, hidden]. Reads every block once.

    Args:
        folder: of a checkpoint that is not int8.
        spec: `models.describe` of its config.
        calibration: the tokens, run in sequences of 1,024 or what the model allows, and the number
            of columns: of a linear with fewer input features all of them.
        blocks: whose linears are wanted; those before them are run too. None: all.
        head: the head too, unless it is skipped; all blocks are run for it.
        skip: linears that stay floating, by name component.
        device: where blocks run.
        dtype: of weights and hidden states there.
        allow_pickle: read `.bin` files where there is no safetensors file.
        progress: called with the number of checkpoint bytes just read.

    Returns:
        For the name of each linear ("blocks.0.qkv", "lm_head") its columns in ascending order.

    Raises:
        ValueError: as `load_stage`, for a token that the model does not have, or where activations
            are not finite.
    """
    token_ids = calibration.token_ids
    if token_ids.max() >= spec.vocab_size:
        raise ValueError(
            f"calibrate: tokens must be in 0..{spec.vocab_size - 1}, got {token_ids.max()}; the "
            "folder's tokenizer must be that of the model"
        )
    window = min(WINDOW, spec.max_positions or WINDOW)
    batches = [
        TokenBatch.from_segments(ids, [(0, 0, len(ids))], device=device)
        for ids in token_ids.split(window)
    ]

    def load(
        blocks: range, embedding_rows: Tensor | None = None, last: bool = False
    ) -> DecoderStage:
        return load_stage(
            folder,
            spec,
            blocks,
            first=embedding_rows is not None,
            last=last,
            head=False,
            device=device,
            dtype=dtype,
            int8=False,
            progress=None if last else progress,  # a norm, not in the bytes announced
            max_tokens=window,
            allow_pickle=allow_pickle,
            embedding_rows=embedding_rows,
        )

    rows, places = token_ids.unique(return_inverse=True)
    first = load(range(0), rows)
    hidden_states = [
        first(TokenBatch(ids.to(device), batch.segments, batch.positions), None, NO_CACHES)
        for ids, batch in zip(places.split(window), batches, strict=True)
    ]
    del first
    blocks = range(spec.num_blocks) if blocks is None else blocks
    found: dict[str, list[int]] = {}
    head = head and not is_skipped("lm_head", skip)

    def hottest(name: str, absmax: Tensor) -> list[int]:
        if not absmax.isfinite().all():
            raise ValueError(
                f"calibrate: activations must be finite, got NaN or Inf before {name}; the model "
                f"does not work in {dtype}"
            )
        columns = absmax.topk(calibration.num_hot_columns).indices
        return sorted(columns.tolist())

    for index in range(spec.num_blocks if head else blocks.stop):
        stage = load(range(index, index + 1))
        caches = _OneBlock(spec, index, window, dtype, device)
        block = stage.blocks[str(index)]
        largest = _watch(block)
        hidden_states = [
            stage(batch, hidden, caches)
            for batch, hidden in zip(batches, hidden_states, strict=True)
        ]
        for name, absmax in largest.items():
            qualified = f"blocks.{index}.{name}"
            if index in blocks and not is_skipped(qualified, skip):
                found[qualified] = hottest(qualified, absmax)
        del stage, block, caches
    if head:
        stage = load(range(0), last=True)
        inputs = (stage.before_head(hidden).float().abs().amax(0) for hidden in hidden_states)
        found["lm_head"] = hottest("lm_head", torch.stack(list(inputs)).amax(0))
    return found


def _watch(block: nn.Module) -> dict[str, Tensor]:
    """Will hold the largest magnitude of every input feature of each linear, fp32 [K]."""
    largest: dict[str, Tensor] = {}

    def note(name: str, x: Tensor) -> None:
        absmax = x.detach().float().abs().amax(dim=0)
        largest[name] = torch.maximum(largest.get(name, absmax), absmax)

    for name, child in block.named_modules():
        if type(child) is nn.Linear:
            child.register_forward_pre_hook(
                lambda module, arguments, name=name: note(name, arguments[0])
            )
    return largest


class _NoCaches:
    """Of a stage without blocks."""

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        raise AssertionError("no block, no cache")


NO_CACHES = _NoCaches()


class _OneBlock:
    """Keys and values of one sequence in one block; every sequence begins anew in it."""

    def __init__(
        self, spec: ModelSpec, index: int, window: int, dtype: torch.dtype, device: object
    ) -> None:
        block = spec.blocks[index]
        shape = (1, block.num_kv_heads, block.head_dim, window)
        self._key = torch.zeros(shape, dtype=dtype, device=str(device))
        self._value = torch.zeros_like(self._key).transpose(2, 3).contiguous()

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        return self._key, self._value
