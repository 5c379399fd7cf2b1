"""The plan: what each stage holds and how long it takes, as data, text and JSON. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dist_int8.partition.activations import Workload
from dist_int8.partition.cost import PS_PER_MS


@dataclass(frozen=True)
class StagePlan:
    """What one stage holds and how long it takes.

    Attributes:
        rank: rank, which is also the number of the stage.
        host: name of the machine.
        device: "cpu" or "cuda:N".
        first_block, last_block: first and last block of the stage, both inclusive.
        weight_bytes: bytes of the parameters in their formats.
        float_bytes: bytes of the same parameters in fp32.
        kv_bytes: bytes of the KV cache of all slots at full length.
        activation_bytes: peak bytes of activations.
        reserve_bytes: bytes of the budget that stay free.
        budget: bytes that the stage may use; None: unlimited.
        ps: picoseconds of a decode step, including the hop to the next stage.
        prefill_ps: picoseconds of a micro-batch full of prompt tokens, without the hop.
        profile: name of the device profile behind the predicted times.
    """

    rank: int
    host: str
    device: str
    first_block: int
    last_block: int
    weight_bytes: int
    float_bytes: int
    kv_bytes: int
    activation_bytes: int = 0
    reserve_bytes: int = 0
    budget: int | None = None
    ps: int = 0
    prefill_ps: int = 0
    profile: str = ""

    @property
    def bytes(self) -> int:
        """Bytes of the parameters in their formats."""
        return self.weight_bytes

    @property
    def blocks(self) -> range:
        return range(self.first_block, self.last_block + 1)

    @property
    def needed_bytes(self) -> int:
        """Bytes that have to fit into the budget."""
        return self.weight_bytes + self.kv_bytes + self.activation_bytes + self.reserve_bytes

    @property
    def free_bytes(self) -> int | None:
        """Bytes left of the budget, negative if it is too small; None without a budget."""
        return None if self.budget is None else self.budget - self.needed_bytes

    @property
    def missing_bytes(self) -> int:
        """Bytes that the budget lacks; 0 if the stage fits."""
        return max(0, -(self.free_bytes or 0))

    @property
    def ms(self) -> float:
        """Milliseconds of a decode step, including the hop to the next stage."""
        return self.ps / PS_PER_MS


@dataclass(frozen=True)
class Plan:
    """The stages of a model, in order.

    Attributes:
        stages: stages, one per rank.
        num_blocks: number of blocks of the model.
        block_bytes: bytes of the parameters of the largest block.
        model_bytes: bytes of all parameters, counting a tied table once.
        kv_bytes_per_token: bytes of the KV cache of one token in all blocks.
        kv_tokens: number of KV tokens that fit on the fullest stage, including those of
            `workload`; None if no stage has a budget.
        workload: requested workload, or the largest that fits.
        suggestions: changes that would make the model fit, the cheapest first; empty if it fits.
        numerics: which numerics the int8 linears have, in a line; empty without any.
        notes: further remarks for the user, one line each.
        asked: where the workload comes from, before "12 sequences of 2048 tokens".
        alone_ps: picoseconds of a decode step of one short sequence alone, through all stages.
    """

    stages: tuple[StagePlan, ...]
    num_blocks: int
    block_bytes: int = 0
    model_bytes: int = 0
    kv_bytes_per_token: int = 0
    kv_tokens: int | None = None
    workload: Workload | None = None
    suggestions: tuple[str, ...] = ()
    numerics: str = ""
    notes: tuple[str, ...] = ()
    asked: str = field(default="requested", compare=False)
    alone_ps: int = 0

    @property
    def missing_bytes(self) -> int:
        """Bytes that all budgets lack in total."""
        return sum(stage.missing_bytes for stage in self.stages)

    @property
    def fits(self) -> bool:
        return self.missing_bytes == 0

    @property
    def ms_per_token(self) -> float:
        """Milliseconds of a decode step through all stages: one token per sequence."""
        return sum(stage.ps for stage in self.stages) / PS_PER_MS

    def refusal(self) -> str:
        """Says in one line which stage does not fit, by how much, and what to change."""
        worst = max(self.stages, key=lambda stage: stage.missing_bytes)
        assert worst.budget is not None, "a stage without a budget lacks nothing"
        advice = "; or ".join(self.suggestions) or "use devices with more memory"
        return (
            f"plan: stage {worst.rank} on {worst.device} must fit {format_bytes(worst.budget)}, "
            f"got {format_bytes(worst.weight_bytes)} of weights, {format_bytes(worst.kv_bytes)} of "
            f"KV cache, {format_bytes(worst.activation_bytes)} of activations and "
            f"{format_bytes(worst.reserve_bytes)} of reserve, "
            f"{format_bytes(worst.missing_bytes)} too much "
            f"({self.missing_bytes} bytes on all stages); {advice}"
        )

    def table(self) -> str:
        """Formats the plan as text, one line per stage."""
        columns = "stage device blocks weights kv activations reserve free ms/token ms/prefill"
        rows = [tuple(columns.split())]
        several_hosts = len({stage.host for stage in self.stages}) > 1
        for stage in self.stages:
            rows.append(
                (
                    str(stage.rank),
                    f"{stage.host} {stage.device}" if several_hosts else stage.device,
                    f"{stage.first_block}-{stage.last_block}",
                    format_bytes(stage.weight_bytes),
                    format_bytes(stage.kv_bytes),
                    format_bytes(stage.activation_bytes),
                    format_bytes(stage.reserve_bytes),
                    _format_free(stage),
                    f"{stage.ms:.2f}",
                    f"{stage.prefill_ps / PS_PER_MS:.1f}",
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        )

    def prediction(self) -> str:
        """Says in one line how long a token takes when all slots are busy, and when one is."""
        assert self.workload is not None
        speeds = ", ".join(sorted({stage.profile for stage in self.stages}))
        number = self.workload.num_sequences
        many = "one sequence" if number == 1 else f"each of {number} sequences in flight"
        return (
            f"predicted for {speeds}: {self.ms_per_token:.2f} ms per token of {many}, half full; "
            f"{self.alone_ps / PS_PER_MS:.2f} ms of one short sequence alone"
        )

    def summary(self) -> str:
        """Formats what the table does not say: the model, the workload, and whether it fits."""
        workload = self.workload
        lines = [
            f"model: {format_bytes(self.model_bytes)} ({self.model_bytes} bytes), "
            f"{format_bytes(self.block_bytes)} per block, "
            f"KV cache {self.kv_bytes_per_token} bytes per token"
        ]
        lines += [self.numerics] if self.numerics else []
        if workload is not None:
            lines.append(
                f"{self.asked}: {_count(workload.num_sequences, 'sequence')} of "
                f"{_count(workload.max_tokens, 'token')}, "
                f"prompts in chunks of {workload.prefill_chunk}"
            )
        if self.fits:
            tokens = "no budget given" if self.kv_tokens is None else str(self.kv_tokens)
            lines += [f"fits; KV tokens in total: {tokens}", self.prediction()]
        else:
            lines.append(
                f"does not fit: {self.missing_bytes} bytes are missing "
                f"({format_bytes(self.missing_bytes)}), most of them on stage "
                f"{max(self.stages, key=lambda stage: stage.missing_bytes).rank}"
            )
            lines += [f"  - {suggestion}" for suggestion in self.suggestions]
        lines += self.notes
        return "\n".join(lines)

    def as_dict(self, model: str) -> dict[str, Any]:
        """Returns what `dist-int8 plan --json` prints; `model` is the name that the user gave."""
        return {
            "fits": self.fits,
            "model": model,
            "numerics": self.numerics,
            "num_blocks": self.num_blocks,
            "block_bytes": self.block_bytes,
            "model_bytes": self.model_bytes,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "kv_tokens": self.kv_tokens,
            "ms_per_token": round(self.ms_per_token, 6),
            "ms_per_token_alone": round(self.alone_ps / PS_PER_MS, 6),
            "stages": [
                {
                    "rank": stage.rank,
                    "host": stage.host,
                    "device": stage.device,
                    "blocks": [stage.first_block, stage.last_block],
                    "bytes": {
                        "weights": stage.weight_bytes,
                        "kv": stage.kv_bytes,
                        "activations": stage.activation_bytes,
                        "reserve": stage.reserve_bytes,
                        "free": stage.free_bytes,
                    },
                    "ms": round(stage.ms, 6),
                }
                for stage in self.stages
            ],
            "missing_bytes": self.missing_bytes,
            "suggestions": list(self.suggestions),
        }


def _format_free(stage: StagePlan) -> str:
    """Formats what is left of a budget; what is missing has its own word instead of a sign."""
    if stage.free_bytes is None:
        return "-"
    lacks = "lacks " if stage.missing_bytes else ""
    return lacks + format_bytes(abs(stage.free_bytes))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def format_bytes(num_bytes: int) -> str:
    """Formats bytes for people: 1610612736 as "1.50 GiB"."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"
