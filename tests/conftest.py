"""Small random models, saved by transformers, for the tests of everything above `models`.

transformers is imported where it is needed: tests of kernels start without it.
"""

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for tiny_models, the one module tests share


@pytest.fixture(autouse=True)
def sigterm_is_restored():
    """The command line, run in this process, handles SIGTERM; pools of others end by it."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


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
