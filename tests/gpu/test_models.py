"""Small random models on a GPU: the greedy tokens of the CPU, in every family and every mode."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
)

import dist_int8
from dist_int8.checkpoint.writer import quantize

SIZES = {
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
OPT = {name: SIZES[name] for name in SIZES if name != "intermediate_size"}
CONFIGS = {
    "llama": LlamaConfig(**GROUPED),
    "mistral": MistralConfig(**GROUPED, sliding_window=16),
    "qwen2": Qwen2Config(**GROUPED),
    "bloom": BloomConfig(vocab_size=48, hidden_size=64, n_layer=3, n_head=4),
    "opt": OPTConfig(**OPT, ffn_dim=160),
    "gpt_neox": GPTNeoXConfig(**SIZES),
}
# Of the largest logit. Another order of fp32 sums rounds some activations to the next int8 step: on
# the CPU, norms that differ by 3e-7 move these logits by up to 2e-2, with two full planes by 5e-4,
# with an int8 KV cache beside them by 7e-3.
TOLERANCES = {"row_rms": 5e-2, "all": 2e-3, "int8 KV": 2e-2}
NUM_TOKENS = 24
OPTIONS = {"progress": False, "max_tokens": 96, "max_sequences": 4, "micro_batches": 1}
LENGTHS = (1, 37, 5, 18, 60, 3)  # more prompts than slots, longer and shorter than a chunk


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """A function: name in CONFIGS -> folder of a model in which every parameter matters."""
    folders = {}

    def get(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            config = CONFIGS[name]
            config.eos_token_id = None
            model = AutoModelForCausalLM.from_config(config).eval()
            with torch.no_grad():
                for parameter_name, parameter in model.named_parameters():
                    parameter.normal_(std=0.15)
                    if "norm" in parameter_name or "ln_f" in parameter_name:
                        parameter.add_(parameter_name.endswith("weight"))
            model.save_pretrained(folder := folders[name])
            (folder / "generation_config.json").unlink(missing_ok=True)
        return folders[name]

    return get


def prompts(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 48, (n,), generator=generator).tolist() for n in lengths]


def answers(model, asked, **settings):
    found = model.generate(asked, max_new_tokens=NUM_TOKENS, **settings)
    return [answer.token_ids for answer in found]


class Twin:
    """A model on the CPU: its greedy tokens, and how sure it is of each."""

    def __init__(self, folder, asked, **options):
        with dist_int8.load(folder, devices=["cpu"], **OPTIONS, **options) as model:
            self.asked, self.tokens = asked, answers(model, asked)
            self.logits = self.others(model)

    def others(self, model):
        """The model's logits of the same sequences."""
        return [
            model.logits([prompt + tokens])[0]
            for prompt, tokens in zip(self.asked, self.tokens, strict=True)
        ]

    def error(self, model):
        """|logits - these| / |these| over all sequences."""
        mine, these = torch.cat(self.others(model)), torch.cat(self.logits)
        return float((mine - these).norm() / these.norm())

    def assert_near(self, model, tolerance):
        """The model's logits are near; its tokens are these until one that is a near tie."""
        got = answers(model, self.asked)
        num_compared = 0
        for prompt, mine, tokens, logits, others in zip(
            self.asked, got, self.tokens, self.logits, self.others(model), strict=True
        ):
            bound = tolerance * float(logits.abs().max())
            assert float((others - logits).abs().max()) <= bound
            best = logits[len(prompt) - 1 : -1].topk(2).values
            ties = (best[:, 0] - best[:, 1] <= 2 * bound).nonzero()
            sure = int(ties[0]) if len(ties) else NUM_TOKENS
            assert mine[:sure] == tokens[:sure]
            num_compared += sure
        return num_compared


@pytest.mark.parametrize("rule", ["all", "row_rms"])
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_those_of_the_cpu(stage_device, family, name, rule):
    """With chunks of 8, so that prompts are prefilled beside sequences that decode."""
    options = {"dtype": "float32", "prefill_chunk": 8, "outlier_rule": rule}
    twin = Twin(family(name), prompts(), **options)
    with dist_int8.load(family(name), devices=[stage_device], **OPTIONS, **options) as model:
        num_compared = twin.assert_near(model, TOLERANCES[rule])
    if rule == "all":
        assert num_compared >= 2 * NUM_TOKENS, "few tokens are sure: the comparison says little"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_16_bit_error_is_no_larger_than_on_the_cpu(stage_device, family, name, dtype):
    """Against fp32 on the CPU: there every step is rounded to 16 bits, on a GPU fewer are."""
    twin = Twin(family(name), prompts(), dtype="float32")
    errors = []
    for device in ("cpu", stage_device):
        with dist_int8.load(family(name), devices=[device], dtype=dtype, **OPTIONS) as model:
            errors.append(twin.error(model))
    assert errors[1] <= 1.5 * errors[0]


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_int8_kv_cache_is_close_to_the_cpu(stage_device, family, name):
    options = {"dtype": "float32", "kv": "int8", "prefill_chunk": 8, "outlier_rule": "all"}
    twin = Twin(family(name), prompts(), **options)
    with dist_int8.load(family(name), devices=[stage_device], **OPTIONS, **options) as model:
        twin.assert_near(model, TOLERANCES["int8 KV"])


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_two_stages_in_threads_on_one_gpu_give_the_tokens_of_one(stage_device, family, name):
    options = {**OPTIONS, "dtype": "bfloat16"}
    with dist_int8.load(family(name), devices=[stage_device], **options) as model:
        expected = answers(model, prompts())
    with dist_int8.load(
        family(name), devices=[stage_device] * 2, in_process=True, **options
    ) as model:
        assert answers(model, prompts()) == expected


def test_stages_on_cpu_and_gpu_work_together(stage_device, family):
    options = {"dtype": "float32", "outlier_rule": "all", **OPTIONS}
    twin = Twin(family("llama"), prompts(), dtype="float32", outlier_rule="all")
    for devices in (["cpu", stage_device], [stage_device, "cpu"]):
        with dist_int8.load(family("llama"), devices=devices, in_process=True, **options) as model:
            twin.assert_near(model, TOLERANCES["all"])


def test_two_ranks_share_a_gpu_over_gloo(stage_device, family):
    options = {**OPTIONS, "dtype": "bfloat16"}
    with dist_int8.load(family("llama"), devices=[stage_device], **options) as model:
        expected = answers(model, prompts())
    with dist_int8.load(
        family("llama"), devices=[stage_device] * 2, backend="gloo", **options
    ) as model:
        assert answers(model, prompts()) == expected


def test_sampling_on_the_gpu_is_reproducible(stage_device, family):
    with dist_int8.load(family("llama"), devices=[stage_device], **OPTIONS) as model:
        greedy = answers(model, prompts())
        assert answers(model, prompts(), temperature=1.5, top_k=1) == greedy
        hot = {"temperature": 2.0, "top_p": 0.9, "repetition_penalty": 1.2}
        first = answers(model, prompts(), seed=7, **hot)
        assert answers(model, prompts(), seed=7, **hot) == first
        assert answers(model, prompts(), seed=8, **hot) != first
        assert all(0 <= token < 48 for tokens in first for token in tokens)


@pytest.mark.parametrize("name", ["llama", "bloom", "opt"])
def test_graphs_and_two_steps_in_flight_change_no_token(stage_device, family, name):
    """In fp32, where the head's sums hardly depend on the number of rows."""
    sampled = {"temperature": 1.0, "top_p": 0.9, "frequency_penalty": 0.2, "seed": 3}
    found = []
    for graphs in (False, True):
        options = {**OPTIONS, "dtype": "float32", "cuda_graphs": graphs}
        with dist_int8.load(family(name), devices=[stage_device], **options) as model:
            ends = {"stop_token_ids": [3, 17]}
            found.append(
                [answers(model, prompts(), **how) for how in ({}, sampled, ends, sampled | ends)]
            )
    assert found[0] == found[1]


def test_a_draw_is_that_of_the_cpu(stage_device, family):
    """At a temperature that leaves the logits' differences no weight."""
    hot = {"temperature": 1e4, "seed": 5}
    with dist_int8.load(family("llama"), devices=["cpu"], dtype="float32", **OPTIONS) as model:
        expected = answers(model, prompts(), **hot)
    options = {**OPTIONS, "dtype": "float32"}
    with dist_int8.load(family("llama"), devices=[stage_device], **options) as model:
        got = answers(model, prompts(), **hot)
    same = [
        a == b
        for mine, theirs in zip(got, expected, strict=True)
        for a, b in zip(mine, theirs, strict=True)
    ]
    assert sum(same) > 0.9 * len(same)


def test_a_steady_decode_never_waits_for_the_gpu(stage_device, gpu_only, family):
    """torch raises for every wait of its own; what waits for tokens waits for an event."""
    with dist_int8.load(family("llama"), devices=[stage_device], **OPTIONS) as model:
        answers(model, prompts())  # records the graphs
        engine = model._engine
        chosen = model._encoder.choose(None, {"max_new_tokens": 40, "temperature": 1.0})
        requests = model._encoder.make_requests(prompts()[:4], chosen)
        engine.add(requests)
        while not all(len(request.token_ids) > 2 for request in requests):
            engine.step()
        before = sum(len(request.token_ids) for request in requests)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(12):
                engine.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert sum(len(request.token_ids) for request in requests) > before
        while not all(request.ended for request in requests):
            engine.step()


def test_a_prompt_beside_sequences_that_decode_never_waits(stage_device, gpu_only, family):
    options = {**OPTIONS, "dtype": "bfloat16", "prefill_chunk": 8}
    with dist_int8.load(family("llama"), devices=[stage_device], **options) as model:
        answers(model, prompts())
        engine = model._engine
        chosen = model._encoder.choose(None, {"max_new_tokens": 40})
        requests = model._encoder.make_requests([prompts()[1], prompts()[4]], chosen)
        engine.add(requests[:1])
        while len(requests[0].token_ids) < 3:
            engine.step()
        engine.add(requests[1:])
        engine.step()  # the settings of a sequence that starts
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(6):  # chunks of 8, of 60 tokens
                engine.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        while not all(request.ended for request in requests):
            engine.step()


@pytest.mark.parametrize("num_hot_columns", [0, 16])
def test_an_int8_checkpoint_gives_the_logits_of_its_original(
    stage_device, family, tmp_path, num_hot_columns
):
    """Bit for bit: what is quantized on the card is what was quantized on the CPU."""
    calibrate = "random" if num_hot_columns else "off"
    how = {"calibrate": calibrate, "num_hot_columns": num_hot_columns, "rotation": 64}
    quantize(family("llama"), tmp_path / "int8", **how).run()
    ids = prompts((40, 40))
    options = {"devices": [stage_device], **OPTIONS}
    with dist_int8.load(tmp_path / "int8", **options) as model:
        got = model.logits(ids)
    if num_hot_columns:  # found on another device, other columns may be the hottest: near is enough
        with dist_int8.load(tmp_path / "int8", **{**options, "devices": ["cpu"]}) as model:
            want = model.logits(ids)
        assert float((got - want).abs().max()) <= 6e-2 * float(want.abs().max())
    else:
        with dist_int8.load(family("llama"), **options) as model:
            assert torch.equal(got, model.logits(ids))
