"""Reading a config into a `ModelSpec`. No code of the model is ever executed."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PretrainedConfig

from dist_int8.models.config_numbers import check_numbers
from dist_int8.models.families import BY_MODEL_TYPE, BY_NAME
from dist_int8.models.folder import HUB_ID, check_contents, explain_no_folder, is_folder
from dist_int8.models.json_file import read_json
from dist_int8.models.notice import warn_once
from dist_int8.models.quantization import check_quantization
from dist_int8.models.rotary import check_one_set
from dist_int8.models.sources import TensorSource
from dist_int8.models.spec import ModelSpec
from dist_int8.models.stage_slice import StageSlice

logger = logging.getLogger(__name__)

# Config fields that change what a model computes and that our block does not implement, with the
# values that mean "not used". Fields that a family's own transformers class lacks are checked too:
# models derived from a family often carry them.
_REFUSED: dict[str, tuple[Any, ...]] = {
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


# Dtypes of stored weights that are not those of any computation, and what holds their values.
_RUN_IN: dict[torch.dtype | None, torch.dtype] = {
    torch.float32: torch.float32,
    torch.float16: torch.float16,
    torch.bfloat16: torch.bfloat16,
    torch.float8_e4m3fn: torch.bfloat16,
    torch.float8_e5m2: torch.bfloat16,
}


def load_config(model: str | Path) -> PretrainedConfig:
    """Reads the config of a model folder or of a hub id ("organization/name").

    `auto_map` and any Python file beside the config are ignored: only transformers' own config
    classes of the supported families are used.

    Raises:
        ValueError: no such folder or model, no config.json, not JSON, unknown family, invalid
            fields.
    """
    if is_folder(model):
        check_contents(Path(model))
        where = str(Path(model) / "config.json")
        fields = read_json(Path(model) / "config.json")
    else:
        where, fields = f"{model}/config.json", _fetch_fields(model)
    _check_fields(where, fields)
    try:
        config = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
    except (StrictDataclassError, TypeError, ValueError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{where}: must be a valid {fields['model_type']} config, got {reason}; correct the "
            "field"
        ) from None
    if config.dtype is not None:  # what the model is run in, where it decides
        config.dtype = _RUN_IN.get(_parse_dtype(config.dtype), torch.float32)
    return config


def _parse_dtype(name: Any) -> torch.dtype | None:
    """Returns the floating dtype that config.json names; None: it is none."""
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    is_floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    return dtype if is_floating else None


def _fetch_fields(model: str | Path) -> dict[str, Any]:
    if os.path.lexists(model) or not HUB_ID.fullmatch(str(model)):
        raise ValueError(
            f"model: must be a folder or a hub id such as 'bigscience/bloom', got {str(model)!r}: "
            f"{explain_no_folder(model)}"
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


def _check_fields(where: str, fields: dict[str, Any]) -> None:
    """Refuses what transformers' config classes would accept or fail on without a clear message."""
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in BY_MODEL_TYPE:
        shown = "nothing" if model_type is None else repr(model_type)
        raise ValueError(
            f"{where}:model_type: must be one of {', '.join(BY_MODEL_TYPE)}, got {shown}; use a "
            "model of a supported family"
        )
    names = fields.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{where}:architectures: must be a list of class names, got {names!r}; correct the "
            "field"
        )
    for key in ("dtype", "torch_dtype"):
        if fields.get(key) is not None and _parse_dtype(fields[key]) is None:
            raise ValueError(
                f"{where}:{key}: must be a floating dtype of torch such as bfloat16, got "
                f"{fields[key]!r}; correct the field"
            )
    check_quantization(where, fields.get("quantization_config"))
    check_numbers(where, fields)
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
        if value not in unused:
            raise ValueError(
                f"config.json:{key}: must be absent or {unused[-1]!r}, got {value!r}; this feature "
                "is not supported, use a model without it"
            )
    check_quantization("config.json", getattr(config, "quantization_config", None))
    _warn_of_attention_kinds(config)
    wrong = [name for name in config.architectures or () if not _is_language_model(name)]
    if wrong:
        raise ValueError(
            "config.json:architectures: must be a causal language model (...ForCausalLM), got "
            f"{wrong[0]!r}; use a checkpoint with a language-model head"
        )
    return family.describe(config)


def _warn_of_attention_kinds(config: PretrainedConfig) -> None:
    """Warns of windows and layer types that the family has not, in transformers either."""
    if config.model_type == "qwen2":
        return
    named = []
    kinds: Any = getattr(config, "layer_types", None)
    if isinstance(kinds, list) and len(set(map(str, kinds))) > 1:
        named.append("layer_types")
    window = getattr(config, "sliding_window", None)
    if config.model_type != "mistral" and window and getattr(config, "use_sliding_window", True):
        named.append("sliding_window")
    if named:
        warn_once(
            logger,
            f"config.json:{' and '.join(named)}: ignored, as in transformers: all blocks of a "
            f"{config.model_type} model attend alike",
        )


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
