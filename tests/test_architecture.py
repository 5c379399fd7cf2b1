"""Who may import whom, which dependency has which owner, and what nobody may use (ARCHITECTURE.md).

`python -m pytest tests/test_architecture.py` names the file, the line and the rule.
"""

import ast
import functools
import graphlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dist_int8"

ROOMS_OF_API = {
    "checkpoint",
    "config",
    "distributed",
    "engine",
    "errors",
    "int8",
    "models",
    "partition",
    "pipeline",
}
ALL = {*ROOMS_OF_API, "api", "evaluation", "launcher", "profiling", "server"}
# Room of dist_int8 -> rooms it may import. What is missing here is refused.
MAY_IMPORT = {
    "errors": set(),
    "config": set(),
    "int8": set(),
    "distributed": {"errors"},
    "partition": {"config"},
    "models": {"int8"},
    "pipeline": {"distributed", "errors", "models"},
    "checkpoint": {"int8", "models"},
    "profiling": {"config", "int8", "models", "partition"},
    "engine": {"config", "errors", "int8", "models", "pipeline"},
    "api": ROOMS_OF_API,
    "launcher": {"api", "config", "distributed"},  # api: the rank alone; config: the log level
    "evaluation": {"api", "checkpoint", "config", "distributed", "engine", "int8", "models"},
    "server": {"api", "config", "engine", "errors"},
    "cli": ALL,
    # the doors
    "__init__": {"api", "errors", "evaluation", "int8"},
    "__main__": {"cli", "distributed"},
}
# File -> rooms it may import, where that is less.
CLOSER = {
    "int8/checks": set(),
    "int8/rotation": set(),
    "launcher/logs": {"config"},
    "launcher/signals": {"distributed"},
    "launcher/supervisor": {"distributed", "launcher"},
    "partition/memory": set(),
    "pipeline/schedule": set(),
    "pipeline/trace": set(),
    "profiling/simulator": set(),
}
WITHOUT_TORCH = {
    "config",
    "distributed/children",
    "distributed/diagnosis",
    "distributed/environment",
    "distributed/heartbeat",
    "distributed/interfaces",
    "distributed/interpreter",
    "distributed/launchers",
    "distributed/monitor",
    "distributed/owner",
    "distributed/slurm",
    "distributed/states",
    "distributed/world",
    "launcher",
    "partition",
    "pipeline/schedule",
    "pipeline/trace",
    "profiling/simulator",
    "profiling/timeline",
    *(f"cli/{name}" for name in ("app", "bench", "checkpoint", "eval", "generate", "plan")),
    *(f"cli/{name}" for name in ("exit_codes", "layout", "options", "prompt_file", "stdout")),
    *(f"cli/{name}" for name in ("command", "escapes", "plural", "targets")),
}
OWNERS = {  # outside dependency -> the only files or rooms that import it
    "accelerate": set(),  # patches nn.Module for every thread
    "cuda": {"partition/gpus"},
    "huggingface_hub": {"checkpoint", "models/config"},
    "bitsandbytes": {"evaluation/linears"},
    "lm_eval": {"evaluation/harness", "evaluation/tasks"},
    "matplotlib": {"evaluation/pictures", "profiling/timeline"},
    "pydantic": {"config"},
    "rich": {"cli/doctor"},
    "safetensors": {"checkpoint"},
    "torch.distributed": {"distributed/rendezvous", "pipeline/transport"},
    "torchao": {"evaluation/linears"},
    "tqdm": {"cli/batch", "cli/checkpoint", "cli/demo_model", "evaluation", "api/stages"},
    "transformers": {
        "models",
        "engine/detokenizer",
        "engine/processors",
        "api/prepare",
        "evaluation",
        "api/model",
        "cli/demo_model",
    },
    "typer": {
        *(f"cli/{name}" for name in ("app", "bench", "checkpoint", "command", "eval")),
        *(f"cli/{name}" for name in ("generate", "options", "plan")),
    },
    "yaml": {"config"},
}
# Files that start other programs: each was read for what it lets run.
STARTERS = {"cli/demo_model", "distributed/children", "distributed/spawn", "launcher/supervisor"}
STARTING = {"asyncio.subprocess", "multiprocessing", "pty", "subprocess", "torch.multiprocessing"}
STARTING_CALLS = ("os.exec", "os.fork", "os.popen", "os.posix_spawn", "os.spawn")
PEER_TO_PEER = {"send", "recv", "isend", "irecv", "batch_isend_irecv", "P2POp"}
BANNED_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "deepspeed"}
BANNED_CALLS = {"torch.load", "torch.save", "os.system", "eval", "exec"}


@functools.cache
def modules():
    """(name, tree) of every file."""
    paths = sorted(PACKAGE.rglob("*.py"))
    names = [path.relative_to(PACKAGE).with_suffix("").as_posix() for path in paths]
    return [
        (name.removesuffix("/__init__"), ast.parse(path.read_text()))
        for name, path in zip(names, paths, strict=True)
    ]


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


def targets(name, tree):
    """(line, file of ours) of every import of ours."""
    names = {name for name, _ in modules()}
    for line, target in imported(tree):
        if target.startswith("dist_int8."):
            parts = target.split(".")[1:]
            whole, room = "/".join(parts), "/".join(parts[:-1])
            yield line, whole if whole in names else room


def test_rooms_import_only_what_they_may():
    wrong = []
    for name, tree in modules():
        room = name.split("/")[0]
        assert room in MAY_IMPORT, f"{name}: a new room; say in MAY_IMPORT what it may import"
        for line, target in targets(name, tree):
            other = target.split("/")[0]
            allowed = CLOSER.get(name, {room, *MAY_IMPORT[room]})
            if other not in allowed:
                wrong.append(f"{name}.py:{line} imports {target}")
    assert not wrong


def test_no_file_imports_itself_through_others():
    graph = {name: {target for _, target in targets(name, tree)} for name, tree in modules()}
    rooms = {}
    for name, others in graph.items():
        rooms.setdefault(name.split("/")[0], set()).update(o.split("/")[0] for o in others)
    for room, others in rooms.items():
        others.discard(room)
    # raises CycleError, which names the circle
    assert list(graphlib.TopologicalSorter(graph).static_order())
    assert list(graphlib.TopologicalSorter(rooms).static_order())


def test_nothing_lies_loose_at_the_root():
    loose = {name for name, _ in modules() if "/" not in name and not is_room(name)}
    assert loose <= {"__init__", "__main__", "errors"}


def is_room(name):
    return (PACKAGE / name).is_dir()


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
def test_forbidden_code_is_found(code):
    assert list(offences("api", ast.parse(code)))


def commands_with_the_folder_on_the_path(tree):
    """(line, command) of every list that begins with this Python but not with -P.

    Without -P, `python -m` and `python -c` import what lies in the working directory.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.List | ast.Tuple):
            words = [ast.unparse(word) for word in node.elts]
            for word, following in itertools.zip_longest(words, words[1:]):
                if word == "sys.executable" and following != "'-P'":
                    yield node.lineno, ast.unparse(node)


def starters(name, tree):
    """What in a file starts another program."""
    for line, target in imported(tree):
        if within(target.replace(".", "/"), [place.replace(".", "/") for place in STARTING]):
            yield f"{name}.py:{line} imports {target}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith(STARTING_CALLS):
            yield f"{name}.py:{node.lineno} calls {ast.unparse(node.func)}"


def test_no_process_of_ours_imports_from_the_working_directory():
    found = {
        (name, command)
        for name, tree in modules()
        for _, command in commands_with_the_folder_on_the_path(tree)
    }
    # `dist-int8 launch script.py`: the user's script, whose own folder is on sys.path by design
    assert found == {("cli/app", "[sys.executable, first, *rest]")}
    assert not [
        start for name, tree in modules() if name not in STARTERS for start in starters(name, tree)
    ]


@pytest.mark.parametrize(
    "code",
    [
        "import subprocess",
        "from multiprocessing import Pool",
        "import torch.multiprocessing as mp",
        "os.execv(sys.executable, line)",
        "os.fork()",
    ],
)
def test_a_file_that_starts_programs_is_found(code):
    assert list(starters("api", ast.parse(code)))


def test_a_python_that_imports_from_the_working_directory_is_found():
    for code in ("[sys.executable, '-m', 'x']", "run((nice, sys.executable))"):
        assert list(commands_with_the_folder_on_the_path(ast.parse(code)))
    good = ast.parse("[sys.executable, '-P', '-m', 'x']")
    assert not list(commands_with_the_folder_on_the_path(good))


ENDS = {"kill", "killpg", "rmtree", "say_bye", "terminate"}  # calls that end what others may need
AT_THE_END = {"atexit.register", "weakref.finalize"}
# Functions that need not ask whether they run in a forked child, and why.
NEVER_IN_A_CHILD = {
    "checkpoint/writer/aside": "rewriting is one call, which forks nobody",
    "cli/demo_model": "conversion is one call, which forks nobody",
    "distributed/children.remove_folders": "called by handlers of the command line",
    "distributed/heartbeat.say_bye": "its connection is closed in a child",
    "distributed/monitor.say_bye": "its connections are closed in a child",
    "distributed/rendezvous.join": "calls World.kill, which asks",
    "distributed/spawn.spawn": "calls World.kill, which asks",
    "distributed/world.kill": "calls Children.kill and _end, which ask",
    "engine/steps": "runs in the thread of the driver, which a child has not",
    "launcher/supervisor._signal": "its children replace themselves by other programs",
}


def teardown_without_owner(name, tree):
    """Functions that end a process or remove a folder and do not ask whose it is.

    A forked child has copies of everything and must end nothing of its parent's.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            called = {ast.unparse(n.func).split(".")[-1] for n in ast.walk(node) if is_call(n)}
            asks = "is_here" in ast.unparse(node) or "owner.check" in ast.unparse(node)
            known = {name, f"{name}.{node.name}"} & NEVER_IN_A_CHILD.keys()
            if called & ENDS and not asks and not known:
                yield f"{name}.py:{node.lineno} {node.name} ends something and does not ask whose"
    text = ast.unparse(tree)
    for node in ast.walk(tree):
        late = is_call(node) and ast.unparse(node.func) in AT_THE_END
        late |= isinstance(node, ast.FunctionDef) and node.name == "__del__"
        if late and "owner.is_here" not in text:
            yield f"{name}.py:{node.lineno} runs at the end of forked children too"


def is_call(node):
    return isinstance(node, ast.Call)


def test_what_ends_something_asks_whose_it_is():
    rooms = ("api", "cli", "checkpoint", "distributed", "engine", "launcher", "pipeline")
    assert not [
        found
        for name, tree in modules()
        if name.startswith(rooms)
        for found in teardown_without_owner(name, tree)
    ]


@pytest.mark.parametrize(
    "code",
    [
        "def close(self): self.child.kill()",
        "def close(self): shutil.rmtree(self.folder)",
        "atexit.register(close)",
        "class A:\n    def __del__(self): pass",
        "weakref.finalize(model, close)",
    ],
)
def test_a_teardown_that_does_not_ask_is_found(code):
    assert list(teardown_without_owner("api/model", ast.parse(code)))


def test_importing_the_package_and_its_command_line_loads_no_torch():
    code = "import sys, dist_int8, dist_int8.cli.app; print('torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    assert answer.stdout.strip() == "False"


def test_dir_names_what_is_public():
    import dist_int8

    assert set(dist_int8.__all__) < set(dir(dist_int8))


def test_no_library_module_prints():
    allowed = {"cli"}
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            is_print = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
            if is_print and room not in allowed:
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert not found, "library code logs; only the command line prints"


def test_no_two_public_classes_share_a_name():
    places: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))
    assert not {name: where for name, where in places.items() if len(where) > 1}


def test_fields_are_documented_in_the_docstring_of_their_class():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                for member, text in itertools.pairwise(node.body):
                    is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
                    if isinstance(member, ast.AnnAssign) and is_text:
                        found.append(f"{path.relative_to(PACKAGE)}:{text.lineno}")
    assert not found, "an Attributes: section, not a string below the field"
