"""A measured device profile as YAML: what `dist-int8 bench --profile` writes and the plan reads."""

from typing import Annotated

from pydantic import Field

from dist_int8.config.checked import Checked, Count, NonEmpty

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ProfileSettings(Checked):
    """How fast one device is, as measured; rates per second."""

    name: NonEmpty = Field(description="What the plan calls it.", examples=["my-cpu"])
    memory_bytes: Count = Field(
        description="Memory of the device; the budget of a stage where none is set.",
        examples=[80000000000],
    )
    int8_bandwidth: Rate = Field(
        description="Bytes of int8 weights that a linear of one row reads in a second.",
        examples=[1.75e12],
    )
    float_bandwidth: Rate = Field(
        description="Bytes of 16-bit weights that a linear of one row reads in a second.",
        examples=[1.75e12],
    )
    int8_ops: Rate = Field(
        description="int8 operations a second of a linear of many rows, two a weight and row.",
        examples=[4.0e14],
    )
    float_ops: Rate = Field(
        description="The same of a 16-bit linear.",
        examples=[2.0e14],
    )
    overlaps: bool = Field(
        description="Reading and computing go on at once (GPUs) or add up (CPUs).",
        examples=[True],
    )
    block_overhead_s: Seconds = Field(
        description="Seconds a block takes beside its linears.", examples=[2.0e-05]
    )
    link_bandwidth: Rate = Field(
        description="Bytes a second to the next device of the same machine.", examples=[2.5e11]
    )
    link_latency_s: Seconds = Field(
        description="Seconds of the smallest message there.", examples=[1.5e-05]
    )
    network_bandwidth: Rate = Field(
        description="Bytes a second to another machine.", examples=[1.25e10]
    )
    network_latency_s: Seconds = Field(
        description="Seconds of the smallest message there.", examples=[4.0e-05]
    )
