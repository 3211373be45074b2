"""LLaVA: patch features pass a small projector and become tokens of the language model's own sequence.

Papers: LLaVA 1.0 (huggingface.co/papers/2304.08485), LLaVA-1.5 (huggingface.co/papers/2310.03744), LLaVA-NeXT
(llava-vl.github.io/blog/2024-01-30-llava-next).

Paper map:
    1.0 section 4.1, the linear projection W         `LlavaConnector` with `projector_num_layers=1`
    1.5 section 3.2, the two-layer MLP               `LlavaConnector` with `projector_num_layers=2` (the default)
    1.5 section 3.4 and NeXT, AnyRes                 `image_grid_pinpoints`; `LlavaConnector.pack_tiles`
    1.0 section 4.1, features before the last layer  `vision_feature_layer=-2`

Deviations: the tower's last layers are not built when no feature uses them. With
`vision_feature_select_strategy="default"` all prefix tokens of a tower go, not always one: none for SigLIP, CLS and
registers for DINOv2.
"""

from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GenerationMixin
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.image_processing_utils import select_best_resolution
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import can_return_tuple

from .configuration_vlm import ZooConfig, publish
from .geometry_vlm import unpadded_grid
from .layers import grid_places
from .modeling_vlm import ZooForConditionalGeneration, ZooModel
from .processing_vlm import ZooProcessor


@strict
class ZooLlavaConfig(ZooConfig):
    r"""
    Configuration of LLaVA; the fields that all architectures share are those of `ZooConfig`.

    projector_num_layers (`int`): linear layers of the projector; 1 is LLaVA 1.0, 2 is LLaVA-1.5.
    projector_hidden_act (`str`): activation between them.
    multimodal_projector_bias (`bool`): whether they have a bias.
    image_grid_pinpoints (`list[list[int]]`, *optional*):
        Resolutions `[height, width]` that AnyRes tiles an image into, multiples of the tower's image size. `None`
        gives every image one square view.
    merge_type (`"spatial_unpad"`, `"spatial"` or `"flat"`):
        How AnyRes tiles are joined: as one map without its padding and with a newline vector a row, as one map, or
        one after the other.
    """

    model_type = "zoo_llava"

    projector_num_layers: int = 2
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    image_grid_pinpoints: list | None = None
    merge_type: Literal["spatial_unpad", "spatial", "flat"] = "spatial_unpad"

    def validate_projector(self):
        """Part of `@strict` validation."""
        if self.projector_num_layers < 1:
            raise ValueError(f"projector_num_layers must be at least 1, got {self.projector_num_layers}.")

    def validate_pinpoints(self):
        """Part of `@strict` validation: every pinpoint is a grid of whole tiles."""
        size = getattr(self.vision_config, "image_size", None)
        if not isinstance(size, int | None) or not isinstance(getattr(self.vision_config, "patch_size", 0), int):
            raise ValueError(f"LLaVA takes a tower of square images and patches, this one sees {size} pixels.")
        for pinpoint in self.image_grid_pinpoints or []:
            if len(pinpoint) != 2 or (size and any(side % size for side in pinpoint)):
                raise ValueError(
                    f"image_grid_pinpoints holds {pinpoint}; expected [height, width] in multiples of the tower's "
                    f"image size {size}."
                )


class LlavaConnector(nn.Module):
    """Projects patch features and, for AnyRes, joins the tiles of an image."""

    def __init__(self, config: ZooLlavaConfig):
        super().__init__()
        self.config = config
        width_in = config.vision_config.hidden_size * len(config.feature_layers)
        width = config.text_config.hidden_size
        self.layers = nn.ModuleList(
            nn.Linear(width_in if index == 0 else width, width, bias=config.multimodal_projector_bias)
            for index in range(config.projector_num_layers)
        )
        self.act = ACT2FN[config.projector_hidden_act]
        if config.image_grid_pinpoints is not None and config.merge_type == "spatial_unpad":
            self.image_newline = nn.Parameter(torch.empty(width))

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """`float[I, N, Dv]` to `float[I, N, Dt]`."""
        patches = patches.to(self.layers[0].weight.dtype)
        for index, layer in enumerate(self.layers):
            patches = layer(patches if index == 0 else self.act(patches))
        return patches

    def pack_tiles(
        self, tiles: torch.Tensor, image_size: list[int], newline: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Joins the views of one image: the whole image first, then its tiles.

        Args:
            tiles (`float[P, N, Dt]`): the whole image squashed to a square, then the tiles row by row.
            image_size: height and width of the original image, in pixels.
            newline (`float[Dt]`): what ends a row of tiles, by default the learned vector.

        Returns:
            `float[K, Dt]`
        """
        base, tiles = tiles[0], tiles[1:]
        if self.config.merge_type == "flat":
            return torch.cat((base, tiles.flatten(0, 1)))
        size, patch = self.config.vision_config.image_size, self.config.vision_config.patch_size
        side = size // patch
        height, width = select_best_resolution(image_size, self.config.image_grid_pinpoints)
        rows, columns = height // size, width // size
        tiles = tiles[:, tiles.shape[1] - side * side :]  # prefix tokens have no place in a map
        grid = tiles.view(rows, columns, side, side, -1).transpose(1, 2).flatten(2, 3).flatten(0, 1)  # [H, W, Dt]
        if self.config.merge_type == "spatial_unpad":
            kept_rows, kept_columns = unpadded_grid(image_size, grid.shape[:2])
            top, left = (grid.shape[0] - kept_rows) // 2, (grid.shape[1] - kept_columns) // 2
            grid = grid[top : top + kept_rows, left : left + kept_columns]
            newline = self.image_newline if newline is None else newline
            grid = torch.cat((grid, newline.to(grid.dtype).expand(kept_rows, 1, -1)), dim=1)
        return torch.cat((base, grid.flatten(0, 1)))


class ZooLlavaModel(ZooModel):
    """Vision tower, projector, language model."""

    config: ZooLlavaConfig

    def build_connector(self, config: ZooLlavaConfig) -> None:
        self.connector = LlavaConnector(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, LlavaConnector) and hasattr(module, "image_newline"):
            init.normal_(module.image_newline, mean=0.0, std=self.config.text_config.hidden_size**-0.5)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, image_sizes: torch.LongTensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """
        Images to tokens.

        Args:
            pixel_values: `float[I, C, H, W]`; with AnyRes `float[I, P, C, H, W]`, padded with blank tiles.
            image_sizes (`int[I, 2]`): height and width of the original images; AnyRes needs them.

        Returns:
            The tower's output with `pooler_output`: one `float[K, Dt]` for each image.
        """
        if self.config.image_grid_pinpoints is None:
            if pixel_values.ndim != 4:
                raise ValueError(
                    f"pixel_values has {pixel_values.ndim} dimensions, expected 4 [I, C, H, W]: this model has no "
                    "image_grid_pinpoints, were the images tiled by the processor of another model?"
                )
            outputs, patches = self.see(pixel_values, **kwargs)
            outputs.pooler_output = list(self.connector(patches))
            return outputs
        if image_sizes is None or pixel_values.ndim != 5:
            raise ValueError(
                f"AnyRes needs pixel_values [I, P, C, H, W] and image_sizes [I, 2]; got {list(pixel_values.shape)} "
                f"and {None if image_sizes is None else 'sizes'}: was this batch made by the processor of another "
                "model?"
            )
        sizes = torch.as_tensor(image_sizes).tolist()
        if not sizes or any(len(size) != 2 or min(size) < 1 for size in sizes):
            raise ValueError(f"image_sizes must hold a height and a width of at least 1 for each image, got {sizes}.")
        counts = [self.num_tiles(size) for size in sizes]
        if len(counts) != len(pixel_values) or max(counts) > pixel_values.shape[1]:
            raise ValueError(
                f"image_sizes asks for {counts} tiles, pixel_values holds {len(pixel_values)} images of up to "
                f"{pixel_values.shape[1]} tiles: processor and model differ in image_grid_pinpoints."
            )
        tiles = torch.cat([tiles[:count] for tiles, count in zip(pixel_values, counts, strict=True)])
        outputs, patches = self.see(tiles, **kwargs)
        views = self.connector(patches).split(counts)
        outputs.pooler_output = [self.connector.pack_tiles(*pair) for pair in zip(views, sizes, strict=True)]
        return outputs

    def num_tiles(self, image_size: list[int]) -> int:
        """Views of an image of this height and width: the whole image, and its tiles."""
        height, width = select_best_resolution(image_size, self.config.image_grid_pinpoints)
        size = self.config.vision_config.image_size
        return 1 + (height // size) * (width // size)

    def token_places(self, vision_inputs: dict[str, torch.Tensor], fusion_outputs: Any) -> list[torch.Tensor]:
        """As in the frame: places are packed as features are; prefix tokens and newlines have none."""
        vision, config = self.config.vision_config, self.config
        side = vision.image_size // vision.patch_size
        prefix = 0 if config.vision_feature_select_strategy == "default" else config.num_prefix_tokens
        nowhere = torch.tensor([-1.0, 0.0, 0.0, 0.0, 0.0])

        def of_view(view: int) -> torch.Tensor:
            return torch.cat((nowhere.expand(prefix, 5), grid_places((side, side), view=view)))

        if config.image_grid_pinpoints is None:
            return [of_view(0)] * len(vision_inputs["pixel_values"])
        return [
            self.connector.pack_tiles(torch.stack([*map(of_view, range(self.num_tiles(size)))]), size, nowhere)
            for size in torch.as_tensor(vision_inputs["image_sizes"]).tolist()
        ]

    def dummy_vision_inputs(self) -> dict[str, torch.Tensor]:
        inputs = super().dummy_vision_inputs()
        if self.config.image_grid_pinpoints is None:
            return inputs
        size = self.config.image_grid_pinpoints[0]
        tiles = inputs["pixel_values"].expand(self.num_tiles(size), -1, -1, -1)
        return {"pixel_values": tiles[None], "image_sizes": torch.tensor([size], device=self.device)}


class ZooLlavaForConditionalGeneration(ZooForConditionalGeneration, GenerationMixin):
    """LLaVA with the language model's head."""

    config: ZooLlavaConfig
    base_model_class = ZooLlavaModel


class ZooLlavaProcessor(ZooProcessor):
    r"""
    Images and text to a batch for LLaVA.

    patch_size (`int`): patch of the vision tower, in pixels.
    num_prefix_tokens (`int`): prefix tokens of the tower, as in the config.
    vision_feature_select_strategy (`"default"` or `"full"`): as in the config.
    merge_type (`str`): as in the config.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size: int = 14,
        num_prefix_tokens: int = 1,
        vision_feature_select_strategy: str = "default",
        merge_type: str = "spatial_unpad",
        chat_template=None,
    ):
        self.patch_size = patch_size
        self.num_prefix_tokens = num_prefix_tokens
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.merge_type = merge_type
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def fields_from(cls, config: ZooLlavaConfig) -> dict:
        return {
            "patch_size": config.vision_config.patch_size,
            "num_prefix_tokens": config.num_prefix_tokens,
            "vision_feature_select_strategy": config.vision_feature_select_strategy,
            "merge_type": config.merge_type,
        }

    @classmethod
    def image_fields_from(cls, config: ZooLlavaConfig) -> dict:
        return {**super().image_fields_from(config), "image_grid_pinpoints": config.image_grid_pinpoints}

    def num_image_tokens(self, height: int, width: int, **images_kwargs) -> int:
        tile_height, tile_width = self.image_processor.processed_size(height, width, **images_kwargs)
        rows, columns = tile_height // self.patch_size, tile_width // self.patch_size
        prefix = 0 if self.vision_feature_select_strategy == "default" else self.num_prefix_tokens
        base = rows * columns + prefix
        tiles = self.image_processor.tile_grid(height, width, **images_kwargs)
        if tiles is None:
            return base
        if self.merge_type == "flat":
            return base * (1 + tiles[0] * tiles[1])
        rows, columns = rows * tiles[0], columns * tiles[1]
        if self.merge_type == "spatial":
            return base + rows * columns
        rows, columns = unpadded_grid((height, width), (rows, columns))
        return base + rows * (columns + 1)


publish(ZooLlavaConfig)
