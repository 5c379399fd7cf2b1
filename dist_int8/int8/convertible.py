"""Which modules are a linear layer and nothing more, and what else of a module holds matrices."""

from typing import NamedTuple

from torch import Tensor, nn

# Classes whose forward is x @ weight.T + bias, by name, so that their library need not be imported;
# a subclass may do more. Conv1D of GPT and GPT-2 keeps its weight as [K, N].
LINEARS = (
    "torch.nn.modules.linear.Linear",
    "transformers.models.falcon.modeling_falcon.FalconLinear",
)
TRANSPOSED = ("transformers.pytorch_utils.Conv1D",)

_NOT_PRODUCTS = (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd)
_MATRIX = 16  # the smallest number of rows and columns of what counts as a matrix


class Parameters(NamedTuple):
    """The weight [N, K] and the bias [N] of a linear layer, views of its parameters."""

    weight: Tensor
    bias: Tensor | None


def floating(module: nn.Module) -> Parameters | None:
    """Weight and bias of a module that is a linear layer and nothing more, else None."""
    name = f"{type(module).__module__}.{type(module).__qualname__}"
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if weight is not None and name in LINEARS:
        return Parameters(weight, bias)
    if weight is not None and name in TRANSPOSED:
        return Parameters(weight.t(), bias)
    return None


def inherited(module: nn.Module) -> Parameters | None:
    """`floating`, also of a subclass of `nn.Linear` that has no forward of its own."""
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return Parameters(module.weight, module.bias)
    return floating(module)


def is_watched(module: nn.Module) -> bool:
    """Whether others added to what the module does: hooks, or accelerate's own `forward`."""
    return bool(
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def list_adapters(module: nn.Module) -> tuple[str, ...]:
    """Names of the children that train beside a `base_layer`, as peft's layers declare them."""
    names = getattr(module, "adapter_layer_names", ())
    return tuple(names) if "base_layer" in module._modules else ()


def has_matrices(module: nn.Module) -> bool:
    """Whether `module` itself is a kind of linear, or has parameters that look like its weight."""
    if isinstance(module, _NOT_PRODUCTS):
        return False
    return isinstance(module, nn.Linear) or any(
        parameter.dim() >= 2 and min(parameter.shape[-2:]) >= _MATRIX and "embed" not in name
        for name, parameter in module.named_parameters(recurse=False)
    )
