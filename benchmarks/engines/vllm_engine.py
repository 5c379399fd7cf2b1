"""vLLM on a CPU, in the process itself; the checkpoint says whether it is bf16 or int8."""

import os

from worker import MOST_SEQUENCES, MOST_TOKENS, bytes_of, serve


class Vllm:
    def __init__(self, args):
        cores = sorted(os.sched_getaffinity(0))[: args.threads]
        os.environ |= {
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the largest cell fills a tenth of it
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        import vllm

        self.vllm, self.version, self.calls = vllm, vllm.__version__, 0
        self.llm = vllm.LLM(
            model=str(args.model),
            dtype="bfloat16",
            max_model_len=MOST_TOKENS,
            max_num_seqs=MOST_SEQUENCES,
            max_num_batched_tokens=2048,
            enable_prefix_caching=False,
        )
        self.weight_bytes = bytes_of(args.model / "model.safetensors")

    def generate(self, prompts, num_tokens, watch):
        settings = self.vllm.SamplingParams(
            temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False
        )
        engine, self.calls = self.llm.llm_engine, self.calls + 1
        for index, prompt in enumerate(prompts):
            request_id = f"{self.calls}-{index}"
            engine.add_request(request_id, {"prompt_token_ids": prompt}, settings)
        while engine.has_unfinished_requests():
            for output in engine.step():
                index = int(output.request_id.split("-")[1])
                known = len(watch.token_ids[index])
                for token_id in output.outputs[0].token_ids[known:]:
                    watch.note(index, token_id)


if __name__ == "__main__":
    serve(Vllm)
