"""Settings of a deployment: which model runs, on which devices, in how much memory and how."""

from dataclasses import fields
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from dist_int8.config import accuracy as points
from dist_int8.config.accuracy import Accuracy, Chosen, Numerics, OutlierRule, Rotation
from dist_int8.config.byte_size import parse_optional_size
from dist_int8.config.checked import Checked, Count, NonEmpty, PathText, expand_home, listed
from dist_int8.config.generation import GenerationSettings
from dist_int8.config.layout import MAX_STAGES, Device, Memory, Stages, check_memory

DEFAULT_MAX_TOKENS = 2048  # in a slot, where the model allows it


def _listed_paths(value: object) -> object:
    return listed(expand_home(value))


Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Settings(Checked):
    """Describes how a model is laid out and run.

    The names are YAML keys, arguments of `load()` and, for most, flags of the command line.
    """

    model: PathText | None = Field(
        default=None,
        description="Folder of a transformers checkpoint (config.json, safetensors), or a hub id.",
        examples=["bigscience/bloom"],
    )
    revision: NonEmpty | None = Field(
        default=None,
        description="Commit, tag or branch of a hub id; by default the hub's own choice.",
        examples=["main"],
    )
    stages: Stages = Field(
        default=None,
        description="Number of pipeline stages, one process each, or the number of blocks of "
        "each; by default one balanced stage per device.",
        examples=[[17, 18, 18, 17]],
    )
    devices: Annotated[
        Annotated[list[Device], Field(min_length=1)] | None, BeforeValidator(listed)
    ] = Field(
        default=None,
        description="Device of each stage in order, cpu or cuda:N; excludes `gpus`.",
        examples=[["cpu", "cpu"]],
    )
    gpus: Annotated[int, Field(ge=1, le=MAX_STAGES)] | None = Field(
        default=None,
        description="Use this many GPUs, cuda:0 upwards, one stage each; excludes `devices`.",
        examples=[4],
    )
    in_process: bool = Field(
        default=False,
        description="Run the stages as threads of this process instead of one process each: "
        "hidden states are copied from device to device, without NCCL. One machine only.",
        examples=[True],
    )
    backend: Literal["auto", "nccl", "gloo"] = Field(
        default="auto",
        description="What carries hidden states between stages that run in separate processes: "
        "nccl (from GPU to GPU, one stage per GPU), gloo (through host memory; stages may share a "
        "GPU), or auto (nccl if every stage is on a GPU).",
        examples=["gloo"],
    )
    threads_per_stage: Count | None = Field(
        default=None,
        description="CPU threads per stage; by default the cores are shared evenly, as far as the "
        "affinity mask and the CPU quota of the process (of a container) allow.",
        examples=[1],
    )
    pin_cores: bool | None = Field(
        default=None,
        description="Keep each stage on CPU cores of its own. By default where there are enough of "
        "them, the process may use all cores of the machine, and no CPU quota binds it; where "
        "others share the cores, false is faster.",
        examples=[False],
    )
    cuda_graphs: bool = Field(
        default=True,
        description="Replay decoding steps on a GPU as CUDA graphs, each recorded when its number "
        "of sequences first comes; false launches kernel by kernel.",
        examples=[False],
    )
    micro_batches: Count | None = Field(
        default=None,
        description="Number of lanes, each with one micro-batch in flight; by default one per "
        "stage, which is fastest unless a hop takes longer than reading the weights of a stage "
        "(docs/pipelining.md). With 1, chunks of prompts also run one at a time.",
        examples=[4],
    )
    max_sequences: Count = Field(
        default=8,
        description="Number of slots in the KV cache, and so of sequences in flight; further "
        "prompts wait in the queue.",
        examples=[8],
    )
    max_queue: Count = Field(
        default=1024,
        description="Maximum number of prompts that wait for a slot; more are refused until some "
        "have finished.",
        examples=[1024],
    )
    max_tokens: Count | None = Field(
        default=None,
        description="Maximum number of tokens in a slot, prompt and answer together; by default "
        "the model's limit or 2048, whichever is smaller.",
        examples=[2048],
    )
    prefill_chunk: Count = Field(
        default=512,
        description="Maximum number of prompt tokens per micro-batch; longer prompts are split "
        "into chunks, and so are shorter ones where that keeps every stage busy.",
        examples=[512],
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Floating-point type between the int8 products; auto is float32 on cpu and "
        "the checkpoint's own type on cuda.",
        examples=["bfloat16"],
    )
    int8: bool = Field(
        default=True,
        description="Run the linear layers in int8; false keeps them in floating point.",
        examples=[True],
    )
    accuracy: Accuracy | None = Field(
        default=None,
        description="Named point of accuracy and speed: balanced (rotated, one plane, which is "
        "fastest), accurate (rotated, two planes) or paper (the rule of LLM.int8()). By default "
        "balanced, or what an int8 checkpoint was made for. The settings beside it change one "
        "thing each.",
        examples=["balanced"],
    )
    rotation: Rotation | None = Field(
        default=None,
        description="Largest block size of the rotation of input features, which makes outliers "
        "small: 0 (off) or a power of two from 2 to 1024; by default that of `accuracy`, 64. An "
        "int8 checkpoint brings its own.",
        examples=[64],
    )
    outlier_rule: OutlierRule | None = Field(
        default=None,
        description="Which elements of x are outliers: none, |x| >= threshold (absolute, the "
        "paper's), |x| >= threshold times the row's root mean square (row_rms), or all; by "
        "default that of `accuracy`: none where the weights are rotated, row_rms where not.",
        examples=["row_rms"],
    )
    outlier_threshold: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="Threshold of the outlier rules that have one, by default 6.0 for absolute "
        "and 4.0 for row_rms; 0 switches the decomposition off.",
        examples=[6.0],
    )
    skip_modules: Annotated[list[NonEmpty], BeforeValidator(listed)] = Field(
        default=["lm_head"],
        description="Names of modules whose linear layers stay in floating point; an int8 "
        "checkpoint brings its own list.",
        examples=[["lm_head"]],
    )
    head: Literal["int8", "16bit"] | None = Field(
        default=None,
        description="Format of the head, int8 or 16bit; by default 16bit, because skip_modules "
        "names it. An int8 checkpoint brings its own format.",
        examples=["int8"],
    )
    embedding: Literal["int8", "16bit"] = Field(
        default="16bit",
        description="Format of the token embedding, int8 or 16bit; an int8 checkpoint brings its "
        "own.",
        examples=["int8"],
    )
    kv: Literal["int8", "16bit"] = Field(
        default="16bit",
        description="Format of the KV cache: 16bit (the dtype between the int8 products), or int8 "
        "with one scale per token and head, which takes half or a quarter of the bytes.",
        examples=["int8"],
    )
    calibrate: PathText = Field(
        default="off",
        description="How to find hot columns (the input features of each linear that keep exact "
        "weights) while loading: random (with random tokens), a text file, or off. An int8 "
        "checkpoint brings its own.",
        examples=["random"],
    )
    num_hot_columns: Annotated[int, Field(ge=0, multiple_of=16)] | None = Field(
        default=None,
        description="Number of hot columns that calibration finds per linear, and four times as "
        "many in `down`: 0 or a multiple of 16; by default that of `accuracy`: 16, and 0 for "
        "paper.",
        examples=[16],
    )
    allow_pickle: bool = Field(
        default=False,
        description="Read pytorch_model.bin files, which are pickles, where there is no "
        "safetensors file; do so only if you trust their author.",
        examples=[False],
    )
    random_weights: bool = Field(
        default=False,
        description="Make up the weights on the devices from the shapes in config.json, to "
        "rehearse a deployment and its memory without the download.",
        examples=[False],
    )
    memory: Memory = Field(
        default=None,
        description="Memory budget: a list with one byte size per stage, or a mapping from device "
        "to the byte size of each stage there; by default what is free on each GPU less 1 GiB (no "
        "limit under a launcher and on CPUs).",
        examples=[["79GiB", "79GiB"]],
    )
    reserve: Annotated[int | None, BeforeValidator(parse_optional_size)] = Field(
        default=None,
        description="Byte size that the plan leaves free in the memory budget of each stage; by "
        "default 256MiB on cuda (for the allocator and libraries) and 0 on cpu.",
        examples=["1GiB"],
    )
    objective: Literal["throughput", "latency", "max_kv_tokens"] = Field(
        default="throughput",
        description="What the plan optimizes: the time of the slowest stage (throughput), the "
        "time of one token through all stages (latency), or the number of tokens in the KV cache "
        "(max_kv_tokens).",
        examples=["throughput"],
    )
    prefill_ratio: float = Field(
        default=1.0,
        ge=0,
        le=1e6,
        allow_inf_nan=False,
        description="Expected number of prompt tokens per generated token, such as 16 for prompts "
        "of 1024 and answers of 64. The throughput objective counts both, and prompts hardly use "
        "the head on the last stage.",
        examples=[16],
    )
    profile: Annotated[list[PathText] | None, BeforeValidator(_listed_paths)] = Field(
        default=None,
        description="How fast the devices are, for the plan: a name such as a100-80, or a file "
        "written by `dist-int8 bench --profile`; one for all devices or one per device.",
        examples=["a100-80"],
    )
    hosts: Annotated[list[NonEmpty] | None, BeforeValidator(listed)] = Field(
        default=None,
        description="Machines that the plan spreads the stages over, evenly and in order; more "
        "than one needs a launcher.",
        examples=[["node-0", "node-1"]],
    )
    interface: NonEmpty | None = Field(
        default=None,
        description="Network interface on which ranks listen for each other; by default loopback "
        "on one machine, otherwise GLOO_SOCKET_IFNAME or the interface that reaches MASTER_ADDR.",
        examples=["eth0"],
    )
    rendezvous_timeout: Seconds = Field(
        default=60.0,
        description="Seconds within which every rank must have joined.",
        examples=[60.0],
    )
    step_timeout: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(
        default=300.0,
        description="Seconds after which an unfinished step counts as hung, and a rank without a "
        "sign of life as stopped or cut off.",
        examples=[300.0],
    )
    recover: bool = Field(
        default=False,
        description="Restart a lost stage and replay what was running instead of raising an "
        "error; not available under a launcher.",
        examples=[True],
    )
    max_recoveries: Count = Field(
        default=3,
        description="Maximum number of times that lost stages are restarted in the life of a "
        "model.",
        examples=[3],
    )
    drain_timeout: Seconds = Field(
        default=30.0,
        description="Seconds that running answers have to finish after SIGTERM.",
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
                "leave stages out or name one device per stage"
            )
        for key, value in (("head", self.head), ("embedding", self.embedding)):
            if value == "int8" and not self.int8:
                raise ValueError(
                    f"{key}: {key} must be 16bit where int8 is false, got {value!r}; leave it out"
                )
        self._check_accuracy()
        num_stages = self.num_stages or named
        check_memory(self.memory, self.devices, num_stages)
        return self

    def _check_accuracy(self) -> None:
        has_none = points.POINTS[self.accuracy or points.DEFAULT_POINT].num_hot_columns == 0
        if self.calibrate != "off" and has_none and self.num_hot_columns is None:
            raise ValueError(
                f"calibrate: calibrate must be off with accuracy {self.accuracy}, which has no hot "
                f"columns, got {self.calibrate!r}; leave it out, or give num_hot_columns"
            )

    @classmethod
    def explain_unknown(cls, key: str) -> str | None:
        """Says of a setting of one generation that it is not one of a deployment."""
        if key not in GenerationSettings.model_fields:
            return None
        flag = key.replace("_", "-")
        return f"it belongs to one generation: give it to generate({key}=) or as --{flag}"

    @property
    def num_stages(self) -> int | None:
        """Number of stages if `stages` gives it, itself or as a list of blocks; else None."""
        return len(self.stages) if isinstance(self.stages, list) else self.stages

    @property
    def pinned(self) -> tuple[int, ...] | None:
        """Number of blocks of each stage if `stages` lists them; else None."""
        return tuple(self.stages) if isinstance(self.stages, list) else None

    @property
    def skipped(self) -> tuple[str, ...]:
        """Names of the linears that stay in floating point, from `skip_modules` and `head`."""
        if self.head is None:
            return tuple(self.skip_modules)
        others = tuple(name for name in self.skip_modules if name != "lm_head")
        return others if self.head == "int8" else (*others, "lm_head")

    @property
    def numerics(self) -> Numerics:
        """How the int8 linears of a floating-point checkpoint treat large elements."""
        return self.resolve_numerics(None)

    def resolve_numerics(self, stored_rotation: int | None) -> Numerics:
        """`numerics`, of an int8 checkpoint whose weights have `stored_rotation`.

        Raises:
            ValueError: a threshold without a rule that has one.
        """
        values = {key.name: getattr(self, key.name) for key in fields(Chosen)}
        return Chosen(**values).resolve(stored_rotation)

    @property
    def calibrates(self) -> bool:
        """Whether hot columns are searched for while loading."""
        return self.int8 and self.calibrate != "off" and self.numerics.num_hot_columns > 0

    def find_budget(self, rank: int, device: str) -> int | None:
        """Returns the budget in bytes of the stage of `rank` on `device`; None if none is set."""
        if isinstance(self.memory, list):
            return self.memory[rank] if rank < len(self.memory) else None
        return self.memory.get(device) if self.memory is not None else None
