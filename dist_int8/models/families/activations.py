"""transformers' activation names, for families whose config chooses one."""

from dist_int8.models.spec import Activation

_KNOWN: dict[str, Activation] = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def translate_activation(key: str, name: str) -> Activation:
    """Returns our name of transformers' activation `name`, read from the config's `key`.

    Raises:
        ValueError: an activation that the block does not implement.
    """
    if name not in _KNOWN:
        raise ValueError(
            f"config.json:{key}: must be one of {', '.join(_KNOWN)}, got {name!r}; use a model "
            "with one of these activations"
        )
    return _KNOWN[name]
