"""VET, the visual embedding table: patches become probabilities over visual words, and tokens their mean embedding.

Papers: Ovis (huggingface.co/papers/2405.20797); the code of Ovis 1.6 and 2, and `Ovis2` of transformers.

Paper map:
    section 3.2, equations 1 to 3, the visual head     `VetConnector.tokenize`; `VisualHead`
    section 3.2, equations 4 and 5, the embedding      `VisualEmbeddingTable`, an expectation over its rows
    Ovis 1.0, indicator tokens                         `num_visual_indicators=2`: around the image
    Ovis 1.6 and 2, neighbours and tiles               `hidden_stride`, `max_tiles`, `num_visual_indicators=5`
    Ovis 2, one word a token                           `tokenize_function="st_argmax"` (or `"gumbel_argmax"`)

Deviations: indicators stand at placeholders of their own image, not at ids of the language model's vocabulary. Zeros
are not appended to the probabilities: the table is cut instead. Gumbel noise is drawn in training alone, so that an
image means one thing when it is asked about. The features' last norm, which Ovis 2 leaves out and transformers'
`Ovis2` applies, is `tower_norm`. With one word a token, `st_argmax` looks the word up, where Ovis multiplies the table
by ones and zeros that are rounded.

Ovis 2.5 reads images at their own size. `VetConnector.embed` takes groups of patches of any number of images, so a
tower of native resolution needs a `get_image_features` of its own and no other connector.
"""

import itertools
import math
from typing import Literal, NamedTuple

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
from .modeling_vlm import ZooForConditionalGeneration, ZooModel
from .parts_vlm import build_part, cut_tower, pair
from .processing_vlm import ZooProcessor


# What a chunk of tokens may have in probabilities, tokens times words: 256 MiB in float32. More tokens are embedded
# chunk by chunk, and in training a chunk's probabilities are computed again instead of kept. Where nothing is kept,
# chunks are an eighth of that, which is as fast.
CHUNK_ENTRIES = 2**26

# Words whose scores are computed at once where rows are no multiple of a cache line; see `product`.
BLOCK_WORDS, LINE = 512, 16


@strict
class ZooVetConfig(ZooConfig):
    r"""
    Configuration of the visual embedding table; the fields that all architectures share are those of `ZooConfig`.

    visual_vocab_size (`int`): rows of the table, visual words and indicators.
    num_visual_indicators (`int`):
        Its last rows, which no patch becomes: 5 mark start, end of the whole picture, columns, rows and end of an
        image (Ovis 1.6 and 2), 2 its start and end (Ovis 1), 0 nothing.
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
    """

    model_type = "zoo_vet"

    vision_feature_layer: int | list[int] = -1
    visual_vocab_size: int = 16384
    num_visual_indicators: int = 5
    hidden_stride: int = 1
    tokenize_function: Literal["softmax", "gumbel_argmax", "st_argmax"] = "softmax"
    tau: float = 1.0
    head_layer_norm: bool = True
    head_layer_norm_eps: float = 1e-5
    tower_norm: bool = False
    max_tiles: int | None = None

    def validate_table(self):
        """Part of `@strict` validation."""
        if self.num_visual_indicators not in (0, 2, 5):
            raise ValueError(
                f"num_visual_indicators is {self.num_visual_indicators}, expected 5 (start, end of the whole picture, "
                "column, row, end), 2 (start, end) or 0."
            )
        if self.visual_vocab_size <= self.num_visual_indicators:
            raise ValueError(
                f"visual_vocab_size {self.visual_vocab_size} leaves no visual word: {self.num_visual_indicators} of "
                "its rows are indicators."
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
# Products with a large vocabulary
# ---------------------------------------------------------------------------------------------------------------------


def product(states: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """
    `states @ words.T`: `float[N, D]` and `float[V, D]` to `float[N, V]`.

    A vocabulary without its indicators is rarely a multiple of a cache line. Matrix products into such rows are up to
    1.7 times slower on a CPU than into blocks of words, which are then laid side by side.
    """
    if (
        words.device.type != "cpu"
        or words.dtype != torch.float32
        or len(words) % LINE == 0
        or len(words) < BLOCK_WORDS
    ):
        return states @ words.t()
    scores, states = states.new_empty(len(states), len(words)), states.t()
    for part, block in zip(scores.split(BLOCK_WORDS, dim=1), words.split(BLOCK_WORDS), strict=True):
        part.copy_((block @ states).t())
    return scores


class _Product(torch.autograd.Function):
    """`product` with its gradients."""

    @staticmethod
    def forward(states: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        return product(states, words)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        states, words = ctx.saved_tensors
        for_states, for_words = ctx.needs_input_grad
        return gradient @ words if for_states else None, gradient.t() @ states if for_words else None


class _Expectation(torch.autograd.Function):
    """
    Probabilities `float[N, V]` of the first V rows of a table `float[R, D]` to their mean, `float[N, D]`.

    The rows are cut here: the gradient of a slice is a second table.
    """

    @staticmethod
    def forward(probabilities: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return probabilities @ table[: probabilities.shape[1]]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        probabilities, table = ctx.saved_tensors
        for_probabilities = for_table = None
        words = probabilities.shape[1]
        if ctx.needs_input_grad[1]:
            for_table = torch.empty_like(table)
            torch.mm(probabilities.t(), gradient, out=for_table[:words])
            for_table[words:] = 0.0
        if ctx.needs_input_grad[0]:
            for_probabilities = product(gradient, table[:words])
        return for_probabilities, for_table


class _StraightThrough(torch.autograd.Function):
    """Chosen words `float[N, D]`, with the gradient that the mean of all words would give the probabilities."""

    @staticmethod
    def forward(probabilities: torch.Tensor, chosen: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        return chosen.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx, gradient):
        (words,) = ctx.saved_tensors
        return product(gradient.to(words.dtype), words), gradient, None


def is_ordinary(device: torch.device) -> bool:
    """Whether the functions above may stand in for torch's own products: nothing traces or casts those."""
    return device.type == "cpu" and not (torch.compiler.is_compiling() or torch.is_autocast_enabled(device.type))


class VisualHead(nn.Linear):
    """The scores of all visual words: a linear layer without bias, made for many outputs."""

    def __init__(self, in_features: int, num_words: int):
        super().__init__(in_features, num_words, bias=False)

    def forward(self, groups: torch.Tensor) -> torch.Tensor:
        """`float[N, D]` to `float[N, V]`."""
        return _Product.apply(groups, self.weight) if is_ordinary(groups.device) else super().forward(groups)


class VisualEmbeddingTable(nn.Embedding):
    """The embeddings of visual words, its last rows those of indicators."""

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """
        Args:
            words: `int[…]`, ids to look up; or `float[N, V]`, the probabilities of the first V rows, of which the mean
                is taken.

        Returns:
            `float[…, Dt]` or `float[N, Dt]`.
        """
        if not words.is_floating_point():
            return super().forward(words)
        if words.shape[-1] > self.num_embeddings:
            raise ValueError(
                f"Got probabilities of {words.shape[-1]} words, the table has {self.num_embeddings} rows."
            )
        if is_ordinary(words.device) and words.ndim == 2:
            return _Expectation.apply(words, self.weight)
        return words @ self.weight[: words.shape[-1]]

    def choose(self, probabilities: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The words `int[N]`, looked up, with the gradient of the mean under `float[N, V]`: `float[N, Dt]`."""
        rows = self.weight[: probabilities.shape[-1]].detach()
        return _StraightThrough.apply(probabilities, super().forward(ids), rows)


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


def layout(grid: tuple[int, int], num_indicators: int) -> list[tuple[Literal["view", "indicator"], int]]:
    """
    What an image becomes, in its order: its views, the whole picture first, and indicators by their number.

    Args:
        grid: rows and columns of tiles; (1, 1) is the whole picture alone.
        num_indicators: 0, 2 or 5.
    """
    tiles = math.prod(grid) if grid != (1, 1) else 0
    views = [("view", view) for view in range(1 + tiles)]
    if num_indicators == 0:
        return views
    if num_indicators == 2:
        return [("indicator", 0), *views, ("indicator", 1)]
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


class VetConnector(nn.Module):
    """Patches to visual words to tokens."""

    def __init__(self, config: ZooVetConfig):
        super().__init__()
        self.config = config
        height, width = pair(config.vision_config.image_size)
        patch_height, patch_width = pair(config.vision_config.patch_size)
        self.grid = (height // patch_height, width // patch_width)
        width_in = config.vision_config.hidden_size * len(config.feature_layers) * config.hidden_stride**2
        self.head = VisualHead(width_in, config.num_visual_words)
        if config.head_layer_norm:
            self.norm = nn.LayerNorm(config.num_visual_words, eps=config.head_layer_norm_eps)
        self.table = VisualEmbeddingTable(config.visual_vocab_size, config.text_config.hidden_size)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """`float[P, N, Dv]`, patches of whole views, to `float[P, n, Dt]`."""
        groups = join_neighbours(patches, self.grid, self.config.hidden_stride)
        return self.embed(groups.flatten(0, 1)).unflatten(0, groups.shape[:2])

    def scores(self, groups: torch.Tensor) -> torch.Tensor:
        """`float[n, D]`, the features of a token, to the scores of all words `float[n, V]`."""
        scores = self.head(groups.to(self.table.weight.dtype))
        return self.norm(scores) if self.config.head_layer_norm else scores

    def tokenize(self, groups: torch.Tensor) -> torch.Tensor:
        """`float[n, D]`, the features of a token, to `float[n, V]`, the probabilities of all words."""
        return self.scores(groups).softmax(dim=-1)

    def chunks(self, groups: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tokens in as many parts as keep their probabilities within what a chunk may have."""
        entries = CHUNK_ENTRIES if torch.is_grad_enabled() else CHUNK_ENTRIES // 8
        return groups.split(max(1, entries // self.config.num_visual_words))

    def embed(self, groups: torch.Tensor) -> torch.Tensor:
        """`float[n, D]`, the features of a token, to its embedding `float[n, Dt]`."""
        chunks = self.chunks(groups)
        if len(chunks) == 1:
            return self.embed_chunk(groups)
        if torch.is_grad_enabled():
            return torch.cat([checkpoint(self.embed_chunk, chunk, use_reentrant=False) for chunk in chunks])
        return torch.cat([self.embed_chunk(chunk) for chunk in chunks])

    def embed_chunk(self, groups: torch.Tensor) -> torch.Tensor:
        """`embed` in one piece."""
        scores = self.scores(groups)
        if self.config.tokenize_function == "softmax":
            return self.table(scores.softmax(dim=-1))
        if self.config.tokenize_function == "gumbel_argmax" and self.training:
            noise = -torch.empty_like(scores).exponential_().log()
            scores = (scores + noise) / self.config.tau
        ids = scores.argmax(dim=-1)
        if not torch.is_grad_enabled():
            return self.table(ids)
        return self.table.choose(scores.softmax(dim=-1), ids)

    def assemble(self, views: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """
        The tokens of one image, with indicators.

        Args:
            views (`float[P, n, Dt]`): the whole picture, then its tiles row by row.
            grid: rows and columns of tiles.

        Returns:
            `float[K, Dt]`
        """
        first, count = self.config.num_visual_words, self.config.num_visual_indicators
        indicators = self.table(torch.arange(first, first + count, device=views.device)).to(views.dtype)
        pieces = [
            views[number] if kind == "view" else indicators[number : number + 1]
            for kind, number in layout(grid, count)
        ]
        return torch.cat(pieces)


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


class ZooVetModel(ZooModel):
    """Vision tower, visual head and table, language model."""

    config: ZooVetConfig

    def build_tower(self, config: ZooVetConfig) -> None:
        self.vision_tower = build_part(config.vision_config, "vision tower")
        cut_tower(self.vision_tower, config.feature_layers, last_hidden_state=config.tower_norm)

    def build_connector(self, config: ZooVetConfig) -> None:
        self.connector = VetConnector(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, VisualEmbeddingTable):
            # The mean of many words is short: of V words e / V of this variance is left, not far from that of words
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

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, image_sizes: torch.LongTensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """
        Images to tokens.

        Args:
            pixel_values: `float[I, C, H, W]`; with `max_tiles` `float[I, P, C, H, W]`, padded with blank views.
            image_sizes (`int[I, 2]`): height and width of the original images; tiles need them.

        Returns:
            The tower's output with `pooler_output`: one `float[K, Dt]` for each image, indicators among them.
        """
        grids = self.tile_grids(pixel_values, image_sizes)
        outputs, patches = self.see(self.views(pixel_values, grids), **kwargs)
        views = self.connector(patches).split([num_views(grid) for grid in grids])
        outputs.pooler_output = list(map(self.connector.assemble, views, grids))
        return outputs

    @torch.no_grad()
    def visual_words(
        self, pixel_values: torch.Tensor, image_sizes: torch.LongTensor | None = None, top_k: int = 1
    ) -> list[VisualWords]:
        """
        Which words images use.

        Args:
            pixel_values, image_sizes: as `get_image_features` takes them.
            top_k: how many words of every token.

        Returns:
            For each image the words of its tokens, view by view, the whole picture first.
        """
        grids = self.tile_grids(pixel_values, image_sizes)
        patches = self.see(self.views(pixel_values, grids))[1]
        groups = join_neighbours(patches, self.connector.grid, self.config.hidden_stride)
        best = [self.connector.tokenize(chunk).topk(top_k) for chunk in self.connector.chunks(groups.flatten(0, 1))]
        sizes = [num_views(grid) * groups.shape[1] for grid in grids]
        ids, probabilities = (
            torch.cat(parts).split(sizes) for parts in ([b.indices for b in best], [b.values for b in best])
        )
        return list(itertools.starmap(VisualWords, zip(ids, probabilities, strict=True)))

    def dummy_vision_inputs(self) -> dict[str, torch.Tensor]:
        inputs = super().dummy_vision_inputs()
        if self.config.max_tiles is None:
            return inputs
        size = pair(self.config.vision_config.image_size)
        return {"pixel_values": inputs["pixel_values"][None], "image_sizes": torch.tensor([size], device=self.device)}


class ZooVetForConditionalGeneration(ZooForConditionalGeneration, GenerationMixin):
    """The visual embedding table with the language model's head."""

    config: ZooVetConfig
    base_model_class = ZooVetModel

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
    """

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
        return {**super().image_fields_from(config), "do_pad_to_square": True, "max_tiles": config.max_tiles}

    def num_image_tokens(self, height: int, width: int, **images_kwargs) -> int:
        size = self.image_processor.processed_size(height, width, **images_kwargs)
        rows, columns = (
            math.ceil(edge // patch / self.hidden_stride)
            for edge, patch in zip(size, pair(self.patch_size), strict=True)
        )
        prefix = 0 if self.vision_feature_select_strategy == "default" else self.num_prefix_tokens
        grid = self.image_processor.tile_grid(height, width, **images_kwargs) or (1, 1)
        kinds = [kind for kind, _ in layout(grid, self.num_visual_indicators)]
        return kinds.count("view") * (rows * columns + prefix) + kinds.count("indicator")


publish(ZooVetConfig)
