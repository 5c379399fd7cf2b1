"""The int8 numerics: the specification, the ops, the linear layer, the conversion of a module."""
