"""The rotation of input features that makes outliers of a row small, in plain torch.

x and the weight are multiplied by the same block-diagonal Hadamard matrix H, which leaves their
product unchanged and spreads a large element over its block. QuaRot (Ashkboos et al. 2024,
arXiv:2404.00456) folds such matrices into a model; here they stay inside a layer, in blocks, so
that no model has to change. H is of +1 and -1 only, H @ H = block size * identity: x is multiplied
by H and the weight by H / block size, which is exact for a power of two.
"""

import torch
from torch import Tensor

LARGEST_ROTATION = 1024


def check_rotation(rotation: int) -> None:
    """Raises ValueError unless `rotation` is 0 or a power of two from 2 to 1024."""
    if rotation != 0 and not (2 <= rotation <= LARGEST_ROTATION and rotation.bit_count() == 1):
        raise ValueError(
            f"int8: rotation must be 0 or a power of two from 2 to {LARGEST_ROTATION}, got "
            f"{rotation}; 64 is a good size, 0 turns the rotation off"
        )


def rotation_block(num_features: int, rotation: int) -> int:
    """Block size that holds for K input features where `rotation` is asked for; 1: no rotation.

    The largest power of two that divides K and is at most `rotation`: every block is whole. Raises
    ValueError for a rotation that is not 0 or a power of two.
    """
    check_rotation(rotation)
    return min(num_features & -num_features or 1, max(rotation, 1))


def rotate(x: Tensor, rotation: int) -> Tensor:
    """x [..., K] -> fp32 [..., K]: every block of `rotation_block` features times H.

    H is the Walsh-Hadamard matrix in natural (Sylvester's) order. Butterflies with strides 1, 2, 4,
    ... in this order turn (a, b) into (a + b, a - b), each sum rounded to fp32: kernels keep the
    order, so that their results are the same bits.
    """
    values = x.float()
    stride = 1
    while stride < rotation_block(x.shape[-1], rotation):
        a, b = values.unflatten(-1, (-1, 2, stride)).unbind(-2)
        values = torch.stack((a + b, a - b), -2).flatten(-3)
        stride *= 2
    return values


def rotate_weight(weight: Tensor, rotation: int) -> Tensor:
    """weight [N, K] -> fp32 [N, K], the weight of rotated rows: `rotate` over the block size.

    `rotate` of the result is the weight again, up to fp32 rounding.
    """
    return rotate(weight, rotation) / rotation_block(weight.shape[-1], rotation)
