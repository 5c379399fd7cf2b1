"""The models that every engine gets, as folders of safetensors, and in other formats.

    python -m engines.models MODEL FOLDER         # `demo` or `llama-1b` as a transformers folder
    python -m engines.models --gguf SOURCE FILE   # the same weights as Q8_0
    python -m engines.models --w8a8 SOURCE FOLDER    # the same weights as compressed-tensors

Runs in benchmarks, in the project's own environment.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from engines.gguf_file import write_gguf
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

# Llama-3.2-1B, with the vocabulary of the demo model so that both take the same prompts
LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
# copied from the demo model beside the weights, whatever the model
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def demo_folder() -> Path:
    from dist_int8.cli.demo_model import demo_model

    return demo_model()


def make_demo(folder: Path) -> None:
    """Copies the demo model."""
    shutil.copytree(demo_folder(), folder)


def make_llama_1b(folder: Path) -> None:
    """Writes a model of Llama-3.2-1B's shape with random weights (seed 0)."""
    tokens = json.loads((demo_folder() / "config.json").read_text())
    config = LlamaConfig(
        **LLAMA_1B,
        **{name: tokens[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")},
        pad_token_id=tokens["pad_token_id"],
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.to_empty(device="cpu").to(torch.bfloat16)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1) if name.endswith("norm.weight") else weight.normal_(0, 0.02)
    model.tie_weights()
    model.save_pretrained(folder)


def finish(folder: Path) -> None:
    """Adds the tokenizer, and writes config.json so that old and new transformers read it alike."""
    for name in TOKENIZER:
        if not (folder / name).exists():
            shutil.copy(demo_folder() / name, folder / name)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]  # transformers 4 looks here
    config["torch_dtype"] = config.get("dtype", "bfloat16")
    path.write_text(json.dumps(config, indent=2) + "\n")


def write_w8a8(source: Path, folder: Path) -> None:
    """Rounds every linear of the blocks to int8: a scale per output, x quantized per token.

    The checkpoint is one of compressed-tensors, as llm-compressor writes it without calibration.
    """
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name].float()
        scale = (weight.abs().amax(1, keepdim=True) / 127).to(torch.bfloat16)
        tensors[name] = (weight / scale.float()).round().clamp(-127, 127).to(torch.int8)
        tensors[name + "_scale"] = scale
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    int8 = {"num_bits": 8, "type": "int", "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**int8, "strategy": "channel", "dynamic": False},
                "input_activations": {**int8, "strategy": "token", "dynamic": True},
            }
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


MODELS = {"demo": make_demo, "llama-1b": make_llama_1b}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gguf", action="store_true")
    parser.add_argument("--w8a8", action="store_true")
    parser.add_argument("source", help=f"{' or '.join(MODELS)}, or the folder to convert")
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    if args.gguf:
        write_gguf(Path(args.source), args.target)
    elif args.w8a8:
        write_w8a8(Path(args.source), args.target)
    else:
        MODELS[args.source](args.target)
        finish(args.target)


if __name__ == "__main__":
    main()
