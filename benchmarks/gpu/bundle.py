"""Packs what a machine with a GPU and no network lacks: the compiled library and some packages.

    make gpu-bundle                                     # compiles, then runs this
    python benchmarks/gpu/bundle.py --library build/bundle/_ops.so --out .gpu

That machine is taken to have Python, torch with CUDA, numpy, transformers, accelerate, safetensors,
pytest, hypothesis, rich, tqdm, typer, pyyaml, psutil and cuda-bindings. The packages come from the
package index, for its version of Python, in the versions that are installed here; what they need
beyond themselves is among them. manifest.json says which commit, versions and sizes.
"""

import argparse
import datetime
import importlib.metadata
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import records

MOST_BYTES = 40 << 20
PACKAGES = (
    "pydantic",
    "pydantic-core",
    "typing-extensions",
    "typing-inspection",
    "annotated-types",
    "bitsandbytes",
)
BITSANDBYTES_FOR = "cuda130"  # the library that it picks for a torch of CUDA 13.0
PLATFORMS = ("manylinux_2_28", "manylinux_2_24", "manylinux_2_17", "manylinux2014")


def install(site: Path, python: str) -> dict[str, str]:
    """Puts the packages for that Python into `site`; their versions by name."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    platforms = [flag for name in PLATFORMS for flag in ("--platform", f"{name}_x86_64")]
    command = [sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", "install"]
    command += ["--quiet", "--no-deps", "--no-compile", "--only-binary=:all:"]
    command += ["--python-version", python, *platforms, "--target", str(site)]
    subprocess.run([*command, *(f"{n}=={v}" for n, v in versions.items())], check=True)
    return versions


def prune(site: Path) -> None:
    """Leaves bitsandbytes one library of its dozen, and nothing that is not imported."""
    kept = {f"libbitsandbytes_{BITSANDBYTES_FOR}.so", "libbitsandbytes_cpu.so"}
    for library in site.glob("bitsandbytes/libbitsandbytes_*"):
        if library.name not in kept:
            library.unlink()
    if not (site / "bitsandbytes" / f"libbitsandbytes_{BITSANDBYTES_FOR}.so").exists():
        raise SystemExit(f"bundle: bitsandbytes must have a library for {BITSANDBYTES_FOR}")
    shutil.rmtree(site / "bin", ignore_errors=True)


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of every entry of the bundle, packages by their folders, without what Python caches."""
    found: dict[str, int] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix != ".pyc" and path.name != "manifest.json":
            parts = path.relative_to(folder).parts
            name = "/".join(parts[: 2 if parts[0] == "site" else 1])
            found[name] = found.get(name, 0) + path.stat().st_size
    return found


def problem(bundle: Path) -> str | None:
    """Why the steps of first_light.py cannot run with this bundle; None if they can."""
    try:
        manifest = json.loads((bundle / "manifest.json").read_text())
        packed, python, sources = (manifest[key] for key in ("bytes", "python", "sources"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"--bundle must hold a manifest.json, got {bundle} ({error}); run make gpu-bundle"
    here = ".".join(map(str, sys.version_info[:2]))
    if python != here:
        return (
            f"--bundle must be for Python {here}, got {python}; pack it with BUNDLE_PYTHON={here}"
        )
    found = sizes(bundle)
    changed = sorted(name for name in {*packed, *found} if packed.get(name) != found.get(name))
    if changed:
        return f"--bundle must be as it was packed, {changed[0]} in {bundle} is not; pack it again"
    if sources != records.sources_digest():
        return f"--bundle must be compiled from this tree's csrc, {bundle} is of another; repack it"
    return None


def version(bundle: Path | None) -> tuple[str, bool | None]:
    """Commit of this tree, and whether it is that of the commit.

    A copy of the tree may come without .git, or with that of an earlier commit, so the word of the
    bundle counts first, where it was packed from this very tree.
    """
    if bundle is not None:
        manifest = json.loads((bundle / "manifest.json").read_text())
        if manifest.get("tree") == records.tree_digest():
            return manifest["commit"], manifest["clean"]
    return records.commit(), records.is_clean()


def pack(out: Path, library: Path, python: str, architectures: str) -> dict[str, Any]:
    """Makes the bundle in a folder that is new, and returns its manifest."""
    site = out / "site"
    site.mkdir(parents=True)
    shutil.copyfile(library, out / "_ops.so")
    packages = install(site, python)
    prune(site)
    found = sizes(out)
    manifest: dict[str, Any] = {
        "commit": records.commit(),
        "clean": records.is_clean(),
        "sources": records.sources_digest(),
        "tree": records.tree_digest(),
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": python,
        "architectures": architectures,
        "packages": packages,
        "bytes": found,
        "total_bytes": sum(found.values()),
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--library", type=Path, required=True, help="the compiled _ops.so")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write; replaced if it exists"
    )
    parser.add_argument("--python", default="3.12", help="version of Python there (default 3.12)")
    parser.add_argument("--architectures", default="", help="what the library was compiled for")
    args = parser.parse_args()
    if not args.library.is_file():
        parser.error(f"--library must be a file, got {args.library}; run make gpu-bundle")
    is_bundle = (args.out / "manifest.json").exists()
    if args.out.exists() and not (args.out.is_dir() and (is_bundle or not any(args.out.iterdir()))):
        parser.error(f"--out must be a bundle or a new folder, got {args.out}; choose another")
    with tempfile.TemporaryDirectory(prefix="bundle-", dir=args.out.resolve().parent) as name:
        made = Path(name, "bundle")
        manifest = pack(made, args.library, args.python, args.architectures)
        shutil.rmtree(args.out, ignore_errors=True)  # the old one stays until the new one is there
        made.rename(args.out)
    for entry, num_bytes in sorted(manifest["bytes"].items(), key=lambda item: -item[1]):
        print(f"{num_bytes:12,d}  {entry}")
    print(f"{manifest['total_bytes']:12,d}  {args.out}, commit {manifest['commit'][:12]}")
    if manifest["total_bytes"] > MOST_BYTES:
        print(f"bundle: it must be at most {MOST_BYTES:,d} bytes; leave a package out")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
