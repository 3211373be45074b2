"""M-RoPE: images keep their own size, and every visual token a place in time, height and width.

Papers: Qwen2-VL (huggingface.co/papers/2409.12191), Qwen2.5-VL (huggingface.co/papers/2502.13923), Qwen3-VL
(huggingface.co/papers/2511.21631), DeepStack (huggingface.co/papers/2406.04334).

Paper map:
    Qwen2-VL 2.1, naive dynamic resolution    `native_vlm`; the image processor's `merge_size`; `PatchMerger`
    Qwen2-VL 2.1, M-RoPE                      `MultiAxisRope` with `mrope_layout="chunked"`; `multi_axis_positions`
    Qwen2.5-VL 2.1.2, absolute time           `video_time="seconds"`
    Qwen3-VL 2, interleaved M-RoPE            `mrope_layout="interleaved"` (the default)
    Qwen3-VL 2, DeepStack                     `deepstack_layers`; `DeepStackFeatures`
    Qwen3-VL 2, text timestamps               `video_time="timestamps"` (the default)

Deviations: towers and language models are any, not Qwen's. Images and clips share one placeholder and one batch key:
a clip is an image with several frames. The time ids of `video_time="seconds"` come from the processor, which knows the
clip, as `image_position_ids`. DeepStack's features travel beside the tokens' own, in the channels after them.
"""

from functools import partial
from inspect import signature
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import BatchFeature, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .configuration_vlm import ZooConfig, publish
from .layers import enter_layers
from .modeling_vlm import (
    FuseContext,
    ZooForConditionalGeneration,
    ZooImageOutput,
    ZooModel,
    encoded_inputs,
)
from .native_vlm import (
    blank_patches,
    build_native_tower,
    check_patches,
    feature_width,
    native_image_fields,
    see_natively,
    spread,
    starts,
)
from .parts_vlm import find_layers
from .processing_vlm import ZooProcessor
from .video_vlm import Clip, flat_items


@strict
class ZooMropeConfig(ZooConfig):
    r"""
    Configuration of M-RoPE; the fields that all architectures share are those of `ZooConfig`.

    spatial_merge_size (`int`): side of the square of neighbouring patches that become one token.
    merger_norm (`"layer_norm"` or `"rms_norm"`): norm of the mergers, Qwen2.5-VL's is the latter.
    merger_norm_eps (`float`): its epsilon.
    mrope_layout (`"interleaved"`, `"chunked"` or `"none"`):
        Which rotary frequencies belong to time, height and width: in turns (Qwen3-VL), in three blocks (Qwen2-VL), or
        all to the place in the sequence.
    mrope_section (`list[int]`, *optional*):
        How many frequencies belong to time, height and width. By default in Qwen's proportions.
    positions_after_image (`"side"` or `"extent"`):
        By how much an image moves the positions of what follows: by its longer side, as transformers does from 5.0 on,
        or by its longest extent, time included, as in 4.45 to 4.57. Only clips with time ids tell them apart.
    video_time (`"timestamps"`, `"seconds"` or `"index"`):
        How the frames of a clip tell their time: as text in front of each (Qwen3-VL), as time ids in seconds times
        `tokens_per_second` (Qwen2.5-VL), or as time ids that count them (Qwen2-VL).
    tokens_per_second (`float`): time ids in a second.
    deepstack_layers (`list[int]`):
        Hidden states of the tower, numbered like `vision_feature_layer`, whose features enter the language model
        later, each through its own merger.
    deepstack_text_layers (`list[int]`, *optional*):
        The layers of the language model after which they are added, by default the first ones.
    min_image_tokens, max_image_tokens (`int`): bounds of an image, which is resized to keep them.
    max_clip_tokens (`int`): bound of a clip, all its frames together.
    """

    model_type = "zoo_mrope"
    takes_native_towers = True

    vision_feature_layer: int | list[int] = -1
    spatial_merge_size: int = 2
    merger_norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    merger_norm_eps: float = 1e-6
    mrope_layout: Literal["interleaved", "chunked", "none"] = "interleaved"
    mrope_section: list[int] | None = None
    positions_after_image: Literal["side", "extent"] = "side"
    video_time: Literal["timestamps", "seconds", "index"] = "timestamps"
    tokens_per_second: float | int = 2.0
    deepstack_layers: list[int] | None = None
    deepstack_text_layers: list[int] | None = None
    min_image_tokens: int = 4
    max_image_tokens: int = 1280
    max_clip_tokens: int = 16384

    def validate_tokens(self):
        """Part of `@strict` validation."""
        if not 1 <= self.min_image_tokens <= self.max_image_tokens <= self.max_clip_tokens:
            raise ValueError(
                f"Expected 1 <= min_image_tokens <= max_image_tokens <= max_clip_tokens, got {self.min_image_tokens}, "
                f"{self.max_image_tokens} and {self.max_clip_tokens}."
            )
        if self.tokens_per_second <= 0:
            raise ValueError(f"tokens_per_second must be above 0, got {self.tokens_per_second}.")

    def validate_merge_size(self):
        """Part of `@strict` validation: a tower that orders patches by squares has the same squares."""
        own = getattr(self.vision_config, "spatial_merge_size", self.spatial_merge_size)
        if self.spatial_merge_size < 1 or own != self.spatial_merge_size:
            raise ValueError(
                f"spatial_merge_size is {self.spatial_merge_size}, the tower's is {own}: it orders its patches so."
            )

    def validate_section(self):
        """Part of `@strict` validation: three shares."""
        section = self.mrope_section
        if section is not None and (len(section) != 3 or min(section) < 0):
            raise ValueError(f"mrope_section is {section}, expected three numbers: for time, height and width.")

    def validate_deepstack(self):
        """Part of `@strict` validation: every feature has a layer that it is added after."""
        depth = getattr(self.vision_config, "num_hidden_layers", None)
        for layer in self.deepstack_layers or []:
            if depth is not None and not 0 <= layer <= depth:
                raise ValueError(f"deepstack_layers holds {layer}, the tower's hidden states are 0 to {depth}.")
        count, places = len(self.deepstack_layers or []), self.deepstack_places
        depth = getattr(self.text_config, "num_hidden_layers", None)
        if len(places) != count or sorted(set(places)) != places or (places and places[0] < 0):
            raise ValueError(
                f"deepstack_text_layers is {self.deepstack_text_layers}; expected {count} ascending numbers of "
                f"layers, one for each of deepstack_layers {self.deepstack_layers}."
            )
        if places and depth is not None and places[-1] > depth - 2:
            raise ValueError(
                f"Features are to be added after layer {places[-1]} of the language model, which has {depth} (0 to "
                f"{depth - 1}) and must go on with another one: the last place is {depth - 2}."
            )

    @classmethod
    def small_fields(cls, width: int, from_scratch: bool = False) -> dict:
        # Few patches are all there is to look at; from scratch nothing is gained by joining them.
        return {"spatial_merge_size": 1, "min_image_tokens": 1} if from_scratch else {}

    @property
    def deepstack_places(self) -> list[int]:
        """The layers of the language model after which features are added."""
        if self.deepstack_text_layers is not None:
            return list(self.deepstack_text_layers)
        return list(range(len(self.deepstack_layers or [])))

    @property
    def seen_layers(self) -> list[int]:
        """The hidden states of the tower that are used: those of the tokens, then those of DeepStack."""
        return [*self.feature_layers, *(self.deepstack_layers or [])]


# ---------------------------------------------------------------------------------------------------------------------
# Positions
# ---------------------------------------------------------------------------------------------------------------------


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
        after_image: `"side"` or `"extent"`, see `ZooMropeConfig.positions_after_image`.

    Returns:
        Positions `int[3, B, T]`, and `int[B, 1]`: what is to be added to the number of a later token, counted without
        padding, to have its position.
    """
    valid = torch.ones_like(visual) if attention_mask is None else attention_mask.bool()
    counts = grids.prod(dim=1)
    total = int(counts.sum())
    image = spread(torch.arange(len(grids), device=grids.device), counts, total)  # int[K], whose token it is
    _, height, width = grids[image].unbind(dim=1)
    within = torch.arange(total, device=grids.device) - starts(counts)[image]
    frame, rest = within // (height * width), within % (height * width)
    time = frame if times is None else times[image, frame]
    places = torch.stack((time, rest // width, rest % width))  # int[3, K], from the start of the image

    moves = grids[:, 1:].amax(dim=1)
    if after_image == "extent":
        moves = moves.scatter_reduce(0, image, time + 1, "amax")
    last = torch.zeros_like(time).index_copy(0, counts.cumsum(0) - 1, moves)  # an image moves on at its last token
    steps = valid.long().masked_scatter(visual, last)
    ends = steps.cumsum(dim=1)
    positions = (ends - steps) + torch.zeros_like(steps).expand(3, -1, -1).masked_scatter(visual, places)
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


# ---------------------------------------------------------------------------------------------------------------------
# Connector
# ---------------------------------------------------------------------------------------------------------------------


class PatchMerger(nn.Module):
    """
    A square of neighbouring patches becomes a token: norm, two layers.

    `after_joining`: whether the norm sees the square, as DeepStack's does, or each of its patches.
    """

    def __init__(self, config: ZooMropeConfig, width: int, after_joining: bool = False):
        super().__init__()
        self.width = width * config.spatial_merge_size**2
        norm = {"layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm}[config.merger_norm]
        self.after_joining = after_joining
        self.norm = norm(self.width if after_joining else width, eps=config.merger_norm_eps)
        self.linear_1 = nn.Linear(self.width, self.width)
        self.linear_2 = nn.Linear(self.width, config.text_config.hidden_size)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """`float[N, Dv]`, square by square, to `float[N / merge_size², Dt]`."""
        patches = patches.to(self.linear_1.weight.dtype)
        if self.after_joining:
            squares = self.norm(patches.reshape(-1, self.width))
        else:
            squares = self.norm(patches).reshape(-1, self.width)
        return self.linear_2(nn.functional.gelu(self.linear_1(squares)))


class MropeConnector(nn.Module):
    """A merger for the tokens, and one for each of DeepStack's layers."""

    def __init__(self, config: ZooMropeConfig, width: int):
        super().__init__()
        self.merger = PatchMerger(config, width * len(config.feature_layers))
        self.deepstack_mergers = nn.ModuleList(
            PatchMerger(config, width, after_joining=True) for _ in config.deepstack_layers or []
        )

    def forward(self, patches: torch.Tensor, deeper: list[torch.Tensor]) -> torch.Tensor:
        """`float[N, Dv]`, and one for each of DeepStack's layers, to `float[N / merge_size², Dt * (1 + layers)]`."""
        pairs = zip(self.deepstack_mergers, deeper, strict=True)
        return torch.cat((self.merger(patches), *(merger(states) for merger, states in pairs)), dim=-1)


class DeepStackFeatures(NamedTuple):
    """What the layers are given: `bool[B, T]`, true at visual tokens, and for each place `float[K, Dt]`, what is added
    there. Without images both are empty."""

    visual: torch.Tensor | None = None
    features: tuple[torch.Tensor, ...] = ()

    def enter(self, position: int, states: torch.Tensor) -> torch.Tensor:
        """Adds features to `float[B, T, Dt]`; see `enter_layers`."""
        if self.visual is None:
            return states
        added = self.features[position].to(states.device, states.dtype)
        return states + torch.zeros_like(states).masked_scatter(self.visual.to(states.device)[..., None], added)


def forget_axes(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Keeps positions on three axes from a layer, which has their embedding: attention kernels would take places that
    go back for the starts of packed sequences."""
    positions = kwargs.get("position_ids")
    if positions is not None and positions.ndim == 3:
        kwargs = {**kwargs, "position_ids": None}
    return args, kwargs


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


class ZooMropeModel(ZooModel):
    """Vision tower, mergers, language model with positions on three axes."""

    config: ZooMropeConfig

    def __init__(self, config: ZooMropeConfig):
        super().__init__(config)
        if config.mrope_layout != "none":
            put_axes(self.language_model, config.text_config, config.mrope_layout, config.mrope_section)
            holder, name = find_layers(self.language_model)
            for layer in getattr(holder, name):
                layer.register_forward_pre_hook(forget_axes, with_kwargs=True)
        if config.deepstack_layers:
            places = {layer + 1: number for number, layer in enumerate(config.deepstack_places)}
            enter_layers(self.language_model, "deepstack", places)

    def build_tower(self, config: ZooMropeConfig) -> None:
        self.vision_tower = build_native_tower(config.vision_config, config.seen_layers)

    def build_connector(self, config: ZooMropeConfig) -> None:
        self.connector = MropeConnector(config, feature_width(self.vision_tower))

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_grid_thw: torch.LongTensor | None = None,
        image_position_ids: torch.LongTensor | None = None,
        **kwargs,
    ) -> ZooImageOutput:
        """
        Images and clips to tokens.

        Args:
            pixel_values (`float[N, C * F * P * P]`): the patches of all images, see `native_vlm`.
            image_grid_thw (`int[I, 3]`): patches of each image in time, height and width.
            image_position_ids (`int[I, F]`, *optional*): the time ids of the frames of clips.

        Returns:
            The tower's output with `pooler_output`: one `float[K, Dt]` for each image, with DeepStack
            `float[K, Dt * (1 + layers)]`; and with what the positions are computed from.
        """
        if image_grid_thw is None:
            raise ValueError(
                f"pixel_values {list(pixel_values.shape)} came without image_grid_thw, the patches of each image: was "
                "this batch made by the processor of another model?"
            )
        grids, config = torch.as_tensor(image_grid_thw), self.config
        check_patches(config.vision_config, pixel_values, grids, config.spatial_merge_size)
        outputs, patches = self.see(pixel_values, image_grid_thw=grids, **kwargs)
        count = len(config.feature_layers)
        tokens = self.connector(torch.cat(patches[:count], dim=-1), patches[count:])
        sizes = grids.prod(dim=1) // config.spatial_merge_size**2
        vision_inputs = {"image_grid_thw": grids}
        if image_position_ids is not None:
            vision_inputs["image_position_ids"] = image_position_ids
        return ZooImageOutput(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=list(tokens.split(sizes.tolist())),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            vision_inputs=vision_inputs,
        )

    def see(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor, **kwargs):
        """As in the frame, at native resolution: the tower's output, and a `float[N, Dv]` for each of the config's
        `seen_layers`."""
        tower, config = self.vision_tower, self.config
        with torch.set_grad_enabled(self.tower_needs_graph(pixel_values)):
            return see_natively(
                tower,
                pixel_values,
                image_grid_thw,
                config.seen_layers,
                config.spatial_merge_size,
                config.num_prefix_tokens,
                **kwargs,
            )

    def dummy_vision_inputs(self) -> dict[str, torch.Tensor]:
        return blank_patches(self.config.vision_config, self.config.spatial_merge_size, self.device, self.dtype)

    def positions(
        self,
        visual: torch.Tensor,
        vision_inputs: dict[str, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past: int = 0,
        carry: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        `multi_axis_positions` of a batch, or of what comes behind a cache.

        Args:
            visual (`bool[B, T]`): true at placeholders.
            vision_inputs: `image_grid_thw`, and `image_position_ids` where clips have time ids.
            attention_mask (`int[B, past + T]`): 0 at padding.
            past: how many tokens the cache holds.
            carry (`int[B, 1]`, *optional*): of what the cache holds; without images there it may be left out.
        """
        side, config = self.config.spatial_merge_size, self.config
        grids = vision_inputs["image_grid_thw"].to(visual.device)
        grids = torch.cat((grids[:, :1], grids[:, 1:] // side), dim=1)
        times = vision_inputs.get("image_position_ids")
        if config.video_time == "timestamps":  # each frame is an image of its own
            grids, times = spread(grids, grids[:, 0]), None
            grids = torch.cat((torch.ones_like(grids[:, :1]), grids[:, 1:]), dim=1)
        times = None if times is None else times.to(visual.device)
        padding = None if attention_mask is None else attention_mask[:, past:]
        positions, deltas = multi_axis_positions(visual, grids, times, padding, config.positions_after_image)
        if past:
            moved = 0 if carry is None else carry.to(visual.device)
            before = past if attention_mask is None else attention_mask[:, :past].sum(dim=1, keepdim=True)
            positions, deltas = positions + before + moved, deltas + moved
        return positions, deltas

    def fuse(
        self, inputs_embeds: torch.Tensor, features: list[torch.Tensor] | None, context: FuseContext
    ) -> tuple[dict[str, Any], Any]:
        """
        As in the frame, with positions on three axes and DeepStack's features.

        The carry is `int[B, 1]`: what is to be added to the number of a token to have its position.
        """
        config, width = self.config, self.config.text_config.hidden_size
        tokens = None if features is None else [feature[:, :width] for feature in features]
        lm_inputs, carry = super().fuse(inputs_embeds, tokens, context)
        if config.deepstack_layers:
            lm_inputs["deepstack"] = DeepStackFeatures()
        if features is None:
            if config.mrope_layout != "none" and carry is not None and context.position_ids is None:
                lm_inputs["position_ids"] = self._later_positions(inputs_embeds, context)
            return lm_inputs, carry
        visual = self.placeholder_mask(context.input_ids, inputs_embeds)
        if config.deepstack_layers:
            deeper = torch.cat(list(features))[:, width:].split(width, dim=-1)
            lm_inputs["deepstack"] = DeepStackFeatures(visual, deeper)
        if config.mrope_layout == "none":
            return lm_inputs, None
        if context.position_ids is None:
            lm_inputs["position_ids"], carry = self._positions_of_batch(visual, context)
        if context.attention_mask is None and context.past_key_values is None:
            # Without a mask, places that go back would be taken for the starts of packed sequences
            lm_inputs["attention_mask"] = torch.ones_like(visual, dtype=torch.long)
        return lm_inputs, carry

    def _positions_of_batch(self, visual: torch.Tensor, context: FuseContext) -> tuple[torch.Tensor, torch.Tensor]:
        if "image_grid_thw" not in context.vision_inputs:
            raise ValueError(
                "The images came without image_grid_thw, so their tokens have no place: give mm_encoder_outputs as "
                "get_image_features returns them, or position_ids."
            )
        padding = context.attention_mask
        if padding is not None and padding.ndim != 2:
            raise ValueError(
                f"Positions are counted where attention_mask int[B, T] shows no padding, got {list(padding.shape)}."
            )
        past = 0 if context.past_key_values is None else context.past_key_values.get_seq_length()
        return self.positions(visual, context.vision_inputs, padding, past, context.carry)

    def _later_positions(self, inputs_embeds: torch.Tensor, context: FuseContext) -> torch.Tensor:
        """Positions `int[3, B, T]` of tokens that come after what the cache holds."""
        rows, length = inputs_embeds.shape[:2]
        if context.attention_mask is not None and context.attention_mask.ndim == 2:
            numbers = (context.attention_mask.long().cumsum(dim=1) - 1)[:, -length:]
        else:
            past = 0 if context.past_key_values is None else context.past_key_values.get_seq_length()
            numbers = (torch.arange(length, device=inputs_embeds.device) + past).expand(rows, -1)
        return (numbers + context.carry.to(numbers.device)).expand(3, -1, -1)


class ZooMropeForConditionalGeneration(ZooForConditionalGeneration, GenerationMixin):
    """
    M-RoPE with the language model's head.

    `generate` computes the places of the whole prompt once. A loop of one's own hands `carry=outputs.carry` to the
    next step beside `past_key_values`.
    """

    config: ZooMropeConfig
    base_model_class = ZooMropeModel

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        """
        As in transformers; for a prompt with images `int[3, B, T]`.

        Behind a kept cache the images may be those of the whole prompt or, with the carry of what the cache holds,
        those of the rest.
        """
        numbers = super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        carry, cache = model_kwargs.get("carry"), model_kwargs.get("past_key_values")
        past, length = 0 if cache is None else cache.get_seq_length(), numbers.shape[1]
        if self.config.mrope_layout == "none":
            return numbers
        ids = model_kwargs.get("input_ids")
        if ids is None or ids.shape[1] == 0:
            ids = inputs_tensor
        visual = self.model.placeholder_mask(*((ids, None) if ids.ndim == 2 else (None, ids)))
        rest = visual[:, past - length :]
        side, padding = self.config.spatial_merge_size, model_kwargs.get("attention_mask")
        encoded = (model_kwargs.get("mm_encoder_outputs") or {}).get("image")
        vision_inputs = encoded_inputs(model_kwargs.get("mm_encoder_outputs")) or {
            name: model_kwargs[name]
            for name in ("image_grid_thw", "image_position_ids")
            if model_kwargs.get(name) is not None
        }
        found = int(vision_inputs["image_grid_thw"].prod(dim=1).sum()) // side**2 if vision_inputs else 0
        if past and found and found == visual.sum() and visual.shape[1] == length:
            rest, past, carry = visual, 0, None  # the whole prompt, and all its images
        elif past and carry is None and visual[:, : visual.shape[1] - rest.shape[1]].any():
            raise ValueError(
                "The cached beginning of the prompt holds images, whose places move what follows: give all images of "
                "the prompt again, as pixel_values or mm_encoder_outputs, or the carry of the model's outputs."
            )
        if not vision_inputs:
            return numbers if carry is None else (numbers + carry).expand(3, -1, -1)
        if encoded is not None:
            self.model.check_placeholders(rest, list(encoded.pooler_output))
        positions, _ = self.model.positions(rest, vision_inputs, padding, past, carry)
        return torch.cat((numbers[:, :past].expand(3, len(rest), -1), positions), dim=2)


# ---------------------------------------------------------------------------------------------------------------------
# Processor
# ---------------------------------------------------------------------------------------------------------------------


class ZooMropeProcessor(ZooProcessor):
    r"""
    Images, clips and text to a batch for M-RoPE.

    video_time (`"timestamps"`, `"seconds"` or `"index"`): as in the config.
    tokens_per_second (`float`): as in the config.
    frame_start, frame_end (`str`): text around the placeholders of a time step of a clip, after its timestamp.
    """

    takes_clips = True

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        video_time: str = "timestamps",
        tokens_per_second: float = 2.0,
        frame_start: str = "",
        frame_end: str = "",
        chat_template=None,
    ):
        self.video_time = video_time
        self.tokens_per_second = tokens_per_second
        self.frame_start = frame_start
        self.frame_end = frame_end
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def fields_from(cls, config: ZooMropeConfig) -> dict:
        return {"video_time": config.video_time, "tokens_per_second": config.tokens_per_second}

    @classmethod
    def image_fields_from(cls, config: ZooMropeConfig) -> dict:
        return native_image_fields(config, config.spatial_merge_size)

    def num_image_tokens(self, height: int, width: int, **images_kwargs) -> int:
        return self.num_clip_tokens(1, height, width, **images_kwargs)

    def num_clip_tokens(self, frames: int, height: int, width: int, **images_kwargs) -> int:
        """How many placeholders a clip of so many frames of this size becomes."""
        return self.image_processor.num_patches(height, width, frames, **images_kwargs) // self.patches_a_token(
            **images_kwargs
        )

    def patches_a_token(self, merge_size: int | None = None, **images_kwargs) -> int:
        """Patches that become one token."""
        return (self.image_processor.merge_size if merge_size is None else merge_size) ** 2

    def _process_images(self, images, **kwargs):
        processed = self.image_processor(images, **kwargs)
        flat = flat_items(images)
        grids = [[int(edge) for edge in grid] for grid in processed["image_grid_thw"]]
        replacements = []
        for item, (times, rows, columns) in zip(flat, grids, strict=True):
            tokens = rows * columns // self.patches_a_token(**kwargs)
            if isinstance(item, Clip) and self.video_time == "timestamps":
                replacements.append("".join(map(partial(self.frame_text, tokens), self.patch_times(item, times))))
            else:
                replacements.append(self.image_text(times * tokens))
        if self.video_time == "seconds" and any(isinstance(item, Clip) for item in flat):
            longest = max(times for times, _, _ in grids)
            ids = [self.time_ids(item, times) for item, (times, _, _) in zip(flat, grids, strict=True)]
            ids = [[*own, *[0] * (longest - len(own))] for own in ids]
            processed = BatchFeature(
                {**processed, "image_position_ids": ids}, tensor_type=kwargs.get("return_tensors")
            )
        return processed, replacements

    def frame_text(self, num_tokens: int, seconds: float) -> str:
        """The text of one time step of a clip: when it is, then its placeholders."""
        return f"<{seconds:.1f} seconds>{self.frame_start}{self.image_text(num_tokens)}{self.frame_end}"

    def patch_times(self, clip: Clip, steps: int) -> list[float]:
        """When each time step of a clip is, in seconds: in the middle of its first and its last frame."""
        length = self.image_processor.temporal_patch_size
        shown = [*clip.times, *[clip.times[-1]] * (steps * length - len(clip.times))]
        return [(shown[step * length] + shown[(step + 1) * length - 1]) / 2 for step in range(steps)]

    def time_ids(self, item, steps: int) -> list[int]:
        """The time ids of a clip's steps; a still has 0."""
        if not isinstance(item, Clip):
            return list(range(steps))
        seconds_a_step = self.image_processor.temporal_patch_size / item.fps
        return [int(step * (self.tokens_per_second * seconds_a_step)) for step in range(steps)]


publish(ZooMropeConfig)
