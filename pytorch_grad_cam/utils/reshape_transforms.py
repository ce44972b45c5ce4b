"""Reshape transforms: from the tokens of a transformer layer to maps (B, C, h, w).

They have the names of the pytorch-grad-cam package. For another grid than the default, pass for example
`reshape_transform=functools.partial(vit_reshape_transform, height=16, width=20)`.
"""
from torch import Tensor


def vit_reshape_transform(tensor: Tensor, height: int = 14, width: int = 14) -> Tensor:
    """Return maps (B, C, height, width) from the tokens (B, 1 + height * width, C) of a ViT.

    The first token is the class token.

    Raises:
        ValueError: the number of tokens does not fit the grid.
    """
    check_tokens(tensor, 1, height, width)
    return tensor[:, 1:].mT.unflatten(-1, (height, width))


def swinT_reshape_transform(tensor: Tensor, height: int = 7, width: int = 7) -> Tensor:
    """Return maps (B, C, h, w) from the tokens of a Swin transformer.

    Args:
        tensor: (B, height * width, C); or (B, h, w, C), the layout of torchvision and timm, which needs no
            grid size.

    Raises:
        ValueError: the number of tokens does not fit the grid.
    """
    if tensor.ndim == 4:
        return tensor.movedim(-1, 1)
    check_tokens(tensor, 0, height, width)
    return tensor.mT.unflatten(-1, (height, width))


def check_tokens(tensor: Tensor, extra: int, height: int, width: int) -> None:
    """Raise ValueError unless `tensor` is (B, extra + height * width, C)."""
    if tensor.ndim != 3 or tensor.shape[1] != extra + height * width:
        tokens = f"{extra} + {height} * {width}" if extra else f"{height} * {width}"
        raise ValueError(
            f"tokens of shape {tuple(tensor.shape)} are not (B, {tokens}, C): set height and width to the "
            "grid of patches, and remove tokens that are not patches"
        )
