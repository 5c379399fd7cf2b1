"""The wire format: what goes in comes out, and a forged header is refused."""

import math

import pytest
import torch

from dist_int8.errors import ProtocolError
from dist_int8.pipeline import wire
from dist_int8.pipeline.microbatch import Kind, Limits, MicroBatch, Result

LIMITS = Limits(num_slots=4, max_tokens=64, max_rows=32, hidden_size=8, vocab_size=100)


def make_micro_batch() -> MicroBatch:
    return MicroBatch(
        Kind.STEP,
        lane=1,
        step=7,
        token_ids=torch.tensor([5, 6, 7, 99]),
        segments=torch.tensor([[2, 10, 3], [0, 63, 1]], dtype=torch.int32),
        emits=torch.tensor([0, 1]),
        starts=torch.tensor([[2, 2**62 + 1]]),
        settings=torch.tensor([[0.7, 50, 0.9, 0.05, 1.1, -0.5, 0.2, 13]], dtype=torch.float64),
        spans=[(10, 25), (2**60, 2**60 + 1)],
    )


def test_round_trip_keeps_every_field():
    sent = make_micro_batch()
    got = wire.unpack(*wire.pack(sent), LIMITS)
    assert (got.kind, got.lane, got.step) == (Kind.STEP, 1, 7)
    assert got.spans == sent.spans
    for name in ("token_ids", "segments", "emits", "starts", "settings"):
        assert torch.equal(getattr(got, name), getattr(sent, name)), name
        assert getattr(got, name).dtype == getattr(sent, name).dtype, name


def test_shutdown_has_no_tokens():
    header, control = wire.pack(MicroBatch(Kind.SHUTDOWN))
    assert control.numel() == 0 == wire.control_size(header, LIMITS)
    assert wire.unpack(header, control, LIMITS).kind == Kind.SHUTDOWN


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (0, 1, "magic"),
        (1, 4, "version"),
        (2, 9, "kind must be 1, 2 or 3, got 9"),
        (2, 4, "kind"),
        (3, -1, "lane"),
        (5, 0, "num_tokens must be 1 to 32, got 0"),
        (5, 2**40, "num_tokens"),
        (6, -1, "num_segments must be 0 to 4, got -1"),
        (6, 5, "num_segments"),
        (7, 2**62, "num_starts"),
        (8, -1, "num_spans must be 0 to 255, got -1"),
        (8, 256, "num_spans"),
    ],
)
def test_forged_headers_are_refused_before_their_sizes_are_used(field, value, message):
    header, _ = wire.pack(make_micro_batch())
    header[field] = value
    with pytest.raises(ProtocolError, match=message):
        wire.control_size(header, LIMITS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.token_ids.__setitem__(0, 100), "token ids must be 0 to 99"),
        (lambda m: m.token_ids.__setitem__(0, -1), "token ids"),
        (lambda m: m.segments.__setitem__((0, 0), 4), "slots of segments must be 0 to 3"),
        (lambda m: m.segments.__setitem__((0, 0), 0), "two segments"),
        (lambda m: m.segments.__setitem__((0, 1), -1), "segment starts"),
        (lambda m: m.segments.__setitem__((0, 1), 62), "positions must stay below 64"),
        (lambda m: m.segments.__setitem__((0, 2), 2), "cover 4 tokens, got 3"),
        (lambda m: m.segments.__setitem__((0, 2), 0), "segment counts"),
        (lambda m: m.emits.__setitem__(0, 2), "emits"),
        (lambda m: m.starts.__setitem__((0, 0), 9), "slots of starts"),
        (lambda m: m.settings.__setitem__((0, 0), math.nan), "sampling settings must be those"),
        (lambda m: m.settings.__setitem__((0, 0), 1e-300), "sampling settings"),
        (lambda m: m.settings.__setitem__((0, 1), -1.0), "sampling settings"),
        (lambda m: m.settings.__setitem__((0, 2), 0.0), "sampling settings"),
        (lambda m: m.settings.__setitem__((0, 3), 1.01), "sampling settings"),
        (lambda m: m.settings.__setitem__((0, 4), math.inf), "sampling settings"),
        (lambda m: m.settings.__setitem__((0, 5), math.nan), "sampling settings"),
        (lambda m: m.settings.__setitem__((0, 6), -math.inf), "sampling settings"),
        (lambda m: m.settings.__setitem__((0, 7), 65.0), "sampling settings"),
    ],
)
def test_forged_control_data_is_refused(change, message):
    micro_batch = make_micro_batch()
    change(micro_batch)
    with pytest.raises(ProtocolError, match=message):
        wire.unpack(*wire.pack(micro_batch), LIMITS)


def test_results_announce_their_size_and_kind():
    tokens = Result(lane=1, step=2, values=torch.tensor([4, 5]), spans=[(1, 2), (3, 4)])
    header, spans = wire.pack_result(tokens)
    assert wire.result_spans_size(header) == spans.numel() == 4
    empty = wire.empty_result(header, spans, LIMITS)
    assert (empty.lane, empty.step, empty.values.shape) == (1, 2, (2,))
    assert empty.spans == tokens.spans
    logits = Result(lane=0, step=3, values=torch.zeros(6, 100))
    empty = wire.empty_result(*wire.pack_result(logits), LIMITS)
    assert empty.values.shape == (6, 100) and empty.values.dtype == torch.float32


@pytest.mark.parametrize(("field", "value"), [(0, 0), (2, 1), (5, -1), (5, 2**50), (6, 2**40)])
def test_forged_results_are_refused(field, value):
    header, spans = wire.pack_result(Result(0, 0, torch.tensor([4, 5])))
    header[field] = value
    with pytest.raises(ProtocolError):
        wire.result_spans_size(header)
        wire.empty_result(header, spans, LIMITS)


@pytest.mark.parametrize("token_id", [-2, 100, 2**40])
def test_sampled_tokens_outside_of_the_vocabulary_are_refused(token_id):
    wire.check_tokens(torch.tensor([-1, 0, 99]), LIMITS)
    with pytest.raises(ProtocolError, match="token ids must be -1 to 99"):
        wire.check_tokens(torch.tensor([4, token_id]), LIMITS)
