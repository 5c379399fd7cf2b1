"""Several GPUs: the tokens of one, and what NCCL is not asked to do."""

import pytest
import torch

import dist_int8

OPTIONS = {"progress": False, "max_tokens": 96, "dtype": "float32"}
PROMPTS = ["The capital of France is", "a", "Once upon a time"]


def test_stages_on_every_gpu_give_the_tokens_of_one(gpu_only, tiny_llama):
    with dist_int8.load(tiny_llama, devices=["cuda:0"], **OPTIONS) as model:
        expected = [a.token_ids for a in model.generate(PROMPTS, max_new_tokens=8)]
    num_gpus = min(4, torch.cuda.device_count())
    with dist_int8.load(tiny_llama, gpus=num_gpus, **OPTIONS) as model:
        assert [a.token_ids for a in model.generate(PROMPTS, max_new_tokens=8)] == expected


def test_nccl_never_gets_the_same_gpu_twice(gpu_only, tiny_llama):
    with pytest.raises(ValueError, match="each GPU once where NCCL connects the stages") as caught:
        dist_int8.load(tiny_llama, devices=["cuda:0", "cuda:0"], **OPTIONS)
    assert "\n" not in str(caught.value)
