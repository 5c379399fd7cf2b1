"""Small random models, saved by transformers, for the tests of everything above `models`.

transformers is imported where it is needed: tests of kernels start without it.
"""

import logging
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for tiny_models, the one module tests share


@pytest.fixture(autouse=True)
def random_numbers_are_the_same():
    """Every test draws the same numbers, whichever tests ran before it in its process."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def command_line_leaves_no_trace():
    """Undoes what the command line, run in this process, does to it: signals and the log."""
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    logger = logging.getLogger("dist_int8")
    level, log = logger.level, os.environ.get("DIST_INT8_LOG")
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)  # pools of other libraries end by SIGTERM
    logger.handlers.clear()  # a handler holds the stderr of its test
    logger.propagate = True
    logger.setLevel(level)
    if log is None:
        os.environ.pop("DIST_INT8_LOG", None)
    else:
        os.environ["DIST_INT8_LOG"] = log


def save_tokenizer(folder) -> None:
    """A byte-level tokenizer: 256 tokens, one per byte, and one to end with."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>").save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """Folder of a Llama of 4 blocks with grouped KV heads, a tied head and a byte tokenizer."""
    from tiny_models import make_config
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    config = make_config(
        "llama",
        vocab_size=288,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=287,
        bos_token_id=None,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


# `make test` runs these files one after the other: a neighbour would make them too late, or they
# measure memory.
ALONE = (
    "benchmarks/test_cells.py",
    "benchmarks/test_first_light.py",
    "benchmarks/test_process.py",
    "checkpoint/test_memory.py",
    "distributed/test_failure.py",
    "distributed/test_heartbeat.py",
    "launcher/test_supervisor.py",
)
# `make test-fast` leaves these files out as well: they start ranks or other processes, compile C++,
# or evaluate models.
SLOW = (
    "api/test_every_setting.py",
    "api/test_formats.py",
    "api/test_interrupts.py",
    "api/test_load.py",
    "api/test_notebook.py",
    "api/test_release.py",
    "benchmarks/test_rehearsal.py",
    "checkpoint/test_calibrate.py",
    "checkpoint/writer/test_folder.py",
    "cli/test_app.py",
    "cli/test_checkpoint.py",
    "cli/test_command.py",
    "cli/test_demo_model.py",
    "cli/test_doctor.py",
    "cli/test_eval.py",
    "cli/test_generate.py",
    "cli/test_interrupt.py",
    "csrc/test_attention.py",
    "csrc/test_csrc.py",
    "csrc/test_emulator.py",
    "csrc/test_gemm_tiles.py",
    "csrc/test_int8_matmul.py",
    "csrc/test_int8_weight_linear.py",
    "csrc/test_rows.py",
    "csrc/test_transform_layout.py",
    "distributed/test_interpreter.py",
    "distributed/test_owner.py",
    "distributed/test_rendezvous.py",
    "distributed/test_sockets.py",
    "evaluation/test_harness.py",
    "evaluation/test_linears.py",
    "evaluation/test_outlier_features.py",
    "evaluation/test_perplexity.py",
    "evaluation/test_witness.py",
    "launch/test_ends.py",
    "launch/test_generate.py",
    "pipeline/test_forged_messages.py",
    "pipeline/test_transport.py",
)


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    """Marks the tests of the files above `alone` and `slow`, and puts the slow ones first.

    No worker of `make test` is then left with a slow file at the end.
    """
    root = Path(__file__).parent
    alone, slow = ({root / name for name in names} for names in (ALONE, SLOW))
    for paths, mark in ((alone, pytest.mark.alone), (slow, pytest.mark.slow)):
        if gone := sorted(str(path) for path in paths if not path.is_file()):
            raise pytest.UsageError(f"tests/conftest.py names files that are gone: {gone}")
        for item in items:
            if item.path in paths:
                item.add_marker(mark)
    items.sort(key=lambda item: item.path not in slow)
