"""A measured device profile as YAML: what `dist-int8 bench --profile` writes and the plan reads."""

from typing import Annotated

from pydantic import Field

from dist_int8.config.checked import Checked, Count, NonEmpty

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ProfileSettings(Checked):
    """Describes how fast one device is, as measured; rates are per second."""

    name: NonEmpty = Field(description="Name of the device in the plan.", examples=["my-cpu"])
    memory_bytes: Count = Field(
        description="Memory of the device, which is the budget of a stage if none is set.",
        examples=[80000000000],
    )
    int8_bandwidth: Rate = Field(
        description="Bytes of int8 weights that a linear reads per second for one row.",
        examples=[1.75e12],
    )
    float_bandwidth: Rate = Field(
        description="Bytes of 16-bit weights that a linear reads per second for one row.",
        examples=[1.75e12],
    )
    int8_ops: Rate = Field(
        description="int8 operations per second of a linear with many rows, two per weight and "
        "row.",
        examples=[4.0e14],
    )
    float_ops: Rate = Field(
        description="Operations per second of a 16-bit linear with many rows.",
        examples=[2.0e14],
    )
    attention_ops: Rate = Field(
        description="Operations per second of attention over a long prompt.", examples=[2.0e14]
    )
    overlaps: bool = Field(
        description="Whether reading and computing overlap (GPUs) or add up (CPUs).",
        examples=[True],
    )
    block_overhead_s: Seconds = Field(
        description="Seconds that a block takes besides its linears and attention.",
        examples=[2.5e-05],
    )
    launch_s: Seconds = Field(
        description="Seconds that the host takes per kernel, where a GPU's are launched one by "
        "one; 0 for a CPU.",
        examples=[2.5e-05],
    )
    link_bandwidth: Rate = Field(
        description="Bytes per second to the next device of the same machine.", examples=[2.5e11]
    )
    link_latency_s: Seconds = Field(
        description="Seconds of the smallest message to that device.", examples=[1.5e-05]
    )
    network_bandwidth: Rate = Field(
        description="Bytes per second to another machine.", examples=[1.25e10]
    )
    network_latency_s: Seconds = Field(
        description="Seconds of the smallest message to that machine.", examples=[4.0e-05]
    )

    @classmethod
    def explain_missing(cls, hint: str) -> str:
        """Fields are measured, not written by hand; earlier files lack the newer ones."""
        return "measure the device again with `dist-int8 bench --profile`"
