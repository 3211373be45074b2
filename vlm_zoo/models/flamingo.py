"""Flamingo: an image is resampled to a few latents, and text looks at them from inside the language model.

Papers: Flamingo (huggingface.co/papers/2204.14198), OpenFlamingo (huggingface.co/papers/2308.01390), OBELICS / IDEFICS
(huggingface.co/papers/2306.16527), Perceiver (huggingface.co/papers/2103.03206).

Paper map:
    2.1 Perceiver Resampler, keys and values from [features; latents]   `PerceiverResampler`
    2.1 temporal embeddings of video frames                            `frame_embeddings`
    2.2 GATED XATTN-DENSE before every n-th layer, gates zero at first  `FlamingoBlock`, `cross_attention_interval`
    2.3 a token sees the immediately preceding image alone              `media_mask`, `only_immediate_media`
    IDEFICS: RMSNorm, gated feed-forward, vector gates                  `cross_attention_norm`, `gated_feed_forward`,
                                                                        `gate_type`

Deviations: a token that sees no image skips the block, feed-forward and all, so that it gets exactly what the language
model alone would give it; with `feed_forward_without_media=True` the feed-forward runs on every token, as it does in
OpenFlamingo and IDEFICS. One placeholder stands for an image or for a clip, whatever its number of frames. Clips of
more frames than there are frame embeddings get interpolated ones, as in the paper's evaluation.

IDEFICS' own inputs are taken too: images padded to as many in every row, and `image_attention_mask` beside them. The
mask must say what the image tokens say, which decide without one. For itself it may say that tokens after an end of
sequence, up to the next image, see none, as in a row of several documents; tokens that are generated go on so.

The language model is wrapped without being renamed: its layers keep their names and their code, and a hook in front of
every layer runs the block that belongs there. Keys and values of an image are computed once and travel as the carry.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn import functional as F
from transformers import BatchFeature, GenerationMixin
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from .configuration_vlm import ZooConfig, publish
from .layers import attend, enter_layers, split_heads
from .modeling_vlm import FuseContext, ZooForConditionalGeneration, ZooModel, holds_images
from .processing_vlm import ZooProcessor
from .video_vlm import Clip, flat_items


@strict
class ZooFlamingoConfig(ZooConfig):
    r"""
    Configuration of Flamingo; the fields that all architectures share are those of `ZooConfig`.

    num_latents (`int`): latents that an image or a clip is resampled to.
    resampler_depth (`int`): layers of the resampler; 0 hands the tower's features on as they are, images only.
    resampler_num_heads, resampler_head_dim (`int`): its attention.
    resampler_intermediate_size (`int`, *optional*): width of its feed-forward, by default four times the tower's.
    resampler_hidden_act (`str`): activation of its feed-forward.
    resampler_qk_norm (`bool`): whether it normalises queries and keys in each head.
    num_frame_embeddings (`int`): learned embeddings of the frames of a clip; 0 for none.
    cross_attention_interval (`int`):
        A block stands before every so many-th layer of the language model; in one with fewer layers, before its last.
    cross_attention_layers (`list[int]`, *optional*): the layers with a block, instead of an interval.
    cross_attention_num_heads, cross_attention_head_dim (`int`): attention of the blocks.
    cross_attention_norm (`"layer_norm"` or `"rms_norm"`): their norms; `cross_attention_norm_eps` is the epsilon.
    cross_attention_qk_norm (`bool`): whether they normalise queries and keys in each head.
    feed_forward_size (`int`, *optional*): width of the blocks' feed-forward, by default four times the model's.
    feed_forward_act (`str`): its activation.
    gated_feed_forward (`bool`): whether it is a gated linear unit.
    gate_type (`"scalar"` or `"vector"`): one tanh gate for all channels, or one for each.
    gate_init (`float`): where the gates start. At 0 a fresh model computes what its language model computes.
    only_immediate_media (`bool`): a token sees the last image before it (true), or all images before it.
    feed_forward_without_media (`bool`): whether the feed-forward runs on tokens that see no image.
    """

    model_type = "zoo_flamingo"

    num_latents: int = 64
    resampler_depth: int = 6
    resampler_num_heads: int = 8
    resampler_head_dim: int = 64
    resampler_intermediate_size: int | None = None
    resampler_hidden_act: str = "gelu"
    resampler_qk_norm: bool = False
    num_frame_embeddings: int = 8
    cross_attention_interval: int = 4
    cross_attention_layers: list[int] | None = None
    cross_attention_num_heads: int = 8
    cross_attention_head_dim: int = 64
    cross_attention_norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    cross_attention_norm_eps: float = 1e-5
    cross_attention_qk_norm: bool = False
    feed_forward_size: int | None = None
    feed_forward_act: str = "gelu"
    gated_feed_forward: bool = False
    gate_type: Literal["scalar", "vector"] = "scalar"
    gate_init: float = 0.0
    only_immediate_media: bool = True
    feed_forward_without_media: bool = False

    def validate_sizes(self):
        """Part of `@strict` validation."""
        for name in ("num_latents", "cross_attention_interval", "resampler_num_heads", "resampler_head_dim",
                     "cross_attention_num_heads", "cross_attention_head_dim"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("resampler_depth", "num_frame_embeddings"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} cannot be negative, got {getattr(self, name)}.")
        for name in ("resampler_intermediate_size", "feed_forward_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, or None, got {getattr(self, name)}.")
        for name in ("resampler_hidden_act", "feed_forward_act"):
            if getattr(self, name) not in ACT2FN:
                raise ValueError(f"{name} '{getattr(self, name)}' is no activation of transformers.")

    def validate_cross_attention_layers(self):
        """Part of `@strict` validation: every block stands before a layer that the language model has."""
        depth = getattr(self.text_config, "num_hidden_layers", None)
        layers = self.cross_attention_layers
        if layers is None or depth is None:
            return
        if not layers or sorted(set(layers)) != layers or layers[0] < 0 or layers[-1] >= depth:
            raise ValueError(
                f"cross_attention_layers is {layers}; expected ascending numbers of layers of the language model, "
                f"which has {depth} (0 to {depth - 1})."
            )

    @property
    def gated_layers(self) -> list[int]:
        """The layers of the language model that a block stands before."""
        if self.cross_attention_layers is not None:
            return self.cross_attention_layers
        depth, interval = self.text_config.num_hidden_layers, self.cross_attention_interval
        return list(range(interval - 1, depth, interval)) or [depth - 1]

    @property
    def media_width(self) -> int:
        """Width of the features that the blocks look at."""
        return self.vision_config.hidden_size * len(self.feature_layers)

    @classmethod
    def small_fields(cls, width: int, from_scratch: bool = False) -> dict:
        heads = max(1, width // 32)
        return {
            "num_latents": 16,
            "resampler_depth": 1,
            "resampler_num_heads": heads,
            "resampler_head_dim": width // heads,
            "cross_attention_interval": 1,
            "cross_attention_num_heads": heads,
            "cross_attention_head_dim": width // heads,
            # Closed gates protect what a language model knows. Where it knows nothing they only cost time.
            "gate_init": 1.0 if from_scratch else 0.0,
        }


# ---------------------------------------------------------------------------------------------------------------------
# Resampler
# ---------------------------------------------------------------------------------------------------------------------


class PerceiverLayer(GradientCheckpointingLayer):
    """Latents look at features and at themselves, then pass a feed-forward; both are added to them."""

    def __init__(self, config: ZooFlamingoConfig):
        super().__init__()
        self.config = config
        width, head_dim = config.media_width, config.resampler_head_dim
        inner = config.resampler_num_heads * head_dim
        intermediate = config.resampler_intermediate_size or 4 * width
        self.media_norm = nn.LayerNorm(width)
        self.latents_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, inner, bias=False)
        self.key = nn.Linear(width, inner, bias=False)
        self.value = nn.Linear(width, inner, bias=False)
        self.output = nn.Linear(inner, width, bias=False)
        self.query_norm = nn.LayerNorm(head_dim) if config.resampler_qk_norm else nn.Identity()
        self.key_norm = nn.LayerNorm(head_dim) if config.resampler_qk_norm else nn.Identity()
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward_in = nn.Linear(width, intermediate, bias=False)
        self.act = ACT2FN[config.resampler_hidden_act]
        self.feed_forward_out = nn.Linear(intermediate, width, bias=False)

    def forward(self, latents: torch.Tensor, media: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """
        Args:
            latents: `float[I, K, Dv]`.
            media (`float[I, S, Dv]`): the features of all frames of an image or clip.
            mask (`bool[I, 1, 1, S + K]`): false at frames that are padding.
        """
        normed = self.latents_norm(latents)
        seen = torch.cat((self.media_norm(media), normed), dim=1)  # [I, S + K, Dv]
        head_dim = self.config.resampler_head_dim
        query = self.query_norm(split_heads(self.query(normed), head_dim))
        key = self.key_norm(split_heads(self.key(seen), head_dim))
        value = split_heads(self.value(seen), head_dim)
        attended = attend(query, key, value, mask, implementation=self.config._attn_implementation)
        latents = latents + self.output(attended)
        return latents + self.feed_forward_out(self.act(self.feed_forward_in(self.feed_forward_norm(latents))))


class PerceiverResampler(nn.Module):
    """Any number of features to `num_latents` latents."""

    def __init__(self, config: ZooFlamingoConfig):
        super().__init__()
        self.config = config
        width = config.media_width
        if config.num_frame_embeddings:
            self.frame_embeddings = nn.Parameter(torch.empty(config.num_frame_embeddings, width))
        if config.resampler_depth:
            self.latents = nn.Parameter(torch.empty(config.num_latents, width))
            self.layers = nn.ModuleList(PerceiverLayer(config) for _ in range(config.resampler_depth))
            self.norm = nn.LayerNorm(width)

    def forward(self, patches: torch.Tensor, frames: list[int]) -> torch.Tensor:
        """
        Args:
            patches (`float[R, N, Dv]`): the features of all frames of all images and clips, one after the other.
            frames: how many frames each image (1) or clip has; their sum is R.

        Returns:
            `float[I, K, Dv]`, of equal length whatever the number of frames.
        """
        dtype = (self.norm.weight if self.config.resampler_depth else patches).dtype
        patches = patches.to(dtype)
        if self.config.num_frame_embeddings:
            patches = patches + self.time(frames)[:, None].to(patches)
        if self.config.resampler_depth == 0:
            return patches
        longest, mask = max(frames), None
        if longest == 1:
            media = patches
        else:
            media = nn.utils.rnn.pad_sequence(patches.split(frames), batch_first=True).flatten(1, 2)  # [I, F * N, Dv]
            there = torch.arange(longest, device=patches.device) < torch.tensor(frames, device=patches.device)[:, None]
            mask = there.repeat_interleave(patches.shape[1], dim=1)
            mask = F.pad(mask, (0, self.config.num_latents), value=True)[:, None, None]
        latents = self.latents.expand(len(frames), -1, -1).to(media.dtype)
        for layer in self.layers:
            latents = layer(latents, media, mask)
        return self.norm(latents)

    def time(self, frames: list[int]) -> torch.Tensor:
        """`float[R, Dv]`, the embedding of every frame's place in its clip."""
        table, rows = self.frame_embeddings, {}
        for count in set(frames):
            rows[count] = table[:count]
            if count > len(table):
                stretched = F.interpolate(table.float().T[None], size=count, mode="linear", align_corners=True)
                rows[count] = stretched[0].T.to(table.dtype)
        return torch.cat([rows[count] for count in frames])


# ---------------------------------------------------------------------------------------------------------------------
# Blocks inside the language model
# ---------------------------------------------------------------------------------------------------------------------


class FlamingoMedia(NamedTuple):
    """
    The carry: what later tokens need of the images so far.

    keys, values: for every block, `float[B, H, M * K, D]`.
    order (`int[B, M]`): the number of each image in its row, from 1; 0 where a row has fewer images than others.
    seen (`int[B]`): how many images each row has had.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    order: torch.Tensor
    seen: torch.Tensor


class CachedPrefix(NamedTuple):
    """A carry for a prompt whose beginning `int[B, P]` lies in the cache already. The images of the prefix come along
    with those of the rest."""

    input_ids: torch.Tensor


class MediaStep(NamedTuple):
    """What the layers are given in one forward: `fusion`, which runs a block, and what the blocks look at, `keys` and
    `values` as in the carry, `mask` `bool[B, 1, T, M * K]`, and `sees` `bool[B, T, 1]`, true for tokens that see an
    image. Without any image there is `fusion` alone."""

    fusion: Callable
    keys: tuple[torch.Tensor, ...] = ()
    values: tuple[torch.Tensor, ...] = ()
    mask: torch.Tensor | None = None
    sees: torch.Tensor | None = None

    def enter(self, position: int, states: torch.Tensor) -> torch.Tensor:
        """Runs a block on `float[B, T, Dt]`; see `enter_layers`."""
        return self.fusion(position, states, self)


def media_mask(time: torch.Tensor, order: torch.Tensor, only_immediate: bool) -> torch.Tensor:
    """
    Which tokens see which images.

    Args:
        time (`int[B, T]`): how many images of its row came up to a token, its own placeholder included.
        order (`int[B, M]`): the number of each image in its row, from 1; 0 for none.
        only_immediate: whether a token sees the last of them alone.

    Returns:
        `bool[B, T, M]`
    """
    time, order = time[:, :, None], order[:, None, :]
    return (order > 0) & (order == time if only_immediate else order <= time)


def documents_ended(placeholders: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """
    Which tokens follow an end of sequence, with no image since.

    Args:
        placeholders, ends (`bool[B, T]`): true at image tokens, and at tokens that end a sequence.

    Returns:
        `bool[B, T]`
    """
    place = torch.arange(1, ends.shape[1] + 1, device=ends.device)
    last_end = F.pad((place * ends).cummax(dim=1).values, (1, 0))[:, :-1]  # before a token, 0 for none
    return last_end > (place * placeholders).cummax(dim=1).values


def block_norm(config: ZooFlamingoConfig, width: int) -> nn.Module:
    """The norm of the blocks, for vectors of this width."""
    norm = nn.LayerNorm if config.cross_attention_norm == "layer_norm" else nn.RMSNorm
    return norm(width, eps=config.cross_attention_norm_eps)


class MediaProjection(nn.Module):
    """
    Keys and values of images for one block.

    A module of its own, because it is called at another time than the block: sharded training gathers the weights of
    a module when that module is called.
    """

    def __init__(self, config: ZooFlamingoConfig):
        super().__init__()
        self.head_dim = config.cross_attention_head_dim
        inner = config.cross_attention_num_heads * self.head_dim
        self.key = nn.Linear(config.media_width, inner, bias=False)
        self.value = nn.Linear(config.media_width, inner, bias=False)
        self.key_norm = block_norm(config, self.head_dim) if config.cross_attention_qk_norm else nn.Identity()

    def forward(self, media: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`float[B, S, Dv]` to keys and values `float[B, H, S, D]`."""
        key, value = (split_heads(states, self.head_dim) for states in (self.key(media), self.value(media)))
        return self.key_norm(key), value


class FlamingoBlock(GradientCheckpointingLayer):
    """Text looks at images, then passes a feed-forward; each is added through a tanh gate that starts at zero."""

    def __init__(self, config: ZooFlamingoConfig):
        super().__init__()
        self.config = config
        width, head_dim = config.text_config.hidden_size, config.cross_attention_head_dim
        inner = config.cross_attention_num_heads * head_dim
        size = config.feed_forward_size or 4 * width
        gates = 1 if config.gate_type == "scalar" else width
        self.attention_norm = block_norm(config, width)
        self.query = nn.Linear(width, inner, bias=False)
        self.media = MediaProjection(config)
        self.output = nn.Linear(inner, width, bias=False)
        self.query_norm = block_norm(config, head_dim) if config.cross_attention_qk_norm else nn.Identity()
        self.attention_gate = nn.Parameter(torch.empty(gates))
        self.feed_forward_norm = block_norm(config, width)
        self.feed_forward_in = nn.Linear(width, size, bias=False)
        if config.gated_feed_forward:
            self.feed_forward_gate_in = nn.Linear(width, size, bias=False)
        self.act = ACT2FN[config.feed_forward_act]
        self.feed_forward_out = nn.Linear(size, width, bias=False)
        self.feed_forward_gate = nn.Parameter(torch.empty(gates))

    def feed_forward(self, states: torch.Tensor) -> torch.Tensor:
        normed = self.feed_forward_norm(states)
        inner = self.feed_forward_in(normed)
        if self.config.gated_feed_forward:
            inner = self.act(self.feed_forward_gate_in(normed)) * inner
        else:
            inner = self.act(inner)
        return states + self.feed_forward_gate.tanh() * self.feed_forward_out(inner)

    def forward(
        self,
        states: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        mask: torch.Tensor | None,
        sees: torch.Tensor | None,
    ) -> torch.Tensor:
        """`float[B, T, Dt]` to the same, with what this block sees in `key` and `value`; see `MediaStep`."""
        if key is None:
            return self.feed_forward(states) if self.config.feed_forward_without_media else states
        query = self.query_norm(
            split_heads(self.query(self.attention_norm(states)), self.config.cross_attention_head_dim)
        )
        attended = attend(query, key, value, mask, implementation=self.config._attn_implementation)
        attended = self.output(attended).masked_fill(~sees, 0.0)
        fused = self.feed_forward(states + self.attention_gate.tanh() * attended)
        return fused if self.config.feed_forward_without_media else torch.where(sees, fused, states)


class FlamingoFusion(nn.Module):
    """The blocks, in the order of the layers that they stand before."""

    def __init__(self, config: ZooFlamingoConfig):
        super().__init__()
        self.blocks = nn.ModuleList(FlamingoBlock(config) for _ in config.gated_layers)

    def look_at(self, media: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """`float[B, S, Dv]` to the keys and the values of every block."""
        pairs = [block.media(media) for block in self.blocks]
        return tuple(key for key, _ in pairs), tuple(value for _, value in pairs)

    def forward(self, position: int, states: torch.Tensor, media: MediaStep) -> torch.Tensor:
        """Runs one block on `float[B, T, Dt]`."""
        if not media.keys:
            return self.blocks[position](states, None, None, None, None)
        return self.blocks[position](states, media.keys[position], media.values[position], media.mask, media.sees)


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


class ZooFlamingoModel(ZooModel):
    """Vision tower, resampler, language model, and blocks before some of its layers."""

    config: ZooFlamingoConfig
    query_inputs = ("image_attention_mask",)
    _no_split_modules = ["PerceiverLayer", "FlamingoBlock", "MediaProjection"]

    def __init__(self, config: ZooFlamingoConfig):
        super().__init__(config)
        enter_layers(self.language_model, "media", {layer: place for place, layer in enumerate(config.gated_layers)})

    @property
    def places_features(self) -> bool:
        return False

    @property
    def keeps_text(self) -> bool:
        return not self.config.feed_forward_without_media

    def build_connector(self, config: ZooFlamingoConfig) -> None:
        self.connector = PerceiverResampler(config)
        self.fusion = FlamingoFusion(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, PerceiverResampler):
            if self.config.resampler_depth:
                init.normal_(module.latents, mean=0.0, std=1.0)
            if self.config.num_frame_embeddings:
                init.normal_(module.frame_embeddings, mean=0.0, std=0.02)
        elif isinstance(module, FlamingoBlock):
            init.constant_(module.attention_gate, self.config.gate_init)
            init.constant_(module.feed_forward_gate, self.config.gate_init)

    def fit_images(self, vision_inputs, query_inputs, input_ids, inputs_embeds) -> dict[str, torch.Tensor]:
        """
        As in the frame; of `pixel_values` float[B, M, C, H, W] each row's first images are kept, as many as it has
        image tokens.

        Raises:
            ValueError: a row has fewer images than image tokens, or more that are not blank although no
                `image_attention_mask` says that no token sees them.
        """
        pixels = vision_inputs["pixel_values"]
        if pixels.ndim != 5:
            return vision_inputs
        mask = self.placeholder_mask(input_ids, inputs_embeds)  # bool[B, T]
        if "image_grid_thw" in vision_inputs:
            raise ValueError(
                f"pixel_values {list(pixels.shape)} are rows of images, image_grid_thw counts the frames of clips, "
                "which follow each other as [R, C, H, W]: they belong to different batches."
            )
        if len(pixels) != len(mask):
            raise ValueError(
                f"pixel_values {list(pixels.shape)} holds {len(pixels)} rows of images, the text has {len(mask)} "
                "rows: they belong to different batches."
            )
        counts = mask.sum(dim=1).to(pixels.device)
        kept = torch.arange(pixels.shape[1], device=pixels.device) < counts[:, None]  # bool[B, M]
        for row, count in enumerate(counts.tolist()):
            if count > pixels.shape[1]:
                raise ValueError(
                    f"Row {row} has {count} image tokens, pixel_values {list(pixels.shape)} at most {pixels.shape[1]} "
                    "images a row: images are missing, or the text is of another batch."
                )
            if "image_attention_mask" not in query_inputs and pixels[row, count:].any():
                raise ValueError(
                    f"Row {row} has {count} image tokens, but of its {pixels.shape[1]} images more are not blank: was "
                    "the text truncated, or made without the processor?"
                )
        return {**vision_inputs, "pixel_values": pixels[kept]}

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, image_grid_thw: torch.LongTensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """
        Images and clips to latents.

        Args:
            pixel_values (`float[R, C, H, W]`): images, and the frames of clips, one after the other.
            image_grid_thw (`int[I, 3]`):
                For each image or clip its number of frames, 1, and 1; without it every row of pixels is an image.

        Returns:
            The tower's output with `pooler_output`: one `float[K, Dv]` for each image or clip.
        """
        frames = [1] * len(pixel_values) if image_grid_thw is None else self._frames(pixel_values, image_grid_thw)
        outputs, patches = self.see(pixel_values, **kwargs)
        outputs.pooler_output = list(self.connector(patches, frames))
        return outputs

    def _frames(self, pixel_values: torch.Tensor, image_grid_thw: torch.LongTensor) -> list[int]:
        grid = torch.as_tensor(image_grid_thw)
        if grid.ndim != 2 or grid.shape[1] != 3 or (grid[:, 1:] != 1).any() or (grid[:, 0] < 1).any():
            raise ValueError(
                f"image_grid_thw must hold [frames, 1, 1] for each image or clip, got {grid.tolist()}: was this batch "
                "made by the processor of another model?"
            )
        frames = grid[:, 0].tolist()
        if sum(frames) != len(pixel_values):
            raise ValueError(
                f"image_grid_thw counts {sum(frames)} frames, pixel_values holds {len(pixel_values)}: frames and grid "
                "belong to different batches."
            )
        if max(frames) > 1 and self.config.resampler_depth == 0:
            raise ValueError("A model without a resampler (resampler_depth=0) takes images, not clips.")
        return frames

    def placeholders_of(self, features: list[torch.Tensor], vision_inputs: dict[str, torch.Tensor]) -> list[int]:
        return [1] * len(features)

    def fuse(
        self, inputs_embeds: torch.Tensor, features: list[torch.Tensor] | None, context: FuseContext
    ) -> tuple[dict[str, Any], FlamingoMedia | None]:
        """
        Hands images to the blocks; embeddings stay as they are, those of placeholders too.

        The carry counts only beside a cache: without one every forward starts with the first token.
        """
        carry = None if context.past_key_values is None else context.carry
        prefix = carry.input_ids if isinstance(carry, CachedPrefix) else None
        carry = carry if isinstance(carry, FlamingoMedia) else None
        if features is None and carry is None:
            hint = context.query_inputs.get("image_attention_mask")
            if hint is not None and not torch.compiler.is_compiling() and hint.any():
                raise ValueError(
                    "image_attention_mask lets tokens see images, but there are none: pixel_values is missing, or "
                    "beside a cache the carry of the step before."
                )
            return {"inputs_embeds": inputs_embeds, "media": MediaStep(self.fusion.__call__)}, None
        rows, length = inputs_embeds.shape[:2]
        if features is None:
            time = carry.seen[:, None].expand(rows, length)
            return self._step(inputs_embeds, self._under_mask(time, carry, None, None, context), carry)
        mask = self.placeholder_mask(context.input_ids, inputs_embeds).to(inputs_embeds.device)  # bool[B, T]
        if prefix is not None:
            mask = torch.cat(((prefix == self.config.image_token_id).to(mask.device), mask), dim=1)
        expected = self.placeholders_of(features, context.vision_inputs)
        self.check_placeholders(mask, expected, whole_rows=context.past_key_values is None or prefix is not None)
        counts, time = mask.sum(dim=1), mask.cumsum(dim=1)[:, -length:]  # int[B], int[B, T]
        slots = len(features) if torch.compiler.is_compiling() else int(counts.max())
        place = torch.arange(slots, device=mask.device)
        there = place < counts[:, None]
        index = torch.where(there, (counts.cumsum(0) - counts)[:, None] + place, 0)  # int[B, M]
        order = torch.where(there, place + 1, 0)
        new = self._remember(inputs_embeds, features, index, order, counts)
        if carry is not None:
            time = time + carry.seen[:, None]
            new = FlamingoMedia(
                tuple(torch.cat(pair, dim=2) for pair in zip(carry.keys, new.keys, strict=True)),
                tuple(torch.cat(pair, dim=2) for pair in zip(carry.values, new.values, strict=True)),
                torch.cat((carry.order, torch.where(there, order + carry.seen[:, None], 0)), dim=1),
                carry.seen + new.seen,
            )
        return self._step(inputs_embeds, self._under_mask(time, carry, mask, prefix, context), new)

    def _under_mask(
        self,
        time: torch.Tensor,
        carry: FlamingoMedia | None,
        placeholders: torch.Tensor | None,
        prefix: torch.Tensor | None,
        context: FuseContext,
    ) -> torch.Tensor:
        """
        The time of every token, `int[B, T]`, under `image_attention_mask`, if there is one: 0 where it lets a token
        see nothing after an end of sequence. Else it must say what the times say.

        The last row of a mask that is shorter than the text holds on, as it does for tokens that are generated; of a
        longer one the end counts. Its columns are the images of each row from the first one on. What padding sees is
        not looked at.

        Args:
            time (`int[B, T]`): see `media_mask`.
            carry: the images before the first of these tokens, if any.
            placeholders (`bool[B, P + T]`): where images are, with the prefix; `None` without new images.
            prefix (`int[B, P]`): the tokens before these that are in the cache, where its images come with these.

        Raises:
            ValueError: the mask lets a token see other images than its image tokens do.
        """
        mask = context.query_inputs.get("image_attention_mask")
        if mask is None:
            return time
        rows, length = time.shape
        if mask.ndim != 3 or len(mask) != rows:
            raise ValueError(
                f"image_attention_mask has shape {list(mask.shape)}, the text is {rows} rows of {length} tokens: "
                "expected [B, T, M]."
            )
        ended, whole = torch.zeros_like(time, dtype=torch.bool), length
        if placeholders is not None and context.input_ids is not None:
            ids, whole = context.input_ids.to(time.device), placeholders.shape[1]
            ids = ids if prefix is None else torch.cat((prefix.to(ids), ids), dim=1)
            end = self.config.text_config.eos_token_id
            ends = torch.isin(ids, torch.tensor([] if end is None else end, dtype=ids.dtype, device=ids.device))
            ended = documents_ended(placeholders, ends)[:, -length:]
        if carry is not None:  # its document may have ended before, and no image has come since
            ended = ended | ((carry.order == 0).all(dim=1, keepdim=True) & (time == carry.seen[:, None]))
        mask = mask.to(time.device).bool()
        mask = torch.cat((mask, mask[:, -1:].expand(-1, max(0, whole - mask.shape[1]), -1)), dim=1)[:, -length:]
        time = time.masked_fill(ended & ~mask.any(dim=-1), 0)
        if not torch.compiler.is_compiling():
            self._check_media_mask(mask, time, context.attention_mask)
        return time

    def _check_media_mask(self, mask: torch.Tensor, time: torch.Tensor, attention_mask: torch.Tensor | None) -> None:
        """Raises `ValueError` unless `bool[B, T, M]` is what image tokens say that came up to each token, `int[B, T]`;
        see `_under_mask`."""
        slots = max(mask.shape[2], int(time.max()))
        order = torch.arange(1, slots + 1, device=time.device).expand(len(time), -1)
        expected = media_mask(time, order, self.config.only_immediate_media)
        found = F.pad(mask, (0, slots - mask.shape[2]))
        wrong = (found != expected).any(dim=-1)
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            wrong &= attention_mask[:, -time.shape[1] :].to(wrong.device).bool()
        if wrong.any():
            row, token = wrong.nonzero()[0].tolist()
            sees, should = (which[row, token].nonzero().flatten().tolist() for which in (found, expected))
            raise ValueError(
                f"image_attention_mask lets token {token} of row {row} see the images {sees} of its row; by its image "
                f"tokens it sees {should}: was the mask made for another text, or for a model that looks at images "
                "otherwise?"
            )

    def fuse_nothing(self, inputs_embeds, blank, context):
        rows = len(inputs_embeds)
        nothing = torch.zeros(rows, 1, dtype=torch.long, device=inputs_embeds.device)
        media = self._remember(inputs_embeds, blank, nothing, nothing, nothing[:, 0])
        return self._step(inputs_embeds, nothing.expand(rows, inputs_embeds.shape[1]), media)

    def _remember(self, inputs_embeds, features, index, order, seen) -> FlamingoMedia:
        """Keys and values of the images `index` int[B, M] of `features`, for every block."""
        media = torch.stack(list(features)).to(inputs_embeds.device, inputs_embeds.dtype)[index]  # [B, M, K, Dv]
        keys, values = self.fusion.look_at(media.flatten(1, 2))
        return FlamingoMedia(keys, values, order, seen)

    def _step(self, inputs_embeds, time, media: FlamingoMedia) -> tuple[dict[str, Any], FlamingoMedia]:
        visible = media_mask(time, media.order, self.config.only_immediate_media)  # bool[B, T, M]
        sees = visible.any(dim=-1, keepdim=True)
        # Tokens that see nothing look at everything, so that no softmax is empty; what they find is thrown away.
        mask = (visible | ~sees).repeat_interleave(media.keys[0].shape[2] // visible.shape[2], dim=-1)[:, None]
        step = MediaStep(self.fusion.__call__, media.keys, media.values, mask, sees)
        # Where the last token sees nothing though there are images, an end of sequence hides them from the next too.
        media = media._replace(order=media.order.masked_fill(time[:, -1:] == 0, 0))
        return {"inputs_embeds": inputs_embeds, "media": step}, self._kept(media)

    def _kept(self, media: FlamingoMedia) -> FlamingoMedia:
        """What later tokens can see: where only the last image counts, that one alone."""
        slots = media.order.shape[1]
        if not self.config.only_immediate_media or slots == 1:
            return media
        last = media.order.argmax(dim=1)  # int[B]
        rows = torch.arange(len(last), device=last.device)

        def pick(states: torch.Tensor) -> torch.Tensor:
            return states.unflatten(2, (slots, -1))[rows, :, last]  # float[B, H, K, D]

        keys, values = tuple(map(pick, media.keys)), tuple(map(pick, media.values))
        return FlamingoMedia(keys, values, media.order[rows, last][:, None], media.seen)


class ZooFlamingoForConditionalGeneration(ZooForConditionalGeneration, GenerationMixin):
    """
    Flamingo with the language model's head.

    The cache holds the language model's keys and values, the carry those of the images. `generate` keeps both. A loop
    of one's own hands `carry=outputs.carry` to the next step beside `past_key_values`; without it the new tokens see
    no image. To go on from the cache of an earlier `generate`, give it all tokens and all images, the earlier ones
    too.
    """

    config: ZooFlamingoConfig
    base_model_class = ZooFlamingoModel

    def prepare_inputs_for_generation(self, input_ids, inputs_embeds=None, is_first_iteration=False, **kwargs):
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        ids = model_inputs.get("input_ids")
        if is_first_iteration and model_inputs.get("carry") is None and ids is not None:
            cached = input_ids.shape[1] - ids.shape[1]
            if cached > 0:  # the answer goes on from a cache: its images are needed again, their tokens are not
                prefix = CachedPrefix(input_ids[:, :cached])
                placeholders = int((prefix.input_ids == self.config.image_token_id).sum())
                if not holds_images(model_inputs) and placeholders:
                    raise ValueError(
                        f"The cached beginning of the prompt holds {placeholders} image tokens, but "
                        "images are missing: the cache keeps the language model's keys and values alone, so give all "
                        "images of the prompt again, as pixel_values or mm_encoder_outputs."
                    )
                model_inputs["carry"] = prefix
        return model_inputs


# ---------------------------------------------------------------------------------------------------------------------
# Processor
# ---------------------------------------------------------------------------------------------------------------------


class ZooFlamingoProcessor(ZooProcessor):
    """
    Images, clips and text to a batch for Flamingo: one placeholder for an image or a clip.

    num_frames (`int`): how many frames of a video are sampled, where a call says neither `num_frames` nor `fps`.

    With clips `pixel_values` holds the frames of all of them, and `image_grid_thw` says how many belong together.
    """

    takes_clips = True

    def __init__(self, image_processor=None, tokenizer=None, num_frames: int = 8, chat_template=None):
        if num_frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {num_frames}.")
        self.num_frames = num_frames
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, "image_grid_thw"]

    @classmethod
    def fields_from(cls, config: ZooFlamingoConfig) -> dict:
        return {"num_frames": config.num_frame_embeddings or 8}

    @property
    def clip_options(self) -> dict[str, Any]:
        """Every frame has a learned embedding of its place, as far as the model has them."""
        return {"num_frames": self.num_frames}

    def num_image_tokens(self, height: int, width: int, **images_kwargs) -> int:
        return 1

    def _process_images(self, images, **kwargs) -> tuple[BatchFeature, list[str]]:
        items = flat_items(images)
        if not any(isinstance(item, Clip) for item in items):
            return super()._process_images(images, **kwargs)
        frames = [item.frames if isinstance(item, Clip) else [item] for item in items]
        processed = self.image_processor([frame for clip in frames for frame in clip], **kwargs)
        processed["image_grid_thw"] = torch.tensor([[len(clip), 1, 1] for clip in frames])
        return processed, [self.image_text(1)] * len(items)


publish(ZooFlamingoConfig)
