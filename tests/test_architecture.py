"""Who may import whom, which dependency has which owner, and what nobody may use (ARCHITECTURE.md).

`python -m pytest tests/test_architecture.py` names the file, the line and the rule.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dist_int8"

# Room (folder or module of dist_int8) -> rooms it may import. What is missing here is refused.
MAY_IMPORT = {
    "__init__": {"api", "distributed", "evaluation", "int8"},
    "api": {"checkpoint", "config", "distributed", "engine", "models", "partition", "pipeline"},
    "batch": {"config"},
    "checkpoint": {"int8", "models"},
    "cli": {
        "cli_bench",
        "cli_checkpoint",
        "cli_eval",
        "cli_generate",
        "cli_plan",
        "config",
        "console",
        "demo_model",
        "distributed",
        "doctor",
        "launcher",
        "partition",
    },
    "cli_bench": {"api", "config", "demo_model", "profiling"},
    "cli_checkpoint": {"checkpoint", "config"},
    "cli_eval": {"config", "evaluation"},
    "cli_generate": {"batch", "config", "console", "partition"},
    "cli_plan": {"config", "models", "partition"},
    "config": set(),
    "console": {"api", "batch", "config", "engine", "launcher", "partition"},
    "demo_model": set(),
    "distributed": set(),
    "doctor": {"int8", "partition"},
    "engine": {"config", "pipeline"},
    "evaluation": {"api", "checkpoint", "config", "engine", "int8", "models"},
    "int8": set(),
    "launcher": {"api"},
    "models": {"int8"},
    "partition": {"config"},
    "pipeline": {"distributed", "models"},
    "profiling": {"config", "int8", "models", "partition"},
}
LEAVES = {"int8/reference", "partition/memory"}  # import nothing of ours
LEAVES |= {"pipeline/schedule", "profiling/simulator", "pipeline/trace"}
WITHOUT_TORCH = {
    "config",
    "partition",
    "pipeline/schedule",
    "launcher/supervisor",
    "cli",
}
WITHOUT_TORCH |= {
    "cli_checkpoint",
    "cli_plan",
    "distributed/interfaces",
    "distributed/slurm",
}
WITHOUT_TORCH |= {"batch", "cli_bench", "cli_eval", "cli_generate", "profiling/timeline"}
WITHOUT_TORCH |= {"profiling/simulator", "pipeline/trace"}
WITHOUT_TORCH |= {
    "distributed/heartbeat",
    "distributed/monitor",
    "launcher/signals",
    "distributed/world",
}
OWNERS = {  # outside dependency -> the only files or rooms that import it
    "accelerate": {"models"},
    "cuda": {"partition/gpus"},
    "huggingface_hub": {"checkpoint", "models/config"},
    "bitsandbytes": {"evaluation/linears"},
    "lm_eval": {"evaluation/harness", "evaluation/tasks"},
    "matplotlib": {"evaluation/pictures", "profiling/timeline"},
    "pydantic": {"config"},
    "rich": {"doctor"},
    "safetensors": {"checkpoint"},
    "torch.distributed": {"distributed/rendezvous", "pipeline/transport"},
    "torchao": {"evaluation/linears"},
    "tqdm": {"cli_checkpoint", "console", "demo_model", "evaluation", "api/stages"},
    "transformers": {
        "models",
        "engine/sampling",
        "api/load",
        "evaluation",
        "api/model",
        "demo_model",
    },
    "typer": {"cli", "cli_bench", "cli_checkpoint", "cli_eval", "cli_generate", "cli_plan"},
    "yaml": {"config"},
}
PEER_TO_PEER = {"send", "recv", "isend", "irecv", "batch_isend_irecv", "P2POp"}
BANNED_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "deepspeed"}
BANNED_CALLS = {"torch.load", "torch.save", "os.system", "eval", "exec"}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).with_suffix("").as_posix()
        yield name.removesuffix("/__init__"), ast.parse(path.read_text())


def imported(tree):
    """(line, full name) of every import, those inside functions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"line {node.lineno}: write the full name, not a relative import"
            )
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def within(name, places):
    return any(name == place or name.startswith(f"{place}/") for place in places)


def test_rooms_import_only_what_they_may():
    wrong = []
    for name, tree in modules():
        room = name.split("/")[0]
        assert room in MAY_IMPORT, f"{name}: a new room; say in MAY_IMPORT what it may import"
        for line, target in imported(tree):
            if not target.startswith("dist_int8."):
                continue
            other = target.split(".")[1]
            if name in LEAVES or (other != room and other not in MAY_IMPORT[room]):
                wrong.append(f"{name}.py:{line} imports {target}")
    assert not wrong


def test_what_reads_checkpoints_knows_nothing_of_what_writes_them():
    writer = "dist_int8.checkpoint.writer"
    assert not [
        f"{name}.py:{line} imports {target}"
        for name, tree in modules()
        if name.startswith("checkpoint") and not name.startswith("checkpoint/writer")
        for line, target in imported(tree)
        if target.startswith(writer)
    ]


def test_every_outside_dependency_has_its_owner():
    wrong = []
    for name, tree in modules():
        for line, target in imported(tree):
            if target.startswith("torch") and within(name, WITHOUT_TORCH):
                wrong.append(f"{name}.py:{line} imports torch")
            for dependency, owners in OWNERS.items():
                if f"{target}.".startswith(f"{dependency}.") and not within(name, owners):
                    wrong.append(
                        f"{name}.py:{line} imports {dependency}, which belongs to {owners}"
                    )
    assert not wrong


def is_of_objects(name):
    """Whether torch.distributed pickles: broadcast_object_list, all_gather_object, ..."""
    return name.endswith(("_object", "_object_list", "_objects"))


def shipped():
    """What people run: the package, and the scripts that start or measure it."""
    yield from modules()
    for folder in ("launch", "benchmarks", "docs"):
        for path in sorted((PACKAGE.parent / folder).rglob("*.py")):
            yield (
                path.relative_to(PACKAGE.parent).with_suffix("").as_posix(),
                ast.parse(path.read_text()),
            )


def offences(name, tree):
    """What in a file unpickles, executes or trusts what came from elsewhere."""
    for line, target in imported(tree):
        if target.split(".")[0] in BANNED_MODULES or target in BANNED_CALLS:
            yield f"{name}.py:{line} imports {target}"
        if is_of_objects(target.split(".")[-1]):
            yield f"{name}.py:{line} imports {target}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        last = called.split(".")[-1]
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        restricted = called == "torch.load" and given.get("weights_only") == "True"
        if restricted and name == "checkpoint/pickles":
            continue
        if called in BANNED_CALLS or is_of_objects(last) or last.endswith("_pickle"):
            yield f"{name}.py:{node.lineno} calls {called}"
        if called in ("np.load", "numpy.load") and "allow_pickle" in given:
            yield f"{name}.py:{node.lineno} gives allow_pickle"
        peer_to_peer = last in PEER_TO_PEER and called.startswith(("dist.", "torch."))
        if peer_to_peer and name != "pipeline/transport":
            yield f"{name}.py:{node.lineno} calls {called} outside of transport"
        for keyword in node.keywords:
            value = getattr(keyword.value, "value", True)
            if keyword.arg in ("trust_remote_code", "shell") and value is not False:
                yield f"{name}.py:{node.lineno} gives {keyword.arg}"


def test_nothing_is_unpickled_executed_or_trusted():
    assert not [offence for name, tree in shipped() for offence in offences(name, tree)]


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import deepspeed; deepspeed.init_distributed()",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=True)",  # but for the one file that checks what it gets
        "from torch import load",
        "dist.broadcast_object_list(values)",
        "from torch.distributed import all_gather_object",
        "group.all_gather_object(values, 1)",
        "dist.scatter_object_list(values)",
        "pandas.read_pickle(path)",
        "np.load(path, allow_pickle=True)",
        "dist.send(tensor, 1)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "subprocess.run(line, shell=True)",
        "eval(text)",
    ],
)
def test_the_rule_sees(code):
    assert list(offences("api", ast.parse(code)))


def test_importing_the_package_and_its_command_line_loads_no_torch():
    code = "import sys, dist_int8, dist_int8.cli; print('torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    assert answer.stdout.strip() == "False"
