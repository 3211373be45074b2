"""The frame for models whose visual tokens have places: native resolution, mergers, positions on three axes.

    see        `native_vlm`, every image at its own size
    align      `MergerConnector`: squares of neighbouring patches become tokens, of several depths with DeepStack
    fuse       tokens in the sequence, `position_ids` int[3, B, T], DeepStack's features in front of later layers
    decode     the carry int[B, 1]: what is to be added to the number of a token to have its position

M-RoPE is this frame. An architecture that brings other tokens than one for each square into the sequence overrides
`runs` (how many there are, and where their image stands) and `fuse`.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers.utils.generic import can_return_tuple

from .configuration_vlm import ZooConfig
from .layers import enter_layers, grid_places
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
    check_native_config,
    feature_width,
    in_squares,
    look_natively,
    native_image_fields,
    patch_geometry,
    spread,
)
from .positions_vlm import Runs, put_axes, runs_of_grids, sequence_positions
from .processing_vlm import ZooProcessor
from .video_vlm import Clip, flat_items


@strict
class MultiAxisConfig(ZooConfig):
    r"""
    Configuration for visual tokens with places; the fields that all architectures share are those of `ZooConfig`.

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
        Hidden states of the tower, 0 being the embeddings, whose features enter the language model later, each through
        its own merger.
    deepstack_text_layers (`list[int]`, *optional*):
        The layers of the language model after which they are added, by default the first ones.
    image_size (`list[int]`, *optional*):
        Height and width to which every image is resized whatever its shape, for towers that know one size alone.
    min_image_tokens, max_image_tokens (`int`): bounds of an image, which is resized to keep them.
    max_clip_tokens (`int`): bound of a clip, all its frames together.
    """

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
    image_size: list[int] | None = None
    min_image_tokens: int = 4
    max_image_tokens: int = 1280
    max_clip_tokens: int = 16384

    def validate_native_resolution(self):
        """Part of `@strict` validation."""
        check_native_config(self, "spatial_merge_size")
        size = self.image_size
        if size is not None:
            side = patch_geometry(self.vision_config).size * self.spatial_merge_size
            if len(size) != 2 or min(size) < 1 or any(edge % side for edge in size):
                raise ValueError(f"image_size is {size}, expected a height and a width that are multiples of {side}.")
        if self.tokens_per_second <= 0:
            raise ValueError(f"tokens_per_second must be above 0, got {self.tokens_per_second}.")

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
# Connector
# ---------------------------------------------------------------------------------------------------------------------


class PatchMerger(nn.Module):
    """
    A square of neighbouring patches becomes a token: norm, two layers.

    `after_joining`: whether the norm sees the square, as DeepStack's does, or each of its patches.
    """

    def __init__(self, config: MultiAxisConfig, width: int, after_joining: bool = False):
        super().__init__()
        self.width = width * config.spatial_merge_size**2
        norm = {"layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm}[config.merger_norm]
        self.after_joining = after_joining
        self.norm = norm(self.width if after_joining else width, eps=config.merger_norm_eps)
        self.linear_1 = nn.Linear(self.width, self.width)
        self.linear_2 = nn.Linear(self.width, config.text_config.hidden_size)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """`float[N, Dv]`, square by square, to `float[N / merge_size², Dt]`."""
        patches = patches.to(self.norm.weight.dtype)  # a quantised layer's own says nothing
        if self.after_joining:
            squares = self.norm(patches.reshape(-1, self.width))
        else:
            squares = self.norm(patches).reshape(-1, self.width)
        return self.linear_2(nn.functional.gelu(self.linear_1(squares)))


class MergerConnector(nn.Module):
    """A merger for the tokens, and one for each of DeepStack's layers."""

    def __init__(self, config: MultiAxisConfig, width: int):
        super().__init__()
        self.merger = PatchMerger(config, width * len(config.feature_layers))
        self.deepstack_mergers = nn.ModuleList(
            PatchMerger(config, width, after_joining=True) for _ in config.deepstack_layers or []
        )

    def forward(self, patches: torch.Tensor, deeper: list[torch.Tensor]) -> torch.Tensor:
        """`float[N, Dv]`, and one for each of DeepStack's layers, to `float[N / merge_size², Dt * (1 + layers)]`."""
        pairs = zip(self.deepstack_mergers, deeper, strict=True)
        return torch.cat((self.merger(patches), *(merger(states) for merger, states in pairs)), dim=-1)


# What is wrong with images whose sizes are not known.
NO_GRIDS = (
    "The images came without image_grid_thw, so their tokens have no place: give mm_encoder_outputs as "
    "get_image_features returns them, or position_ids."
)


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


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


class MultiAxisModel(ZooModel):
    """Vision tower, mergers, language model with positions on three axes."""

    config: MultiAxisConfig

    def __init__(self, config: MultiAxisConfig):
        super().__init__(config)
        if config.mrope_layout != "none":
            put_axes(self.language_model, config.text_config, config.mrope_layout, config.mrope_section)
        if config.deepstack_layers:
            places = {layer + 1: number for number, layer in enumerate(config.deepstack_places)}
            enter_layers(self.language_model, "deepstack", places)

    def build_tower(self, config: MultiAxisConfig) -> None:
        self.vision_tower = build_native_tower(config.vision_config, config.seen_layers)

    def build_connector(self, config: MultiAxisConfig) -> None:
        self.connector = MergerConnector(config, feature_width(self.vision_tower))

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
        config = self.config
        outputs, patches, grids = look_natively(
            self, pixel_values, image_grid_thw, config.seen_layers, config.spatial_merge_size, **kwargs
        )
        self.check_times(image_position_ids, grids)
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

    def check_times(self, times: torch.Tensor | None, grids: torch.Tensor) -> None:
        """Raises `ValueError` unless clips have the time ids that the config asks for."""
        longest = int(grids[:, 0].max())
        if times is None:
            if self.config.video_time == "seconds" and longest > 1:
                raise ValueError(
                    f"A clip of {longest} time steps came without image_position_ids, which video_time 'seconds' "
                    "needs. Likely cause: a trainer that does not pass them on (TRL's GRPO and RLOO); those "
                    "need video_time 'timestamps'."
                )
            return
        if self.config.video_time == "timestamps":
            raise ValueError(
                "image_position_ids are for time ids, video_time is 'timestamps': was this batch made by the "
                "processor of another model?"
            )
        shape, wanted = list(times.shape), f"integers [{len(grids)}, at least {longest}], none below 0"
        fits = times.ndim == 2 and shape[0] == len(grids) and shape[1] >= longest
        if not fits or times.is_floating_point() or bool((times < 0).any()):
            raise ValueError(f"image_position_ids are {times.dtype} {shape}, expected {wanted}.")

    def dummy_vision_inputs(self) -> dict[str, torch.Tensor]:
        return blank_patches(self.config.vision_config, self.config.spatial_merge_size, self.device, self.dtype)

    def grids_and_times(
        self, vision_inputs: dict[str, torch.Tensor], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        What stands in the sequence as one image: stills, clips with time ids, and the frames of clips with timestamps.

        Returns:
            Grids `int[I, 3]` in tokens, and the time ids `int[I, F]` where there are some.
        """
        if "image_grid_thw" not in vision_inputs:
            raise ValueError(NO_GRIDS)
        grids = in_squares(vision_inputs["image_grid_thw"].to(device), self.config.spatial_merge_size)
        if self.config.video_time == "timestamps":
            grids = spread(grids, grids[:, 0])
            return torch.cat((torch.ones_like(grids[:, :1]), grids[:, 1:]), dim=1), None
        times = vision_inputs.get("image_position_ids")
        return grids, None if times is None else times.to(device)

    def token_places(self, vision_inputs: dict[str, torch.Tensor], fusion_outputs: Any) -> list[torch.Tensor]:
        """As in the frame; the time steps of a clip stand one upon the other."""
        side = self.config.spatial_merge_size
        return [
            grid_places((rows, columns), side).repeat(times, 1)
            for times, rows, columns in torch.as_tensor(vision_inputs["image_grid_thw"]).tolist()
        ]

    def runs(self, vision_inputs: dict[str, torch.Tensor], device: torch.device) -> Runs:
        """The visual tokens of the sequence; see `Runs`."""
        return runs_of_grids(*self.grids_and_times(vision_inputs, device), self.config.positions_after_image)

    def positions(
        self,
        visual: torch.Tensor,
        vision_inputs: dict[str, torch.Tensor],
        attention_mask: torch.Tensor | None,
        past: int = 0,
        carry: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        `sequence_positions` of a batch, or of what comes behind a cache.

        Args:
            visual (`bool[B, T]`): true at placeholders.
            vision_inputs: `image_grid_thw`, and `image_position_ids` where clips have time ids.
            attention_mask (`int[B, past + T]`): 0 at padding.
            past: how many tokens the cache holds.
            carry (`int[B, 1]`, *optional*): of what the cache holds; without images there it may be left out.
        """
        padding = None if attention_mask is None else attention_mask[:, past:]
        positions, deltas = sequence_positions(visual, self.runs(vision_inputs, visual.device), padding)
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
        elif context.position_ids.ndim != 3:
            raise ValueError(
                f"position_ids are {list(context.position_ids.shape)}, expected [3, B, T] beside images: leave them "
                "out, or give what `positions` of this model returns."
            )
        if context.attention_mask is None and context.past_key_values is None:
            # Without a mask, places that go back would be taken for the starts of packed sequences
            lm_inputs["attention_mask"] = torch.ones_like(visual, dtype=torch.long)
        return lm_inputs, carry

    def _positions_of_batch(self, visual: torch.Tensor, context: FuseContext) -> tuple[torch.Tensor, torch.Tensor]:
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


class MultiAxisForConditionalGeneration(ZooForConditionalGeneration):
    """
    Visual tokens with places, and the language model's head.

    `generate` computes the places of the whole prompt once. A loop of one's own hands `carry=outputs.carry` to the
    next step beside `past_key_values`.
    """

    config: MultiAxisConfig
    base_model_class = MultiAxisModel

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
        padding = model_kwargs.get("attention_mask")
        encoded = (model_kwargs.get("mm_encoder_outputs") or {}).get("image")
        vision_inputs = encoded_inputs(model_kwargs.get("mm_encoder_outputs")) or {
            name: model_kwargs[name]
            for name in ("image_grid_thw", "image_position_ids")
            if model_kwargs.get(name) is not None
        }
        found = int(self.model.runs(vision_inputs, visual.device).counts.sum()) if vision_inputs else 0
        if past and found and found == visual.sum() and visual.shape[1] == length:
            rest, past, carry = visual, 0, None  # the whole prompt, and all its images
        elif past and carry is None and visual[:, : visual.shape[1] - rest.shape[1]].any():
            raise ValueError(
                "The cached beginning of the prompt holds images, whose places move what follows: give all images of "
                "the prompt again, as pixel_values or mm_encoder_outputs, or the carry of the forward that filled it."
            )
        if not vision_inputs:
            if encoded is not None:
                raise ValueError(NO_GRIDS)
            return numbers if carry is None else (numbers + carry).expand(3, -1, -1)
        if encoded is not None:
            self.model.check_placeholders(rest, self.model.placeholders_of(list(encoded.pooler_output), vision_inputs))
        positions, model_kwargs["carry"] = self.model.positions(rest, vision_inputs, padding, past, carry)
        return torch.cat((numbers[:, :past].expand(3, len(rest), -1), positions), dim=2)

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs):
        """As in transformers; new tokens stand where the carry says, though the prompt ends with an image, whose last
        token is not the furthest."""
        before = model_kwargs.get("position_ids")
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        positions, carry = model_kwargs.get("position_ids"), model_kwargs.get("carry")
        if carry is not None and positions is not None and positions.ndim == 3:
            new, mask = positions.shape[2] - before.shape[2], model_kwargs.get("attention_mask")
            total = positions.shape[2] if mask is None else mask.sum(dim=1, keepdim=True)
            numbers = total - new + torch.arange(new, device=positions.device)
            positions[:, :, -new:] = numbers + carry
        return model_kwargs


# ---------------------------------------------------------------------------------------------------------------------
# Processor
# ---------------------------------------------------------------------------------------------------------------------


class MultiAxisProcessor(ZooProcessor):
    r"""
    Images, clips and text to a batch for visual tokens with places.

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
    def fields_from(cls, config: MultiAxisConfig) -> dict:
        return {"video_time": config.video_time, "tokens_per_second": config.tokens_per_second}

    @classmethod
    def image_fields_from(cls, config: MultiAxisConfig) -> dict:
        return native_image_fields(config, config.spatial_merge_size)

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, *(["image_position_ids"] if self.video_time == "seconds" else [])]

    @property
    def clip_options(self) -> dict[str, Any]:
        """As upstream: with time ids as many frames as fill whole patches, else the last one is repeated."""
        frames = self.image_processor.temporal_patch_size
        return {} if self.video_time == "timestamps" else {"frame_multiple": frames}

    def num_image_tokens(self, height: int, width: int, **images_kwargs) -> int:
        return self.num_clip_tokens(1, height, width, **images_kwargs)

    def num_clip_tokens(self, frames: int, height: int, width: int, **images_kwargs) -> int:
        """How many placeholders a clip of so many frames of this size becomes."""
        times, rows, columns = self.image_processor.patch_grid(height, width, frames, **images_kwargs)
        return times * self.tokens_of_frame(rows, columns, **images_kwargs)

    def tokens_of_frame(self, rows: int, columns: int, **images_kwargs) -> int:
        """How many placeholders a still, or a time step of a clip, of so many patches becomes."""
        return rows * columns // self.patches_a_token(**images_kwargs)

    def patches_a_token(self, merge_size: int | None = None, **images_kwargs) -> int:
        """Patches that become one token."""
        return (self.image_processor.merge_size if merge_size is None else merge_size) ** 2

    def _process_images(self, images, **kwargs):
        processed = self.image_processor(images, **kwargs)
        flat = flat_items(images)
        grids = [[int(edge) for edge in grid] for grid in processed["image_grid_thw"]]
        replacements = []
        for item, (times, rows, columns) in zip(flat, grids, strict=True):
            tokens = self.tokens_of_frame(rows, columns, **kwargs)
            if isinstance(item, Clip) and self.video_time == "timestamps":
                replacements.append("".join(map(partial(self.frame_text, tokens), self.patch_times(item, times))))
            else:
                replacements.append(self.image_text(times * tokens))
        if self.video_time == "seconds" and any(isinstance(item, Clip) for item in flat):
            longest = max(times for times, _, _ in grids)
            ids = [self.time_ids(item, times) for item, (times, _, _) in zip(flat, grids, strict=True)]
            ids = [[*own, *[0] * (longest - len(own))] for own in ids]
            # A tensor, asked for or not: trainers take lists of lists for one number a token
            processed["image_position_ids"] = torch.tensor(ids)
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
        seconds_a_step = torch.tensor(self.image_processor.temporal_patch_size / item.fps)  # float32, as upstream
        return (torch.arange(steps) * (self.tokens_per_second * seconds_a_step)).long().tolist()
