"""One stage on a GPU: the tokens of the CPU in fp32, and stages on as many GPUs as there are."""

import torch

import dist_int8

OPTIONS = {"progress": False, "max_tokens": 96, "dtype": "float32"}
PROMPTS = ["The capital of France is", "a", "Once upon a time"]


def test_one_gpu_gives_the_logits_of_the_cpu(tiny_llama):
    input_ids = torch.arange(40).view(2, 20)
    with dist_int8.load(tiny_llama, devices=["cpu"], **OPTIONS) as model:
        expected = model.logits(input_ids)
    with dist_int8.load(tiny_llama, devices=["cuda:0"], **OPTIONS) as model:
        torch.testing.assert_close(model.logits(input_ids), expected, atol=2e-2, rtol=2e-2)
        assert all(answer.token_ids for answer in model.generate(PROMPTS, max_new_tokens=8))


def test_stages_on_every_gpu_give_the_tokens_of_one(tiny_llama):
    with dist_int8.load(tiny_llama, devices=["cuda:0"], **OPTIONS) as model:
        expected = [a.token_ids for a in model.generate(PROMPTS, max_new_tokens=8)]
    num_gpus = min(4, torch.cuda.device_count())
    with dist_int8.load(tiny_llama, gpus=num_gpus, **OPTIONS) as model:
        assert [a.token_ids for a in model.generate(PROMPTS, max_new_tokens=8)] == expected
