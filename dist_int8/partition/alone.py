"""How long a token takes of one sequence alone, which is what a first try shows. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from dist_int8.partition import memory
from dist_int8.partition.activations import Workload
from dist_int8.partition.plan import Plan
from dist_int8.partition.planner import Device, make_problem

CONTEXT = 128  # tokens of that sequence: a question and a short answer


def predict_alone(
    model: memory.ModelSizes, devices: Sequence[Device], formats: memory.Formats, plan: Plan
) -> int:
    """Predicts the picoseconds of a decode step of one short sequence through all stages.

    Args:
        model: sizes of the model.
        devices: device of each stage of the plan, in order.
        formats: formats of weights and KV cache.
        plan: stages of the model.
    """
    # sequences count with half of their length
    records_steps = plan.workload is not None and plan.workload.records_steps
    workload = Workload(1, 2 * CONTEXT, records_steps=records_steps)
    problem = make_problem(model, devices, formats, workload)
    total = 0
    for rank, stage in enumerate(plan.stages):
        total += problem.time(rank, stage.first_block, stage.last_block + 1)
        if rank + 1 < len(plan.stages):
            total += problem.hops[rank][rank + 1]
    return total
