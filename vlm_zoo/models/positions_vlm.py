"""Places on three axes, time, height and width, and rotary embeddings that take them, for any decoder.

`multi_axis_positions` says where tokens are, `put_axes` lets a decoder turn every rotary frequency by the axis that it
belongs to. M-RoPE is that of Qwen2-VL (huggingface.co/papers/2409.12191), interleaved in Qwen3-VL
(huggingface.co/papers/2511.21631).
"""

from inspect import signature
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .native_vlm import places_in
from .parts_vlm import find_layers


class Runs(NamedTuple):
    """
    The visual tokens of a sequence, image by image.

    counts (`int[I]`): tokens of each. moves (`int[I]`): by how much it moves what follows. places (`int[3, K]`): time,
    height and width of each token, from the start of its image.
    """

    counts: torch.Tensor
    moves: torch.Tensor
    places: torch.Tensor


def multi_axis_positions(
    visual: torch.Tensor,
    grids: torch.Tensor,
    times: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    after_image: str = "side",
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Places in time, height and width.

    Text counts up on all three axes. An image that starts at s has its tokens at (s + time, s + row, s + column), and
    moves what follows by its longer side. With `[text, text, image of 2 x 2, text]`:

        time    0 1  2 2 2 2  4
        height  0 1  2 2 3 3  4
        width   0 1  2 3 2 3  4

    Args:
        visual (`bool[B, T]`): true at visual tokens.
        grids (`int[I, 3]`): time, height and width of each image, in tokens.
        times (`int[I, F]`, *optional*): the time ids of each image's frames; by default they are counted.
        attention_mask (`int[B, T]`, *optional*): 0 at padding, which has no place and stands at 0.
        after_image: `"side"` or `"extent"`, by how much an image moves what follows.

    Returns:
        Positions `int[3, B, T]`, and `int[B, 1]`: what is to be added to the number of a later token, counted without
        padding, to have its position.
    """
    return sequence_positions(visual, runs_of_grids(grids, times, after_image), attention_mask)


def runs_of_grids(
    grids: torch.Tensor,
    times: torch.Tensor | None = None,
    after_image: str = "side",
    sides: torch.Tensor | None = None,
) -> Runs:
    """Images with a token for every cell of their grid; see `multi_axis_positions`. `sides` int[I] are their longer
    sides, where they are not those of the grids."""
    image, frame, within, width = places_in(grids)
    time = frame if times is None else times[image, frame]
    moves = grids[:, 1:].amax(dim=1) if sides is None else sides
    if after_image == "extent":
        moves = moves.scatter_reduce(0, image, time + 1, "amax")
    return Runs(grids.prod(dim=1), moves, torch.stack((time, within // width, within % width)))


def sequence_positions(
    visual: torch.Tensor, runs: Runs, attention_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of all tokens of a batch, from those of its visual tokens; see `multi_axis_positions`."""
    valid = torch.ones_like(visual) if attention_mask is None else attention_mask.bool()
    last_tokens = runs.counts.cumsum(0) - 1
    moved = torch.zeros_like(runs.places[0]).index_copy(0, last_tokens, runs.moves)  # an image moves on at its end
    steps = valid.long().masked_scatter(visual, moved)
    ends = steps.cumsum(dim=1)
    positions = (ends - steps) + torch.zeros_like(steps).expand(3, -1, -1).masked_scatter(visual, runs.places)
    return positions.masked_fill(~valid, 0), ends[:, -1:] - valid.sum(dim=1, keepdim=True)


def frequency_axes(layout: str, section: list[int] | None, frequencies: int) -> list[int]:
    """
    The axis (0 time, 1 height, 2 width) of every rotary frequency.

    Args:
        layout: `"chunked"` or `"interleaved"`.
        section: frequencies of each axis, `None` for Qwen's proportions: 16, 24, 24 or 24, 20, 20 of 64.
        frequencies: of the language model.

    Raises:
        ValueError: when the shares do not fit the language model.
    """
    if section is None:
        share = 3 * frequencies // 8 if layout == "chunked" else 5 * frequencies // 16
        section = [frequencies - 2 * share, share, share]
    if sum(section) != frequencies:
        raise ValueError(
            f"mrope_section {section} shares out {sum(section)} rotary frequencies, the language model has "
            f"{frequencies}."
        )
    if layout == "chunked":
        return [axis for axis, count in enumerate(section) for _ in range(count)]
    axes = [place % 3 if place // 3 < section[place % 3] else 0 for place in range(frequencies)]
    if [axes.count(axis) for axis in range(3)] != section:
        raise ValueError(
            f"mrope_section {section} cannot be interleaved: height and width take every third of {frequencies} "
            "frequencies at most."
        )
    return axes


class MultiAxisRope(nn.Module):
    """
    A decoder's own rotary embedding, for positions on three axes too.

    Positions `int[B, T]` pass through it unchanged. Of `int[3, B, T]` every frequency takes its own axis.
    """

    def __init__(self, own: nn.Module, axes: list[int], in_halves: bool):
        """
        Args:
            own: of the decoder.
            axes: of every frequency, see `frequency_axes`.
            in_halves: whether the decoder's values for all frequencies come twice one after the other, or each twice.
        """
        super().__init__()
        self.own = own
        self.shape, self.dim = ((2, len(axes)), -1) if in_halves else ((len(axes), 2), -2)
        places = {axis: [place for place, other in enumerate(axes) if other == axis] for axis in (1, 2)}
        # Slices, not an index: they need no buffer, which the decoder's own initialiser would not know how to restore.
        self.slices = {
            axis: slice(found[0], found[-1] + 1, found[1] - found[0] if len(found) > 1 else 1)
            for axis, found in places.items()
            if found
        }

    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor, *args, **kwargs):
        """Cosine and sine, `float[B, T, R]` each."""
        if position_ids.ndim == 2:
            return self.own(hidden_states, position_ids, *args, **kwargs)
        flat = self.own(hidden_states, position_ids.flatten(0, 1), *args, **kwargs)
        return tuple(self._choose(values.unflatten(0, (3, -1))) for values in flat)

    def _choose(self, values: torch.Tensor) -> torch.Tensor:
        values = values.unflatten(-1, self.shape)  # [3, B, T, 2, F] or [3, B, T, F, 2]
        chosen = values[0].clone()
        for axis, part in self.slices.items():
            index = (..., part) if self.dim == -1 else (..., part, slice(None))
            chosen[index] = values[axis][index]
        return chosen.flatten(-2)


def put_axes(language_model: PreTrainedModel, text_config: PreTrainedConfig, layout: str, section: list[int] | None):
    """Replaces a decoder's rotary embedding by one for three axes; a decoder without one is a `ValueError`."""
    own = getattr(language_model, "rotary_emb", None)
    if own is None:
        raise ValueError(
            f"mrope_layout '{layout}' needs rotary positions, {type(language_model).__name__} has no rotary_emb: "
            "choose mrope_layout 'none', or another language model."
        )
    with torch.device("cpu"):  # what the values are like, even where the model has no weights yet
        probe = type(own)(config=text_config)
        kind = (
            {"layer_type": text_config.layer_types[0]} if "layer_type" in signature(probe.forward).parameters else {}
        )
        cosine = probe(torch.zeros(1), torch.ones(1, 1, dtype=torch.long), **kind)[0].flatten()
    frequencies = len(cosine) // 2
    axes = frequency_axes(layout, section, frequencies)
    in_halves = torch.equal(cosine[:frequencies], cosine[frequencies:])
    if not in_halves and not torch.equal(cosine[::2], cosine[1::2]):
        raise ValueError(f"{type(own).__name__} arranges its frequencies neither in halves nor in pairs.")
    language_model.rotary_emb = MultiAxisRope(own, axes, in_halves)
    holder, name = find_layers(language_model)
    for layer in getattr(holder, name):
        layer.register_forward_pre_hook(_forget_axes, with_kwargs=True)


def _forget_axes(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Keeps positions on three axes from a layer, which has their embedding: attention kernels would take places that
    go back for the starts of packed sequences."""
    positions = kwargs.get("position_ids")
    if positions is not None and positions.ndim == 3:
        kwargs = {**kwargs, "position_ids": None}
    return args, kwargs
