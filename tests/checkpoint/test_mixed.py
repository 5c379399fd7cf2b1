"""Int8 checkpoints of bitsandbytes that skip one of query, key and value."""

import torch
from tiny_models import compute_logits, load_tiny_stage, read_spec
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from dist_int8.checkpoint import read_stored_format
from dist_int8.checkpoint.writer import quantize

IDS = torch.arange(3, 40)


def save_by_bitsandbytes(original, folder, skip):
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    model = AutoModelForCausalLM.from_pretrained(original, quantization_config=config)
    model.save_pretrained(folder)


def dequantize_by_hand(folder):
    """The logits of transformers in fp32 with the weights that the int8 ones stand for."""
    model = AutoModelForCausalLM.from_pretrained(folder.parent / "original")
    from safetensors.torch import load_file

    stored = load_file(folder / "model.safetensors")
    state = {
        name: tensor.float() * stored[name.removesuffix("weight") + "SCB"][:, None] / 127
        if tensor.dtype == torch.int8
        else tensor.float()
        for name, tensor in stored.items()
        if not name.endswith(("SCB", "weight_format"))
    }
    model.float().load_state_dict(state, strict=False)
    with torch.no_grad():
        return model(IDS[None]).logits[0]


def test_a_mixed_matrix_is_held_in_floating_point_as_a_whole(folder_of, tmp_path, caplog):
    original = folder_of("llama").rename(tmp_path / "original")
    mixed = tmp_path / "mixed"
    save_by_bitsandbytes(original, mixed, ["q_proj", "up_proj", "lm_head"])
    stored = read_stored_format(mixed, read_spec(mixed))
    assert stored.is_int8 and {"blocks.0.qkv", "blocks.2.gate_up"} <= set(stored.skip)
    assert "6 matrices are made of int8 and floating-point tensors" in caplog.text
    stage = load_tiny_stage(mixed)
    assert type(stage.blocks["0"].qkv) is torch.nn.Linear
    assert type(stage.blocks["0"].down) is not torch.nn.Linear
    floating = load_tiny_stage(mixed, int8=False)
    expected = dequantize_by_hand(mixed)
    torch.testing.assert_close(compute_logits(floating, IDS), expected, atol=1e-3, rtol=1e-3)
    # in our own form the same weights, none rounded again
    quantize(mixed, tmp_path / "ours").run()
    again = load_tiny_stage(tmp_path / "ours")
    assert torch.equal(compute_logits(again, IDS), compute_logits(stage, IDS))
