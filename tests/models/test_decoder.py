"""The decoder against transformers' logits, and against itself however the work is split."""

import pytest
import torch
from tiny_models import load_tiny_stage, read_spec

from dist_int8.models import DecoderStage, ModelSpec, StageSlice, TokenBatch

FIRST = [5, 17, 3, 96, 0, 41, 41, 8, 29, 77, 12, 60, 2]
SECOND = [1, 90, 33, 7, 7, 54, 68]


class Caches:
    """KV cache of a stage: 3 slots of 24 positions, filled with garbage that nothing may read."""

    def __init__(self, stage: DecoderStage, dtype: torch.dtype = torch.float32) -> None:
        block = stage.spec.blocks[0]
        heads, dim = block.num_kv_heads, block.head_dim
        self.layers = [
            (
                torch.full((3, heads, dim, 24), 1e4, dtype=dtype),
                torch.full((3, heads, 24, dim), 1e4, dtype=dtype),
            )
            for _ in stage.slice.blocks
        ]

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layers[index]


class Model:
    """The stages of a whole model with their caches."""

    def __init__(self, folder, spec: ModelSpec, num_stages: int = 1, **options) -> None:
        edges = [spec.num_blocks * i // num_stages for i in range(num_stages + 1)]
        slices = [
            StageSlice(range(edges[i], edges[i + 1]), first=i == 0, last=i == num_stages - 1)
            for i in range(num_stages)
        ]
        self.stages = [load_tiny_stage(folder, stage_slice, **options) for stage_slice in slices]
        dtype = options.get("dtype", torch.float32)
        self.caches = [Caches(stage, dtype) for stage in self.stages]

    def __call__(self, token_ids, segments, logit_rows=None) -> torch.Tensor:
        batch = TokenBatch.from_segments(token_ids, segments, logit_rows)
        hidden = None
        for stage, caches in zip(self.stages, self.caches, strict=True):
            hidden = stage(batch, hidden, caches)
        return hidden


def steps(*parts: tuple[int, int, int]):
    """Parts (sequence, start, count) of a micro-batch -> its token ids and segments."""
    token_ids, segments = [], []
    for which, start, count in parts:
        token_ids += (FIRST, SECOND)[which][start : start + count]
        segments.append((2 if which == 0 else 0, start, count))
    return token_ids, segments


# Each schedule feeds both sequences completely; a number is a micro-batch.
SCHEDULES = {
    "alone": [steps((0, 0, 13)), steps((1, 0, 7))],
    "together": [steps((0, 0, 13), (1, 0, 7))],
    "chunked": [steps((0, 0, 5)), steps((1, 0, 3), (0, 5, 6)), steps((0, 11, 2), (1, 3, 4))],
    "decoded": [
        steps((0, 0, 6), (1, 0, 1)),
        *(steps((1, 1 + i, 1), (0, 6 + i, 1)) for i in range(6)),
        steps((0, 12, 1)),
    ],
}


def run(model: Model, schedule) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of FIRST [13, vocab] and SECOND [7, vocab] gathered from all micro-batches."""
    rows: dict[int, list[torch.Tensor]] = {2: [], 0: []}
    for token_ids, segments in schedule:
        logits = model(token_ids, segments)
        counts = [count for _, _, count in segments]
        for (slot, _, _), part in zip(segments, logits.split(counts), strict=True):
            rows[slot].append(part)
    return torch.cat(rows[2]), torch.cat(rows[0])


def test_logits_equal_transformers(saved_model, every_model):
    saved = saved_model(every_model)
    spec = read_spec(saved.folder)
    expected = saved.logits(FIRST), saved.logits(SECOND)
    assert expected[0].std() > 0.1  # no flat logits, which any model would match
    for schedule in SCHEDULES.values():
        model = Model(saved.folder, spec, int8=False)
        for logits, wanted in zip(run(model, schedule), expected, strict=True):
            torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)


def test_splitting_into_stages_changes_no_bit(saved_model, every_model):
    saved = saved_model(every_model)
    spec = read_spec(saved.folder)
    for dtype in (torch.float32, torch.bfloat16):
        whole, *split = (
            run(Model(saved.folder, spec, n, int8=False, dtype=dtype), SCHEDULES["chunked"])
            for n in (1, 2, 3)
        )
        for logits in split:
            assert torch.equal(logits[0], whole[0])
            assert torch.equal(logits[1], whole[1])


INT8_MODELS = [
    "llama_grouped_tied",
    "llama_one_kv_head_biases",
    "mistral_window",
    "bloom_six_heads",
    "opt_350m",
    "opt_gelu",
    "gpt_neox",
    "gpt_neox_sequential",
]


@pytest.mark.parametrize("name", INT8_MODELS)
def test_int8_results_are_batch_invariant(saved_model, name):
    saved = saved_model(name)
    spec = read_spec(saved.folder)
    options = {"outlier_rule": "row_rms", "outlier_threshold": 4.0}
    alone = run(Model(saved.folder, spec, **options), SCHEDULES["alone"])
    for num_stages, schedule in ((1, "together"), (1, "chunked"), (2, "decoded"), (3, "chunked")):
        logits = run(Model(saved.folder, spec, num_stages, **options), SCHEDULES[schedule])
        assert torch.equal(logits[0], alone[0]), (num_stages, schedule)
        assert torch.equal(logits[1], alone[1]), (num_stages, schedule)


@pytest.mark.parametrize("name", INT8_MODELS)
def test_int8_stays_close_to_floating_point(saved_model, name):
    saved = saved_model(name)
    spec = read_spec(saved.folder)
    model = Model(saved.folder, spec, outlier_rule="all", outlier_threshold=0.0)
    logits, _ = run(model, SCHEDULES["together"])
    wanted = saved.logits(FIRST)
    assert (logits - wanted).norm() < 0.1 * wanted.norm()


def test_logits_are_made_of_the_wanted_rows_alone(saved_model):
    saved = saved_model("llama")
    spec = read_spec(saved.folder)
    token_ids, segments = SCHEDULES["together"][0]
    every = Model(saved.folder, spec, int8=False)(token_ids, segments)
    some = Model(saved.folder, spec, int8=False)(token_ids, segments, [12, 19])
    torch.testing.assert_close(some, every[[12, 19]], rtol=0, atol=1e-5)
    assert some.dtype == torch.float32
    none = Model(saved.folder, spec, int8=False)(token_ids, segments, [])
    assert none.shape == (0, spec.vocab_size)


def test_parameter_names_count_blocks_of_the_whole_model(saved_model):
    spec = read_spec(saved_model("llama").folder)
    whole = DecoderStage.empty(spec, StageSlice.whole(spec)).state_dict()
    parts = [
        DecoderStage.empty(spec, StageSlice(range(0, 2), first=True, last=False)).state_dict(),
        DecoderStage.empty(spec, StageSlice(range(2, 3), first=False, last=True)).state_dict(),
    ]
    assert sorted(whole) == sorted([*parts[0], *parts[1]])
    assert "blocks.2.qkv.weight" in parts[1]


@pytest.mark.parametrize("blocks", [range(0, 4), range(-1, 2), range(0, 3, 2)])
def test_blocks_outside_the_model_are_refused(saved_model, blocks):
    spec = read_spec(saved_model("llama").folder)
    with pytest.raises(ValueError, match=r"blocks must be contiguous within 0\.\.2"):
        DecoderStage.empty(spec, StageSlice(blocks, first=True, last=True))


def test_max_tokens_beyond_the_positions_are_refused(saved_model):
    spec = read_spec(saved_model("opt").folder)
    with pytest.raises(ValueError, match=r"max_tokens must be at most 64 .* got 65"):
        DecoderStage.empty(spec, StageSlice.whole(spec), max_tokens=65)


def test_position_tables_have_max_tokens_rows(saved_model):
    spec = read_spec(saved_model("llama").folder)
    stage = DecoderStage.empty(spec, StageSlice.whole(spec), max_tokens=20)
    assert stage.rotary_cos.shape == (20, 6)
    assert not stage.rotary_cos.is_meta
