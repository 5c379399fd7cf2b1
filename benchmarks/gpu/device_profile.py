"""What `dist-int8 bench --profile` measures of this card, as a record and as a file for the plan.

    python benchmarks/gpu/device_profile.py --profile h100.yaml [--records FILE]

The datasheet figures that `dist_int8/partition/profiles.py` has for the card are recorded beside
them: their ratio is how much of a datasheet a stage reaches.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from records import Records, make_parser

from dist_int8.cli import app
from dist_int8.config.yaml_file import read_yaml
from dist_int8.partition.profiles import PROFILES


def datasheet_of(name: str) -> dict[str, Any] | None:
    """Our figures of the card that the driver calls "NVIDIA H100 80GB HBM3"."""
    words = name.lower().split()
    known = [key for key in PROFILES if key.split("-")[0] in words]
    if {"pcie", "nvl"} & set(words):  # the table has the SXM cards
        return None
    return asdict(PROFILES[known[-1]]) if known else None


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--profile", type=Path, required=True, help="YAML file to write")
    args = parser.parse_args()
    device = "cuda:0" if args.device == "cuda" else "cpu"
    code = app.run(["bench", "--profile", str(args.profile), "--device", device])
    if code == 0:
        measured = read_yaml(args.profile)
        records = Records(args.records, "device_profile")
        records.add("profile", measured=measured, datasheet=datasheet_of(measured["name"]))
    return code


if __name__ == "__main__":
    raise SystemExit(main())
