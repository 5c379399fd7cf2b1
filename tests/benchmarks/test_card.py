"""The first step: every op is tried, and a wrong or missing one is named."""

import card
import pytest
import records
import torch
from cells import Cells

from dist_int8.int8 import ops
from dist_int8.int8.registry import OPS

CPU = torch.device("cpu")


def test_every_op_of_the_library_is_tried():
    tried = {name.split(",")[0] for name, _, _ in card.cases()}
    assert tried == set(OPS) - card.ON_CPU_ALONE


def test_products_cover_every_kernel_of_the_gpu():
    """Their sizes, by gemm_tiles.h: at most 32, 128, 512 rows, and more with N 4096."""
    rows = {name: M for name, (M, N, K) in card.PRODUCTS.items()}
    assert rows["small"] <= 32 < rows["tiled"] <= 128 < rows["wgmma 128"] <= 512 < rows["wgmma 256"]
    assert card.PRODUCTS["wgmma 256"][1] >= 4096


@pytest.mark.parametrize("how", ["wrong", "nan", "raises"])
def test_an_op_that_is_wrong_is_named(tmp_path, how):
    """Wrong on the card alone: the second call, on the CPU, is right."""
    right, calls = ops.silu_mul, []

    def broken(x):
        calls.append(1)
        if len(calls) > 1:
            return right(x)
        if how == "raises":
            raise RuntimeError("CUDA error: an illegal memory access")
        return right(x) * (1.1 if how == "wrong" else torch.nan)

    case = next(case for case in card.cases() if case[0] == "silu_mul")
    assert card.check(case, CPU) == {"error": 0.0}
    cells = Cells(records.Records(tmp_path / "results.jsonl", "card"), None)
    assert (
        cells.run("op", {"op": "silu_mul"}, lambda: card.check(("x", broken, case[2]), CPU)) is None
    )
    assert cells.status() == 1
    _, bad = records.read(tmp_path / "results.jsonl")
    assert bad["kind"] == "error" and bad["cell"] == {"op": "silu_mul"}
    assert ("illegal memory access" in bad["error"]) == (how == "raises")
