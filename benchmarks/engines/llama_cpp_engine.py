"""llama.cpp or its fork ik_llama.cpp: llama_decode with a sequence per prompt, greedy.

--variant is upstream (PyPI: llama-cpp-python, compiled here for this processor) or ik
(ik-llama-cpp-python, compiled for AVX2). Contexts have their defaults but for threads and sizes.
"""

from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import numpy as np
from worker import bytes_of, serve

BATCH = 2048  # tokens per llama_decode; a micro-batch stays at the default of 512
VARIANTS = {
    "upstream": ("llama-cpp-python", "llama_cpp"),
    "ik": ("ik-llama-cpp-python", "ik_llama_cpp._ctypes_api"),
}


class LlamaCpp:
    def __init__(self, args):
        package, module = VARIANTS[args.variant]
        self.version = version(package)
        self.lib = import_module(module)
        self.threads, self.is_ik = args.threads, args.variant == "ik"
        self.weight_bytes = bytes_of(args.model)
        self.flags = Path("/proc/cpuinfo").read_text()
        self.lib.llama_backend_init()
        params = self.lib.llama_model_default_params()
        if not self.is_ik and "amx_int8" in self.flags:
            params.use_extra_bufts = False  # its AMX kernels end with a protection fault
        self.model = self.lib.llama_model_load_from_file(str(args.model).encode(), params)
        assert self.model, f"{args.model}: llama.cpp cannot load it"
        self.vocab_size = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))
        self.batch = self.lib.llama_batch_init(BATCH, 0, 1)

    def context(self, num_sequences, num_tokens):
        params = self.lib.llama_context_default_params()
        params.n_ctx = num_sequences * num_tokens
        params.n_batch, params.n_seq_max = BATCH, num_sequences
        params.n_threads = params.n_threads_batch = self.threads
        if self.is_ik and ("avx_vnni" not in self.flags or num_sequences > 1):
            params.flash_attn = False  # it aborts there
        context = self.lib.llama_init_from_model(self.model, params)
        assert context, "llama.cpp: no context"
        return context

    def decode(self, context, rows):
        """Computes rows of (token id, position, sequence, whether logits are wanted)."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token_id, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i] = token_id, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = wanted
        status = self.lib.llama_decode(context, batch)
        assert status == 0, f"llama_decode: {status}"
        wanted = [(row[2], i) for i, row in enumerate(rows) if row[3]]
        known = []
        for index, i in wanted:
            logits = self.lib.llama_get_logits_ith(context, i)
            known.append((index, int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())))
        return known

    def generate(self, prompts, num_tokens, watch):
        length = max(map(len, prompts)) + num_tokens
        context = self.context(len(prompts), length)
        watch.begin()  # a caller would keep the context
        rows = [
            (token_id, position, index, position == len(prompt) - 1)
            for index, prompt in enumerate(prompts)
            for position, token_id in enumerate(prompt)
        ]
        known = []
        for first in range(0, len(rows), BATCH):
            known += self.decode(context, rows[first : first + BATCH])
        for step in range(num_tokens):
            for index, token_id in known:
                watch.note(index, token_id)
            if step + 1 < num_tokens:
                known = self.decode(
                    context,
                    [(token_id, len(prompts[i]) + step, i, True) for i, token_id in known],
                )
        self.lib.llama_free(context)


if __name__ == "__main__":
    serve(LlamaCpp)
