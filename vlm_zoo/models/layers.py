"""Modules and functions that two architectures share."""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from .parts_vlm import find_layers, pair


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


def grid_places(grid: tuple[int, int], side: int | tuple[int, int] = 1, view: int = 0) -> torch.Tensor:
    """
    Where the tokens of a view stand, row by row; see `ZooModel.token_places`.

    Args:
        grid: rows and columns of patches.
        side: of the square of patches, or height and width of the block, that is one token; the last ones of a row or
            a column may hold fewer.
        view: its number.

    Returns:
        `float[K, 5]`
    """
    edges = []
    for length, step in zip(grid, pair(side), strict=True):
        starts = torch.arange(0, length, step)
        edges.append(torch.stack((starts, (starts + step).clamp(max=length)), dim=-1) / length)
    rows, columns = torch.broadcast_tensors(edges[0][:, None], edges[1][None])  # [h, w, 2]
    number = torch.full_like(rows[..., 0], view)
    places = (number, rows[..., 0], columns[..., 0], rows[..., 1], columns[..., 1])
    return torch.stack(places, dim=-1).flatten(0, 1)


def enter_layers(language_model: PreTrainedModel, name: str, places: dict[int, int]) -> None:
    """
    Lets something happen to the hidden states in front of layers of a decoder.

    The decoder is called with one keyword argument more, which it hands on to its layers; there it is taken out, and
    its method `enter(position, hidden_states)` gives the states `float[B, T, Dt]` with which the layer goes on.
    Nothing is kept on a module, so calls cannot disturb each other, and the layers keep their names.

    Args:
        language_model: a decoder.
        name: of the keyword argument.
        places: the layers in front of which something happens, and the `position` that each is called with.
    """
    holder, layers = find_layers(language_model)
    for index, layer in enumerate(getattr(holder, layers)):
        layer.register_forward_pre_hook(partial(_enter_layer, name, places.get(index)), with_kwargs=True)


def _enter_layer(name: str, position: int | None, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if name not in kwargs:
        raise ValueError(
            f"{type(layer).__name__} was called without {name}. Call the vision-language model instead of its "
            "language model; if you did, this decoder does not hand keyword arguments on to its layers and cannot be "
            "the language model of this architecture."
        )
    carried = kwargs.pop(name)
    if position is None:
        return args, kwargs
    if args:
        return (carried.enter(position, args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": carried.enter(position, kwargs["hidden_states"])}


def compact(ids: torch.Tensor, mask: torch.Tensor, limit: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Moves the marked tokens of every row to its left end, in their order.

    Args:
        ids (`int[B, T]`), mask (`bool[B, T]`): tokens, and which of them to keep.
        limit: how many to keep of a row at most, its last ones; `None` keeps all.

    Returns:
        `int[B, L]` and `bool[B, L]`, L at least 1.

    Raises:
        ValueError: when tokens and mask differ in shape, or there is no token at all.
    """
    if ids.shape != mask.shape or ids.ndim != 2 or ids.numel() == 0:
        raise ValueError(
            f"Tokens have the shape {list(ids.shape)} and their attention mask {list(mask.shape)}: expected [B, T], "
            "the same for both and not empty."
        )
    mask = mask.bool()
    if limit is not None:
        mask = mask & (mask.flip(1).cumsum(1).flip(1) <= limit)
    if torch.compiler.is_compiling():  # what a graph is compiled for must not depend on the numbers
        length = ids.shape[1] if limit is None else min(ids.shape[1], limit)
    else:
        length = max(int(mask.sum(1).max()), 1)
    order = (~mask).int().argsort(dim=1, stable=True)[:, :length]
    mask = mask.gather(1, order)
    return ids.gather(1, order).masked_fill(~mask, 0), mask
