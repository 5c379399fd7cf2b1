"""Reading a config into a `ModelSpec`. No code of the model is ever executed."""

import json
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PretrainedConfig

from dist_int8.models.families import BY_MODEL_TYPE, BY_NAME
from dist_int8.models.rotary import check_one_set
from dist_int8.models.sources import TensorSource
from dist_int8.models.spec import ModelSpec
from dist_int8.models.stage_slice import StageSlice

# Config fields that change what a model computes and that our block does not implement, with the
# values that mean "not used". Fields that a family's own transformers class lacks are checked too:
# models derived from a family often carry them.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "compression_config": (None,),
    "attn_logit_softcapping": (None, 0),
    "final_logit_softcapping": (None, 0),
    "logit_scale": (None, 1),
    "logits_scaling": (None, 1),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "attention_multiplier": (None, 1),
    "scale_embedding": (None, False),
    "rope_interleaved": (None, False),
    "clip_qkv": (None,),
    "qk_norm": (None, False),
    "use_qk_norm": (None, False),
    "qk_layernorm": (None, False),
    "num_experts": (None, 0, 1),
    "num_local_experts": (None, 0, 1),
    "no_rope_layers": (None, [], {}),
    "attention_chunk_size": (None,),
    "attn_output_gate": (None, False),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
}
_WITHOUT_WINDOW = ("llama", "bloom", "opt", "gpt_neox")
# The `version` in the quantization_config of our int8 checkpoints.
INT8_VERSION = 1
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


# The sizes that every config states, under the names that the families give them.
_SIZES = (("hidden_size", "n_embed"), ("num_hidden_layers", "n_layer"))
_LARGEST_SIZE = 131072  # of K in one int8 product; no model has as many blocks


def load_config(model: str | Path) -> PretrainedConfig:
    """Reads the config of a model folder or of a hub id ("organization/name").

    `auto_map` and any Python file beside the config are ignored: only transformers' own config
    classes of the supported families are used.

    Raises:
        ValueError: no such folder or model, no config.json, not JSON, unknown family, invalid
            fields.
    """
    if str(model) and Path(model).is_dir():
        where, fields = str(Path(model) / "config.json"), _read_local_fields(Path(model))
    else:
        where, fields = f"{model}/config.json", _fetch_fields(model)
    _check_fields(where, fields)
    try:
        return CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{where}: must be a valid {fields['model_type']} config, got {reason}; correct the "
            "field"
        ) from None


def _read_local_fields(folder: Path) -> Any:
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{folder}: must hold a config.json, got none; give the folder of a transformers model"
        )
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: must be JSON, got {error}; download the file again") from None


def _fetch_fields(model: str | Path) -> Any:
    if os.path.lexists(model) or not _HUB_ID.fullmatch(str(model)):
        raise ValueError(
            f"model: must be a folder or a hub id such as 'bigscience/bloom', got {str(model)!r}, "
            "which is neither; check the path"
        )
    try:
        fields, _ = PretrainedConfig.get_config_dict(str(model))
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            "model: must be an existing folder or a hub id that can be reached, got "
            f"{str(model)!r} ({reason}); check the path, the name or the network (a "
            "plan needs only a folder with a config.json, such as configs/models/...)"
        ) from None
    return fields


def _check_fields(where: str, fields: Any) -> None:
    """Refuses what transformers' config classes would accept or fail on without a clear message."""
    if not isinstance(fields, dict):
        raise ValueError(
            f"{where}: must be a JSON object, got {type(fields).__name__}; download the file again"
        )
    model_type = fields.get("model_type")
    if model_type not in BY_MODEL_TYPE:
        raise ValueError(
            f"{where}:model_type: must be one of {', '.join(BY_MODEL_TYPE)}, got {model_type!r}; "
            "use a model of a supported family"
        )
    for names in _SIZES:  # transformers would fill in the sizes of another model
        found = [fields[name] for name in names if name in fields]
        if not found:
            raise ValueError(
                f"{where}:{names[0]}: must be an integer, got nothing; download the file again"
            )
        if isinstance(found[0], int) and not 1 <= found[0] <= _LARGEST_SIZE:
            raise ValueError(
                f"{where}:{names[0]}: must be 1 to {_LARGEST_SIZE}, got {found[0]}; correct the "
                "field"
            )
    check_one_set(fields.get("rope_parameters") or {})


def describe(config: PretrainedConfig) -> ModelSpec:
    """Describes a transformers config as a `ModelSpec`.

    Raises:
        ValueError: an unknown family, or a field that asks for something our block does not
            implement.
    """
    family = BY_MODEL_TYPE.get(config.model_type)
    if family is None:
        raise ValueError(
            f"config.json:model_type: must be one of {', '.join(BY_MODEL_TYPE)}, got "
            f"{config.model_type!r}; use a model of a supported family"
        )
    for key, unused in _REFUSED.items():
        value = getattr(config, key, None)
        if key == "quantization_config" and _is_readable_int8(value):
            continue
        if value not in unused:
            shown = (
                value if not isinstance(value, dict) else value.get("quant_method", "a dictionary")
            )
            raise ValueError(
                f"config.json:{key}: must be absent or {unused[-1]!r}, got {shown!r}; this feature "
                "is not supported, use a model without it"
            )
    if config.model_type in _WITHOUT_WINDOW and getattr(config, "sliding_window", None):
        raise ValueError(
            f"config.json:sliding_window: must be absent for a {config.model_type} model, got "
            f"{config.sliding_window}; this family has full attention only"
        )
    wrong = [name for name in config.architectures or () if not _is_language_model(name)]
    if wrong:
        raise ValueError(
            "config.json:architectures: must be a causal language model (...ForCausalLM), got "
            f"{wrong[0]!r}; use a checkpoint with a language-model head"
        )
    return family.describe(config)


def _is_readable_int8(quantization: Any) -> bool:
    """Whether `checkpoint` reads this form: ours, or bitsandbytes' 8 bits."""
    if not isinstance(quantization, dict):
        return False
    method = quantization.get("quant_method", "bitsandbytes")
    if method == "dist_int8":
        return quantization.get("version") == INT8_VERSION
    return method == "bitsandbytes" and quantization.get("load_in_8bit") is True


def _is_language_model(architecture: str) -> bool:
    return architecture.endswith(("ForCausalLM", "Model"))


def tensor_sources(spec: ModelSpec, stage_slice: StageSlice) -> dict[str, TensorSource]:
    """Returns the source of every parameter of a stage, keyed by the stage's own parameter names.

    Names are accepted with and without the family's base-model prefix. Under a tied head,
    embedding and head may each be read from the other's tensor if their own is absent.
    """
    family = BY_NAME[spec.family]
    edges = family.edge_sources(spec)
    if spec.tied_head:
        embedding, head = edges["embedding.weight"], edges["lm_head.weight"]
        names = embedding.names[0], head.names[0]
        edges["embedding.weight"] = TensorSource((names[0] + names[1],), embedding.shapes)
        edges["lm_head.weight"] = TensorSource((names[1] + names[0],), head.shapes)
    at_end = ("final_norm.", "project_out.", "lm_head.")
    sources = {
        target: source
        for target, source in edges.items()
        if (stage_slice.last if target.startswith(at_end) else stage_slice.first)
    }
    for index in stage_slice.blocks:
        for target, source in family.block_sources(spec, index).items():
            sources[f"blocks.{index}.{target}"] = source

    def both(names: tuple[str, ...]) -> tuple[str, ...]:
        short = (name.removeprefix(family.PREFIX) for name in names)
        return tuple(dict.fromkeys((*names, *short)))

    return {
        target: TensorSource(
            tuple(both(names) for names in source.names),
            source.shapes,
            source.row_order,
            source.num_heads,
            source.fill,
        )
        for target, source in sources.items()
    }


def ignored_tensors(spec: ModelSpec) -> tuple[str, ...]:
    """Returns regular expressions of checkpoint tensors to ignore, such as old mask buffers."""
    return BY_NAME[spec.family].IGNORED
