"""No code of a model folder runs: every loader is told so, and templates are sandboxed."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from dist_int8.cli.app import run
from dist_int8.evaluation.floating import load_floating_model
from dist_int8.evaluation.host import Host

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


@pytest.fixture
def poisoned(tiny_llama, tmp_path):
    """A folder whose every file that may name code names a module that leaves a trace."""
    for path in tiny_llama.iterdir():
        shutil.copy(path, tmp_path / path.name)
    trace = f"open({str(tmp_path / 'executed')!r}, 'w').close()\n"
    (tmp_path / "own.py").write_text(trace)
    (tmp_path / "custom_generate").mkdir()
    (tmp_path / "custom_generate" / "generate.py").write_text(trace)
    own = {name: f"own.{name}" for name in ("AutoConfig", "AutoModelForCausalLM", "AutoProcessor")}
    added = {
        "config.json": {"auto_map": own},
        "tokenizer_config.json": {
            "auto_map": {"AutoTokenizer": ["own.Tokenizer", "own.Tokenizer"]}
        },
        "generation_config.json": {"custom_generate": str(tmp_path)},
        "processor_config.json": {"auto_map": own},
    }
    for name, fields in added.items():
        path = tmp_path / name
        before = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(before | fields))
    return tmp_path


CALLS = {
    "load": "with dist_int8.load(folder, devices=['cpu'], progress=False) as model: "
    "model.generate([[1, 2]], max_new_tokens=2)",
    "tokenizer": "from dist_int8.models.tokenizer import load_tokenizer; load_tokenizer(folder)",
    "host": "from dist_int8.evaluation.host import Host; Host(folder)",
    "outliers": "from dist_int8.config import Settings\n"
    "from dist_int8.evaluation.evaluate import with_outlier_features\n"
    "with with_outlier_features(Settings(model=folder), 0): pass",
    "harness": "from dist_int8.evaluation.harness import PipelineLM; "
    "PipelineLM(folder, devices=['cpu'], progress=False)",
}


OTHER_CLASSES = ("OwnTokenizer", "AutoTokenizer", "RagTokenizer")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tokenizer_class"),
    [*((name, None) for name in CALLS), *(("tokenizer", other) for other in OTHER_CLASSES)],
)
def test_no_code_of_the_folder_runs_even_if_yes_is_typed(poisoned, name, tokenizer_class):
    path = poisoned / "tokenizer_config.json"
    fields = json.loads(path.read_text()) | {"tokenizer_class": tokenizer_class}
    path.write_text(json.dumps(fields))
    code = f"import sys, dist_int8; folder = sys.argv[1]\n{CALLS[name]}"
    ran = subprocess.run(
        [sys.executable, "-c", code, str(poisoned)], input="y\n" * 9, capture_output=True, text=True
    )
    assert "Do you wish" not in ran.stdout + ran.stderr
    assert not (poisoned / "executed").exists()
    if ran.returncode:  # it refused, for a reason
        assert "ValueError" in ran.stderr, ran.stderr


ESCAPES = (
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__init__.__globals__ }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
    "{{ messages.append(1) }}",
)


@pytest.mark.parametrize("template", ESCAPES)
def test_a_chat_template_cannot_leave_its_sandbox(tiny_llama, tmp_path, capsys, template):
    for path in tiny_llama.iterdir():
        shutil.copy(path, tmp_path / path.name)
    (tmp_path / "chat_template.jinja").write_text(template)
    arguments = ["generate", "-m", str(tmp_path), "--device", "cpu", "-q", "--chat", "-p", "Hi"]
    assert run(arguments) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(said) == 1 and "must fit the chat template, got" in said[0] and "unsafe" in said[0]


def test_an_evaluation_takes_no_pickle_unless_told(tiny_llama, tmp_path):
    for path in tiny_llama.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, tmp_path / path.name)
    model = LlamaForCausalLM.from_pretrained(tiny_llama)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="must be a model that transformers loads"):
        Host(tmp_path)
    assert Host(tmp_path, allow_pickle=True).linears


def test_an_evaluation_fetches_no_kernel_that_a_config_names(tiny_llama, tmp_path):
    for path in tiny_llama.iterdir():
        shutil.copy(path, tmp_path / path.name)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text()) | {"attn_implementation": "someone/kernel"}
    path.write_text(json.dumps(fields))
    assert load_floating_model(tmp_path, torch.float32).config._attn_implementation == "sdpa"
