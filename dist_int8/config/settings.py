"""Settings of a deployment: which model, on which devices, in how much memory, how it is run."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from dist_int8.config.checked import Checked, Count, NonEmpty, listed
from dist_int8.config.yaml_file import read_yaml

BYTE_UNITS = {
    "": 1,
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)},
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", start=1)},
}
_BYTE_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
MOST_STAGES = 1024  # no model has as many blocks
_DEVICE = re.compile(r"cpu|cuda:(0|[1-9]\d*)")


def parse_byte_size(size: object) -> int:
    """Bytes of 1073741824, "1GiB", "79.5GiB" or "80GB" (GiB = 1024**3 bytes, GB = 1000**3)."""
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    if isinstance(size, str) and (match := _BYTE_SIZE.fullmatch(size)):
        number, unit = match.groups()
        if unit in BYTE_UNITS and (num_bytes := int(float(number) * BYTE_UNITS[unit])) > 0:
            return num_bytes
    raise ValueError(f'must be a byte size above 0, got {size!r}; write it like "79GiB" or "80GB"')


def _parse_memory(memory: object) -> object:
    if isinstance(memory, Mapping):
        return {_check_device(device): parse_byte_size(size) for device, size in memory.items()}
    if isinstance(memory, Sequence) and not isinstance(memory, str):
        return [parse_byte_size(size) for size in memory]
    raise ValueError(
        f"must be a list (one byte size a stage) or a mapping of device to byte size, "
        f'got {memory!r}; write [79GiB, 79GiB] or {{"cuda:0": 79GiB}}'
    )


def _check_device(device: object) -> str:
    if isinstance(device, str) and _DEVICE.fullmatch(device):
        return device
    raise ValueError(f"must be cpu or cuda:N, got {device!r}; write [cpu, cpu] or [cuda:0, cuda:1]")


def _path_as_text(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


def _check_stages(stages: object) -> object:
    is_list = isinstance(stages, list | tuple)
    counts: Sequence[object] = stages if isinstance(stages, list | tuple) else [stages]
    highest = math.inf if is_list else MOST_STAGES
    if counts and all(type(count) is int and 1 <= count <= highest for count in counts):
        return list(counts) if is_list else stages
    expected = "a list of numbers of blocks, each at least 1" if is_list else "at least 1"
    if not is_list and type(stages) is not int:
        expected = "an integer or a list of integers"
    elif not is_list and isinstance(stages, int) and stages > MOST_STAGES:
        expected = f"at most {MOST_STAGES}"
    raise ValueError(f"must be {expected}, got {stages!r}; write 4 or [17, 18, 18, 17]")


def _parse_size(size: object) -> object:
    return None if size is None else 0 if size == 0 else parse_byte_size(size)


Device = Annotated[str, BeforeValidator(_check_device)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Settings(Checked):
    """How a model is laid out and run; the names are YAML keys, `load()` arguments and flags."""

    model: Annotated[NonEmpty, BeforeValidator(_path_as_text)] | None = Field(
        default=None,
        description="Folder of a transformers checkpoint (config.json, safetensors), or a hub id.",
        examples=["bigscience/bloom"],
    )
    revision: NonEmpty | None = Field(
        default=None,
        description="Commit, tag or branch of a hub id; by default the hub's own choice.",
        examples=["main"],
    )
    stages: Annotated[
        int | list[int] | None,
        BeforeValidator(lambda stages: None if stages is None else _check_stages(stages)),
    ] = Field(
        default=None,
        description="Number of pipeline stages, one process each, or the number of blocks of each; "
        "by default one stage a device, balanced.",
        examples=[[17, 18, 18, 17]],
    )
    devices: Annotated[
        Annotated[list[Device], Field(min_length=1)] | None, BeforeValidator(listed)
    ] = Field(
        default=None,
        description="Device of each stage in order, cpu or cuda:N; excludes `gpus`.",
        examples=[["cpu", "cpu"]],
    )
    gpus: Annotated[int, Field(ge=1, le=MOST_STAGES)] | None = Field(
        default=None,
        description="Use this many GPUs, cuda:0 upwards, one stage each; excludes `devices`.",
        examples=[4],
    )
    in_process: bool = Field(
        default=False,
        description="Run the stages as threads of this process instead of a process each: hidden "
        "states are copied from device to device, without NCCL. One machine only.",
        examples=[True],
    )
    backend: Literal["auto", "nccl", "gloo"] = Field(
        default="auto",
        description="What carries hidden states between stages in processes of their own: nccl, "
        "from GPU to GPU, each with one stage, or gloo, through host memory, which also lets "
        "stages share a GPU; auto: nccl where every stage is on a GPU.",
        examples=["gloo"],
    )
    threads_per_stage: Count | None = Field(
        default=None,
        description="CPU threads of each stage; by default the cores are shared evenly.",
        examples=[1],
    )
    micro_batches: Count | None = Field(
        default=None,
        description="Lanes, with a micro-batch each in flight; by default as many as stages, which "
        "is fastest unless hops take longer than reading a stage's weights (docs/pipelining.md). "
        "1: one in flight, chunks of prompts too.",
        examples=[4],
    )
    max_sequences: Count = Field(
        default=8,
        description="Slots of the KV cache: sequences in flight at once; more prompts queue.",
        examples=[8],
    )
    max_queue: Count = Field(
        default=1024,
        description="Prompts that may wait for a slot; more are refused until some are done.",
        examples=[1024],
    )
    max_tokens: Count | None = Field(
        default=None,
        description="Tokens of one slot, prompt and answer; by default the model's limit, "
        "at most 2048.",
        examples=[2048],
    )
    prefill_chunk: Count = Field(
        default=512,
        description="Prompt tokens that one micro-batch carries at most; longer prompts are cut, "
        "and shorter ones too where that keeps every stage busy.",
        examples=[512],
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Floating-point type between the int8 products; auto: float32 on cpu, "
        "the checkpoint's own on cuda.",
        examples=["bfloat16"],
    )
    int8: bool = Field(
        default=True,
        description="Run the linear layers in int8; false keeps them in floating point.",
        examples=[True],
    )
    outlier_rule: Literal["none", "absolute", "row_rms", "all"] = Field(
        default="row_rms",
        description="Which elements of x are outliers: none, |x| >= threshold (absolute, the "
        "paper's), |x| >= threshold times the row's root mean square (row_rms), or all.",
        examples=["row_rms"],
    )
    outlier_threshold: float = Field(
        default=4.0,
        ge=0,
        allow_inf_nan=False,
        description="Threshold of the outlier rule; 0 switches the decomposition off.",
        examples=[6.0],
    )
    skip_modules: Annotated[list[NonEmpty], BeforeValidator(listed)] = Field(
        default=["lm_head"],
        description="Names of modules whose linear layers stay in floating point; an int8 "
        "checkpoint has chosen already.",
        examples=[["lm_head"]],
    )
    head: Literal["int8", "16bit"] | None = Field(
        default=None,
        description="Format of the head; by default 16bit, as skip_modules has it. An int8 "
        "checkpoint has chosen already.",
        examples=["int8"],
    )
    embedding: Literal["int8", "16bit"] = Field(
        default="16bit",
        description="Format of the token embedding; an int8 checkpoint has chosen already.",
        examples=["int8"],
    )
    kv: Literal["int8", "16bit"] = Field(
        default="16bit",
        description="Format of the KV cache: the dtype between the int8 products (16bit), or int8 "
        "with a scale a token and head: half or a quarter of the bytes; on a GPU slower attention.",
        examples=["int8"],
    )
    calibrate: NonEmpty = Field(
        default="off",
        description="Find hot columns, the input features of each linear that keep exact weights, "
        "while loading: with random tokens (random) or a text file; or off. An int8 checkpoint has "
        "its own.",
        examples=["random"],
    )
    num_hot_columns: Annotated[int, Field(ge=0, multiple_of=16)] = Field(
        default=16,
        description="Hot columns of each linear that calibration finds: 0 or a multiple of 16.",
        examples=[16],
    )
    allow_pickle: bool = Field(
        default=False,
        description="Read pytorch_model.bin files, pickles, where there is no safetensors file; "
        "only if you trust who made them.",
        examples=[False],
    )
    random_weights: bool = Field(
        default=False,
        description="Make up the weights on the devices, by the shapes of config.json alone, to "
        "rehearse a deployment and its memory without the download.",
        examples=[False],
    )
    memory: Annotated[
        dict[str, int] | Annotated[list[int], Field(min_length=1)] | None,
        BeforeValidator(lambda memory: None if memory is None else _parse_memory(memory)),
    ] = Field(
        default=None,
        description="Memory budget: a byte size a stage in order, or a mapping of device to byte "
        "size (of each stage there); by default what is free on each GPU less 1 GiB (nothing is "
        "limited under a launcher and on CPUs).",
        examples=[["79GiB", "79GiB"]],
    )
    reserve: Annotated[int | None, BeforeValidator(_parse_size)] = Field(
        default=None,
        description="Part of each stage's memory budget that the plan leaves alone, a byte size; "
        "by default 256MiB on cuda (allocator, libraries), nothing on cpu.",
        examples=["1GiB"],
    )
    objective: Literal["throughput", "latency", "max_kv_tokens"] = Field(
        default="throughput",
        description="What the stages are cut for: the fastest slowest stage (throughput), the "
        "shortest way of one token (latency), or the most tokens in the KV cache (max_kv_tokens).",
        examples=["throughput"],
    )
    prefill_ratio: float = Field(
        default=1.0,
        ge=0,
        le=1e6,
        allow_inf_nan=False,
        description="Prompt tokens for every generated one in the requests to come, as in 16 for "
        "prompts of 1024 and answers of 64: throughput counts both, and prompts hardly need the "
        "head of the last stage.",
        examples=[16],
    )
    profile: Annotated[list[NonEmpty] | None, BeforeValidator(listed)] = Field(
        default=None,
        description="How fast the devices are, for the plan: a name such as a100-80, or a file "
        "written by `dist-int8 bench --profile`; one for all or one a device.",
        examples=["a100-80"],
    )
    hosts: Annotated[list[NonEmpty] | None, BeforeValidator(listed)] = Field(
        default=None,
        description="Machines of the stages, for the plan: the stages are spread evenly over them, "
        "in order; several need a launcher.",
        examples=[["node-0", "node-1"]],
    )
    interface: NonEmpty | None = Field(
        default=None,
        description="Network interface on which ranks listen for each other; by default loopback "
        "on one machine, else GLOO_SOCKET_IFNAME or the way to MASTER_ADDR.",
        examples=["eth0"],
    )
    rendezvous_timeout: Seconds = Field(
        default=60.0,
        description="Seconds within which every rank must have joined.",
        examples=[60.0],
    )
    step_timeout: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(
        default=300.0,
        description="Seconds after which a step that does not end counts as hung, and a rank that "
        "gives no sign of life as stopped or cut off.",
        examples=[300.0],
    )
    recover: bool = Field(
        default=False,
        description="Start a lost stage again and replay what was running, instead of an error; "
        "not under a launcher.",
        examples=[True],
    )
    max_recoveries: Count = Field(
        default=3,
        description="Times that lost stages are started again in the life of a model, at most.",
        examples=[3],
    )
    drain_timeout: Seconds = Field(
        default=30.0,
        description="Seconds that running answers get to end after SIGTERM.",
        examples=[30.0],
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.devices is not None and self.gpus is not None:
            raise ValueError(
                f"gpus: gpus must be left out when devices is given, got gpus={self.gpus} and "
                f"devices={self.devices}; keep one of the two"
            )
        if self.in_process and self.backend != "auto":
            raise ValueError(
                f"backend: backend must be left out with in_process, got {self.backend}; stages of "
                "one process pass hidden states themselves"
            )
        named = self.gpus if self.devices is None else len(self.devices)
        if None not in (named, self.num_stages) and named != self.num_stages:
            raise ValueError(
                f"stages: stages must be the number of devices, {named}, got {self.stages}; "
                "leave stages out or name one device a stage"
            )
        for key, value in (("head", self.head), ("embedding", self.embedding)):
            if value == "int8" and not self.int8:
                raise ValueError(
                    f"{key}: {key} must be 16bit where int8 is false, got {value!r}; leave it out"
                )
        num_stages = self.num_stages or named
        if isinstance(self.memory, list) and num_stages not in (None, len(self.memory)):
            raise ValueError(
                f"memory: memory must be one byte size a stage, {num_stages}, "
                f"got {len(self.memory)}; write one a stage or a mapping of device to byte size"
            )
        if isinstance(self.memory, dict) and self.devices is not None:
            for device in self.devices:
                if device not in self.memory:
                    raise ValueError(
                        f"memory: memory must name every device, got no {device}; "
                        f"add {device} to the mapping"
                    )
        return self

    @property
    def num_stages(self) -> int | None:
        """Number of stages where `stages` says it, as a number or as the blocks of each."""
        return len(self.stages) if isinstance(self.stages, list) else self.stages

    @property
    def pinned(self) -> tuple[int, ...] | None:
        """Number of blocks of each stage, where they are given."""
        return tuple(self.stages) if isinstance(self.stages, list) else None

    @property
    def skipped(self) -> tuple[str, ...]:
        """Names of the linears that stay floating: skip_modules, and what `head` says."""
        if self.head is None:
            return tuple(self.skip_modules)
        others = tuple(name for name in self.skip_modules if name != "lm_head")
        return others if self.head == "int8" else (*others, "lm_head")

    @property
    def calibrates(self) -> bool:
        """Whether linears have hot columns that are found while loading."""
        return self.int8 and self.calibrate != "off" and self.num_hot_columns > 0

    def find_budget(self, rank: int, device: str) -> int | None:
        """Budget in bytes of the stage of `rank` on `device`; None where none was set."""
        if isinstance(self.memory, list):
            return self.memory[rank] if rank < len(self.memory) else None
        return self.memory.get(device) if self.memory is not None else None


def load_settings(
    path: str | Path | None = None, *, source: str = "load()", **overrides: Any
) -> Settings:
    """Settings of a YAML file, with the overrides that are not None laid over it.

    `source` names where the overrides come from in errors about them.
    An override of one of `devices`, `gpus`, `stages` takes the place of all three of the file,
    since they say the same thing in three ways. Raises ValueError, one line, naming file and key.
    """
    values = read_yaml(path) if path is not None else {}
    chosen = {name: value for name, value in overrides.items() if value is not None}
    if path is not None:
        Settings.from_values(values, str(path))
        layout = {"devices", "gpus", "stages"}
        if layout & chosen.keys():
            values = {key: value for key, value in values.items() if key not in layout}
    return Settings.from_values(values | chosen, source)
