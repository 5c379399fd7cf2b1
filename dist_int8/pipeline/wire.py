"""The bytes of a message between stages, and the typed header in front of them.

On the wire a micro-batch is `header` int64 [16], `control` int64 [C] (token ids, segments, sampling
settings, spans, rules; C follows from the header) and, between stages, hidden_states [num_tokens,
hidden_size]. A result is `header`, spans, then token ids int64 or logits fp32. An end mark follows.
Nothing is pickled; a header that no rank of this pipeline sends is refused before any of its sizes
is used.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dist_int8.errors import ProtocolError
from dist_int8.pipeline.clock import LateSpan, Span, host_spans, read_spans
from dist_int8.pipeline.microbatch import SAMPLING_FIELDS, Kind, Limits, MicroBatch, Result
from dist_int8.pipeline.rules import MAX_RULE_WORDS, Rule, pack_rules, unpack_rules

HEADER_SIZE = 16
MAGIC = 0x6473745F696E7438  # "dst_int8"
VERSION = 3
MAX_STAGES = 256  # maximum number of spans in a message
LEAST_TEMPERATURE = 1e-3  # as of the settings of a generation


def pack(micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """`header` int64 [16] and `control` int64 [C] of a micro-batch."""
    rules = [pack_rules(micro_batch.rules)] if micro_batch.rules else []
    header = _header(
        int(micro_batch.kind),
        micro_batch.lane,
        micro_batch.step,
        micro_batch.num_tokens,
        micro_batch.segments.shape[0],
        micro_batch.starts.shape[0],
        len(micro_batch.spans),
        rules[0].numel() if rules else 0,
    )
    control = torch.cat(
        [
            micro_batch.token_ids,
            micro_batch.segments.long().flatten(),
            micro_batch.emits,
            micro_batch.starts.flatten(),
            micro_batch.settings.flatten().view(torch.int64),
            _spans_tensor(host_spans(micro_batch.spans)),
            *rules,
        ]
    )
    return header, control


def _header(*fields: int) -> Tensor:
    unused = HEADER_SIZE - 2 - len(fields)
    return torch.tensor([MAGIC, VERSION, *fields, *[0] * unused], dtype=torch.int64)


def end_mark(header: Tensor) -> Tensor:
    """Returns int64 [1], the end mark of a message: MAGIC ^ step, different for every step."""
    return header[:1] ^ header[4:5]


def control_size(header: Tensor, limits: Limits) -> int:
    """Number of int64 in the control tensor that follows this header.

    Raises:
        ProtocolError: the header is not one of this pipeline's.
    """
    magic, version, kind, lane, step, *sizes, num_words = header[:10].tolist()
    num_tokens, num_segments, num_starts, num_spans = sizes
    if magic != MAGIC or version != VERSION:
        raise ProtocolError(
            f"header: magic and version must be {MAGIC:#x} {VERSION}, got {magic:#x} {version}"
        )
    if kind not in (Kind.STEP, Kind.LOGITS, Kind.SHUTDOWN):
        raise ProtocolError(f"header: kind must be 1, 2 or 3, got {kind}")
    if lane < 0 or step < 0:
        raise ProtocolError(f"header: lane and step must not be negative, got {lane} and {step}")
    least = 0 if kind == Kind.SHUTDOWN else 1
    if not least <= num_tokens <= limits.max_rows:
        raise ProtocolError(
            f"header: num_tokens must be {least} to {limits.max_rows}, got {num_tokens}"
        )
    for name, value in (("num_segments", num_segments), ("num_starts", num_starts)):
        if not 0 <= value <= limits.num_slots:
            raise ProtocolError(f"header: {name} must be 0 to {limits.num_slots}, got {value}")
    _check_num_spans(num_spans, MAX_STAGES - 1)  # the stage that reads it adds its own
    if not 0 <= num_words <= num_starts * MAX_RULE_WORDS:
        raise ProtocolError(
            f"header: words of rules must be 0 to {MAX_RULE_WORDS} per start, got {num_words}"
        )
    return _control_size(num_tokens, num_segments, num_starts, num_spans) + num_words


def max_control_size(limits: Limits) -> int:
    """Maximum number of int64 in a control tensor."""
    num_slots = limits.num_slots
    size = _control_size(limits.max_rows, num_slots, num_slots, MAX_STAGES)
    return size + num_slots * MAX_RULE_WORDS


def _control_size(num_tokens: int, num_segments: int, num_starts: int, num_spans: int) -> int:
    return num_tokens + num_segments * 4 + num_starts * (2 + len(SAMPLING_FIELDS)) + num_spans * 2


def _spans_tensor(spans: list[Span]) -> Tensor:
    return torch.tensor(spans, dtype=torch.int64).flatten()


def _spans_list(values: Tensor) -> list[Span | LateSpan]:
    return [(start, end) for start, end in values.view(-1, 2).tolist()]


def _check_num_spans(num_spans: int, most: int) -> None:
    if not 0 <= num_spans <= most:
        raise ProtocolError(f"header: num_spans must be 0 to {most}, got {num_spans}")


def unpack(header: Tensor, control: Tensor, limits: Limits) -> MicroBatch:
    """The micro-batch of a header and its control tensor, every value checked.

    Raises:
        ProtocolError: a size, slot, position or token id is out of range.
    """
    size = control_size(header, limits)
    assert control.numel() == size
    kind, lane, step, *sizes, num_words = header[2:10].tolist()
    num_tokens, num_segments, num_starts, num_spans = sizes
    token_ids, segments, emits, starts, settings, spans, words = control.split(
        [
            num_tokens,
            num_segments * 3,
            num_segments,
            num_starts * 2,
            num_starts * len(SAMPLING_FIELDS),
            num_spans * 2,
            num_words,
        ]
    )
    segments = segments.view(-1, 3)
    starts = starts.view(-1, 2)
    settings = settings.clone().view(torch.float64).view(-1, len(SAMPLING_FIELDS))
    _check_control(
        token_ids.tolist(), segments.tolist(), emits.tolist(), starts[:, 0].tolist(), limits
    )
    for row in settings.tolist():
        _check_settings(row, limits)
    return MicroBatch(
        kind=Kind(kind),
        lane=lane,
        step=step,
        token_ids=token_ids.clone(),
        segments=segments.to(torch.int32),
        emits=emits.clone(),
        starts=starts.clone(),
        settings=settings,
        rules=_rules_list(words, starts, limits),
        spans=_spans_list(spans),
    )


def _rules_list(words: Tensor, starts: Tensor, limits: Limits) -> list[tuple[int, Rule]]:
    if not words.numel():
        return []
    return unpack_rules(words.tolist(), starts[:, 0].tolist(), limits.vocab_size)


def _check_control(
    token_ids: list[int],
    segments: list[list[int]],
    emits: list[int],
    started_slots: list[int],
    limits: Limits,
) -> None:
    """Raises ProtocolError for values that no rank of this pipeline sends.

    On Python's integers: they do not wrap around, and for a decode step of a few tokens a dozen
    tensor operations would take ten times as long.
    """
    if not all(0 <= token_id < limits.vocab_size for token_id in token_ids):
        raise ProtocolError(f"control: token ids must be 0 to {limits.vocab_size - 1}")
    slots = [slot for slot, _, _ in segments]
    for name, values in (("segments", slots), ("starts", started_slots)):
        if not all(0 <= slot < limits.num_slots for slot in values):
            raise ProtocolError(f"control: slots of {name} must be 0 to {limits.num_slots - 1}")
    if len(set(slots)) != len(slots):
        raise ProtocolError("control: a slot appears in two segments of one micro-batch")
    for _, start, count in segments:
        if not 1 <= count <= limits.max_tokens:
            raise ProtocolError(f"control: segment counts must be 1 to {limits.max_tokens}")
        if not 0 <= start <= limits.max_tokens:
            raise ProtocolError(f"control: segment starts must be 0 to {limits.max_tokens}")
        if start + count > limits.max_tokens:
            raise ProtocolError(f"control: positions must stay below {limits.max_tokens}")
    covered = sum(count for _, _, count in segments)
    if covered != len(token_ids):
        raise ProtocolError(f"control: segments must cover {len(token_ids)} tokens, got {covered}")
    if not all(0 <= emit <= 1 for emit in emits):
        raise ProtocolError("control: emits must be 0 or 1")


def _check_settings(row: list[float], limits: Limits) -> None:
    """Raises ProtocolError for settings that no request has; NaN fails every comparison."""
    temperature, top_k, top_p, min_p, repetition, presence, frequency, prompt_length = row
    if not (
        (temperature == 0 or LEAST_TEMPERATURE <= temperature < math.inf)
        and 0 <= top_k < 2**63
        and 0 < top_p <= 1
        and 0 <= min_p <= 1
        and 0 < repetition < math.inf
        and abs(presence) < math.inf
        and abs(frequency) < math.inf
        and 0 <= prompt_length <= limits.max_tokens
    ):
        raise ProtocolError(f"control: sampling settings must be those of a request, got {row}")


def pack_result(result: Result) -> tuple[Tensor, Tensor]:
    """`header` int64 [16] and spans int64 [2 * num_spans]; the values follow as they are."""
    tokens = result.values.dtype == torch.int64
    kind = Kind.TOKENS_RESULT if tokens else Kind.LOGITS_RESULT
    header = _header(int(kind), result.lane, result.step, result.values.shape[0], len(result.spans))
    return header, _spans_tensor(read_spans(result.spans))


def result_spans_size(header: Tensor) -> int:
    """Number of int64 that the spans after a result's header take.

    Raises:
        ProtocolError: the header is not one of this pipeline's.
    """
    magic, version, *_, num_spans = header[:7].tolist()
    if magic != MAGIC or version != VERSION:
        raise ProtocolError(f"result: magic must be {MAGIC:#x}, got {magic:#x}")
    _check_num_spans(num_spans, MAX_STAGES)
    return 2 * int(num_spans)


def empty_result(header: Tensor, spans: Tensor, limits: Limits) -> Result:
    """A result of the size that this header announces, its values not filled yet.

    Raises:
        ProtocolError: the header is not one of this pipeline's.
    """
    assert spans.numel() == result_spans_size(header)
    kind, lane, step, count = header[2:6].tolist()
    if kind == Kind.TOKENS_RESULT and 0 <= count <= limits.num_slots:
        values = torch.empty(count, dtype=torch.int64)
    elif kind == Kind.LOGITS_RESULT and 0 < count <= limits.max_rows:
        values = torch.empty(count, limits.vocab_size, dtype=torch.float32)
    else:
        raise ProtocolError(f"result: kind {kind} with {count} rows is none of this pipeline's")
    return Result(lane, step, values, _spans_list(spans))


def check_tokens(token_ids: Tensor, limits: Limits) -> None:
    """Raises ProtocolError for a sampled token that is neither of the vocabulary nor -1 (none)."""
    if not all(-1 <= token_id < limits.vocab_size for token_id in token_ids.tolist()):
        raise ProtocolError(f"result: token ids must be -1 to {limits.vocab_size - 1}")
