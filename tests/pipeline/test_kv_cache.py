"""Slots are zeroed, shaped as the attention op expects, and counted to the byte."""

import torch

from dist_int8.pipeline.kv_cache import KVCache


def make(dtype=torch.float32, max_tokens=16) -> KVCache:
    return KVCache(
        num_blocks=3,
        num_slots=2,
        num_kv_heads=4,
        head_dim=8,
        max_tokens=max_tokens,
        dtype=dtype,
        device=torch.device("cpu"),
    )


def test_keys_are_stored_transposed():
    key, value = make(torch.bfloat16).layer(1)
    assert key.shape == (2, 4, 8, 16) and value.shape == (2, 4, 16, 8)
    assert not key.any() and not value.any()


def test_keys_of_the_compiled_op_are_in_groups_of_16():
    key, value = make(max_tokens=48).layer(0)
    assert key.shape == (2, 4, 3, 8, 16) and value.shape == (2, 4, 48, 8)


def test_slots_have_room_for_whole_groups():
    key, value = make(torch.bfloat16, max_tokens=33).layer(0)
    assert key.shape == (2, 4, 8, 48) and value.shape == (2, 4, 48, 8)


def test_layers_do_not_share_memory():
    cache = make(torch.bfloat16)
    cache.layer(0)[0].fill_(1)
    assert not cache.layer(1)[0].any() and not cache.layer(0)[1].any()
    assert cache.layer(0)[0].dtype == torch.bfloat16


def test_num_bytes_counts_every_cache():
    assert make().num_bytes() == 3 * 2 * (2 * 4 * 8 * 16) * 4


def test_int8_has_one_scale_per_token_and_head():
    cache = KVCache(3, 2, 4, 8, 16, torch.bfloat16, torch.device("cpu"), int8=True)
    key, value = cache.layer(2)
    assert key.values.shape == (2, 4, 8, 16) and value.values.shape == (2, 4, 16, 8)
    assert key.scale.shape == value.scale.shape == (2, 4, 16)
    assert not key.values.any() and not value.scale.any()
    assert cache.num_bytes() == 3 * 2 * 2 * 4 * 16 * (8 + 4)
