"""CTranslate2's Generator with int8 weights."""

import json

from worker import bytes_of, serve


class CTranslate2:
    def __init__(self, args):
        import ctranslate2

        self.version = ctranslate2.__version__
        self.generator = ctranslate2.Generator(
            str(args.model), device="cpu", compute_type="int8", intra_threads=args.threads
        )
        self.tokens = json.loads((args.model / "vocabulary.json").read_text())
        self.weight_bytes = bytes_of(args.model / "model.bin")

    def generate(self, prompts, num_tokens, watch):
        def note(step):
            watch.note(step.batch_id, step.token_id)
            return False  # go on

        self.generator.generate_batch(
            [[self.tokens[i] for i in prompt] for prompt in prompts],
            max_length=num_tokens,
            min_length=num_tokens,
            beam_size=1,
            sampling_topk=1,
            end_token=[],
            include_prompt_in_result=False,
            callback=note,
        )


if __name__ == "__main__":
    serve(CTranslate2)
