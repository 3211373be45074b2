"""Visual embedding tables to the zoo and back.

    python -m conversion.vet SRC DST                to the zoo, verified; DST/parity.json holds the proof
    python -m conversion.vet SRC --dry-run          show which tensor becomes which
    python -m conversion.vet SRC DST --verify       prove a conversion that exists already
    python -m conversion.vet DST BACK --reverse     back to the source's files, bit for bit

SRC is a folder or a hub id in one of these formats:

    transformers    Ovis2ForConditionalGeneration of version 4 or 5
    Ovis            1.6, 2 and 2.5, as AIDC-AI's code writes them

Where a format and the zoo differ, the config says so and the numbers stay the source's:

    transformers' Ovis2 passes the tower's last norm, AIDC-AI's code does not: `tower_norm`.
    Indicators have ids of their own upstream; here they are placeholders of their image. A model from transformers'
    format takes both: `indicator_token_ids`.
    AIDC-AI's code has no image token: one is added behind the vocabulary, with the mean embedding where the model has
    no row.
    When Ovis 1.6 was written, Gemma 2 multiplied the embeddings of images too: that factor is part of the table here,
    which is float32 then.
    transformers' processor takes the rows of a grid for columns; here a picture is cut as its grid was chosen, so
    pictures whose grid has as many rows as columns come out the same, and the others do not.
    A source that samples words (`gumbel_argmax`) is proven with the most probable ones.
    Ovis 2.5 has the tower of Qwen3-VL with `position_interpolation="bicubic"`; its pictures are bounded as its code
    does by default, and each frame of a clip like a picture. Its code first grows a side that is shorter than a token;
    such pictures may get another size here. A side of more than 200 times the other it shortens; here it is refused.
    Its video of a single frame has a clip's indicators, here it is an image.

Ovis 1.0 and 1.5 are refused, and so is 2.5 with attention within windows.
"""

import copy
import logging
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import (
    Aimv2VisionConfig,
    AutoImageProcessor,
    BatchFeature,
    Ovis2Config,
    Ovis2ForConditionalGeneration,
    Ovis2Processor,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlm_zoo.chat_templates import ChatTemplateError, find_template, response_tokens
from vlm_zoo.models.geometry_vlm import covering_grid
from vlm_zoo.models.image_processing_vlm import ZooImageProcessor
from vlm_zoo.models.native_vlm import patch_geometry
from vlm_zoo.models.parts_vlm import pair
from vlm_zoo.models.vet import ZooVetConfig, ZooVetForConditionalGeneration, ZooVetProcessor, layout, num_views
from vlm_zoo.models.video_vlm import video_marker

from . import engine, flow, ovis, ovis2_5, parity
from .edits import FillRows
from .engine import ConversionError, Table, Target, TensorInfo
from .flow import Source
from .ovis import IMAGE_TOKEN


logger = logging.getLogger(__name__)

# How transformers' processor writes the tokens of an image.
ATOM, INDICATORS = "<IMG_ATOM>", ("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")

# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------

FROM_OVIS2: Table = (
    (r"^model\.vision_tower\.head_linear\.(.+)$", r"model.connector.head.\1"),
    (r"^model\.vision_tower\.head_norm\.(.+)$", r"model.connector.norm.\1"),
    (r"^model\.visual_embeddings_table\.(.+)$", r"model.connector.table.\1"),
    (
        r"^model\.vision_tower\.transformer\.embeddings\.patch_embedding\.(.+)$",
        r"model.vision_tower.embeddings.patch_embed.\1",
    ),
    (r"^model\.vision_tower\.transformer\.(.+)$", r"model.vision_tower.\1"),
    (r"^model\.language_model\.(.+)$", r"model.language_model.\1"),
    (r"^lm_head\.(.+)$", r"lm_head.\1"),
)

# ---------------------------------------------------------------------------------------------------------------------
# Configs
# ---------------------------------------------------------------------------------------------------------------------


def zoo_config(source: Ovis2Config, max_tiles: int | None = None, tied: bool | None = None) -> ZooVetConfig:
    """
    The zoo's config of transformers' Ovis2.

    Args:
        source: the config, which does not say whether images are tiled.
        max_tiles: see `ZooVetConfig`.
        tied: whether head and embeddings are one tensor, where the config is not to be believed.
    """
    vision, text = source.vision_config, copy.deepcopy(source.text_config)
    text.tie_word_embeddings = source.tie_word_embeddings if tied is None else tied
    fields = (*ovis.AIMV2_FIELDS, "mlp_bias", "hidden_act", "initializer_range")
    return ZooVetConfig(
        vision_config=Aimv2VisionConfig(**{name: getattr(vision, name) for name in fields}, use_head=False),
        text_config=text,
        image_token_id=source.image_token_id,
        num_prefix_tokens=0,
        visual_vocab_size=vision.vocab_size,
        num_visual_indicators=vision.num_visual_indicator_tokens,
        indicator_token_ids=list(source.visual_indicator_token_ids),
        hidden_stride=vision.hidden_stride,
        tokenize_function=vision.tokenize_function,
        tower_norm=True,
        max_tiles=max_tiles,
        tie_word_embeddings=text.tie_word_embeddings,
        dtype=source.dtype,
        architectures=["ZooVetForConditionalGeneration"],
    )


def is_tied(source: Ovis2Config, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether head and embeddings are one tensor: files of version 4 hold an untied head under a config that does not
    say so."""
    names = ("lm_head.weight", "model.language_model.embed_tokens.weight")
    if not source.tie_word_embeddings or any(name not in tensors for name in names):
        return source.tie_word_embeddings
    return torch.equal(*dict(engine.read_tensors({name: tensors[name] for name in names})).values())


# ---------------------------------------------------------------------------------------------------------------------
# Processors
# ---------------------------------------------------------------------------------------------------------------------


def tiles_of(image_processor) -> int | None:
    """Into how many tiles transformers' processor cuts an image at most; `None` where an image has one view."""
    kind = flow.class_name(image_processor)
    if kind != "Ovis2ImageProcessor":
        raise ConversionError(f"The source's image processor is a {kind}, expected an Ovis2ImageProcessor.")
    if not image_processor.crop_to_patches or image_processor.max_patches == 1:
        return None
    if not image_processor.use_covering_area_grid:
        raise ConversionError(
            "The source's image processor chooses tiles by the aspect ratio (use_covering_area_grid is false); the "
            "zoo's chooses the smallest grid that covers the image."
        )
    return image_processor.max_patches


def zoo_processor(
    tokenizer, image_token: str, config: ZooVetConfig, template: str | None, **pixels
) -> ZooVetProcessor:
    """
    The zoo's processor for a model of this config.

    Args:
        tokenizer: of the language model.
        image_token: how an image is written.
        template: a chat template, where the tokenizer's is not meant.
        pixels: fields of the image processor.
    """
    tokenizer = engine.name_image_token(tokenizer, image_token)
    flow.check_image_token(tokenizer, image_token, config.image_token_id)
    return ZooVetProcessor(
        ZooImageProcessor(**pixels, do_center_crop=False, max_tiles=config.max_tiles),
        tokenizer,
        chat_template=chat_template(tokenizer, image_token, template),
        **ZooVetProcessor.fields_from(config),
    )


def chat_template(tokenizer: PreTrainedTokenizerBase, image_token: str, template: str | None) -> str | None:
    """See `find_template`; a tokenizer that allows none is a warning."""
    try:
        return find_template(tokenizer, image_token, template, video_marker(tokenizer))[0]
    except ChatTemplateError as error:
        logger.warning("The processor has no chat template. %s", error)
        return None


def response_tokens_of(processor: ZooVetProcessor) -> list[int] | None:
    """What opens an answer, where there is a chat template."""
    return processor.chat_template and response_tokens(processor.tokenizer, processor.chat_template)


def one_placeholder(input_ids: torch.Tensor, indicator_ids: Iterable[int], image_token_id: int) -> torch.Tensor:
    """Ids `int[B, T]` of an Ovis as the zoo has them: indicators are placeholders of their image."""
    indicators = torch.tensor(list(indicator_ids), device=input_ids.device)
    return input_ids.masked_fill(torch.isin(input_ids, indicators), image_token_id)


def image_ids(
    grid: tuple[int, int], tokens: int, atom: int, indicators: tuple[int, ...], is_clip: bool = False
) -> torch.Tensor:
    """
    The ids `int[K]` of an image upstream.

    Args:
        grid: rows and columns of its tiles.
        tokens: of a view.
        atom, indicators: ids upstream.
        is_clip: whether it has several frames.
    """
    ids = []
    for kind, number in layout(grid, len(indicators), is_clip):
        ids += [atom] * tokens if kind == "view" else [indicators[number]]
    return torch.tensor(ids)


class UpstreamPrompts:
    """transformers' processor; the size of a picture comes along, which the zoo's model reads."""

    def __init__(self, processor: Ovis2Processor):
        self.processor, self.image_processor = processor, processor.image_processor

    def __call__(self, images, text, return_tensors="pt") -> BatchFeature:
        batch = self.processor(images=images, text=text, return_tensors=return_tensors)
        batch["image_sizes"] = torch.tensor([[image.height, image.width] for image in images])
        return batch

    def decode(self, ids: list[int]) -> str:
        return self.processor.tokenizer.decode(ids)


class ZooPrompts:
    """The zoo's processor, given and giving what upstream's is and does: its image token, ids, and flat views."""

    def __init__(self, processor: ZooVetProcessor, atom: int, indicators: tuple[int, ...]):
        self.processor, self.atom, self.indicators = processor, atom, indicators

    def __call__(self, images, text, return_tensors="pt") -> BatchFeature:
        zoo, (image,) = self.processor, images
        text = [sample.replace(IMAGE_TOKEN, zoo.image_token) for sample in text]
        batch = zoo(images=images, text=text, return_tensors=return_tensors)
        grid = zoo.image_processor.tile_grid(image.height, image.width) or (1, 1)
        places = batch["input_ids"] == zoo.image_token_id
        tokens = (int(places.sum()) - len(layout(grid, len(self.indicators))) + num_views(grid)) // num_views(grid)
        own = image_ids(grid, tokens, self.atom, self.indicators)
        batch["input_ids"] = batch["input_ids"].masked_scatter(places, own)
        if zoo.image_processor.max_tiles is not None:
            batch["pixel_values"] = batch["pixel_values"][0]
        batch["image_sizes"] = torch.tensor([[image.height, image.width]])
        return batch


# ---------------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------------


def open_source(
    name: str | Path,
    *,
    tokenizer: str | None = None,
    image_processor: str | None = None,
    max_tiles: int | None = None,
) -> Source:
    """
    Looks at a checkpoint: finds its format, maps its config, and plans where its tensors go.

    Args:
        name: folder or hub id; a folder whose one subfolder is the checkpoint will do.
        tokenizer, image_processor: folders or hub ids to take instead of the source's own.
        max_tiles: into how many tiles an image is cut at most; by default as many as the processor of transformers
            says, or 9, the default of AIDC-AI's code.
    """
    folder = engine.checkpoint_folder(engine.local_folder(name), ("ovis2", ovis.MODEL_TYPE, *ovis2_5.MODEL_TYPES))
    raw_config = engine.read_json(folder / "config.json")
    homes = {
        part: engine.local_folder(given) if given else folder
        for part, given in {"tokenizer": tokenizer, "image_processor": image_processor}.items()
    }
    missing = engine.missing_parts(**homes)
    flow.warn_of_missing(str(name), missing)
    if raw_config.get("model_type") == "ovis2":
        return _open_transformers(str(name), folder, raw_config, None if missing else homes, max_tiles)
    if ovis2_5.is_ovis2_5(raw_config):
        if max_tiles is not None:
            raise ConversionError(f"max_tiles is {max_tiles}, but Ovis 2.5 cuts no tiles: images keep their own size.")
        return _open_native(str(name), folder, raw_config, homes, bool(missing))
    return _open_upstream(str(name), folder, raw_config, homes, bool(missing), max_tiles)


def _open_transformers(
    name: str, folder: Path, raw_config: dict, homes: Mapping[str, Path] | None, max_tiles: int | None
) -> Source:
    upstream_config = Ovis2Config.from_pretrained(folder)
    tensors, processor = engine.read_checkpoint(folder), None
    if homes is not None:
        processor = flow.read_processor(Ovis2Processor, folder, homes["image_processor"], homes["tokenizer"])
        max_tiles = tiles_of(processor.image_processor) if max_tiles is None else max_tiles
        processor.image_processor.crop_to_patches = max_tiles is not None
        processor.image_processor.max_patches = max_tiles or 1
    config = zoo_config(upstream_config, max_tiles, is_tied(upstream_config, tensors))
    zoo = None
    if processor is not None:
        processor.image_seq_length = tokens_of_view(config)  # old files leave it to the model
        zoo = _zoo_processor_of(processor, upstream_config, config)
        config.response_token_ids = response_tokens_of(zoo)
    return Source(
        name=name,
        kind="ovis2",
        folder=folder,
        raw_config=raw_config,
        config=config,
        model_class=ZooVetForConditionalGeneration,
        tensors=tensors,
        plan=engine.plan_tensors(
            tensors, FROM_OVIS2, flow.zoo_target(ZooVetForConditionalGeneration, config, flow.IGNORED), name
        ),
        load=lambda: UpstreamOvis2(parity.load_strictly(Ovis2ForConditionalGeneration, folder)),
        implementation="transformers' Ovis2ForConditionalGeneration",
        processor=None if processor is None else UpstreamPrompts(processor),
        zoo_processor=zoo,
    )


def _zoo_processor_of(source: Ovis2Processor, upstream_config: Ovis2Config, config: ZooVetConfig) -> ZooVetProcessor:
    """The zoo's processor with the tokens and pixels of transformers' processor."""
    found = source.tokenizer.convert_tokens_to_ids([ATOM, *INDICATORS])
    expected = [upstream_config.image_token_id, *upstream_config.visual_indicator_token_ids]
    if found != expected:
        raise ConversionError(
            f"The tokenizer's {ATOM} and indicators are {found}, the model's are {expected}: tokenizer and model "
            "belong to different checkpoints."
        )
    template = source.chat_template or source.tokenizer.chat_template
    return zoo_processor(
        source.tokenizer,
        ATOM,
        config,
        template and template.replace(IMAGE_TOKEN, ATOM),
        **flow.pixel_settings(source.image_processor),
    )


def _open_upstream(
    name: str, folder: Path, raw_config: dict, homes: Mapping[str, Path], incomplete: bool, max_tiles: int | None
) -> Source:
    tensors = engine.read_checkpoint(folder) if raw_config.get("model_type") == ovis.MODEL_TYPE else {}
    ovis.check(raw_config, tensors)
    had = raw_config["llm_config"]["vocab_size"]
    tokenizer, image_token_id = _with_image_token(homes["tokenizer"], had)
    processor = zoo = None
    config = ovis.zoo_config(raw_config, tensors, image_token_id, ovis.MAX_TILES if max_tiles is None else max_tiles)
    if not incomplete:
        pixels = AutoImageProcessor.from_pretrained(homes["image_processor"], trust_remote_code=False)
        processor = ovis.OriginalProcessor(tokenizer, pixels, config)
        height, width = pair(config.vision_config.image_size)
        settings = {**flow.pixel_settings(pixels), "size": {"height": height, "width": width}}
        zoo = zoo_processor(tokenizer, IMAGE_TOKEN, config, None, **settings, do_pad_to_square=True)
        config.response_token_ids = response_tokens_of(zoo)
    target = flow.zoo_target(ZooVetForConditionalGeneration, config, flow.IGNORED)
    prepared = ovis.apart(tensors)
    shapes, edits = _grown_vocabulary(config, had, target)
    if ovis.scaled(config) is not None:
        edits[ovis.TABLE] = ovis.scaled(config)
    return Source(
        name=name,
        kind="ovis",
        folder=folder,
        raw_config=raw_config,
        config=config,
        model_class=ZooVetForConditionalGeneration,
        tensors=prepared,
        plan=engine.plan_tensors(prepared, ovis.FROM_UPSTREAM, target, name, shapes),
        load=lambda: ovis.OriginalOvis(raw_config, config, tensors, folder),
        implementation="what Ovis' code computes, on transformers' tower and language model",
        processor=processor,
        zoo_processor=zoo,
        vocab_size=had,
        edits=edits,
    )


def _open_native(name: str, folder: Path, raw_config: dict, homes: Mapping[str, Path], incomplete: bool) -> Source:
    tensors = engine.read_checkpoint(folder)
    ovis2_5.check(raw_config, tensors)
    had = raw_config["llm_config"]["vocab_size"]
    tokenizer, image_token_id = _with_image_token(homes["tokenizer"], had)
    config = ovis2_5.zoo_config(raw_config, tensors, image_token_id)
    processor = zoo = None
    if not incomplete:
        pixels = AutoImageProcessor.from_pretrained(homes["image_processor"], trust_remote_code=False)
        processor = ovis2_5.OriginalProcessor(tokenizer, pixels, config)
        settings = {**flow.pixel_settings(pixels), **ovis2_5.patch_settings(config)}
        zoo = zoo_processor(tokenizer, IMAGE_TOKEN, config, None, **settings)
        config.response_token_ids = response_tokens_of(zoo)
    target = ovis2_5.without_mergers(flow.zoo_target(ZooVetForConditionalGeneration, config))
    prepared = ovis2_5.together(tensors, config)
    shapes, edits = _grown_vocabulary(config, had, target)
    return Source(
        name=name,
        kind="ovis2_5",
        folder=folder,
        raw_config=raw_config,
        config=config,
        model_class=ZooVetForConditionalGeneration,
        tensors=prepared,
        plan=engine.plan_tensors(prepared, ovis2_5.FROM_UPSTREAM, target, name, shapes),
        load=lambda: ovis2_5.OriginalOvis2_5(raw_config, tensors, folder),
        implementation="what Ovis' code computes, on transformers' language model",
        processor=processor,
        zoo_processor=zoo,
        vocab_size=had,
        edits=edits,
    )


def _with_image_token(home: Path, vocab_size: int) -> tuple[PreTrainedTokenizerBase | None, int]:
    """The tokenizer of an AIDC-AI folder with an image token, if there is one, and the token's id."""
    if not engine.has_tokenizer(home):
        return None, vocab_size
    tokenizer = ovis.read_tokenizer(home)
    return tokenizer, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)


def _grown_vocabulary(config: ZooVetConfig, had: int, target: Target) -> tuple[dict, dict]:
    """The shapes that embeddings and head have in a source of `had` words, and the edits that make them the zoo's;
    none where they have room for the image token."""
    rows, shapes, edits = config.text_config.vocab_size, {}, {}
    if rows > had:
        with torch.device("meta"):
            vocabulary = ZooVetForConditionalGeneration(config)._tied_weights_keys.items()
        for key in (key for both in vocabulary for key in both):
            shapes[key], edits[key] = (had, *target.wanted[key][1:]), FillRows(rows)
    return shapes, edits


# ---------------------------------------------------------------------------------------------------------------------
# In memory
# ---------------------------------------------------------------------------------------------------------------------


def zoo_from_transformers(
    model: Ovis2ForConditionalGeneration, max_tiles: int | None = None
) -> ZooVetForConditionalGeneration:
    """
    The zoo's model with the weights of a model of transformers, in memory: same dtype, device, mode and attention.

    The weights are copies; the two models share nothing.

    Args:
        model: an Ovis2.
        max_tiles: see `ZooVetConfig`.
    """
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    config = zoo_config(model.config, max_tiles, tied)
    return flow.in_memory(model, ZooVetForConditionalGeneration, config, FROM_OVIS2)


# ---------------------------------------------------------------------------------------------------------------------
# Proof
# ---------------------------------------------------------------------------------------------------------------------

PROMPT = f"What is shown here? {IMAGE_TOKEN}\nAnd what is beside it?"


class UpstreamOvis2(nn.Module):
    """
    transformers' Ovis2 with the outputs that a proof compares.

    Where it samples words, the most probable ones are taken: samples of two models cannot be compared.
    """

    def __init__(self, upstream: Ovis2ForConditionalGeneration):
        super().__init__()
        self.upstream, self.generation_config = upstream, upstream.generation_config
        if upstream.config.vision_config.tokenize_function == "gumbel_argmax":
            upstream.config.vision_config.tokenize_function = "st_argmax"
        self.model = nn.Module()
        self.model.vision_tower = UpstreamTower(upstream.model.vision_tower.transformer)

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        self.model.vision_tower(pixel_values)
        features = self.upstream.get_image_features(pixel_values, return_dict=True).pooler_output
        return BaseModelOutputWithPooling(pooler_output=list(features))

    def forward(self, image_sizes=None, **kwargs):
        return self.upstream(**kwargs)

    def generate(self, image_sizes=None, **kwargs) -> torch.Tensor:
        return self.upstream.generate(**kwargs)


class UpstreamTower(nn.Module):
    """An Ovis2's tower with its last norm, and a place for the hidden states that it does not return."""

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.tower = tower

    def forward(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        return normed(self.tower(pixel_values).last_hidden_state, len(self.tower.encoder.layers))


def normed(last: torch.Tensor, depth: int) -> BaseModelOutputWithPooling:
    """What a tower of so many layers hands on, where that is not a hidden state but normed, `float[P, N, Dv]`."""
    return BaseModelOutputWithPooling(last, hidden_states=(*[None] * depth, last))


class ZooStages(nn.Module):
    """The zoo's model with the inputs of upstream's, ids of indicators and flat views, and features without
    indicators."""

    def __init__(self, zoo: ZooVetForConditionalGeneration, atom: int, indicators: tuple[int, ...]):
        super().__init__()
        self.zoo, self.model, self.generation_config = zoo, zoo.model, zoo.generation_config
        self.own_ids = (atom, *indicators)
        if zoo.config.tower_norm:
            self.model = nn.Module()
            self.model.vision_tower = nn.Identity()  # passes on what the features are made of

    def get_image_features(self, return_dict=True, **images) -> BaseModelOutputWithPooling:
        outputs, groups, _ = self.zoo.model.look(**self.images(**images))
        if self.zoo.config.tower_norm:
            self.model.vision_tower(normed(outputs.last_hidden_state, *self.zoo.config.feature_layers))
        return BaseModelOutputWithPooling(pooler_output=[self.zoo.model.connector(groups)])

    def images(self, pixel_values, image_sizes=None, image_grid_thw=None) -> dict[str, torch.Tensor]:
        """What the zoo's model takes of images."""
        if self.zoo.config.native_resolution:
            return {"pixel_values": pixel_values, "image_grid_thw": image_grid_thw}
        if self.zoo.config.max_tiles is None:
            return {"pixel_values": pixel_values}
        return {"pixel_values": pixel_values[None], "image_sizes": image_sizes}

    def translated(self, input_ids, pixel_values, image_sizes=None, image_grid_thw=None, **kwargs) -> dict:
        """What it takes of a text and its images."""
        ids = one_placeholder(input_ids, self.own_ids, self.zoo.config.image_token_id)
        return {"input_ids": ids, **self.images(pixel_values, image_sizes, image_grid_thw), **kwargs}

    def forward(self, **kwargs):
        return self.zoo(**self.translated(**kwargs))

    def generate(self, **kwargs) -> torch.Tensor:
        return self.zoo.generate(**self.translated(**kwargs))


def prove(source: Source, folder: Path) -> dict:
    """
    Runs the source's implementation and the zoo's on the same inputs: random pixels and ids, in every grid of tiles
    that the probe's sizes ask for, or images and clips of several sizes; with a processor, also random images through
    both processors.

    Returns:
        The report, `passed` or not.
    """
    own = (ovis.ATOM, ovis.INDICATORS if source.kind == "ovis" else ovis2_5.INDICATORS)
    if source.kind == "ovis2":
        ids = source.raw_config.get("visual_indicator_token_ids", Ovis2Config().visual_indicator_token_ids)
        own = (source.config.image_token_id, tuple(ids))
    return flow.prove(
        source,
        folder,
        random_rows(source.config, *own),
        PROMPT,
        zoo_model=lambda model: ZooStages(model, *own),
        zoo_processor=lambda processor: ZooPrompts(processor, *own),
        sizes=probe_sizes(source.config, squares=source.kind == "ovis2"),
    )


def tokens_of_view(config: ZooVetConfig) -> int:
    """How many tokens the tower's view of an image becomes."""
    size, patch = pair(config.vision_config.image_size), pair(config.vision_config.patch_size)
    rows, columns = (-(-(edge // part) // config.hidden_stride) for edge, part in zip(size, patch, strict=True))
    return rows * columns + (config.num_prefix_tokens if config.vision_feature_select_strategy == "full" else 0)


def probe_sizes(config: ZooVetConfig, squares: bool = False) -> list[tuple[int, int]]:
    """
    Heights and widths of images that are treated differently.

    Args:
        squares: only those whose grid has as many rows as columns, which alone transformers cuts as it was chosen.
    """
    if config.native_resolution:
        edge = config.vision_config.patch_size * config.hidden_stride
        return ovis2_5.probe_sizes(edge)
    side = pair(config.vision_config.image_size)[0]
    sizes = parity.probe_sizes(side)
    if config.max_tiles is None:
        return sizes
    sizes += [(2 * side, 2 * side - 1), (side, 2 * side + 1), (3 * side - 1, side)]
    grids = {size: covering_grid(size, side, config.max_tiles) for size in sizes}
    return [size for size, (rows, columns) in grids.items() if not squares or rows == columns]


def random_rows(config: ZooVetConfig, atom: int, indicators: tuple[int, ...]) -> list[parity.Row]:
    """Random pixels and ids, with the ids that an image has upstream."""
    generator, rows = torch.Generator().manual_seed(0), []
    plain = parity.plain_tokens(config)
    plain = plain[~torch.isin(plain, torch.tensor(indicators))]
    if config.native_resolution:
        square, values = config.hidden_stride**2, patch_geometry(config.vision_config).values
        for grids in parity.NATIVE_GRIDS:
            pieces = parity.random_text(plain, (4,), generator)
            for grid in grids:
                pieces.append(image_ids((1, 1), math.prod(grid), atom, indicators, is_clip=grid[0] > 1))
                pieces += parity.random_text(plain, (3,), generator)
            pixels = torch.randn(square * sum(map(math.prod, grids)), values, generator=generator)
            sides = torch.tensor([1, config.hidden_stride, config.hidden_stride])
            images = {"pixel_values": pixels, "image_grid_thw": torch.tensor(grids) * sides}
            rows.append(parity.Row(parity.text_inputs(torch.cat(pieces)), images))
        return rows
    side, channels = pair(config.vision_config.image_size)[0], config.vision_config.num_channels
    for size in probe_sizes(config):
        grid = (1, 1) if config.max_tiles is None else covering_grid(size, side, config.max_tiles)
        before, after = parity.random_text(plain, (4, 6), generator)
        ids = torch.cat((before, image_ids(grid, tokens_of_view(config), atom, indicators), after))
        pixels = torch.randn(num_views(grid), channels, side, side, generator=generator)
        rows.append(parity.Row(parity.text_inputs(ids), {"pixel_values": pixels, "image_sizes": torch.tensor([size])}))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------

SCRIPT = flow.Script("vet", open_source, prove, ("tokenizer", "image_processor", "max_tiles"), ZooVetConfig)
convert, verify, reverse = SCRIPT.convert, SCRIPT.verify, SCRIPT.reverse


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 0 only when everything was read, written and checked."""
    parser = engine.command_line("conversion.vet", __doc__)
    parser.add_argument("--max-tiles", type=int, help="tiles of an image, at most; by default the source's, or 9")
    return engine.run(parser, SCRIPT.job, arguments)


if __name__ == "__main__":
    sys.exit(main())
