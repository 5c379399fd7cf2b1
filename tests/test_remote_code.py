"""No code of a model folder runs: every loader is told so, and templates are sandboxed."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOADERS = ("from_pretrained", "from_config")
# Loaders that have no `trust_remote_code`, because nothing they do imports a module.
SAFE = {"AutoHfQuantizer.from_config"}  # from a config object made in the same line
# What loads code under another name, or renders a template outside of transformers' sandbox.
FORBIDDEN = {
    "get_class_from_dynamic_module",
    "resolve_trust_remote_code",
    "get_kernel",
    "load_custom_generate",
    "render_jinja_template",
}
TEMPLATES = ("Template", "Environment", "NativeEnvironment", "from_string")


def offences(code, where):
    """Loaders that are not told to run no code of the model, by place."""
    tree = ast.parse(code)
    told = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            given = [k.value for k in node.keywords if k.arg == "trust_remote_code"]
            if given and isinstance(given[0], ast.Constant) and given[0].value is False:
                told.add(node.func)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            is_safe = node in told or ast.unparse(node) in SAFE
            if node.attr in LOADERS and not is_safe:
                yield f"{where}:{node.lineno} {ast.unparse(node)} without trust_remote_code=False"
            if node.attr in FORBIDDEN or node.attr in TEMPLATES:
                yield f"{where}:{node.lineno} {ast.unparse(node)}"
        names = node.names if isinstance(node, ast.Import | ast.ImportFrom) else []
        for name in names:
            module = getattr(node, "module", None) or name.name
            if name.name in FORBIDDEN or module.split(".")[0] == "jinja2":
                yield f"{where}:{node.lineno} imports {name.name} of {module}"


def offences_in_text(text, where):
    """The same for examples in Markdown and docstrings."""
    for match in re.finditer(rf"(\w+)\.({'|'.join(LOADERS)})\(([^()]*)\)", text):
        name = f"{match[1]}.{match[2]}"
        if name not in SAFE and "trust_remote_code=False" not in match[3]:
            yield f"{where}: {match[0]}"


def sources():
    for folder in ("dist_int8", "launch", "benchmarks", "docs"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def test_every_loader_is_told_to_run_no_code():
    found = []
    for path in sources():
        where = str(path.relative_to(ROOT))
        text = path.read_text()
        found += [*offences(text, where), *offences_in_text(text, where)]
    for path in (*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))):
        found += offences_in_text(path.read_text(), str(path.relative_to(ROOT)))
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        "AutoTokenizer.from_pretrained(folder)",
        "AutoTokenizer.from_pretrained(folder, trust_remote_code=None)",
        "AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)",
        "AutoTokenizer.from_pretrained(folder, **{'trust_remote_code': False})",
        "transformers.AutoConfig.from_pretrained(folder)",
        "AutoModelForCausalLM.from_config(config, dtype=dtype)",
        "AutoProcessor.from_pretrained(folder)",
        "GenerationConfig.from_pretrained(folder)",
        "read = AutoTokenizer.from_pretrained",
        "import jinja2",
        "from jinja2 import Template",
        "from transformers.dynamic_module_utils import get_class_from_dynamic_module",
        "from kernels import get_kernel",
        "environment.from_string(template)",
    ],
)
def test_a_loader_that_trusts_is_found(code):
    assert list(offences(code, "x"))


def test_an_example_that_trusts_is_found():
    assert list(offences_in_text("    model = AutoModel.from_pretrained(folder)\n", "x"))
    assert not list(offences("AutoModel.from_pretrained(f, trust_remote_code=False)", "x"))


def poison(folder, name):
    """Writes a module that leaves a trace when it is imported."""
    trace = folder / "executed"
    (folder / f"{name}.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    return trace


def run_with_yes(code, *arguments):
    """Runs Python that answers every question with yes."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        input="y\n" * 5,
        capture_output=True,
        text=True,
    )
