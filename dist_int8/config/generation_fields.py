"""Fields of transformers' GenerationConfig: honoured, without effect here, or refused by name.

Whatever is in none of the tables, such as a field of a later transformers, is refused once it has a
value: nothing is dropped silently. A test walks all fields of the installed transformers.
"""

import logging
from collections.abc import Mapping
from typing import Any

_log = logging.getLogger(__name__)

HONOURED = {  # field of transformers -> ours
    name: name
    for name in (
        *("max_new_tokens", "max_length", "min_new_tokens", "min_length", "max_time"),
        *("do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p"),
        *("epsilon_cutoff", "eta_cutoff", "repetition_penalty", "no_repeat_ngram_size"),
        *("eos_token_id", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids"),
        *("sequence_bias", "forced_bos_token_id", "forced_eos_token_id"),
        *("exponential_decay_length_penalty", "remove_invalid_values"),
    )
} | {"stop_strings": "stop"}

_BEAMS = "only beam search reads it"
_ASSISTANT = "only assisted decoding reads it"
_CACHE = "the KV cache is laid out when the model is loaded"
_COMPILE = "nothing is compiled while tokens are generated"
NO_EFFECT = {  # field -> why it changes nothing that is returned
    "use_cache": "keys and values are always kept; the tokens are the same",
    "cache_config": _CACHE,
    "max_cache_len": _CACHE,
    "prefill_chunk_size": "the setting prefill_chunk cuts prompts; the tokens are the same",
    "renormalize_logits": "scores are not returned, and the tokens are the same",
    "pad_token_id": "prompts are not padded",
    "bos_token_id": "a prompt has at least one token already",
    "decoder_start_token_id": "only encoder-decoder models read it",
    "return_dict_in_generate": "what is returned is always a list of Completion",
    "early_stopping": _BEAMS,
    "length_penalty": _BEAMS,
    "diversity_penalty": _BEAMS,
    "low_memory": _BEAMS,
    "num_assistant_tokens": _ASSISTANT,
    "num_assistant_tokens_schedule": _ASSISTANT,
    "assistant_confidence_threshold": _ASSISTANT,
    "assistant_lookbehind": _ASSISTANT,
    "target_lookbehind": _ASSISTANT,
    "assistant_ensemble_weight": _ASSISTANT,
    "max_matching_ngram_size": "only prompt lookup reads it",
    "compile_config": _COMPILE,
    "disable_compile": _COMPILE,
    "continuous_batching_config": "requests are always batched as they come",
    "_from_model_config": "it says where the file came from",
    "transformers_version": "it says where the file came from",
}

_DECODING = "only greedy decoding and sampling are supported"
_SCORES = "logits come from model.logits()"
_PASSES = "only the hidden states of whole stages exist"
_DRAFTS = "tokens are not drafted"
_SAME_CACHES = ("dynamic", "static", "offloaded", "offloaded_static", "hybrid", "sliding_window")
REFUSED: dict[str, tuple[tuple[object, ...], str]] = {  # field -> harmless values, advice
    "num_beams": ((1,), _DECODING),
    "num_beam_groups": ((1,), _DECODING),
    "constraints": ((), _DECODING),
    "force_words_ids": ((), _DECODING),
    "penalty_alpha": ((0,), _DECODING),
    "dola_layers": ((), _DECODING),
    "num_return_sequences": ((1,), "give the prompt several times"),
    "guidance_scale": ((1,), "the prompt is run once"),
    "token_healing": ((False,), "the prompt is taken as it is"),
    "watermarking_config": ((), "answers are not watermarked"),
    "encoder_repetition_penalty": ((1,), "use repetition_penalty"),
    "encoder_no_repeat_ngram_size": ((0,), "use no_repeat_ngram_size"),
    "cache_implementation": (_SAME_CACHES, 'for an int8 cache load the model with kv="int8"'),
    "output_scores": ((False,), _SCORES),
    "output_logits": ((False,), _SCORES),
    "output_attentions": ((False,), _PASSES),
    "output_hidden_states": ((False,), _PASSES),
    "use_mtp": ((False,), _DRAFTS),
    "is_assistant": ((False,), _DRAFTS),
    "prompt_lookup_num_tokens": ((), _DRAFTS),
    "assistant_early_exit": ((), _DRAFTS),
    "speculation_type": ((), _DRAFTS),
}
TRANSFORMERS_TOP_K = 50  # what it takes where a config that samples has no top_k
_SAMPLING_ONLY = ("top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def read_fields(generation_config: Any, source: str) -> dict[str, Any]:
    """Reads the fields that are honoured, by our names; those that are None are left out.

    Args:
        generation_config: a GenerationConfig of transformers.
        source: how errors begin.

    Raises:
        ValueError: it is something else, or has a field that cannot be honoured.
    """
    if not hasattr(generation_config, "to_dict"):
        raise ValueError(
            f"{source}: generation_config must be a GenerationConfig of transformers, got "
            f"{type(generation_config).__name__}; give single settings as keyword arguments"
        )
    given = {k: v for k, v in generation_config.to_dict().items() if v is not None}
    for name, value in given.items():
        if refusal := find_refusal(name, value):
            raise ValueError(f"{source}:{refusal}")
    return {HONOURED[name]: value for name, value in given.items() if name in HONOURED}


def read_model_defaults(generation_config: Any, source: str) -> tuple[dict[str, Any], str]:
    """Reads the fields of a model's own generation config, whatever its authors put there.

    Fields that transformers does not know either are passed over.

    Returns:
        The fields as `read_fields` gives them, and why they must not be used, else "".
    """
    values: dict[str, Any] = {}
    refusals = []
    for name, value in generation_config.to_dict().items():
        if value is None:
            continue
        if name in HONOURED:
            values[HONOURED[name]] = value
        elif name in REFUSED and (refusal := find_refusal(name, value)):
            refusals.append(f"{source}:{refusal}, or give model_defaults=False")
        elif name not in NO_EFFECT and name not in REFUSED:
            _log.info("%s:%s: passed over, no such field is known here", source, name)
    return values, refusals[0] if refusals else ""


def find_refusal(name: str, value: object) -> str:
    """Words why a field with this value, not None, is refused; "" where it is not."""
    if name in HONOURED or name in NO_EFFECT:
        return ""
    harmless, advice = REFUSED.get(name, ((), "no such field is known here"))
    if any(value is h or value == h for h in harmless):
        return ""
    return f"{name}: {name} must be left out, got {_shorten(value)}; {advice}"


def lay_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Lays settings given one by one over fields of generation configs.

    Args:
        below: as `read_fields` gives them: like transformers they sample only with do_sample.
        above: values by name; a temperature alone decides whether to sample.
    """
    values = dict(below)
    if values.get("do_sample"):
        if above.get("do_sample", True):
            values.setdefault("top_k", TRANSFORMERS_TOP_K)
    elif values:
        values["do_sample"] = False
    if "temperature" in above and "do_sample" not in above:
        values.pop("do_sample", None)
    values |= above
    _settle_lengths(values, above)
    if not values.get("do_sample", values.get("temperature")):
        idle = [name for name in _SAMPLING_ONLY if above.get(name, 0) not in (0, 1)]
        if idle:
            _log.warning(
                "%s: greedy decoding takes the most probable token whatever it is; give a "
                "temperature or do_sample to sample",
                ", ".join(idle),
            )
    return values


def _settle_lengths(values: dict[str, Any], above: Mapping[str, Any]) -> None:
    """Settles lengths that come from several places as transformers does, and says so."""
    for name, stronger in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if name in above and stronger in values:
            _log.warning(
                "%s %s has no effect beside %s %s", name, above[name], stronger, values[stronger]
            )
    least, most = values.get("min_new_tokens"), values.get("max_new_tokens")
    together = {"min_new_tokens", "max_new_tokens"} <= above.keys()  # checked as any wrong value
    if isinstance(least, int) and isinstance(most, int) and least > most and not together:
        _log.warning("min_new_tokens %s counts as max_new_tokens, %s", least, most)
        values["min_new_tokens"] = most


def _shorten(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."
