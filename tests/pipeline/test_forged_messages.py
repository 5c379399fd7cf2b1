"""A stage refuses what no rank sends, says so, and answers the next good message (real gloo ranks).

Rank 0 of a real pipeline sends raw bytes over its connection to rank 1, between two generations.
"""

import itertools
import re

import torch

import dist_int8
from dist_int8.pipeline import wire
from dist_int8.pipeline.microbatch import SAMPLING_FIELDS, Kind, MicroBatch
from dist_int8.pipeline.rules import Rule, RuleKind
from dist_int8.pipeline.transport import TAG

PROMPT = "a prompt of this pipeline"
HIDDEN = 64
STEPS = itertools.count(1000)  # a buffer holds no older message of the same step


def settings(**given: float) -> torch.Tensor:
    """One row, greedy but for what is given."""
    row = dict.fromkeys(SAMPLING_FIELDS, 0.0) | {"top_p": 1.0, "repetition_penalty": 1.0}
    return torch.tensor([list((row | given).values())], dtype=torch.float64)


def a_step(slot=1, seed=0, **fields) -> MicroBatch:
    """A micro-batch as rank 0 would send it, of three tokens."""
    values = {
        "step": next(STEPS),
        "token_ids": torch.tensor([5, 6, 7]),
        "segments": torch.tensor([[slot, 0, 3]], dtype=torch.int32),
        "emits": torch.ones(1, dtype=torch.int64),
        "starts": torch.tensor([[slot, seed]]),
        "settings": settings(),
    }
    return MicroBatch(Kind.STEP, **{**values, **fields})


def bytes_of(micro_batch: MicroBatch, **header_fields: int) -> torch.Tensor:
    """Its bytes with hidden_states, after some fields of the header were overwritten."""
    header, control = wire.pack(micro_batch)
    for name, value in header_fields.items():
        header[int(name.removeprefix("field_"))] = value
    hidden_states = torch.zeros(micro_batch.num_tokens, HIDDEN)
    parts = (header, control, hidden_states, wire.end_mark(header))
    return torch.cat([part.view(torch.uint8).flatten() for part in parts])


FORGED = {
    "another protocol": (bytes_of(a_step(), field_0=1), "magic and version must be"),
    "a later version": (bytes_of(a_step(), field_1=4), "magic and version must be"),
    "an unknown kind": (bytes_of(a_step(), field_2=77), "kind must be 1, 2 or 3, got 77"),
    "a result": (bytes_of(a_step(), field_2=4), "kind must be 1, 2 or 3, got 4"),
    "a negative shape": (bytes_of(a_step(), field_5=-3), "num_tokens must be 1 to 544, got -3"),
    "a huge shape": (bytes_of(a_step(), field_5=2**40), "num_tokens must be 1 to 544"),
    "negative segments": (bytes_of(a_step(), field_6=-1), "num_segments must be 0 to 32, got -1"),
    "huge starts": (bytes_of(a_step(), field_7=2**62), "num_starts must be 0 to 32"),
    "spans without end": (bytes_of(a_step(), field_8=256), "num_spans must be 0 to 255, got 256"),
    "a slot out of range": (bytes_of(a_step(slot=32)), "slots of segments must be 0 to 31"),
    "a slot never started": (
        bytes_of(
            a_step(slot=31, starts=torch.zeros(0, 2).long(), settings=torch.zeros(0, 8).double())
        ),
        "no sampling settings have arrived for slot 31",
    ),
    "positions past the end": (
        bytes_of(a_step(segments=torch.tensor([[1, 2**30, 3]], dtype=torch.int32))),
        "segment starts must be 0 to",
    ),
    "an unknown token": (
        bytes_of(a_step(token_ids=torch.tensor([5, 6, 288]))),
        "token ids must be 0",
    ),
    "not a number": (
        bytes_of(a_step(settings=settings(temperature=float("nan")))),
        "sampling settings",
    ),
    "an icy temperature": (
        bytes_of(a_step(settings=settings(temperature=1e-300))),
        "sampling settings",
    ),
    "rules without end": (bytes_of(a_step(), field_9=2**50), "words of rules must be 0 to 2048"),
    "rules of another slot": (
        bytes_of(a_step(rules=[(3, Rule(RuleKind.SUPPRESS, token_ids=(1,)))])),
        "rules must be of slots that start",
    ),
    "a rule that does not exist": (bytes_of(a_step(rules=[(1, Rule(99))])), "kinds of rules"),
    "a token of a rule": (
        bytes_of(a_step(rules=[(1, Rule(RuleKind.SUPPRESS, token_ids=(288,)))])),
        "token ids of rules must be 0 to 287",
    ),
    "a cut header": (bytes_of(a_step())[:41], "must"),
    "a cut control": (bytes_of(a_step())[: 128 + 24], "must"),
    "cut hidden_states": (bytes_of(a_step())[:-8], "it is truncated"),
    "one byte": (torch.zeros(1, dtype=torch.uint8), "must"),
    "noise": (torch.arange(777).to(torch.uint8), "magic and version must be"),
}


def test_every_forged_message_is_refused_and_the_next_one_answered(tiny_llama, capfd, caplog):
    with dist_int8.load(
        tiny_llama, devices=["cpu", "cpu"], max_sequences=32, step_timeout=20.0
    ) as model:

        def text():
            return model.generate([PROMPT], max_new_tokens=6)[0].text

        before = text()
        transport = model._engine.pipeline.transport
        for number, (name, (message, reason)) in enumerate(FORGED.items(), start=1):
            transport._groups["cpu"].send([message], transport.target, TAG).wait()
            assert text() == before, name
            stderr = capfd.readouterr().err
            said = re.findall(rf"\[rank 1\] refused message {number} .*", stderr)
            assert len(said) == 1 and reason in said[0], (name, said)
        transport._groups["cpu"].send([bytes_of(a_step())], transport.target, TAG).wait()
        assert text() == before
        said = re.findall(r"\[rank 0\] refused message 1 from rank 1: .*", caplog.text)
        assert len(said) == 1 and "result: step must be" in said[0]
