"""How many launches, copies and host waits does a micro-batch make on a GPU? Counted without one.

    DIST_INT8_LIBRARY=build/bundle/_ops.so python benchmarks/launches.py

The runtime's own stage runs on torch's fake tensors of a GPU: every op goes through torch's
dispatcher with the shapes, dtypes and decisions of a real one, and computes nothing. The library
must be compiled with CUDA kernels (`make gpu-bundle`), since what runs depends on which it has. A
recorder counts

- launches: kernels that ops start (`KERNELS`: more than one for some; none for views),
- uploads and downloads: copies between host and GPU,
- waits: copies for which the host waits, and values that it reads.

A decode step that is replayed as a graph counts what `DecodeGraphs.run` does around the replay.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_int8.engine import TokenSampler
from dist_int8.int8 import convert, prefill
from dist_int8.models import DecoderStage, StageSlice, describe, load_config
from dist_int8.pipeline.kv_cache import KVCache
from dist_int8.pipeline.microbatch import SAMPLING_FIELDS, Kind, Limits, MicroBatch, Result
from dist_int8.pipeline.stage import Stage

MODELS = Path(__file__).parents[1] / "configs" / "models"
DEVICE = torch.device("cuda:0")
# Kernels that one call of an op starts, where that is not one.
KERNELS = {
    "dist_int8::attention": 3,  # place, attend, combine
    "dist_int8::int8_linear": 2,  # quantize_rows, the product; above 128 rows int8_finish as well
    "aten::_flash_attention_forward": 1,
}
NO_KERNEL = {"aten::empty", "aten::empty_strided", "aten::detach", "aten::_pin_memory"}
STEPS = {
    "decode, 1 sequence": [(0, 100, 1)],
    "decode, 8 sequences": [(slot, 100, 1) for slot in range(8)],
    "decode, 32 sequences": [(slot, 100, 1) for slot in range(32)],
    "31 decode, a prompt of 512": [*((slot, 100, 1) for slot in range(31)), (31, 0, 512)],
    "31 decode, the prompt's next 512": [*((s, 100, 1) for s in range(31)), (31, 512, 512)],
    "prefill of 4 x 512": [(slot, 0, 512) for slot in range(4)],
}
LIMITS = Limits(32, max_tokens=2048, max_rows=4096, hidden_size=0, vocab_size=0)


class Recorder(TorchDispatchMode):
    """Counts what ops on fake tensors of a GPU would do."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.name().split(".")[0]
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        on_gpu = any(t.is_cuda for t in (*given, *made))
        if not on_gpu or name in NO_KERNEL or func.is_view:
            return result
        if name in ("aten::_to_copy", "aten::copy_"):
            source = given[-1]
            target = made[0]
            if source.is_cuda != target.is_cuda:
                self.counts["uploads" if target.is_cuda else "downloads"] += 1
                self.counts["waits"] += not (kwargs.get("non_blocking") or args[-1] is True)
                return result
        if name == "aten::_local_scalar_dense":
            self.counts["waits"] += 1
            return result
        self.counts["launches"] += KERNELS.get(name, 1)
        self.ops[name] += KERNELS.get(name, 1)
        return result


@contextlib.contextmanager
def on_a_fake_gpu() -> Iterator[None]:
    """What fake tensors lack: pinned memory, streams, a capability; flash attention works."""
    stream = mock.Mock()
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(Tensor, "pin_memory", lambda self: self),
        mock.patch.object(torch.cuda, "current_stream", return_value=stream),
        mock.patch.object(prefill, "is_usable", lambda *_: True),
    ):
        yield


def make_stage(name: str, num_blocks: int) -> tuple[Stage, Limits]:
    """The first `num_blocks` blocks of a model with its embedding and head, as one stage."""
    spec = describe(load_config(MODELS / name))
    stage_slice = StageSlice(range(spec.num_blocks), first=True, last=True)
    model = DecoderStage.empty(spec, stage_slice, torch.bfloat16, LIMITS.max_tokens)
    for index in range(num_blocks, spec.num_blocks):
        del model.blocks[str(index)]
    convert.convert(model, outlier_rule="none", outlier_threshold=0.0, rotation=64)
    model = model.to_empty(device=DEVICE)
    model.move_tables(DEVICE)
    block = spec.blocks[0]
    cache = KVCache(
        num_blocks,
        LIMITS.num_slots,
        block.num_kv_heads,
        block.head_dim,
        LIMITS.max_tokens,
        torch.bfloat16,
        DEVICE,
    )
    limits = Limits(LIMITS.num_slots, 2048, 4096, spec.hidden_size, spec.vocab_size)
    return Stage(model, cache, TokenSampler(limits, DEVICE)), limits


def make_step(segments: list[tuple[int, int, int]], start: bool) -> MicroBatch:
    num_tokens = sum(count for _, _, count in segments)
    micro_batch = MicroBatch(
        Kind.STEP,
        token_ids=torch.zeros(num_tokens, dtype=torch.int64),
        segments=torch.tensor(segments, dtype=torch.int32),
        emits=torch.ones(len(segments), dtype=torch.int64),
    )
    if start:
        neutral = dict.fromkeys(SAMPLING_FIELDS, 0.0) | {"top_p": 1.0, "repetition_penalty": 1.0}
        rows = [list((neutral | {"temperature": 1.0}).values())] * len(segments)
        micro_batch.starts = torch.tensor([[slot, 7] for slot, _, _ in segments])
        micro_batch.settings = torch.tensor(rows, dtype=torch.float64)
    return micro_batch


def count(stage: Stage, segments: list[tuple[int, int, int]]) -> Recorder:
    stage.run(make_step([(slot, 0, 1) for slot in range(LIMITS.num_slots)], start=True), None)
    micro_batch = make_step(segments, start=False)
    with Recorder() as recorder:
        result = stage.run(micro_batch, None)
    assert isinstance(result, Result)
    return recorder
