"""Hot columns: the input features of each linear that keep exact weights, found on some tokens.

A few features are far larger than the rest, the same ones for all tokens (section 4 of the
LLM.int8() paper), so that a short run over any tokens finds them. The model streams past: a block
is read in floating point, the tokens' hidden states pass through it, and it is freed before the
next one. Which tokens these are does not matter much; random ones will do. The features with the
largest mean square are taken, which are better than those with the largest single element.
"""

import hashlib
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from dist_int8.checkpoint.load import StageLoader
from dist_int8.checkpoint.stage_format import StageFormat
from dist_int8.int8.convert import is_skipped
from dist_int8.models.spec import ModelSpec
from dist_int8.models.stage_slice import StageSlice
from dist_int8.models.token_batch import TokenBatch
from dist_int8.models.tokenizer import read_tokens

OFF, RANDOM = "off", "random"
NUM_TOKENS = 1024
# Maximum number of tokens in a sequence.
WINDOW = 1024


@dataclass(frozen=True)
class Calibration:
    """The tokens that hot columns are found with.

    Attributes:
        token_ids: int64 [tokens].
        num_hot_columns: of each linear.
        source: "random", or "text" with a checksum of its tokens.
        down_hot_columns: of each `down`, which has more input features; None: num_hot_columns.
    """

    token_ids: Tensor
    num_hot_columns: int
    source: str
    down_hot_columns: int | None = None

    def count(self, name: str, num_features: int) -> int:
        """Returns the number of hot columns of a linear, by its name ("blocks.0.qkv")."""
        number = self.num_hot_columns
        if name.endswith(".down") and self.down_hot_columns is not None:
            number = self.down_hot_columns
        return min(number, num_features)


def make_calibration(
    folder: str | Path,
    spec: ModelSpec,
    calibrate: str,
    num_hot_columns: int,
    down_hot_columns: int | None = None,
) -> Calibration | None:
    """Makes the calibration that the settings ask for; None: off, or without hot columns.

    Args:
        folder: of the checkpoint; its tokenizer reads a text.
        spec: `models.describe` of its config.
        calibrate: "random" (1,024 tokens, always the same), a text file (its first 1,024 tokens),
            or "off".
        num_hot_columns: of each linear, or all its features if it has fewer.
        down_hot_columns: the same of each `down`; None: as many.

    Raises:
        ValueError: no such file, or one without text, or no tokenizer, or more hot columns than any
            linear has input features.
    """
    if calibrate == OFF or num_hot_columns == 0:
        return None
    widths = [spec.embedding_size]
    for block in spec.blocks:
        widths += [block.hidden_size, block.num_heads * block.head_dim, block.intermediate_size]
    widest = max(widths)
    if num_hot_columns > widest:
        raise ValueError(
            f"calibrate: num_hot_columns must be at most the {widest} input features of the "
            f"widest linear, got {num_hot_columns}; use 16"
        )
    if calibrate == RANDOM:
        seed = torch.Generator().manual_seed(0)
        token_ids = torch.randint(spec.vocab_size, (NUM_TOKENS,), generator=seed)
        return Calibration(token_ids, num_hot_columns, RANDOM, down_hot_columns)
    token_ids = read_tokens(folder, calibrate, NUM_TOKENS, spec.vocab_size)
    if len(token_ids) == 0:
        raise ValueError(
            f"calibrate: calibrate must be a file with text, got {calibrate!r} without a token; "
            "name another file, or use random"
        )
    digest = hashlib.sha256(token_ids.numpy().tobytes()).hexdigest()
    return Calibration(token_ids, num_hot_columns, f"text {digest[:16]}", down_hot_columns)


@torch.inference_mode()
def find_hot_columns(
    folder: str | Path,
    spec: ModelSpec,
    calibration: Calibration,
    stage_slice: StageSlice | None = None,
    *,
    skip: Collection[str] = (),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    allow_pickle: bool = False,
    progress: Callable[[int], object] | None = None,
) -> dict[str, list[int]]:
    """Finds the input features of a stage's linears with the largest mean square over the tokens.

    Memory: one block in `dtype` and the hidden states [tokens, hidden]. Reads every block once.

    Args:
        folder: of a checkpoint that is not int8.
        spec: `models.describe` of its config.
        calibration: the tokens, run in sequences of 1,024 or what the model allows, and the number
            of columns.
        stage_slice: whose linears are wanted: those of its blocks, and the head of a last stage.
            The blocks before it run too, and for the head all blocks. None: every block, no head.
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
    if stage_slice is None:
        stage_slice = StageSlice(range(spec.num_blocks), first=True, last=False)
    window = min(WINDOW, spec.max_positions or WINDOW)
    stage_format = StageFormat(dtype=dtype, int8=False, max_tokens=window)
    loader = StageLoader(Path(folder), spec, stage_format, device, progress, allow_pickle)
    run = _CalibrationRun(loader, calibration, window)
    wants_head = stage_slice.last and not is_skipped("lm_head", skip)
    found: dict[str, list[int]] = {}
    for index in range(spec.num_blocks if wants_head else stage_slice.blocks.stop):
        for name, energy in run.run_block(index).items():
            if index in stage_slice.blocks and not is_skipped(name, skip):
                found[name] = run.choose_columns(name, energy)
    if wants_head:
        found["lm_head"] = run.choose_columns("lm_head", run.measure_head_input())
    return found


class _CalibrationRun:
    """The calibration's tokens on their way through the model, one block at a time."""

    def __init__(self, loader: StageLoader, calibration: Calibration, window: int) -> None:
        self._loader = loader
        self._calibration = calibration
        self._window = window
        self._batches = [
            TokenBatch.from_segments(ids, [(0, 0, len(ids))], device=loader.device)
            for ids in calibration.token_ids.split(window)
        ]
        self._hidden_states = self._embed(calibration.token_ids)

    def _embed(self, token_ids: Tensor) -> list[Tensor]:
        rows, places = token_ids.unique(return_inverse=True)
        first = self._loader.load_embedding_rows(rows)
        device = self._loader.device
        return [
            first(replace(batch, token_ids=ids.to(device)), None, NO_CACHES)
            for ids, batch in zip(places.split(self._window), self._batches, strict=True)
        ]

    def run_block(self, index: int) -> dict[str, Tensor]:
        """Runs the next block; returns the energy of each linear's inputs (`_energy`)."""
        loader = self._loader
        stage = loader.load(StageSlice(range(index, index + 1), first=False, last=False))
        caches = _OneBlock(loader.spec, index, self._window, stage.dtype, loader.device)
        energies = _watch(stage.blocks[str(index)])
        self._hidden_states = [
            stage(batch, hidden, caches)
            for batch, hidden in zip(self._batches, self._hidden_states, strict=True)
        ]
        return {f"blocks.{index}.{name}": energy for name, energy in energies.items()}

    def measure_head_input(self) -> Tensor:
        """Returns the energy of the head's inputs, after the last block."""
        # Its norm is not among the bytes announced.
        stage = replace(self._loader, progress=None).load_before_head()
        inputs = (_energy(stage.before_head(hidden)) for hidden in self._hidden_states)
        return torch.stack(list(inputs)).sum(0)

    def choose_columns(self, name: str, energy: Tensor) -> list[int]:
        """Returns the features with the largest energy, ascending."""
        if not energy.isfinite().all():
            raise ValueError(
                f"calibrate: activations must be finite, got NaN or Inf before {name}; the model "
                f"does not work in {self._loader.stage_format.dtype}"
            )
        count = self._calibration.count(name, len(energy))
        return sorted(energy.topk(count).indices.tolist())


def _watch(block: nn.Module) -> dict[str, Tensor]:
    """Makes a dictionary that will hold the energy of every input feature of each linear."""
    energies: dict[str, Tensor] = {}

    def note(name: str, x: Tensor) -> None:
        energy = _energy(x.detach())
        energies[name] = energies[name] + energy if name in energies else energy

    for name, child in block.named_modules():
        if type(child) is nn.Linear:
            child.register_forward_pre_hook(
                lambda module, arguments, name=name: note(name, arguments[0])
            )
    return energies


def _energy(x: Tensor) -> Tensor:
    """x [tokens, K] -> the sum of squares of each feature, fp64 [K]."""
    return x.double().square().sum(dim=0)


class _NoCaches:
    """The caches of a stage without blocks."""

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        raise AssertionError("no block, no cache")


NO_CACHES = _NoCaches()


class _OneBlock:
    """The cache of one sequence in one block; every sequence overwrites the one before."""

    def __init__(
        self, spec: ModelSpec, index: int, window: int, dtype: torch.dtype, device: object
    ) -> None:
        block = spec.blocks[index]
        shape = (1, block.num_kv_heads, block.head_dim, window)
        self._key = torch.zeros(shape, dtype=dtype, device=str(device))
        self._value = torch.zeros_like(self._key).transpose(2, 3).contiguous()

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        return self._key, self._value
