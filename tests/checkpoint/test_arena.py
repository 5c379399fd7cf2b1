"""Weights of a CPU stage follow each other in memory, without a byte in common."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

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


def test_a_full_chunk_is_followed_by_a_new_one(monkeypatch):
    monkeypatch.setattr(arena_module, "CHUNK_BYTES", 1 << 12)
    monkeypatch.setattr(arena_module, "LARGE", 1 << 10)
    arena = Arena("cpu")
    tensors = [arena.empty((1000,), torch.int8) for _ in range(9)]
    jumps = [one.data_ptr() != end_of(other) + 24 for other, one in itertools.pairwise(tensors)]
    assert 2 <= sum(jumps) <= 3
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(tensors))


def test_a_tensor_outlives_its_arena_and_its_neighbours():
    arena = Arena("cpu")
    tensors = [arena.empty((1000,), torch.int8).fill_(number) for number in range(3)]
    kept = tensors[1]
    del arena, tensors
    torch.empty(1 << 20).fill_(1.0)
    assert bool((kept == 1).all())


def test_tensors_are_saved_and_copied_without_their_neighbours(tmp_path):
    arena = Arena("cpu")
    tensors = {"a": arena.empty((7, 3), torch.int8), "b": arena.empty((5,), torch.float32)}
    for tensor in tensors.values():
        tensor.fill_(3)
        assert copy.deepcopy(tensor).untyped_storage().nbytes() == tensor.nbytes
    torch.save(tensors, tmp_path / "both.pt")
    save_file(tensors, tmp_path / "both.safetensors")
    assert (tmp_path / "both.pt").stat().st_size < 10_000
    loaded = load_file(tmp_path / "both.safetensors")
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("shape", [(1 << 24,), (0, 5)])
def test_large_and_empty_tensors_have_memory_of_their_own(shape):
    arena = Arena("cpu")
    arena.empty((4,), torch.int8)
    tensor = arena.empty(shape, torch.int8)
    assert tensor.shape == shape and tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("arena", [Arena("meta"), Arena("cpu", separate=True)])
def test_tensors_off_the_cpu_or_on_request_have_memory_of_their_own(arena):
    tensor = arena.empty((3, 4), torch.float16)
    assert tensor.device == arena.device and tensor.shape == (3, 4)
    assert tensor.untyped_storage().nbytes() == 24


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not HUGE_PAGES.exists(), reason="this kernel has no huge pages")
@pytest.mark.parametrize("num_bytes", [1000, arena_module.LARGE])
def test_memory_is_in_huge_pages_where_there_are_any(num_bytes):
    arena = Arena("cpu")
    address = arena.empty((num_bytes,), torch.int8).data_ptr() + 8192  # beyond malloc's first page
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first:
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            assert "hg" in rest  # advised to be in huge pages
            return
    raise AssertionError("the mapping was not found")
