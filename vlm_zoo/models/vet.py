"""VET, the visual embedding table: patches become probabilities over visual words, and tokens their mean embedding.

Papers: Ovis (huggingface.co/papers/2405.20797), Ovis 2.5 (huggingface.co/papers/2508.11737); the code of Ovis 1.6 and
2, and `Ovis2` of transformers.

Paper map:
    section 3.2, equations 1 to 3, the visual head     `VetConnector.tokenize`; `VisualHead`
    section 3.2, equations 4 and 5, the embedding      `VisualEmbeddingTable`, an expectation over its rows
    Ovis 1.0, indicator tokens                         `num_visual_indicators=2`: around the image
    Ovis 1.6 and 2, neighbours and tiles               `hidden_stride`, `max_tiles`, `num_visual_indicators=5`
    Ovis 2, one word a token                           `tokenize_function="st_argmax"` (or `"gumbel_argmax"`)
    Ovis 2.5 section 2.1, native resolution            `native_resolution`; `num_visual_indicators=4`

Deviations: indicators stand at placeholders of their own image, not at ids of the language model's vocabulary. Gumbel
noise is drawn in training alone, so that an image means one thing when it is asked about. The features' last norm,
which Ovis 2 leaves out and transformers' `Ovis2` applies, is `tower_norm`. With one word a token, the word is looked
up, where Ovis multiplies the table by ones and zeros that are rounded. The gradient of `st_argmax` passes the softmax,
as in transformers; in the code of Ovis the scores themselves stand in for the probabilities.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from .configuration_vlm import ZooConfig, publish
from .geometry_vlm import covering_grid
from .layers import grid_places
from .modeling_vlm import ZooForConditionalGeneration, ZooModel, holds_images
from .native_vlm import (
    blank_patches,
    build_native_tower,
    check_native_config,
    feature_width,
    is_native,
    look_natively,
    native_image_fields,
)
from .parts_vlm import build_part, cut_tower, pair
from .processing_vlm import ZooProcessor


# How many probabilities, tokens times words, are computed at once: 2^26 are 256 MiB in float32, and training keeps
# several of that size until the backward pass. Above that, tokens are embedded chunk by chunk, and training computes a
# chunk again instead of keeping it. Where nothing is kept, chunks are an eighth of that, which is as fast.
CHUNK_ENTRIES = 2**26

# Words whose scores a CPU computes at once where nothing is kept; see `VisualHead`.
BLOCK_WORDS = 512


@strict
class ZooVetConfig(ZooConfig):
    r"""
    Configuration of the visual embedding table; the fields that all architectures share are those of `ZooConfig`.

    visual_vocab_size (`int`): rows of the table, visual words and indicators.
    num_visual_indicators (`int`):
        Its last rows, which no patch becomes: 5 mark start, end of the whole picture, columns, rows and end of an
        image (Ovis 1.6 and 2), 4 start and end of an image, and of a clip (Ovis 2.5), 2 its start and end (Ovis 1), 0
        nothing. A clip is what has several patches in time.
    indicator_token_ids (`list[int]`, *optional*):
        Ids that may stand for the indicators in `input_ids`, in their order, as transformers' Ovis2 writes images.
        Where they do, the image token stands for patches alone: views fill its places one after the other, and each
        of these ids is looked up in the table. `None` where indicators are only placeholders of their image, as the
        zoo's processor writes them in any case.
    hidden_stride (`int`):
        Edge of the square of neighbouring patches that become one token, side by side in its features. Patches are
        filled up with zeros at the bottom and at the right.
    tokenize_function (`"softmax"`, `"st_argmax"` or `"gumbel_argmax"`):
        A token is the mean of all words, weighted by their probability; or the most probable word, with the gradient
        of that mean; or in training a sampled word, with that gradient.
    tau (`float`): temperature of `"gumbel_argmax"`.
    head_layer_norm (`bool`): a layer norm over the scores of all words; the paper's equation has none, its code has.
    head_layer_norm_eps (`float`): of it.
    tower_norm (`bool`):
        Features are the tower's `last_hidden_state`, which most towers norm, instead of a hidden state. Then
        `vision_feature_layer` is the last one.
    max_tiles (`int`, *optional*):
        Into how many tiles an image is cut at most, by the smallest grid that covers it. `None` gives every image one
        view.
    native_resolution (`bool`):
        Whether images keep their own size, as they must with a tower that takes patches, not pictures (Ovis 2.5).
    position_interpolation (`"bicubic"`, `"bilinear"` or `None`):
        How a tower of patches interpolates its table of positions at native resolution, instead of by its own rule.
        Ovis 2.5 has Qwen3-VL's tower with bicubic positions.
    min_image_tokens, max_image_tokens (`int`): bounds of an image at native resolution, which is resized to keep them.
    max_clip_tokens (`int`): bound of a clip, all its frames together.
    """

    model_type = "zoo_vet"
    takes_native_towers = True

    vision_feature_layer: int | list[int] = -1
    visual_vocab_size: int = 16384
    num_visual_indicators: int = 5
    indicator_token_ids: list[int] | None = None
    hidden_stride: int = 1
    tokenize_function: Literal["softmax", "gumbel_argmax", "st_argmax"] = "softmax"
    tau: float = 1.0
    head_layer_norm: bool = True
    head_layer_norm_eps: float = 1e-5
    tower_norm: bool = False
    max_tiles: int | None = None
    native_resolution: bool = False
    position_interpolation: Literal["bicubic", "bilinear"] | None = None
    min_image_tokens: int = 4
    max_image_tokens: int = 3136
    max_clip_tokens: int = 16384

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.native_resolution = self.native_resolution or is_native(self.vision_config)

    def validate_table(self):
        """Part of `@strict` validation."""
        if self.num_visual_indicators not in (0, 2, 4, 5):
            raise ValueError(
                f"num_visual_indicators is {self.num_visual_indicators}, expected 5 (start, end of the whole picture, "
                "column, row, end), 4 (start and end of an image, of a clip), 2 (start, end) or 0."
            )
        if self.visual_vocab_size <= self.num_visual_indicators:
            raise ValueError(
                f"visual_vocab_size {self.visual_vocab_size} leaves no visual word: {self.num_visual_indicators} of "
                "its rows are indicators."
            )
        ids = self.indicator_token_ids
        if ids is not None and len({self.image_token_id, *ids}) != self.num_visual_indicators + 1:
            raise ValueError(
                f"indicator_token_ids is {ids}, expected {self.num_visual_indicators} different ids, one for each "
                f"indicator, none of them the image token ({self.image_token_id})."
            )
        if self.tau <= 0:
            raise ValueError(f"tau must be above 0, got {self.tau}.")

    def validate_tokens(self):
        """Part of `@strict` validation: every patch has its place in a token."""
        if self.hidden_stride < 1:
            raise ValueError(f"hidden_stride must be at least 1, got {self.hidden_stride}.")
        if self.hidden_stride > 1 and self.vision_feature_select_strategy == "full" and self.num_prefix_tokens:
            raise ValueError(
                f"hidden_stride {self.hidden_stride} joins neighbouring patches, but with "
                f"vision_feature_select_strategy 'full' {self.num_prefix_tokens} prefix token(s) without neighbours "
                "are among them: choose 'default'."
            )
        if self.max_tiles is not None and self.max_tiles < 1:
            raise ValueError(f"max_tiles must be at least 1, or None, got {self.max_tiles}.")
        height, width = pair(getattr(self.vision_config, "image_size", 1))
        if self.max_tiles is not None and height != width:
            raise ValueError(f"Tiles are squares, but this tower sees {height} x {width} pixels: max_tiles=None.")

    def validate_native_resolution(self):
        """Part of `@strict` validation: an image of its own size is one view, of whole squares."""
        has_table = self.native_resolution and hasattr(self.vision_config, "num_position_embeddings")
        if self.position_interpolation is not None and not has_table:
            raise ValueError(
                f"position_interpolation is {self.position_interpolation!r}, but this tower "
                f"({self.vision_config.model_type}) has no table of positions that can be interpolated in another way "
                "than its own: None."
            )
        if not self.native_resolution:
            return
        check_native_config(self, "hidden_stride")
        for name, wanted in (("max_tiles", None), ("tower_norm", False)):
            if getattr(self, name) != wanted:
                raise ValueError(f"{name} is {getattr(self, name)!r}, at native resolution it must be {wanted!r}.")

    def validate_tower_norm(self):
        """Part of `@strict` validation: the norm is that of the last layer."""
        depth = getattr(self.vision_config, "num_hidden_layers", None)
        if self.tower_norm and depth is not None and self.feature_layers != [depth]:
            raise ValueError(
                f"tower_norm takes the tower's last hidden state, vision_feature_layer is "
                f"{self.vision_feature_layer}, expected -1."
            )

    @property
    def num_visual_words(self) -> int:
        """Words that a patch can become."""
        return self.visual_vocab_size - self.num_visual_indicators

    @classmethod
    def small_fields(cls, width: int, from_scratch: bool = False) -> dict:
        return {"visual_vocab_size": 512}


# ---------------------------------------------------------------------------------------------------------------------
# Head and table
# ---------------------------------------------------------------------------------------------------------------------


class VisualHead(nn.Linear):
    """The scores of all visual words: a linear layer without bias, made for many outputs."""

    def __init__(self, in_features: int, num_words: int):
        super().__init__(in_features, num_words, bias=False)

    def forward(self, groups: torch.Tensor) -> torch.Tensor:
        """`float[N, D]` to `float[N, V]`."""
        if groups.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(groups)
        # One product into rows as long as a vocabulary takes a CPU 1.3 to 1.6 times as long as blocks side by side:
        # a row lies in pages of its own, and without indicators its length is no multiple of a cache line either.
        # In training the gradient of the blocks would be a second weight.
        scores = groups.new_empty(len(groups), self.out_features)
        blocks = zip(scores.split(BLOCK_WORDS, dim=1), self.weight.split(BLOCK_WORDS), strict=True)
        for block, words in blocks:
            block.copy_((words @ groups.t()).t())
        return scores


class _StraightThrough(torch.autograd.Function):
    """Chosen words `float[N, D]`, with the gradient that the mean of all words would give the probabilities."""

    @staticmethod
    def forward(probabilities: torch.Tensor, chosen: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return chosen.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx, gradient):
        (table,) = ctx.saved_tensors
        return gradient @ table.t(), gradient, None


class VisualEmbeddingTable(nn.Embedding):
    """The embeddings of visual words, its last rows those of indicators."""

    def forward(self, words: torch.Tensor, chosen: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            words: `int[…]`, ids to look up; or `float[…, V]`, the probabilities of all rows, of which the mean is
                taken.
            chosen (`int[…]`): beside probabilities the ids to look up, with the gradient of the mean.

        Returns:
            `float[…, Dt]`
        """
        if not words.is_floating_point():
            return super().forward(words)
        if words.shape[-1] != self.num_embeddings:
            raise ValueError(
                f"Got probabilities of {words.shape[-1]} words, the table has {self.num_embeddings} rows."
            )
        if chosen is None:
            return words @ self.weight
        return _StraightThrough.apply(words, super().forward(chosen), self.weight)


# ---------------------------------------------------------------------------------------------------------------------
# Connector
# ---------------------------------------------------------------------------------------------------------------------


def join_neighbours(patches: torch.Tensor, grid: tuple[int, int], stride: int) -> torch.Tensor:
    """
    Squares of neighbouring patches, side by side in the features; zeros fill up the last rows and columns.

    Args:
        patches (`float[P, N, D]`): row by row.
        grid: rows and columns of patches.
        stride: edge of a square.

    Returns:
        `float[P, n, D * stride²]`
    """
    if stride == 1:
        return patches
    (rows, columns), width = grid, patches.shape[-1]
    patches = patches.unflatten(1, grid)
    missing_rows, missing_columns = -rows % stride, -columns % stride
    if missing_rows or missing_columns:
        patches = nn.functional.pad(patches, (0, 0, 0, missing_columns, 0, missing_rows))
    squares = patches.unflatten(2, (-1, stride)).unflatten(1, (-1, stride)).transpose(2, 3)  # [P, r, c, s, s, D]
    return squares.flatten(1, 2).reshape(len(patches), -1, stride * stride * width)


def layout(
    grid: tuple[int, int], num_indicators: int, is_clip: bool = False
) -> list[tuple[Literal["view", "indicator"], int]]:
    """
    What an image becomes, in its order: its views, the whole picture first, and indicators by their number.

    Args:
        grid: rows and columns of tiles; (1, 1) is the whole picture alone.
        num_indicators: 0, 2, 4 or 5.
        is_clip: whether it has several frames.
    """
    tiles = math.prod(grid) if grid != (1, 1) else 0
    views = [("view", view) for view in range(1 + tiles)]
    if num_indicators == 0:
        return views
    if num_indicators in (2, 4):
        first = 2 if is_clip and num_indicators == 4 else 0
        return [("indicator", first), *views, ("indicator", first + 1)]
    start, whole, column, row, end = (("indicator", number) for number in range(5))
    pieces = [start, views[0], whole]
    for tile, view in enumerate(views[1:], start=1):
        pieces.append(view)
        if tile % grid[1]:
            pieces.append(column)
        elif tile < tiles:
            pieces.append(row)
    return [*pieces, end]


class VisualWords(NamedTuple):
    """
    The words that an image uses, one row for each of its tokens that is no indicator.

    ids (`int[n, k]`): the most probable words, best first.
    probabilities (`float[n, k]`): theirs.
    """

    ids: torch.Tensor
    probabilities: torch.Tensor


class ImageViews(NamedTuple):
    """What an image is seen as: so many views of so many tokens each, in a grid of tiles, one frame or several."""

    views: int
    tokens: int
    grid: tuple[int, int]
    is_clip: bool = False


class VetConnector(nn.Module):
    """Patches to visual words to tokens."""

    def __init__(self, config: ZooVetConfig, width: int):
        super().__init__()
        self.config = config
        width_in = width * len(config.feature_layers) * config.hidden_stride**2
        self.head = VisualHead(width_in, config.num_visual_words)
        if config.head_layer_norm:
            self.norm = nn.LayerNorm(config.num_visual_words, eps=config.head_layer_norm_eps)
        self.table = VisualEmbeddingTable(config.visual_vocab_size, config.text_config.hidden_size)

    def join(self, patches: torch.Tensor) -> torch.Tensor:
        """`float[P, N, Dv]`, patches of whole views, to `float[P, n, D]`, the features of their tokens."""
        vision = self.config.vision_config
        grid = [edge // patch for edge, patch in zip(pair(vision.image_size), pair(vision.patch_size), strict=True)]
        return join_neighbours(patches, tuple(grid), self.config.hidden_stride)

    def scores(self, groups: torch.Tensor) -> torch.Tensor:
        """`float[n, D]`, the features of a token, to the scores of all words `float[n, V]`."""
        scores = self.head(groups.to(self.table.weight.dtype))
        return self.norm(scores) if self.config.head_layer_norm else scores

    def tokenize(self, groups: torch.Tensor) -> torch.Tensor:
        """`float[n, D]`, the features of a token, to `float[n, V]`, the probabilities of all words."""
        return self.scores(groups).softmax(dim=-1)

    def forward(self, groups: torch.Tensor) -> torch.Tensor:
        """`float[n, D]`, the features of a token, to its embedding `float[n, Dt]`."""
        wanted = groups.requires_grad or any(parameter.requires_grad for parameter in self.parameters())
        if not (wanted and torch.is_grad_enabled()):
            return torch.cat([self.embed_chunk(chunk) for chunk in self.chunks(groups)])
        chunks = self.chunks(groups, CHUNK_ENTRIES)
        if len(chunks) == 1:
            return self.embed_chunk(groups)
        return torch.cat([checkpoint(self.embed_chunk, chunk, use_reentrant=False) for chunk in chunks])

    def chunks(self, groups: torch.Tensor, entries: int | None = None) -> tuple[torch.Tensor, ...]:
        """The tokens in parts of so many probabilities, by default as many as suit where nothing is kept."""
        return groups.split(max(1, (entries or CHUNK_ENTRIES // 8) // self.config.num_visual_words))

    def embed_chunk(self, groups: torch.Tensor) -> torch.Tensor:
        """`forward` in one piece."""
        scores, ids = self.scores(groups), None
        if self.config.tokenize_function == "gumbel_argmax" and self.training:
            noise = -torch.empty_like(scores).exponential_().log()
            scores = (scores + noise) / self.config.tau
        if self.config.tokenize_function != "softmax":
            ids = scores.argmax(dim=-1)
            if not scores.requires_grad:
                return self.table(ids)
        # Indicators have no probability. To cut the table instead would make the gradient of the cut a second table.
        indicators = scores.new_full((len(scores), self.config.num_visual_indicators), float("-inf"))
        return self.table(torch.cat((scores, indicators), dim=-1).softmax(dim=-1), ids)

    def assemble(self, views: list[torch.Tensor], images: list[ImageViews]) -> list[torch.Tensor]:
        """
        The tokens of images, with indicators.

        Args:
            views: for each image `float[P, n, Dt]`, the whole picture, then its tiles row by row.
            images: what each is seen as.

        Returns:
            `float[K, Dt]` for each image.
        """
        first, count = self.config.num_visual_words, self.config.num_visual_indicators
        # Once for all images: every look-up has a gradient as large as the table
        rows = self.table(torch.arange(first, first + count, device=self.table.weight.device))
        pieces = {"indicator": rows.split(1)}
        tokens = []
        for own, image in zip(views, images, strict=True):
            pieces["view"] = own
            tokens.append(
                torch.cat([pieces[kind][number] for kind, number in layout(image.grid, count, image.is_clip)])
            )
        return tokens


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


class ZooVetModel(ZooModel):
    """Vision tower, visual head and table, language model."""

    config: ZooVetConfig

    def build_tower(self, config: ZooVetConfig) -> None:
        if config.native_resolution:
            self.vision_tower = build_native_tower(config.vision_config, config.feature_layers)
            return
        self.vision_tower = build_part(config.vision_config, "vision tower")
        cut_tower(self.vision_tower, config.feature_layers, last_hidden_state=config.tower_norm)

    def build_connector(self, config: ZooVetConfig) -> None:
        self.connector = VetConnector(config, feature_width(self.vision_tower))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, VisualEmbeddingTable):
            # As Ovis does: tokens are means of many words, and those are short. Of V words about e / V of the variance
            # is left, which for the usual V is that of a language model's embeddings.
            init.normal_(module.weight, mean=0.0, std=1.0)

    def see(self, pixel_values: torch.Tensor, **kwargs) -> tuple[BaseModelOutputWithPooling, torch.Tensor]:
        """As in the frame; with `tower_norm` the features are the tower's `last_hidden_state`."""
        outputs, patches = super().see(pixel_values, **kwargs)
        if self.config.tower_norm:
            patches = outputs.last_hidden_state
            if self.config.vision_feature_select_strategy == "default":
                patches = patches[:, self.config.num_prefix_tokens :]
        return outputs, patches

    def tile_grids(self, pixel_values: torch.Tensor, image_sizes: torch.LongTensor | None) -> list[tuple[int, int]]:
        """
        Rows and columns of tiles of every image, (1, 1) where there is one view.

        Raises:
            ValueError: pixels or sizes that were not made for this config.
        """
        limit = self.config.max_tiles
        if limit is None:
            if pixel_values.ndim != 4:
                raise ValueError(
                    f"pixel_values has {pixel_values.ndim} dimensions, expected 4 [I, C, H, W]: this model has no "
                    "max_tiles, were the images tiled by the processor of another model?"
                )
            return [(1, 1)] * len(pixel_values)
        if image_sizes is None or pixel_values.ndim != 5:
            raise ValueError(
                f"Tiles (max_tiles={limit}) need pixel_values [I, P, C, H, W] and image_sizes [I, 2]; got "
                f"{list(pixel_values.shape)} and {None if image_sizes is None else 'sizes'}: was this batch made by "
                "the processor of another model?"
            )
        sizes = torch.as_tensor(image_sizes).tolist()
        if not sizes or any(len(size) != 2 or min(size) < 1 for size in sizes):
            raise ValueError(f"image_sizes must hold a height and a width of at least 1 for each image, got {sizes}.")
        tile = pair(self.config.vision_config.image_size)[0]
        grids = [covering_grid(tuple(size), tile, limit) for size in sizes]
        counts = [num_views(grid) for grid in grids]
        if len(counts) != len(pixel_values) or max(counts) > pixel_values.shape[1]:
            raise ValueError(
                f"image_sizes asks for {counts} views, pixel_values holds {len(pixel_values)} images of up to "
                f"{pixel_values.shape[1]} views: processor and model differ in max_tiles."
            )
        return grids

    def views(self, pixel_values: torch.Tensor, grids: list[tuple[int, int]]) -> torch.Tensor:
        """The views of all images one after the other, `float[P, C, H, W]`, without padding."""
        if self.config.max_tiles is None:
            return pixel_values
        return torch.cat([views[: num_views(grid)] for views, grid in zip(pixel_values, grids, strict=True)])

    def look(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.LongTensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        **kwargs,
    ) -> tuple[BaseModelOutputWithPooling, torch.Tensor, list[ImageViews]]:
        """
        Sees images, which are given as `get_image_features` takes them.

        Returns:
            The tower's output, the features `float[n, D]` of all tokens that are no indicators, and whose they are.
        """
        if not self.config.native_resolution:
            if image_grid_thw is not None:
                raise ValueError(
                    "image_grid_thw is for native resolution, which this model has not: was this batch made by the "
                    "processor of another model?"
                )
            grids = self.tile_grids(pixel_values, image_sizes)
            outputs, patches = self.see(self.views(pixel_values, grids), **kwargs)
            groups = self.connector.join(patches)  # [P, n, D]
            return (
                outputs,
                groups.flatten(0, 1),
                [ImageViews(num_views(grid), groups.shape[1], grid) for grid in grids],
            )
        config = self.config
        outputs, patches, grids = look_natively(
            self,
            pixel_values,
            image_grid_thw,
            config.feature_layers,
            config.hidden_stride,
            config.position_interpolation,
            **kwargs,
        )
        groups = torch.cat(patches, dim=-1).unflatten(0, (-1, config.hidden_stride**2)).flatten(1)
        counts = [math.prod(grid) // config.hidden_stride**2 for grid in grids.tolist()]
        clips = (grids[:, 0] > 1).tolist()
        images = [ImageViews(1, count, (1, 1), clip) for count, clip in zip(counts, clips, strict=True)]
        return outputs, groups, images

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.LongTensor | None = None,
        image_grid_thw: torch.LongTensor | None = None,
        indicators: bool = True,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """
        Images to tokens.

        Args:
            pixel_values:
                `float[I, C, H, W]`; with `max_tiles` `float[I, P, C, H, W]`, padded with blank views; at native
                resolution `float[N, C * F * P * P]`, the patches of all images. Without `indicators`, views
                `float[I, C, H, W]` do beside `max_tiles` too, which makes an image of each.
            image_sizes (`int[I, 2]`): height and width of the original images; tiles need them.
            image_grid_thw (`int[I, 3]`):
                Patches of each image in time, height and width; native resolution needs them.
            indicators: whether they are among the tokens; not where `indicator_token_ids` stand for them.

        Returns:
            The tower's output with `pooler_output`: one `float[K, Dt]` for each image.
        """
        config = self.config
        if not indicators and config.max_tiles is not None and image_sizes is None and pixel_values.ndim == 4:
            size = torch.tensor(pair(config.vision_config.image_size), device=pixel_values.device)
            pixel_values, image_sizes = pixel_values[:, None], size.expand(len(pixel_values), 2)
        outputs, groups, images = self.look(pixel_values, image_sizes, image_grid_thw, **kwargs)
        tokens = self.connector(groups).split([image.views * image.tokens for image in images])
        if not indicators:
            outputs.pooler_output = list(tokens)
            return outputs
        views = [own.unflatten(0, (image.views, -1)) for own, image in zip(tokens, images, strict=True)]
        outputs.pooler_output = self.connector.assemble(views, images)
        return outputs

    def indicator_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor | None
    ) -> torch.Tensor | None:
        """`bool[B, T, indicators]`, true where an id of `indicator_token_ids` stands; without ids they are recognised
        by their embedding. `None` where the config has no such ids, or none is there."""
        if not self.config.indicator_token_ids:
            return None
        if input_ids is not None and input_ids.numel() > 0:
            mask = input_ids[..., None] == torch.tensor(self.config.indicator_token_ids, device=input_ids.device)
        else:
            own = torch.tensor(self.config.indicator_token_ids, device=inputs_embeds.device)
            mask = (inputs_embeds[..., None, :] == self.get_input_embeddings()(own)).all(-1)
        return mask if mask.any() else None

    def fit_images(self, vision_inputs, query_inputs, input_ids, inputs_embeds) -> dict[str, Any]:
        """As in the frame; images come without indicators where these have ids of their own in the text."""
        if self.indicator_mask(input_ids, inputs_embeds) is None:
            return vision_inputs
        return {**vision_inputs, "indicators": False}

    def fuse(self, inputs_embeds, features, context):
        """As in the frame; beside images, `indicator_token_ids` are looked up in the visual table, as Ovis does. In
        text alone they are words."""
        mask = None if features is None else self.indicator_mask(context.input_ids, inputs_embeds)
        lm_inputs, carry = super().fuse(inputs_embeds, features, context)
        if mask is not None:
            embeds = lm_inputs["inputs_embeds"]
            words = self.config.num_visual_words + mask.int().argmax(dim=-1).to(self.connector.table.weight.device)
            rows = self.connector.table(words).to(embeds.device, embeds.dtype)  # float[B, T, Dt]
            lm_inputs["inputs_embeds"] = torch.where(mask.any(-1, keepdim=True).to(embeds.device), rows, embeds)
        return lm_inputs, carry

    def token_places(self, vision_inputs: dict[str, torch.Tensor], fusion_outputs: Any) -> list[torch.Tensor]:
        """As in the frame: places are laid out as tokens are; prefix tokens and indicators have none."""
        config, vision = self.config, self.config.vision_config
        if config.native_resolution:
            grids = torch.as_tensor(vision_inputs["image_grid_thw"]).tolist()
            images = [((1, 1), times, (rows, columns)) for times, rows, columns in grids]
        else:
            pairs = zip(pair(vision.image_size), pair(vision.patch_size), strict=True)
            patches = tuple(edge // patch for edge, patch in pairs)
            tiles = self.tile_grids(vision_inputs["pixel_values"], vision_inputs.get("image_sizes"))
            images = [(grid, 1, patches) for grid in tiles]
        prefix = 0 if config.vision_feature_select_strategy == "default" else config.num_prefix_tokens
        nowhere = torch.tensor([[-1.0, 0.0, 0.0, 0.0, 0.0]])
        places = []
        for tiles, times, patches in images:
            pieces = []
            for kind, number in layout(tiles, config.num_visual_indicators, times > 1):
                own = grid_places(patches, config.hidden_stride, number).repeat(times, 1)
                pieces += [nowhere.expand(prefix, 5), own] if kind == "view" else [nowhere]
            places.append(torch.cat(pieces))
        return places

    @torch.no_grad()
    def visual_words(self, pixel_values: torch.Tensor, top_k: int = 1, **vision_inputs) -> list[VisualWords]:
        """
        Which words images use.

        Args:
            pixel_values, vision_inputs: as `get_image_features` takes them.
            top_k: how many words of every token.

        Returns:
            For each image the words of its tokens, view by view, the whole picture first.

        Raises:
            ValueError: more words than there are, or what `get_image_features` refuses.
        """
        if not 1 <= top_k <= self.config.num_visual_words:
            raise ValueError(f"top_k is {top_k}, expected 1 to {self.config.num_visual_words}, the visual words.")
        _, groups, images = self.look(pixel_values, **vision_inputs)
        best = [self.connector.tokenize(chunk).topk(top_k) for chunk in self.connector.chunks(groups)]
        sizes = [image.views * image.tokens for image in images]
        probabilities, ids = (torch.cat(parts).split(sizes) for parts in zip(*best, strict=True))
        return [VisualWords(*words) for words in zip(ids, probabilities, strict=True)]

    def dummy_vision_inputs(self) -> dict[str, torch.Tensor]:
        if self.config.native_resolution:
            return blank_patches(self.config.vision_config, self.config.hidden_stride, self.device, self.dtype)
        inputs = super().dummy_vision_inputs()
        if self.config.max_tiles is None:
            return inputs
        size = pair(self.config.vision_config.image_size)
        return {"pixel_values": inputs["pixel_values"][None], "image_sizes": torch.tensor([size], device=self.device)}


class ZooVetForConditionalGeneration(ZooForConditionalGeneration, GenerationMixin):
    """The visual embedding table with the language model's head."""

    config: ZooVetConfig
    base_model_class = ZooVetModel

    def _prepare_generation_config(self, *args, **kwargs):
        """As in the frame; a chunk of a prompt could hold indicators of their own ids without any of their image, and
        nothing would tell them from words."""
        generation_config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        if self.config.indicator_token_ids is not None and holds_images(model_kwargs):
            generation_config.prefill_chunk_size = None
        return generation_config, model_kwargs

    def visual_words(self, pixel_values: torch.Tensor, **kwargs) -> list[VisualWords]:
        """See the base model's `visual_words`."""
        return self.model.visual_words(pixel_values, **kwargs)


def num_views(grid: tuple[int, int]) -> int:
    """The whole picture, and its tiles where there are several."""
    return 1 if grid == (1, 1) else 1 + math.prod(grid)


# ---------------------------------------------------------------------------------------------------------------------
# Processor
# ---------------------------------------------------------------------------------------------------------------------


class ZooVetProcessor(ZooProcessor):
    r"""
    Images and text to a batch for the visual embedding table.

    patch_size (`int`, or `list[int]`): patch of the vision tower, in pixels.
    num_prefix_tokens (`int`): prefix tokens of the tower, as in the config.
    vision_feature_select_strategy (`"default"` or `"full"`): as in the config.
    hidden_stride (`int`): as in the config.
    num_visual_indicators (`int`): as in the config.

    Clips need native resolution.
    """

    takes_clips = True

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size: int = 14,
        num_prefix_tokens: int = 1,
        vision_feature_select_strategy: str = "default",
        hidden_stride: int = 1,
        num_visual_indicators: int = 5,
        chat_template=None,
    ):
        self.patch_size = patch_size
        self.num_prefix_tokens = num_prefix_tokens
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.hidden_stride = hidden_stride
        self.num_visual_indicators = num_visual_indicators
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def fields_from(cls, config: ZooVetConfig) -> dict:
        return {
            "patch_size": config.vision_config.patch_size,
            "num_prefix_tokens": config.num_prefix_tokens,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
            "hidden_stride": config.hidden_stride,
            "num_visual_indicators": config.num_visual_indicators,
        }

    @classmethod
    def image_fields_from(cls, config: ZooVetConfig) -> dict:
        if config.native_resolution:
            return native_image_fields(config, config.hidden_stride)
        return {**super().image_fields_from(config), "do_pad_to_square": True, "max_tiles": config.max_tiles}

    def num_image_tokens(self, height: int, width: int, **images_kwargs) -> int:
        if self.image_processor.merge_size is not None:
            return self.num_grid_tokens(*self.image_processor.patch_grid(height, width, **images_kwargs))
        size = self.image_processor.processed_size(height, width, **images_kwargs)
        rows, columns = (
            math.ceil(edge // patch / self.hidden_stride)
            for edge, patch in zip(size, pair(self.patch_size), strict=True)
        )
        prefix = 0 if self.vision_feature_select_strategy == "default" else self.num_prefix_tokens
        grid = self.image_processor.tile_grid(height, width, **images_kwargs) or (1, 1)
        kinds = [kind for kind, _ in layout(grid, self.num_visual_indicators)]
        return kinds.count("view") * (rows * columns + prefix) + kinds.count("indicator")

    def num_grid_tokens(self, frames: int, rows: int, columns: int) -> int:
        """How many placeholders an image or a clip of so many patches becomes, at native resolution."""
        indicators = len(layout((1, 1), self.num_visual_indicators)) - 1
        return frames * rows * columns // self.hidden_stride**2 + indicators

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        if "image_grid_thw" not in image_inputs:
            return super().replace_image_token(image_inputs, image_idx, **kwargs)
        return self.image_text(
            self.num_grid_tokens(*(int(edge) for edge in image_inputs["image_grid_thw"][image_idx]))
        )


publish(ZooVetConfig)
