"""`Int8Linear`: a linear layer that keeps int8 weights and multiplies in int8."""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from dist_int8.int8 import checks, convertible, ops, reference, straight_through
from dist_int8.int8.module import Int8Module
from dist_int8.int8.rotation import check_rotation, rotate_weight
from dist_int8.int8.weight_view import Int8Weight

# quantize_ works through the weight in slices of about this many elements, so that the fp32
# temporaries of a very large weight stay small (64 MiB each).
QUANTIZE_SLICE = 1 << 24


class Int8Linear(Int8Module):
    """y = x @ weight.T + bias with weight in int8 (N output features, K input features).

    Buffers: `weight_int8` int8 [N, K]; `col_scale` fp32 [N]; `bias` floating [N] or None; and,
    where the layer has hot columns, `hot_columns` int32 [H] and `hot_weight` floating [N, H]: input
    features whose weights are kept exactly and which never enter the integer product.

    x is [..., K] in fp32, bf16 or fp16 and y is [..., N] in the same dtype: the layer has no
    compute dtype of its own, and casting the module (`.half()`, `.to(torch.bfloat16)`) leaves its
    buffers as they are; the dtype of `weight` alone follows. `outlier_rule` and `outlier_threshold`
    say which elements of a row of x are outliers (see `reference.outlier_mask`); they are settings,
    not part of the state dict. With a `rotation` (`rotation.rotation_block` says which block size
    holds) weight_int8 and col_scale are of the rotated weight and rows of x are rotated before they
    are quantized; `weight` and `dequantize` rotate back. The state dict of a rotated layer has
    `rotation` too, an int32 scalar, and a layer takes the rotation of the state it loads. The
    formulas are in `dist_int8.int8.reference`.

    The layer does not train, but the gradient of x passes through it: that of a frozen `nn.Linear`
    with the dequantized weight. `weight` is that matrix, made when an operation needs its values.

    Made directly the layer is all zeros (or on the meta device, without storage); fill it with
    `quantize_` or `load_state_dict`, or make it with `from_linear`.
    """

    weight_int8: Tensor
    col_scale: Tensor
    bias: Tensor | None
    hot_columns: Tensor | None
    hot_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        outlier_threshold: float = 6.0,
        outlier_rule: str | None = None,
        hot_columns: Sequence[int] | Tensor | None = None,
        rotation: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Makes a layer of zeros.

        Args:
            outlier_rule: default: the paper's "absolute", or "none" with a rotation, which makes
                outliers small and scales x, so that an absolute threshold means little.
            dtype: of bias, hot weights and what `weight` says (default: torch's default).
        """
        super().__init__()
        outlier_rule = outlier_rule or ("none" if rotation else "absolute")
        checks.check_outlier_rule(outlier_rule, outlier_threshold)
        check_rotation(rotation)
        self.in_features = in_features
        self.out_features = out_features
        self.outlier_threshold = outlier_threshold
        self.outlier_rule = outlier_rule
        self.rotation = rotation
        self.weight_dtype = dtype or torch.get_default_dtype()
        n, k = out_features, in_features
        self.register_buffer("weight_int8", torch.zeros(n, k, dtype=torch.int8, device=device))
        self.register_buffer("col_scale", torch.zeros(n, dtype=torch.float32, device=device))
        self.register_buffer("bias", torch.zeros(n, dtype=dtype, device=device) if bias else None)
        self.register_buffer("hot_columns", _hot_columns(hot_columns, k, self.weight_int8.device))
        hot_weight = None
        if self.hot_columns is not None:
            hot_weight = torch.zeros(n, len(self.hot_columns), dtype=dtype, device=device)
        self.register_buffer("hot_weight", hot_weight)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        outlier_threshold: float = 6.0,
        outlier_rule: str | None = None,
        hot_columns: Sequence[int] | Tensor | None = None,
        rotation: int = 0,
    ) -> Self:
        """Makes the int8 layer of a floating one (which stays unchanged), on the same device.

        The defaults are the paper's, or one plane with a rotation. A linear on the meta device
        gives a layer on the meta device. `linear` may also be GPT-2's Conv1D, or of a subclass
        without a forward of its own. Raises ValueError for another class, an unknown rule, a bad
        threshold or rotation, or hot columns that are repeated or outside 0 .. K - 1.
        """
        found = convertible.inherited(linear)
        if found is None:
            raise ValueError(
                f"Int8Linear.from_linear: linear must be a torch.nn.Linear, got "
                f"{type(linear).__name__}; give the linear layer itself"
            )
        weight, bias = found
        layer = cls(
            weight.shape[1],
            weight.shape[0],
            bias is not None,
            outlier_threshold=outlier_threshold,
            outlier_rule=outlier_rule,
            hot_columns=hot_columns,
            rotation=rotation,
            device="meta",
            dtype=weight.dtype,
        )
        if not weight.is_meta:
            layer.quantize_(weight, bias)
        return layer.train(linear.training)

    @torch.no_grad()
    def quantize_(self, weight: Tensor, bias: Tensor | None = None) -> Self:
        """Fills the layer from a floating weight [N, K] and bias [N]; return it.

        A layer on the meta device moves to the device of `weight`; any other stays where it is. The
        bias and the hot weights keep the dtype they come in. Raises ValueError for another shape or
        dtype, and for a bias that is given but has no place, or has a place but is not given.
        """
        expected = [self.out_features, self.in_features]
        if list(weight.shape) != expected or weight.dtype not in checks.FLOAT_DTYPES:
            raise ValueError(
                f"Int8Linear.quantize_: weight must be floating {expected}, got {weight.dtype} "
                f"{list(weight.shape)}; give the weight [N, K] of a linear of this size"
            )
        if (bias is None) != (self.bias is None) or (
            bias is not None and list(bias.shape) != [self.out_features]
        ):
            wanted = "None" if self.bias is None else f"[{self.out_features}]"
            got = "None" if bias is None else str(list(bias.shape))
            raise ValueError(
                f"Int8Linear.quantize_: bias must be {wanted}, got {got}; "
                "make the layer with the `bias` of its linear"
            )
        device = weight.device if self.weight_int8.is_meta else self.weight_int8.device
        hot = None if self.hot_columns is None else self.hot_columns.to(weight.device).long()

        self.weight_int8 = torch.empty(expected, dtype=torch.int8, device=device)
        self.col_scale = torch.empty(self.out_features, dtype=torch.float32, device=device)
        rows = max(1, QUANTIZE_SLICE // max(1, self.in_features))
        for start in range(0, self.out_features, rows):
            piece = weight[start : start + rows]
            if hot is not None:
                piece = piece.index_fill(1, hot, 0.0)  # so that they do not count in col_scale
            piece = rotate_weight(piece, self.rotation)
            weight_int8, col_scale = reference.quantize_weight(piece)
            self.weight_int8[start : start + rows] = weight_int8
            self.col_scale[start : start + rows] = col_scale

        self.weight_dtype = weight.dtype
        if bias is not None:
            self.bias = bias.detach().to(device, copy=True)
        if hot is not None:
            self.hot_columns = hot.to(device, torch.int32)
            self.hot_weight = weight.detach()[:, hot].to(device)
        return self

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns the floating weight [N, K], within col_scale / 2 (before it is rotated back).

        Hot columns are exact.
        """
        return straight_through.dequantize(*self._parts, dtype)

    @property
    def weight(self) -> Tensor:
        """The floating weight [N, K] to read, in the dtype that the linear had; see `Int8Weight`.

        It is neither a parameter nor in the state dict, and its first use as a number dequantizes.
        Assigning it raises AttributeError: `quantize_` fills a layer.
        """
        return Int8Weight.of(*self._parts, self.weight_dtype)

    @property
    def _parts(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, int]:
        return self.weight_int8, self.col_scale, self.hot_columns, self.hot_weight, self.rotation

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuses a floating weight, for example one that is tied to an embedding's."""
        if name == "weight":
            raise AttributeError(
                "Int8Linear: weight is in int8 and cannot be assigned; fill the layer with "
                "quantize_(weight, bias), or keep it in floating point"
            )
        super().register_parameter(name, param)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        return super()._apply(fn, recurse)

    @property
    def quantization(self) -> tuple[str, float, Tensor | None, int]:
        """Rule, threshold, hot columns, rotation: what an op that quantizes rows for it takes."""
        return (
            self.outlier_rule,
            self.outlier_threshold,
            self._buffers["hot_columns"],
            self.rotation,
        )

    def forward(self, x: Tensor | ops.QuantizedRows) -> Tensor:
        """x [..., K] (fp32, bf16 or fp16) -> y [..., N] in x's dtype; rows are independent.

        x may be quantized already, M rows by an op that was given `quantization`: y is [M, N] then.
        """
        # Not self.weight_int8 and so on: nn.Module.__getattr__ costs about 1 us for each.
        buffers = self._buffers
        weight_int8, col_scale = buffers["weight_int8"], buffers["col_scale"]
        assert weight_int8 is not None and col_scale is not None
        if isinstance(x, ops.QuantizedRows):
            return ops.int8_matmul(
                x, weight_int8, col_scale, buffers["bias"], hot_weight=buffers["hot_weight"]
            )
        if x.shape[-1] != self.in_features:
            raise ValueError(
                f"Int8Linear: x must be [..., K={self.in_features}], got {list(x.shape)}; "
                "its last dimension is the input features"
            )
        return ops.int8_linear(
            x,
            weight_int8,
            col_scale,
            buffers["bias"],
            outlier_rule=self.outlier_rule,
            outlier_threshold=self.outlier_threshold,
            hot_columns=buffers["hot_columns"],
            hot_weight=buffers["hot_weight"],
            rotation=self.rotation,
        )

    def extra_repr(self) -> str:
        num_hot_columns = 0 if self.hot_columns is None else len(self.hot_columns)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, outlier_rule={self.outlier_rule!r}, "
            f"outlier_threshold={self.outlier_threshold}, num_hot_columns={num_hot_columns}, "
            f"rotation={self.rotation}"
        )

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.rotation:
            destination[prefix + "rotation"] = torch.tensor(self.rotation, dtype=torch.int32)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Takes the state's rotation, and makes room for its hot columns where there is none."""
        rotation = state_dict.pop(prefix + "rotation", None)
        if prefix + "weight_int8" in state_dict:
            self.rotation = 0 if rotation is None else int(rotation)
            check_rotation(self.rotation)
        columns = state_dict.get(prefix + "hot_columns")
        weight = state_dict.get(prefix + "hot_weight")
        if columns is not None and weight is not None:
            device = self.weight_int8.device
            self.hot_columns = torch.empty_like(columns, device=device)
            self.hot_weight = torch.empty_like(weight, device=device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _hot_columns(
    hot_columns: Sequence[int] | Tensor | None, in_features: int, device: torch.device
) -> Tensor | None:
    """Checked hot columns as int32 [H], None where there are none.

    They stay off the meta device, which would forget which ones they are.
    """
    if hot_columns is None or len(hot_columns) == 0:
        return None
    columns = torch.as_tensor(hot_columns, dtype=torch.int32, device="cpu")
    if columns.dim() != 1 or columns.min() < 0 or columns.max() >= in_features:
        raise ValueError(
            f"Int8Linear: hot_columns must be input features 0 .. {in_features - 1}, "
            f"got {columns.tolist()}; leave out what is outside"
        )
    if len(columns.unique()) != len(columns):
        raise ValueError(
            f"Int8Linear: hot_columns must be distinct, got {columns.tolist()}; name each one once"
        )
    return columns if device.type == "meta" else columns.to(device)
