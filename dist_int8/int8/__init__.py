"""The int8 numerics: the specification, the ops, the linear layer and the conversion of a module."""
