"""How much tensor-core work is one tile of an int8 linear, against plain W8A8? Needs no GPU.

    python benchmarks/gpu/tile_work.py [--features 4096 14336]

Counts what the kernels issue for a tile of 128 rows by 128 outputs: m16n8k32 instructions of int8
per plane of x, and m16n8k16 instructions of 16 bits for hot columns, 16 per step. Both take a
tensor core equally long (int8 has twice the rate and twice the k), so their sum is the time of a
product that is bound by arithmetic. "share": of the second plane's tiles of 64 columns that have an
outlier in any of 128 rows; 0.84 to 1.0 is what the rule row_rms 4.0 flags with real activations.
Bytes per output are those between a GEMM and the result: "sums" writes int32 and reads it again
(int8_finish), "epilogue" would write 16 bits at once.
"""

import argparse

ROWS, OUTPUTS = 128, 128
# name, planes of x beyond the first (share of tiles), hot columns, additions per element of x
WAYS = [
    ("plain W8A8", 0.0, 0, 0),
    ("rotated by 64, 16 hot", 0.0, 16, 6),
    ("rotated by 64, 32 hot", 0.0, 32, 6),
    ("rotated by 64, 64 hot", 0.0, 64, 6),
    ("row_rms 4.0, 16 hot, share 0.84", 0.84, 16, 0),
    ("all, 16 hot (two planes)", 1.0, 16, 0),
]
BYTES = {"sums": 4 + 4 + 2, "epilogue": 2}


def count_instructions(num_features: int, share: float, num_hot: int) -> tuple[int, int]:
    """Returns (int8, 16-bit) tensor-core instructions of a tile."""
    positions = ROWS // 16 * (OUTPUTS // 8)
    tiles = -(-num_features // 64)  # of 64 columns: two steps of k32
    return positions * 2 * (tiles + round(share * tiles)), positions * -(-num_hot // 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, nargs="*", default=[4096, 14336])
    for num_features in parser.parse_args().features:
        bound = sum(count_instructions(num_features, 0.0, 0))
        print(f"K = {num_features}: at least {bound} instructions for {ROWS} x {OUTPUTS} outputs")
        for name, share, num_hot, additions in WAYS:
            int8, floating = count_instructions(num_features, share, num_hot)
            print(
                f"  {name:32s} int8 {int8:7d}  16 bits {floating:5d}  "
                f"of the bound {(int8 + floating) / bound:6.3f}  "
                f"additions per element of x {additions}"
            )
    print(*(f"bytes per output, {name}: {count}" for name, count in BYTES.items()), sep="\n")


if __name__ == "__main__":
    main()
