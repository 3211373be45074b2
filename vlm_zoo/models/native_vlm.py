"""Native resolution: towers that see every image at its own size, in one layout for all of them.

    patches    float[N, C * F * P * P], those of all images one after the other; a row is (channel, frame, y, x)
    grids      int[I, 3], how many patches an image has in time, height and width
    order      within an image: frame by frame, and there square by square of `merge_size` x `merge_size` neighbours,
               so that what becomes one token lies together
    features   float[N, Dv] in the same order, for every hidden state that is asked for

Three kinds of towers take it, told apart by what their `forward` names:

    `grid_thw`         Qwen2-VL, Qwen2.5-VL, Qwen3-VL: all images in one packed sequence
    `spatial_shapes`   SigLIP 2 NaFlex: sequences of patches
    neither            CLIP, SigLIP, DINOv2, ViT, …: pictures, with interpolated positions

The packed towers take everything in one call. The others run once for each distinct size in the batch, so nothing is
padded. An image is one frame; where a tower's patches span several frames it is taken to stand still, and their
kernels are summed instead of repeating its pixels.
"""

import inspect
import math
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from .parts_vlm import build_part, cut_tower, find_layers, tower_class


class PatchGeometry(NamedTuple):
    """What one patch covers: channels, frames, and pixels a side."""

    channels: int
    frames: int
    size: int

    @property
    def values(self) -> int:
        """Numbers in a patch of one frame."""
        return self.channels * self.size * self.size


def patch_geometry(vision_config: PreTrainedConfig) -> PatchGeometry:
    """Reads the patches of a tower from its config; patches that are no squares are a `ValueError`."""
    size = vision_config.patch_size
    if not isinstance(size, int):
        if len(set(size)) != 1:
            raise ValueError(f"Native resolution takes square patches, this tower has {tuple(size)}.")
        size = size[0]
    for name in ("in_channels", "num_channels"):  # Qwen's name, everybody else's
        if hasattr(vision_config, name):
            return PatchGeometry(getattr(vision_config, name), getattr(vision_config, "temporal_patch_size", 1), size)
    raise ValueError(f"The config of the vision tower ({vision_config.model_type}) does not say its channels.")


def _named_inputs(tower_class: type) -> set[str]:
    return set(inspect.signature(tower_class.forward).parameters)


def is_native(vision_config: PreTrainedConfig) -> bool:
    """Whether a tower of this config takes patches of images of any size, and cannot take pictures."""
    own_class = tower_class(vision_config)
    return own_class is not None and bool({"grid_thw", "spatial_shapes"} & _named_inputs(own_class))


def feature_width(tower: PreTrainedModel) -> int:
    """Width of a tower's hidden states. Qwen2-VL's config means another width by `hidden_size`."""
    embedding = getattr(tower, "patch_embed", None)
    return embedding.width if isinstance(embedding, PatchEmbedding) else tower.config.hidden_size


# ---------------------------------------------------------------------------------------------------------------------
# Building
# ---------------------------------------------------------------------------------------------------------------------


class PatchEmbedding(nn.Module):
    """
    A convolution over patches that do not overlap, as the matrix product that it is.

    The weights stay where the convolution keeps them.
    """

    def __init__(self, proj: nn.Conv3d):
        super().__init__()
        self.proj = proj

    @property
    def width(self) -> int:
        """Channels of an embedded patch."""
        return self.proj.out_channels

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """`float[N, C * F * P * P]`, or of a single frame `float[N, C * P * P]`, to `float[N, Dv]`."""
        weight = self.proj.weight  # [Dv, C, F, P, P]
        if type(self.proj) is not nn.Conv3d:  # an adapter around it
            pixels = patches.to(weight.dtype).unflatten(1, (weight.shape[1], -1, *weight.shape[3:]))
            return self.proj(pixels.repeat(1, 1, weight.shape[2] // pixels.shape[2], 1, 1)).flatten(1)
        if patches.shape[-1] * weight.shape[2] == weight[0].numel():
            weight = sum(weight.unbind(dim=2))  # several times faster than a reduction over so short an axis
        return nn.functional.linear(patches.to(weight.dtype), weight.flatten(1), self.proj.bias)


class Neighbours(nn.Module):
    """Stands where a packed tower merges patches: lays those of a square side by side, and computes nothing."""

    def __init__(self, merge_size: int):
        super().__init__()
        self.merge_size = merge_size

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """`float[N, Dv]` to `float[N / merge_size², Dv * merge_size²]`."""
        return states.view(len(states) // self.merge_size**2, -1)


def build_native_tower(vision_config: PreTrainedConfig, layers: list[int]) -> PreTrainedModel:
    """
    Builds a tower without what these hidden states do not need: later layers, norms and heads behind them, and the
    mergers that Qwen's towers hold inside.

    Args:
        vision_config: of any of the three kinds.
        layers: the hidden states that are used, 0 being the embeddings.
    """
    tower = build_part(vision_config, "vision tower")
    named = _named_inputs(type(tower))
    if not {"grid_thw", "spatial_shapes"} & named:
        cut_tower(tower, layers)
        return tower
    holder, name = find_layers(tower)
    setattr(holder, name, getattr(holder, name)[: max(*layers, 1)])
    if "grid_thw" in named:
        _check_packed(tower)
        tower.patch_embed = PatchEmbedding(tower.patch_embed.proj)
        tower.merger = Neighbours(vision_config.spatial_merge_size)
        if hasattr(tower, "deepstack_merger_list"):
            tower.deepstack_merger_list = nn.ModuleList()
            tower.deepstack_visual_indexes = []
    else:
        tower.post_layernorm = nn.Identity()
        tower.use_head = False
        if hasattr(tower, "head"):
            del tower.head
    return tower


def _check_packed(tower: PreTrainedModel) -> None:
    """Raises `ValueError` unless a packed tower is built as Qwen's are: others merge patches in ways of their own."""
    known = {"patch_embed", "pos_embed", "rotary_pos_emb", "blocks", "merger", "deepstack_merger_list"}
    parts = {name for name, _ in tower.named_children()}
    projection = getattr(getattr(tower, "patch_embed", None), "proj", None)
    if not {"patch_embed", "blocks", "merger"} <= parts <= known or not isinstance(projection, nn.Conv3d):
        raise ValueError(
            f"{type(tower).__name__} takes packed patches, but is made of {sorted(parts)}; expected a tower like "
            f"those of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, of {sorted(known)} with a Conv3d in patch_embed."
        )


def check_native_config(config: PreTrainedConfig, merge_name: str) -> None:
    """
    Raises `ValueError` unless a config with `vision_config`, `min_image_tokens`, `max_image_tokens` and
    `max_clip_tokens` makes sense at native resolution.

    Args:
        merge_name: its field for the side of a square of neighbours.
    """
    bounds = config.min_image_tokens, config.max_image_tokens, config.max_clip_tokens
    if not 1 <= bounds[0] <= bounds[1] <= bounds[2]:
        raise ValueError(
            f"Expected 1 <= min_image_tokens <= max_image_tokens <= max_clip_tokens, got {bounds[0]}, {bounds[1]} and "
            f"{bounds[2]}."
        )
    if hasattr(config.vision_config, "vision_config"):
        raise ValueError(
            f"vision_config is of type '{config.vision_config.model_type}', a whole model's; expected the "
            "vision_config inside it."
        )
    if config.vision_feature_select_strategy != "default":
        raise ValueError(
            f"vision_feature_select_strategy is '{config.vision_feature_select_strategy}', at native resolution it "
            "must be 'default': prefix tokens have no place among patches."
        )
    merge_size = getattr(config, merge_name)
    own = getattr(config.vision_config, "spatial_merge_size", merge_size)
    if merge_size < 1 or own != merge_size:
        raise ValueError(f"{merge_name} is {merge_size}, the tower orders its patches by squares of {own}.")


def blank_patches(
    vision_config: PreTrainedConfig, merge_size: int, device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The smallest blank image, as a batch brings it."""
    values = patch_geometry(vision_config).values
    return {
        "pixel_values": torch.zeros(merge_size**2, values, device=device, dtype=dtype),
        "image_grid_thw": torch.tensor([[1, merge_size, merge_size]], device=device),
    }


def native_image_fields(config: PreTrainedConfig, merge_size: int) -> dict[str, Any]:
    """
    The fields of an image processor for a config with `vision_config`, `min_image_tokens`, `max_image_tokens`,
    `max_clip_tokens` and, where it has one, `image_size`.
    """
    geometry = patch_geometry(config.vision_config)
    area = (geometry.size * merge_size) ** 2  # pixels of a token
    size = {"shortest_edge": config.min_image_tokens * area, "longest_edge": config.max_image_tokens * area}
    if getattr(config, "image_size", None) is not None:
        size = dict(zip(("height", "width"), config.image_size, strict=True))
    return {
        "size": size,
        "max_clip_pixels": config.max_clip_tokens * area * geometry.frames,
        "patch_size": geometry.size,
        "temporal_patch_size": geometry.frames,
        "merge_size": merge_size,
        "do_center_crop": False,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Places
# ---------------------------------------------------------------------------------------------------------------------


def spread(values: torch.Tensor, counts: torch.Tensor, total: int | None = None) -> torch.Tensor:
    """Repeats `[I]` or `[I, …]` as often as `int[I]` says, to `total` rows."""
    return torch.repeat_interleave(values, counts, dim=0, output_size=total)


def starts(counts: torch.Tensor) -> torch.Tensor:
    """Where each of several runs begins: `int[I]` to `int[I]`."""
    return counts.cumsum(0) - counts


class Places(NamedTuple):
    """
    Where each of the cells of several grids stands, `int[K]` each, one grid after the other and frame by frame.

    image: the number of its grid. frame: its frame. within: its number in the frame. width: of its grid.
    """

    image: torch.Tensor
    frame: torch.Tensor
    within: torch.Tensor
    width: torch.Tensor


def places_in(grids: torch.Tensor) -> Places:
    """Lists the cells of grids `int[I, 3]`."""
    counts = grids.prod(dim=1)
    total = int(counts.sum())
    image = spread(torch.arange(len(grids), device=grids.device), counts, total)
    _, height, width = grids[image].unbind(dim=1)
    within = torch.arange(total, device=grids.device) - starts(counts)[image]
    return Places(image, within // (height * width), within % (height * width), width)


def in_squares(grids: torch.Tensor, merge_size: int) -> torch.Tensor:
    """Grids `int[I, 3]` of patches as grids of squares of neighbours."""
    return torch.cat((grids[:, :1], grids[:, 1:] // merge_size), dim=1)


def patch_places(grids: torch.Tensor, merge_size: int) -> torch.Tensor:
    """
    Row and column of every patch, in the order of the patches: `int[N, 2]`.

    Args:
        grids (`int[I, 3]`): in patches.
        merge_size: side of a square of neighbours.
    """
    _, _, within, width = places_in(grids)
    square, inside = within // merge_size**2, within % merge_size**2
    columns = width // merge_size
    rows = square // columns * merge_size + inside // merge_size
    return torch.stack((rows, square % columns * merge_size + inside % merge_size), dim=1)


def window_order(grids: torch.Tensor, merge_size: int, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """
    How squares of neighbours are sorted into windows of attention.

    Args:
        grids (`int[I, 3]`): in patches.
        merge_size: side of a square of neighbours, in patches.
        window: side of a window, in squares.

    Returns:
        The order `int[N / merge_size²]`, and the bounds `int[W + 1]` of the windows in patches.
    """
    grids = in_squares(grids, merge_size)
    windows_a_row = -(-grids[:, 2] // window)
    windows_a_frame = -(-grids[:, 1] // window) * windows_a_row
    image, frame, within, width = places_in(grids)
    number = starts(windows_a_frame * grids[:, 0])[image] + frame * windows_a_frame[image]
    number += within // width // window * windows_a_row[image] + within % width // window
    order = torch.argsort(number, stable=True)
    bounds = torch.bincount(number).cumsum(0) * merge_size**2
    return order, nn.functional.pad(bounds, (1, 0)).to(torch.int32)


# ---------------------------------------------------------------------------------------------------------------------
# Seeing
# ---------------------------------------------------------------------------------------------------------------------


def check_patches(
    vision_config: PreTrainedConfig, patches: torch.Tensor, grids: torch.Tensor, merge_size: int
) -> None:
    """Raises `ValueError` unless patches and grids belong together, and to this tower."""
    geometry, foreign = patch_geometry(vision_config), "were the images prepared by the processor of another model?"
    if patches.ndim != 2 or patches.shape[1] not in (geometry.values, geometry.values * geometry.frames):
        raise ValueError(
            f"pixel_values has shape {list(patches.shape)}, expected [patches, {geometry.values * geometry.frames}] "
            f"or, for single frames, [patches, {geometry.values}]: {foreign}"
        )
    sizes = grids.tolist()  # once: each look at a tensor on a device waits for it
    if grids.ndim != 2 or any(len(size) != 3 or min(size) < 1 for size in sizes):
        raise ValueError(
            f"image_grid_thw must hold time, height and width in patches for each image, got {sizes}: {foreign}"
        )
    counted = sum(map(math.prod, sizes))
    if counted != len(patches):
        raise ValueError(
            f"image_grid_thw counts {counted} patches, pixel_values holds {len(patches)}: images and grids do not "
            "belong together."
        )
    if any(height % merge_size or width % merge_size for _, height, width in sizes):
        raise ValueError(
            f"image_grid_thw {sizes} is not made of squares of {merge_size} x {merge_size} patches: {foreign}"
        )


def look_natively(
    model: PreTrainedModel,
    pixel_values: torch.Tensor,
    image_grid_thw: torch.Tensor | None,
    layers: list[int],
    merge_size: int,
    position_mode: str | None = None,
    **kwargs,
) -> tuple[BaseModelOutputWithPooling, list[torch.Tensor], torch.Tensor]:
    """
    What a base model of the zoo sees of a batch, after a check of the batch.

    Args:
        model: with a tower of `build_native_tower`; without anything to train there, it runs without a graph.
        pixel_values (`float[N, C * F * P * P]`), image_grid_thw (`int[I, 3]`): see the head of this file.
        layers, merge_size, position_mode, kwargs: see `see_natively`.

    Returns:
        As `see_natively`, and the grids.
    """
    if image_grid_thw is None:
        raise ValueError(
            f"pixel_values {list(pixel_values.shape)} came without image_grid_thw, the patches of each image: was "
            "this batch made by the processor of another model?"
        )
    grids, config = torch.as_tensor(image_grid_thw), model.config
    check_patches(config.vision_config, pixel_values, grids, merge_size)
    with torch.set_grad_enabled(model.tower_needs_graph(pixel_values)):
        outputs, features = see_natively(
            model.vision_tower,
            pixel_values,
            grids,
            layers,
            merge_size,
            config.num_prefix_tokens,
            position_mode,
            **kwargs,
        )
    return outputs, features, grids


def see_natively(
    tower: PreTrainedModel,
    patches: torch.Tensor,
    grids: torch.Tensor,
    layers: list[int],
    merge_size: int,
    num_prefix_tokens: int = 0,
    position_mode: str | None = None,
    **kwargs,
) -> tuple[BaseModelOutputWithPooling, list[torch.Tensor]]:
    """
    Runs a tower of any kind.

    Args:
        tower: of `build_native_tower`.
        patches (`float[N, C * F * P * P]`): see the head of this file.
        grids (`int[I, 3]`): in patches.
        layers: the hidden states that are wanted.
        merge_size: side of a square of neighbours.
        num_prefix_tokens: tokens that a tower of pictures puts before its patches.
        position_mode: `"bicubic"` or `"bilinear"`, how a packed tower's table of positions is interpolated when not by
            its own rule.
        kwargs: of the tower's forward.

    Returns:
        The tower's output (of the last call, where there are several), and a `float[N, Dv]` for each layer.
    """
    kwargs = {**kwargs, "return_dict": True}
    if not kwargs.get("output_hidden_states"):
        kwargs["output_hidden_states"] = layers
    patches = patches.to(device=tower.device, dtype=tower.dtype)
    grids = grids.to(tower.device)
    named = _named_inputs(type(tower))
    if "grid_thw" in named:
        return _see_packed(tower, patches, grids, layers, merge_size, position_mode, kwargs)
    see_one_size = _see_sequences if "spatial_shapes" in named else _see_pictures
    sizes, size_of = grids[:, 1:].unique(dim=0, return_inverse=True)  # int[S, 2], int[I]
    size_of = spread(size_of, grids.prod(dim=1))  # int[N]
    rows, states = [], []
    for number, size in enumerate(sizes.tolist()):
        own = (size_of == number).nonzero().squeeze(1)
        pictures = patches[own].unflatten(0, (-1, size[0] * size[1]))  # float[F, h * w, C * P * P]
        outputs, found = see_one_size(tower, pictures, size, layers, merge_size, num_prefix_tokens, kwargs)
        rows.append(own)
        states.append([state.flatten(0, 1) for state in found])
    if len(sizes) == 1:
        return outputs, states[0]
    back = torch.argsort(torch.cat(rows))
    features = [torch.cat(pieces)[back] for pieces in zip(*states, strict=True)]
    return BaseModelOutputWithPooling(last_hidden_state=features[layers.index(max(layers))]), features


def _see_packed(tower, patches, grids, layers, merge_size, position_mode, kwargs):
    lengths = spread(grids[:, 1] * grids[:, 2], grids[:, 0])
    kwargs |= {
        "position_ids": patch_places(grids, merge_size),
        "cu_seqlens": nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32),
    }
    order = None
    if hasattr(tower, "window_size"):
        window = tower.window_size // merge_size // tower.patch_size
        order, kwargs["cu_window_seqlens"] = window_order(grids, merge_size, window)
        kwargs["window_index"] = order
    if position_mode is not None:
        kwargs["interp_indices"], kwargs["interp_weights"] = get_vision_interpolation_indices_and_weights(
            grids, tower.num_grid_per_side, mode=position_mode, spatial_merge_size=merge_size
        )
    outputs = tower(patches, grid_thw=grids, **kwargs)
    features = [outputs.hidden_states[layer] for layer in layers]
    if order is not None:  # states come window by window
        back = torch.argsort(order)
        features = [state.unflatten(0, (-1, merge_size**2))[back].flatten(0, 1) for state in features]
    return outputs, features


def _by_rows(patches: torch.Tensor, size: list[int], merge_size: int) -> torch.Tensor:
    """`[F, h * w, …]` from the order of squares to that of rows."""
    squares = patches.unflatten(1, (size[0] // merge_size, size[1] // merge_size, merge_size, merge_size))
    return squares.transpose(2, 3).flatten(1, 4)


def _by_squares(patches: torch.Tensor, size: list[int], merge_size: int) -> torch.Tensor:
    """`[F, h * w, …]` from the order of rows to that of squares."""
    rows = patches.unflatten(1, (size[0] // merge_size, merge_size, size[1] // merge_size, merge_size))
    return rows.transpose(2, 3).flatten(1, 4)


def _see_sequences(tower, patches, size, layers, merge_size, _, kwargs):
    geometry = patch_geometry(tower.config)
    values = patches.unflatten(2, (geometry.channels, -1)).transpose(2, 3).flatten(2)  # NaFlex reads (y, x, channel)
    shapes = torch.tensor(size, device=patches.device).expand(len(patches), 2)
    seen = torch.ones(patches.shape[:2], dtype=torch.int32, device=patches.device)
    outputs = tower(_by_rows(values, size, merge_size), pixel_attention_mask=seen, spatial_shapes=shapes, **kwargs)
    return outputs, [_by_squares(outputs.hidden_states[layer], size, merge_size) for layer in layers]


def _see_pictures(tower, patches, size, layers, merge_size, num_prefix_tokens, kwargs):
    geometry = patch_geometry(tower.config)
    edges = (geometry.channels, geometry.size, geometry.size)
    grid = _by_rows(patches, size, merge_size).unflatten(1, size).unflatten(3, edges)  # [F, h, w, C, P, P]
    pictures = grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)  # [F, C, h * P, w * P]
    if "interpolate_pos_encoding" in _named_inputs(type(tower)):
        kwargs = {**kwargs, "interpolate_pos_encoding": True}
    outputs = tower(pictures, **kwargs)
    states = [outputs.hidden_states[layer][:, num_prefix_tokens:] for layer in layers]
    if states[0].shape[:2] != patches.shape[:2]:
        raise ValueError(
            f"{type(tower).__name__} made {list(states[0].shape[:2])} states of {list(patches.shape[:2])} "
            f"patches, without {num_prefix_tokens} prefix tokens. Likely cause: another num_prefix_tokens, or a tower "
            "that does not take pictures of any size."
        )
    return outputs, [_by_squares(state, size, merge_size) for state in states]
