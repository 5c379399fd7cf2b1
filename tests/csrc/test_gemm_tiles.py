"""Which GEMM kernel takes a product: every edge of the table, alignment, and the cards."""

import re
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
TILES = re.findall(
    r"^  k(Small|Tiled|Sm\d+_\w+),",
    (CSRC / "include/dist_int8/gemm_tiles.h").read_text(),
    re.MULTILINE,
)
# Shared memory a thread block may have, KiB (CUDA C++ Programming Guide, table of technical
# specifications per compute capability); one for 8.6 and 8.9 too, which run the kernels of 8.0.
SHARED_MEMORY = {"80": 99, "90": 227}


@pytest.fixture(scope="module")
def tile(compile_program):
    program = compile_program("gemm_tiles")

    def ask(*shapes):
        text = "\n".join(" ".join(map(str, shape)) for shape in shapes)
        done = subprocess.run([program], input=text, capture_output=True, text=True, check=True)
        return [TILES[int(line)] for line in done.stdout.split()]

    return ask


def test_no_rule_is_hidden_by_an_earlier_one(compile_program):
    done = subprocess.run([compile_program("gemm_tiles"), "rules"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# (architecture, N): the tile at each M where it may change, on both sides of the edge
EDGES = {
    (90, 4096): "1 Small 32 Small 33 Tiled 128 Tiled "
    "129 128x128x128 512 128x128x128 513 256x128x128 100000 256x128x128",
    (90, 4088): "128 Tiled 129 128x128x128 513 128x128x128 4096 128x128x128",
    (80, 4096): "1 Small 32 Small 33 Tiled 512 Tiled 513 128x256x64 100000 128x256x64",
    (80, 4088): "512 Tiled 513 128x128x64 4096 128x128x64",
}


@pytest.mark.parametrize(("architecture", "N"), list(EDGES))
def test_edges_of_the_buckets(tile, architecture, N):
    words = EDGES[architecture, N].split()
    shapes = [(architecture, int(M), N, 4096) for M in words[::2]]
    prefix = f"Sm{architecture}_"
    want = [name if name in ("Small", "Tiled") else prefix + name for name in words[1::2]]
    assert tile(*shapes) == want


def test_compute_capability_8_6_and_8_9_run_the_kernels_of_8_0(tile):
    for M in (33, 512, 513, 2048):
        for N in (4096, 14336):
            assert len(set(tile(*[(a, M, N, 4096) for a in (80, 86, 89)]))) == 1


# What every card runs at 16, 128, 512 and 2,048 rows. Cards below 7.5 have no library to load.
CARDS = {
    ("Small", "Tiled", "Tiled", "Tiled"): (61, 62, 70, 72, 75),
    ("Small", "Tiled", "Tiled", "Sm80_128x256x64"): (80, 86, 87, 89, 100, 101, 103, 110, 120, 121),
    ("Small", "Tiled", "Sm90_128x128x128", "Sm90_256x128x128"): (90,),
}


@pytest.mark.parametrize("kernels", CARDS, ids=lambda kernels: kernels[-1])
def test_every_compute_capability_has_its_kernels(tile, kernels):
    for architecture in CARDS[kernels]:
        shapes = [(architecture, M, 4096, 4096) for M in (16, 128, 512, 2048)]
        assert tile(*shapes) == list(kernels), architecture


def test_unaligned_shapes_go_to_our_own_kernel(tile):
    for architecture in (80, 90):
        (name,) = tile((architecture, 2048, 4096, 4096))
        assert name.startswith(("Sm80_", "Sm90_"))
        for K in (0, 1, 8, 4095, 4088, 4104):
            assert tile((architecture, 2048, 4096, K)) == ["Tiled"], K
        for N in (4093, 4094, 4095):
            assert tile((architecture, 2048, N, 4096)) == ["Tiled"], N
        # 16 bytes of a row of sums are 4 of them
        assert tile((architecture, 2048, 4092, 4112)) != ["Tiled"]


def test_k_beyond_the_tiled_kernels_goes_to_the_small_one(tile):
    for architecture in (75, 80, 90):
        assert tile((architecture, 2048, 4096, 65536)) == ["Small"]
        assert tile((architecture, 2048, 4096, 65520)) != ["Small"]


@pytest.mark.parametrize("architecture", ["80", "90"])
def test_every_tile_is_compiled_and_fits_shared_memory(architecture):
    source = (
        CSRC / f"cuda/cutlass/int8_gemm_sm{architecture}{'a' * (architecture == '90')}.cu"
    ).read_text()
    for name in TILES:
        if not name.startswith(f"Sm{architecture}_"):
            continue
        case = re.search(rf"case GemmTile::k{name}:\s*return ([^;]*);", source)
        assert case, name
        rows, cols, features = map(int, name.split("_")[1].split("x"))
        numbers = list(map(int, re.findall(r"\b\d+\b", case[1])))
        assert numbers[:3] == [rows, cols, features], name
        stages = numbers[6] if architecture == "80" else 2  # CUTLASS fills the memory of 9.0
        assert stages * (rows + cols) * features <= SHARED_MEMORY[architecture] * 1024, name
