"""One module per family: `describe(config)`, `edge_sources(spec)`, `block_sources(spec, index)`."""

from types import ModuleType

from dist_int8.models.families import bloom, gpt_neox, llama, opt

BY_NAME: dict[str, ModuleType] = {
    "llama": llama,
    "bloom": bloom,
    "opt": opt,
    "gpt_neox": gpt_neox,
}
BY_MODEL_TYPE: dict[str, ModuleType] = {
    model_type: family for family in BY_NAME.values() for model_type in family.MODEL_TYPES
}
