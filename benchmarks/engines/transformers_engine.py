"""transformers with cached keys and values, in a bare loop (faster than its generate()).

--variant is the dtype: float32 or bfloat16.
"""

from worker import serve


class Transformers:
    def __init__(self, args):
        import torch
        import transformers

        torch.set_num_threads(args.threads)
        self.torch = torch
        self.version = f"{transformers.__version__}, torch {torch.__version__}"
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            args.model,
            trust_remote_code=False,
            dtype=getattr(torch, args.variant),
            attn_implementation="sdpa",
        ).eval()
        self.weight_bytes = sum(p.nbytes for p in self.model.parameters())

    def generate(self, prompts, num_tokens, watch):
        """Takes prompts of one length: without padding there is nothing to mask."""
        token_ids, cache = self.torch.tensor(prompts), None
        with self.torch.inference_mode():
            for _ in range(num_tokens):
                output = self.model(
                    token_ids, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
                token_ids, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
                watch.note_all(token_ids[:, 0].tolist())


if __name__ == "__main__":
    serve(Transformers)
