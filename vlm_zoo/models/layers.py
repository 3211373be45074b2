"""Modules and functions that two architectures share."""

import torch
from torch.nn import functional as F


def split_heads(states: torch.Tensor, head_dim: int) -> torch.Tensor:
    """`float[…, T, H * D]` to `float[…, H, T, D]`."""
    return states.unflatten(-1, (-1, head_dim)).transpose(-3, -2)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    implementation: str | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """
    Scaled dot-product attention, for connectors whose masks are their own.

    Args:
        query (`float[B, H, T, D]`), key, value (`float[B, H, S, D]`): split into heads.
        mask (`bool[B, 1 or H, T, S]`): true where a position may be seen; every query must see at least one.
        implementation: `"eager"` for plain tensor operations; anything else is the kernel of torch. Kernels that take
            no mask of this kind cannot be used here.
        dropout: probability of dropping an attention weight; 0 outside of training.

    Returns:
        `float[B, T, H * D]`
    """
    if implementation == "eager":
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = F.dropout(scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype), dropout)
        attended = weights @ value
    else:
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    return attended.transpose(1, 2).flatten(2)
