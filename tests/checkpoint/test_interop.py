"""bitsandbytes' int8 checkpoints, read and written, in the layouts of all its versions."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import assert_same_stage, load_tiny_stage, read_spec
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from dist_int8.checkpoint.writer import dequantize, quantize
from dist_int8.int8.layouts import LAYOUTS, transform_layout

NAMES = ["llama", "bloom", "opt", "gpt_neox"]
TOKENS = torch.arange(3, 40)[None]


def by_bitsandbytes(folder):
    """The model of a folder, quantized by bitsandbytes itself on the CPU."""
    config = BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def int8_tensors(model):
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if tensor.dtype == torch.int8 or name.endswith("SCB")
    }


@pytest.mark.parametrize("name", NAMES)
def test_our_bitsandbytes_checkpoint_is_what_bitsandbytes_makes_itself(originals, tmp_path, name):
    # bitsandbytes rounds every weight to fp16 first
    half = AutoModelForCausalLM.from_pretrained(originals[name], dtype=torch.float16)
    half.float().save_pretrained(tmp_path / "half")
    quantize(tmp_path / "half", tmp_path / "bnb", target="bitsandbytes", shard_bytes=30_000).run()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "bnb")
    theirs = by_bitsandbytes(tmp_path / "half")
    one, two = int8_tensors(ours), int8_tensors(theirs)
    assert one.keys() == two.keys() and any(name.endswith("SCB") for name in one)
    num_elements = num_off = 0
    for key, tensor in one.items():
        if key.endswith("SCB"):  # from our scale: 127 * (absmax / 127)
            torch.testing.assert_close(tensor, two[key], rtol=2**-22, atol=0)
            continue
        off = (tensor.int() - two[key].int()).abs()
        assert off.max() <= 1
        num_off += int(off.sum())
        num_elements += off.numel()
    # test_functional.py of bitsandbytes allows 1 of 500, test_autograd.py 1.75% of the outputs
    assert num_off <= num_elements / 500
    with torch.no_grad():
        logits, expected = ours(TOKENS).logits, theirs(TOKENS).logits
    close = torch.isclose(logits, expected, atol=0.01, rtol=0.1)
    assert close.float().mean() >= 1 - 0.0175
    assert torch.isclose(logits, expected, atol=0.035, rtol=0.2).float().mean() >= 0.999


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_by_bitsandbytes_keeps_its_weights(originals, tmp_path, name):
    theirs = by_bitsandbytes(originals[name])
    theirs.save_pretrained(tmp_path / "bnb")
    stored = load_file(tmp_path / "bnb" / "model.safetensors")
    quantize(tmp_path / "bnb", tmp_path / "ours").run()
    ours = load_file(tmp_path / "ours" / "model-00001-of-00001.safetensors")
    num_compared = 0
    for key, tensor in stored.items():
        if tensor.dtype == torch.int8:
            base = key.removesuffix("weight")
            assert torch.equal(ours[key], tensor)
            assert torch.equal(ours[base + "col_scale"], stored[base + "SCB"] / 127)
            num_compared += 1
    assert num_compared > 5
    assert_same_stage(load_tiny_stage(tmp_path / "bnb"), load_tiny_stage(tmp_path / "ours"))
    quantize(tmp_path / "ours", tmp_path / "back", target="bitsandbytes").run()
    assert_same_stage(load_tiny_stage(tmp_path / "back"), load_tiny_stage(tmp_path / "bnb"))
    dequantize(tmp_path / "bnb", tmp_path / "floating", dtype="float32").run()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "floating")
    original = AutoModelForCausalLM.from_pretrained(originals[name])
    restored = dict(model.named_parameters())
    for key, parameter in original.named_parameters():
        step = parameter.abs().amax(-1, keepdim=True) / 127 if parameter.dim() == 2 else 0
        assert ((restored[key] - parameter).abs() <= step * 0.51 + 1e-3).all(), key


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("container", ["safetensors", "bin"])
def test_tiled_layouts_of_old_versions_are_read(originals, tmp_path, layout, container):
    folder = tmp_path / "bnb"
    quantize(originals["gpt_neox"], folder, target="bitsandbytes").run()
    expected = load_tiny_stage(folder)
    shard = folder / "model-00001-of-00001.safetensors"
    tensors = load_file(shard)
    for key, tensor in list(tensors.items()):
        if tensor.dtype == torch.int8:
            tiled = transform_layout(tensor, "row", layout)
            assert torch.equal(transform_layout(tiled, layout, "row", tuple(tensor.shape)), tensor)
            tensors[key] = tiled
            number = torch.tensor(LAYOUTS.index(layout), dtype=torch.uint8)
            # the first versions wrote the name, which only a pickle can hold
            is_bin = container == "bin"
            tensors[key.removesuffix("weight") + "weight_format"] = layout if is_bin else number
    shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    if container == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    allowed = {"allow_pickle": True} if container == "bin" else {}
    assert_same_stage(load_tiny_stage(folder, **allowed), expected)
    dequantize(folder, tmp_path / "floating", **allowed).run()
    quantize(folder, tmp_path / "ours", **allowed).run()
    assert_same_stage(load_tiny_stage(tmp_path / "ours"), expected)


def test_other_quantization_methods_are_refused(folder_of):
    folder = folder_of("llama")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for quantization in (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "dist_int8", "version": 99},
    ):
        path.write_text(json.dumps(config | {"quantization_config": quantization}))
        with pytest.raises(ValueError, match="quantization_config: must be absent"):
            read_spec(folder)
