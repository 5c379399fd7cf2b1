"""How many launches, copies and host waits does a micro-batch make on a GPU? Counted without one.

    DIST_INT8_LIBRARY=build/bundle/_ops.so python benchmarks/launches.py

The runtime's own stage runs on torch's fake tensors of a GPU: every op goes through torch's
dispatcher with the shapes, dtypes and decisions of a real one, and computes nothing. The library
must be compiled with CUDA kernels (`make gpu-bundle`), since what runs depends on which it has. A
recorder counts

- launches: kernels that ops start (`KERNELS`: more than one for some; none for views), "per_block"
  of them in each block,
- uploads and downloads: copies between host and GPU,
- waits: copies for which the host waits, and values that it reads.

A step that is "replayed" is one launch, and what `DecodeGraphs.run` does around it.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from results import make_parser, write_result
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_int8.engine import TokenSampler, sampling
from dist_int8.int8 import attention, convert, prefill
from dist_int8.int8.library import library_info
from dist_int8.models import DecoderStage, StageSlice, describe, load_config, token_batch
from dist_int8.pipeline.graphs import DecodeGraphs
from dist_int8.pipeline.kv_cache import KVCache
from dist_int8.pipeline.microbatch import SAMPLING_FIELDS, Kind, Limits, MicroBatch, Result
from dist_int8.pipeline.stage import Stage

MODELS = Path(__file__).parents[1] / "configs" / "models"
DEVICE = torch.device("cuda:0")
# Kernels that one call of an op starts, where that is not one.
KERNELS = {
    "dist_int8::attention": 2,  # attend, combine
    "dist_int8::int8_kv_attention": 2,
    "dist_int8::attention_quantize": 2,
    "dist_int8::int8_linear": 2,  # quantize_rows and the product
}
# With more rows than this on Hopper the product is CUTLASS', and a second kernel finishes it.
PRODUCTS, MAX_OWN_ROWS = {"dist_int8::int8_linear", "dist_int8::int8_matmul"}, 128
UPLOAD = 1  # `DecodeGraphs._upload`, which copies once and does not wait
COPIES = {"aten::to", "aten::_to_copy", "aten::copy_"}
VIEWS = {  # and what only makes a tensor, in the forms that inference mode leaves undecomposed
    *("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"),
    *("aten::detach", "aten::lift_fresh", "aten::resolve_conj", "aten::resolve_neg"),
    *("aten::view", "aten::reshape", "aten::split", "aten::split_with_sizes", "aten::unbind"),
    *("aten::narrow", "aten::select", "aten::permute", "aten::transpose", "prim::device"),
}
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
        self.counts = dict.fromkeys(("launches", "uploads", "downloads", "waits"), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.name().split(".")[0]
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if name == "aten::_local_scalar_dense" and given[0].is_cuda:
            self.counts["waits"] += 1
        elif name in COPIES and made:
            self._count_copy(given[-1], made[0], [*args, *kwargs.values()])
        elif any(t.is_cuda for t in (*given, *made)) and name not in VIEWS and not func.is_view:
            finishes = name in PRODUCTS and made[0].shape[0] > MAX_OWN_ROWS
            self.counts["launches"] += KERNELS.get(name, 1) + finishes
        return result

    def _count_copy(self, source: Tensor, target: Tensor, arguments: list[Any]) -> None:
        if source is target or not (source.is_cuda or target.is_cuda):
            return
        if source.is_cuda and target.is_cuda:
            self.counts["launches"] += 1
            return
        self.counts["uploads" if target.is_cuda else "downloads"] += 1
        self.counts["waits"] += not any(argument is True for argument in arguments)


@contextlib.contextmanager
def on_a_fake_gpu() -> Iterator[FakeTensorMode]:
    """Fake tensors where the runtime brings something to the GPU or back; the host's are real.

    Pinned memory, streams and a capability, which fake tensors lack, are stood in for.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def faked(owner: Any, name: str) -> Any:
        real = getattr(owner, name)

        def with_fakes(*args: Any, **kwargs: Any) -> Any:
            with mode:
                return real(*args, **kwargs)

        return mock.patch.object(owner, name, with_fakes)

    stream = mock.Mock()
    with (
        faked(token_batch, "upload"),
        faked(sampling, "_send"),
        faked(Stage, "_make_result"),
        faked(DecodeGraphs, "_make"),
        mock.patch.object(DecodeGraphs, "_upload", lambda *_: None),  # fakes cannot: `UPLOAD`
        faked(TokenSampler, "_write_down"),
        faked(TokenSampler, "_draw"),
        faked(attention, "_attend_on_gpu"),
        faked(attention, "_attend_quantized_on_gpu"),
        mock.patch.object(Tensor, "pin_memory", lambda self: self),
        mock.patch.object(torch.cuda, "current_stream", return_value=stream),
        mock.patch.object(prefill, "is_usable", lambda *_: True),
    ):
        yield mode


def make_model(name: str, num_blocks: int) -> DecoderStage:
    """The first `num_blocks` blocks of a model with its embedding and head, on the meta device."""
    spec = describe(load_config(MODELS / name))
    stage_slice = StageSlice(range(spec.num_blocks), first=True, last=True)
    model = DecoderStage.empty(spec, stage_slice, torch.bfloat16, LIMITS.max_tokens)
    for index in range(num_blocks, spec.num_blocks):
        del model.blocks[str(index)]
    convert.convert(model, outlier_rule="none", outlier_threshold=0.0, rotation=64)
    return model


def make_stage(model: DecoderStage, int8_kv: bool) -> Stage:
    """The model as the only stage, on the fake GPU."""
    model = model.to_empty(device=DEVICE)
    model.move_tables(DEVICE)
    spec, block = model.spec, model.spec.blocks[0]
    cache = KVCache(
        len(model.blocks),
        LIMITS.num_slots,
        block.num_kv_heads,
        block.head_dim,
        LIMITS.max_tokens,
        torch.bfloat16,
        DEVICE,
        int8=int8_kv,
    )
    limits = Limits(LIMITS.num_slots, 2048, 4096, spec.hidden_size, spec.vocab_size)
    return Stage(model, cache, TokenSampler(limits, DEVICE))


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


def count(stage: Stage, micro_batch: MicroBatch) -> dict[str, int]:
    with Recorder() as recorder:
        result = stage.run(micro_batch, None)
    assert isinstance(result, Result)
    return recorder.counts


def record(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A `Recorder` of graphs: what a replay does on the GPU is one launch for the host."""
    output = work()
    return (lambda: None), output


def measure(name: str, int8_kv: bool = False) -> dict[str, dict[str, Any]]:
    """Counts of every step of a whole model, from stages of two and of three blocks."""
    spec = describe(load_config(MODELS / name))
    steps = {step: make_step(segments, start=False) for step, segments in STEPS.items()}
    first = make_step([(slot, 0, 1) for slot in range(LIMITS.num_slots)], start=True)
    found: list[dict[str, dict[str, int]]] = []
    for num_blocks, graphs in ((2, False), (3, False), (2, True)):
        model = make_model(name, num_blocks)
        with torch.inference_mode(), on_a_fake_gpu() as mode:
            with mode:
                stage = make_stage(model, int8_kv)
            if graphs:
                stage.use_graphs(LIMITS, record)
            for micro_batch in (first, *steps.values()):  # graphs are made
                stage.run(micro_batch, None)
            found.append({step: count(stage, batch) for step, batch in steps.items()})
    two, three, replayed = found
    table: dict[str, dict[str, Any]] = {}
    for step, counts in two.items():
        per_block = three[step]["launches"] - counts["launches"]
        launches = counts["launches"] + (spec.num_blocks - 2) * per_block
        table[step] = counts | {"launches": launches, "per_block": per_block}
        if step.startswith("decode"):
            replay = replayed[step]
            once = {"launches": replay["launches"] + 1, "uploads": replay["uploads"] + UPLOAD}
            table[f"{step}, replayed"] = replay | once
    return table


def main() -> None:
    parser = make_parser(__doc__, takes_model=False)
    parser.add_argument("--models", nargs="+", default=["llama-3-8b", "bloom-176b"])
    args = parser.parse_args()
    if "attention_quantize" not in library_info()["cuda_ops"]:
        parser.error(
            "the library must have CUDA kernels, got one without; make gpu-bundle, then set "
            "DIST_INT8_LIBRARY=build/bundle/_ops.so"
        )
    tables = {}
    for name in args.models:
        tables[name] = measure(name)
        tables[f"{name}, int8 KV"] = measure(name, int8_kv=True)
    for name, table in tables.items():
        for step, counts in table.items():
            figures = "  ".join(f"{key} {value}" for key, value in counts.items())
            print(f"{name:<22} {step:<40} {figures}")
    write_result("launches", {"models": tables}, args.json, args.raw)


if __name__ == "__main__":
    main()
