"""OpenVINO GenAI's continuous batching, stepped by hand."""

from worker import bytes_of, serve

CACHE_GB = 3


class OpenVino:
    def __init__(self, args):
        import openvino
        import openvino_genai

        self.openvino, self.genai, self.calls = openvino, openvino_genai, 0
        self.version = openvino_genai.__version__
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = CACHE_GB
        scheduler.max_num_batched_tokens = 2048
        scheduler.enable_prefix_caching = False
        properties = {"INFERENCE_NUM_THREADS": args.threads, "PERFORMANCE_HINT": "LATENCY"}
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(
            str(args.model), scheduler, "CPU", properties
        )
        self.weight_bytes = bytes_of(*args.model.glob("openvino_model.bin"))

    def generate(self, prompts, num_tokens, watch):
        settings = self.genai.GenerationConfig()
        settings.max_new_tokens = num_tokens
        settings.ignore_eos = True
        settings.do_sample = False
        handles = []
        for prompt in prompts:
            self.calls += 1
            token_ids = self.openvino.Tensor([prompt])
            handles.append(self.pipeline.add_request(self.calls, token_ids, settings))
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            for index, handle in enumerate(handles):
                while handle.can_read():
                    for output in handle.read().values():
                        for token_id in output.generated_ids:
                            watch.note(index, token_id)


if __name__ == "__main__":
    serve(OpenVino)
