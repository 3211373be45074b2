"""The embedded parts, written as folders that `vlm_zoo.build` opens like any other tower and language model."""

from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    SiglipImageProcessorPil,
)

from .. import data
from ..saving import writing_folder
from .recipe import Recipe


def write_parts(recipe: Recipe, folder: Path) -> tuple[Path, Path]:
    """
    Writes an untrained tower and language model.

    Returns:
        Their folders, `folder/vision` and `folder/language`.
    """
    vision, language = folder / "vision", folder / "language"
    torch.manual_seed(recipe.seed)
    if not vision.exists():
        with writing_folder(vision) as path:
            config = AutoConfig.for_model(**recipe.vision)
            AutoModel.from_config(config).save_pretrained(path)
            size = {"height": config.image_size, "width": config.image_size}
            SiglipImageProcessorPil(size=size).save_pretrained(path)
    if not language.exists():
        with writing_folder(language) as path:
            tokenizer = AutoTokenizer.from_pretrained(data.path("tokenizer"))
            config = AutoConfig.for_model(
                **recipe.language,
                vocab_size=len(tokenizer),
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
            AutoModelForCausalLM.from_config(config).save_pretrained(path)
            tokenizer.save_pretrained(path)
    return vision, language


def enlarge(source: Path, image_size: int, target: Path) -> Path:
    """
    Writes a model whose tower sees larger images: its position table is laid side by side, so that every quadrant of a
    page starts with the positions of a tile.

    Args:
        source: a folder with a model and its processor.
        image_size: the new side, a multiple of the old one.
    """
    model = AutoModelForImageTextToText.from_pretrained(source)
    processor = AutoProcessor.from_pretrained(source)
    old = model.config.vision_config.image_size
    if image_size == old:
        return source
    if image_size % old:
        raise ValueError(f"Image size {image_size} is no multiple of {old}, which the tower of {source} was made for.")
    if not target.exists():
        model.config.vision_config.image_size = image_size
        larger = type(model)(model.config)
        state = model.state_dict()
        for name, table in tile_positions(model, image_size // old).items():
            state[name] = table
        larger.load_state_dict(state)
        processor.image_processor.size = type(processor).image_fields_from(larger.config)["size"]
        processor.image_processor = type(processor.image_processor).from_dict(processor.image_processor.to_dict())
        with writing_folder(target) as path:
            larger.save_pretrained(path)
            processor.save_pretrained(path)
    return target


def tile_positions(model: PreTrainedModel, times: int) -> dict[str, torch.Tensor]:
    """The tower's learned position tables, repeated `times` along both sides: `float[N, Dv]` to `float[N * times²,
    Dv]`."""
    config = model.config.vision_config
    side = config.image_size // times // config.patch_size
    tables = {}
    for name, module in model.model.vision_tower.named_modules():
        if isinstance(module, nn.Embedding) and len(module.weight) == side * side:
            grid = module.weight.detach().view(side, side, -1).repeat(times, times, 1)
            tables[f"model.vision_tower.{name}.weight"] = grid.flatten(0, 1)
    if not tables:
        raise ValueError(
            f"{type(model.model.vision_tower).__name__} has no table of {side} x {side} positions to lay out."
        )
    return tables
