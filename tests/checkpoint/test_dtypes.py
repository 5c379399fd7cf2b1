"""Weights of every dtype, compared with what transformers loads from the same file in fp32."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    assert_same_stage,
    compute_logits,
    find_tiny_columns,
    load_tiny_stage,
    read_spec,
)
from transformers import AutoModelForCausalLM

from dist_int8.checkpoint import CheckpointReader, StageFormat, load_stage, read_stored_format
from dist_int8.checkpoint.writer import dequantize, quantize
from dist_int8.models import StageSlice

IDS = torch.arange(3, 40)
DTYPES = [
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.int32,
    torch.uint8,
    torch.bool,
]
NORM, QUERY = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"


def store(folder, dtypes):
    """Store tensors in other dtypes; a function of the name, None: as it is."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if (dtype := dtypes(name)) is not None:
            is_whole = not (dtype.is_floating_point or dtype.is_complex)
            tensors[name] = (tensor.clamp(0, 1).round() if is_whole else tensor).to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def compute_expected(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(IDS[None]).logits[0]


def assert_right(folder, **options):
    logits = compute_logits(load_tiny_stage(folder, int8=False, **options), IDS)
    torch.testing.assert_close(logits, compute_expected(folder), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("only", [None, NORM, QUERY])
def test_every_dtype_gives_the_logits_of_transformers(folder_of, dtype, only):
    folder = folder_of("llama")
    store(folder, lambda name: dtype if only in (None, name) else None)
    assert_right(folder)


@pytest.mark.parametrize("name", ["bloom", "opt", "gpt_neox", "llama_tied"])
def test_double_precision_in_every_family(folder_of, name):
    folder = folder_of(name)
    store(folder, lambda name: torch.float64)
    assert_right(folder)


def test_a_mix_of_dtypes_in_one_matrix(folder_of, tmp_path):
    folder = folder_of("llama")
    kinds = {"q_proj": torch.bfloat16, "k_proj": torch.float64, "v_proj": torch.float16}
    store(folder, lambda name: next((kinds[k] for k in kinds if f".{k}." in name), torch.float32))
    assert_right(folder)
    hot = {"blocks.0.qkv": [3, 17]}
    direct = load_tiny_stage(folder, hot_columns=hot)
    weight = torch.cat(
        [
            CheckpointReader(folder).read(f"model.layers.0.self_attn.{kind}.weight").float()
            for kind in kinds
        ]
    )
    assert torch.equal(direct.blocks["0"].qkv.hot_weight.float(), weight[:, [3, 17]])
    quantize(folder, tmp_path / "int8", hot_columns=hot).run()
    assert_same_stage(load_tiny_stage(tmp_path / "int8"), direct)
    stored = read_stored_format(tmp_path / "int8", read_spec(folder))
    assert stored.linear_size == direct.blocks["0"].qkv.hot_weight.element_size()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_quantizing_and_calibrating_from_other_dtypes(folder_of, tmp_path, dtype):
    folder = folder_of("llama")
    store(folder, lambda name: dtype)
    single = tmp_path / "single"
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).save_pretrained(single)
    assert find_tiny_columns(folder) == find_tiny_columns(single)
    for source in (folder, single):
        quantize(source, tmp_path / f"{source.name}-int8", calibrate="random").run()
    one, two = (load_tiny_stage(tmp_path / f"{f.name}-int8").state_dict() for f in (folder, single))
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor.float(), two[name].float()) for name, tensor in one.items())
    dequantize(tmp_path / "llama-int8", tmp_path / "floating", dtype="float32").run()
    load_tiny_stage(tmp_path / "floating")


def test_progress_counts_the_stored_bytes(folder_of):
    folder = folder_of("llama")
    store(folder, lambda name: torch.float64)
    stored = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    read = []
    load_tiny_stage(folder, progress=read.append)
    assert sum(read) == stored


def test_an_embedding_of_8_bits_is_held_in_16(folder_of):
    folder = folder_of("llama_tied")
    store(folder, lambda name: torch.float8_e4m3fn)
    stage = load_tiny_stage(folder)
    assert stage.embedding.weight.dtype == torch.bfloat16
    assert stage.lm_head.weight is stage.embedding.weight


def test_pickles_of_other_dtypes(folder_of):
    folder = folder_of("llama")
    store(folder, lambda name: torch.float64)
    expected = compute_expected(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    logits = compute_logits(load_tiny_stage(folder, int8=False, allow_pickle=True), IDS)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_a_dtype_that_is_not_read_says_which_are(folder_of):
    folder = folder_of("llama")
    store(folder, lambda name: torch.complex64 if name == NORM else None)
    with pytest.raises(ValueError, match=rf"{NORM} must be of a dtype that is read \(F64, .*C64"):
        spec = read_spec(folder)
        load_stage(folder, spec, StageSlice.whole(spec), StageFormat())
