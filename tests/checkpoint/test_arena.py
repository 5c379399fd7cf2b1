"""Weights of a CPU stage lie one behind the other, without a byte in common."""

import itertools

import pytest
import torch

from dist_int8.checkpoint import arena as arena_module
from dist_int8.checkpoint.arena import Arena


def end_of(tensor):
    return tensor.data_ptr() + tensor.nbytes


def test_neighbours_follow_each_other_and_share_nothing():
    arena = Arena("cpu")
    shapes = [
        ((3, 5), torch.int8),
        ((7,), torch.float32),
        ((2, 2, 9), torch.bfloat16),
        ((), torch.int8),
    ]
    tensors = [arena.empty(shape, dtype) for shape, dtype in shapes]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    for number, (tensor, (shape, dtype)) in enumerate(zip(tensors, shapes, strict=True)):
        assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0 and bool((tensor == number).all())
    for one, other in itertools.pairwise(tensors):
        assert 0 <= other.data_ptr() - end_of(one) < 64


def test_a_full_chunk_is_followed_by_another(monkeypatch):
    monkeypatch.setattr(arena_module, "CHUNK_BYTES", 1 << 12)
    monkeypatch.setattr(arena_module, "LARGE", 1 << 10)
    arena = Arena("cpu")
    tensors = [arena.empty((1000,), torch.int8) for _ in range(9)]
    storages = [tensor.untyped_storage().data_ptr() for tensor in tensors]
    assert len(set(storages)) == 3
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(tensors))


@pytest.mark.parametrize("shape", [(1 << 26,), (0, 5)])
def test_large_and_empty_tensors_have_memory_of_their_own(shape):
    arena = Arena("cpu")
    arena.empty((4,), torch.int8)
    tensor = arena.empty(shape, torch.int8)
    assert tensor.shape == shape and tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("arena", [Arena("meta"), Arena("cpu", separate=True)])
def test_separate_memory(arena):
    tensor = arena.empty((3, 4), torch.float16)
    assert tensor.device == arena.device and tensor.shape == (3, 4)
    assert tensor.untyped_storage().nbytes() == 24
