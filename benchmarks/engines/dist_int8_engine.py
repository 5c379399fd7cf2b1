"""This project with its defaults: a checkpoint of `quantize` in one stage on the CPU."""

from importlib.metadata import version

from worker import MOST_SEQUENCES, MOST_TOKENS, serve


class DistInt8:
    def __init__(self, args):
        import dist_int8

        self.version = version("dist_int8")
        self.model = dist_int8.load(
            args.model,
            devices=["cpu"],
            threads_per_stage=args.threads,
            max_sequences=MOST_SEQUENCES,
            max_tokens=MOST_TOKENS,
            progress=False,
        )
        self.weight_bytes = sum(stage["bytes"] for stage in self.model.stages)

    def generate(self, prompts, num_tokens, watch):
        self.model.generate(
            prompts,
            max_new_tokens=num_tokens,
            ignore_eos=True,
            model_defaults=False,
            on_token=lambda token: watch.note(token.index, token.token_id),
        )


if __name__ == "__main__":
    serve(DistInt8)
