"""Settings of a deployment and of one generation: their meaning, their bounds and their errors.

A leaf: it imports neither torch nor anything else of this package, so that bad input is refused in
milliseconds.
"""

from dist_int8.config.byte_size import parse_byte_size
from dist_int8.config.generation import GenerationSettings
from dist_int8.config.layout import MAX_STAGES
from dist_int8.config.load import load_settings
from dist_int8.config.profile import ProfileSettings
from dist_int8.config.settings import DEFAULT_MAX_TOKENS, Settings
from dist_int8.config.shipped import find_shipped
from dist_int8.config.yaml_file import read_yaml, syntax_error, write_yaml

__all__ = [
    "DEFAULT_MAX_TOKENS",
    "MAX_STAGES",
    "GenerationSettings",
    "ProfileSettings",
    "Settings",
    "find_shipped",
    "load_settings",
    "parse_byte_size",
    "read_yaml",
    "syntax_error",
    "write_yaml",
]
