"""LLaVA checkpoints to the zoo and back.

    python -m conversion.llava SRC DST                to the zoo, verified; DST/parity.json holds the proof
    python -m conversion.llava SRC --dry-run          show which tensor becomes which
    python -m conversion.llava SRC DST --verify       prove a conversion that exists already
    python -m conversion.llava DST BACK --reverse     back to the source's layout, bit for bit

SRC is a folder, the file that its weights are, or a hub id, in one of these formats:

    transformers    LlavaForConditionalGeneration and LlavaNextForConditionalGeneration, with the tensor names of
                    version 5 or of version 4 (those found on the Hub)
    the original    LLaVA 1.0, 1.5 and 1.6 (model_type llava_llama, llava_mistral or llava_qwen), its vision tower
                    among the tensors, in a folder beside them, or named by --vision-tower
    parts of it     delta weights, a LoRA adapter (adapter_model, non_lora_trainables.bin) or a stage-1 folder with
                    nothing but mm_projector.bin: merged with the language model that --base-model names

Delta weights look like whole ones, and no proof can tell them apart: with --base-model weights are taken for a delta
and summed with it, without they are taken as they are. An adapter's base model is by default the one that its
adapter_config.json names.

Where a format and the zoo differ, the config says so and the numbers stay the source's:

    "default" drops exactly one token in transformers, whatever the tower: num_prefix_tokens is 1 for all of them.
    transformers' class has a plain head: logit scales and soft caps of the language model's config are switched off.
    The original has no image token (its id is -200): one is added behind the vocabulary, with the mean embedding.
"""

import argparse
import copy
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
)

from vlm_zoo.models.image_processing_vlm import ZooImageProcessor, select_best_resolution
from vlm_zoo.models.llava import ZooLlavaConfig, ZooLlavaForConditionalGeneration, ZooLlavaProcessor
from vlm_zoo.models.parts_vlm import measure_tower

from . import engine, flow, llava_merged, llava_original, parity, way_back
from .edits import FillRows
from .engine import ConversionError, Table, Target, TensorInfo
from .flow import Source


# model_type: config, model, processor
FORMATS = {
    "llava": (LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor),
    "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor),
}

# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------

FROM_TRANSFORMERS: Table = (
    (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?(.+)$", r"model.vision_tower.\1"),
    (r"^(?:model\.)?multi_modal_projector\.linear_1\.(weight|bias)$", r"model.connector.layers.0.\1"),
    (r"^(?:model\.)?multi_modal_projector\.linear_2\.(weight|bias)$", r"model.connector.layers.1.\1"),
    (r"^(?:model\.)?image_newline$", "model.connector.image_newline"),
    (r"^(?:(?:model\.)?language_model\.model|model\.language_model)\.(.+)$", r"model.language_model.\1"),
    (r"^(?:language_model\.)?lm_head\.(weight|bias)$", r"lm_head.\1"),
)
TO_HUB: Table = (
    (r"^model\.vision_tower\.(.+)$", r"vision_tower.\1"),
    (r"^model\.connector\.layers\.0\.(.+)$", r"multi_modal_projector.linear_1.\1"),
    (r"^model\.connector\.layers\.1\.(.+)$", r"multi_modal_projector.linear_2.\1"),
    (r"^model\.connector\.image_newline$", "image_newline"),
    (r"^model\.language_model\.(.+)$", r"language_model.model.\1"),
    (r"^lm_head\.(.+)$", r"language_model.lm_head.\1"),
)
# Towers that version 4 kept inside a `vision_model`; version 5 reads the name and drops it.
TO_HUB_WRAPPED: Table = ((r"^model\.vision_tower\.(.+)$", r"vision_tower.vision_model.\1"), *TO_HUB[1:])
WRAPPED_TOWERS = ("clip_vision_model", "siglip_vision_model", "siglip2_vision_model")


def zoo_target(config: ZooLlavaConfig) -> Target:
    """What the zoo's model asks for; the tensors of the uncut tower that it does not build are `unused`."""
    return flow.zoo_target(ZooLlavaForConditionalGeneration, config, flow.IGNORED)


# ---------------------------------------------------------------------------------------------------------------------
# Configs
# ---------------------------------------------------------------------------------------------------------------------

SAME_FIELDS = (
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "projector_hidden_act",
    "multimodal_projector_bias",
    "tie_word_embeddings",
    "dtype",
)
# What a language model's own head does to its logits, and the value with which it does nothing.
HEAD_FIELDS = {
    "logit_scale": 1.0,
    "output_multiplier": 1.0,
    "lm_head_multiplier": 1.0,
    "logits_scaling": 1.0,
    "final_logit_softcapping": None,
}


def zoo_config(source: LlavaConfig | LlavaNextConfig) -> ZooLlavaConfig:
    """The zoo's config of a model of transformers."""
    vision_config, text_config = copy.deepcopy(source.vision_config), copy.deepcopy(source.text_config)
    for name, neutral in HEAD_FIELDS.items():
        if getattr(text_config, name, None) is not None:
            setattr(text_config, name, neutral)
    prefix = 1 if source.vision_feature_select_strategy == "default" else measure_tower(vision_config)[1]
    tiled = {}
    if isinstance(source, LlavaNextConfig):
        tiled = {"image_grid_pinpoints": [list(pinpoint) for pinpoint in source.image_grid_pinpoints]}
    return ZooLlavaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=source.image_token_id,
        num_prefix_tokens=prefix,
        projector_num_layers=2,
        merge_type="spatial_unpad",
        architectures=["ZooLlavaForConditionalGeneration"],
        **{name: getattr(source, name) for name in SAME_FIELDS},
        **tiled,
    )


def transformers_config(config: ZooLlavaConfig) -> LlavaConfig | LlavaNextConfig:
    """transformers' config of a zoo model; raises `ConversionError` where transformers has no such model."""
    patches, prefix = measure_tower(config.vision_config)
    strategy, tiled = config.vision_feature_select_strategy, config.image_grid_pinpoints is not None
    dropped = config.num_prefix_tokens if strategy == "default" else 0
    reasons = []
    if config.projector_num_layers != 2:
        reasons.append(f"projector_num_layers is {config.projector_num_layers}, it always has 2")
    if tiled and config.merge_type != "spatial_unpad":
        reasons.append(f"merge_type is '{config.merge_type}', it only knows 'spatial_unpad'")
    if dropped > 1:
        reasons.append(f"num_prefix_tokens is {dropped}, it drops one token at most")
    if reasons:
        raise ConversionError(f"transformers' LLaVA cannot hold this model: {'; '.join(reasons)}.")
    fields = {name: getattr(config, name) for name in SAME_FIELDS}
    fields |= {
        "vision_config": copy.deepcopy(config.vision_config),
        "text_config": copy.deepcopy(config.text_config),
        "image_token_index": config.image_token_id,
        "image_seq_length": patches + prefix - dropped,
        "vision_feature_select_strategy": "default" if dropped else "full",
    }
    if tiled:
        model_class = LlavaNextForConditionalGeneration
        return LlavaNextConfig(
            image_grid_pinpoints=config.image_grid_pinpoints, architectures=[model_class.__name__], **fields
        )
    return LlavaConfig(architectures=[LlavaForConditionalGeneration.__name__], **fields)


def hub_config(config: LlavaConfig | LlavaNextConfig) -> dict:
    """The config as JSON that versions 4 and 5 read: RoPE in the fields of version 4 where they can hold it."""
    content = config.to_dict()
    text = content["text_config"]
    rope = text.get("rope_parameters") or {}
    if "rope_theta" in rope:
        text["rope_theta"] = rope["rope_theta"]
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        text["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
        del text["rope_parameters"]
    return content


# ---------------------------------------------------------------------------------------------------------------------
# Processors
# ---------------------------------------------------------------------------------------------------------------------

PIXEL_FIELDS = (*flow.PIXEL_FIELDS, "crop_size")
IMAGE_PROCESSORS = (
    "CLIPImageProcessor",
    "LlavaImageProcessor",
    "LlavaNextImageProcessor",
    "SiglipImageProcessor",
    "BitImageProcessor",
    "ViTImageProcessor",
)


def zoo_image_processor(source) -> ZooImageProcessor:
    """The zoo's image processor with the settings of one of transformers."""
    kind = flow.class_name(source)
    if kind not in IMAGE_PROCESSORS:
        raise ConversionError(
            f"The source's image processor is a {type(source).__name__}; known are {', '.join(IMAGE_PROCESSORS)}."
        )
    settings, fields = source.to_dict(), flow.pixel_settings(source, PIXEL_FIELDS)
    fields["do_center_crop"] = bool(settings.get("do_center_crop"))
    if kind == "LlavaImageProcessor":
        fields["do_pad_to_square"] = bool(settings.get("do_pad"))
    if kind == "LlavaNextImageProcessor":
        fields["do_pad"] = bool(settings.get("do_pad"))
        fields["image_grid_pinpoints"] = settings["image_grid_pinpoints"]
    return ZooImageProcessor(**fields)


def zoo_processor(source: LlavaProcessor | LlavaNextProcessor, config: ZooLlavaConfig) -> ZooLlavaProcessor:
    """The zoo's processor for a model of this config, with the tokens and pixels of transformers' processor."""
    return assemble_processor(
        zoo_image_processor(source.image_processor),
        source.tokenizer,
        config,
        image_token=source.image_token,
        chat_template=source.chat_template or source.tokenizer.chat_template,
    )


def assemble_processor(
    image_processor: ZooImageProcessor, tokenizer, config: ZooLlavaConfig, image_token: str, chat_template: str | None
) -> ZooLlavaProcessor:
    """Names the image token, and counts what the model's features are."""
    if getattr(tokenizer, "image_token", None) != image_token:
        tokenizer = engine.name_image_token(tokenizer, image_token)
    flow.check_image_token(tokenizer, image_token, config.image_token_id)
    fields = ZooLlavaProcessor.fields_from(config)
    if config.vision_feature_select_strategy == "default":
        # One token goes from each view; where the tower has none or several of them, placeholders are counted so.
        left = measure_tower(config.vision_config)[1] - config.num_prefix_tokens
        if left:
            fields |= {"vision_feature_select_strategy": "full", "num_prefix_tokens": left}
    return ZooLlavaProcessor(image_processor, tokenizer, chat_template=chat_template, **fields)


# ---------------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Look:
    """
    A source without its processors.

    source: the checkpoint.
    read_processor: builds its own processor from an image processor's and a tokenizer's folder.
    image_processor_folder: where its image processor is.
    tokenizer_folder: where its tokenizer is.
    """

    source: Source
    read_processor: Callable[[Path, Path], LlavaProcessor | LlavaNextProcessor]
    image_processor_folder: Path
    tokenizer_folder: Path


def open_source(
    name: str | Path,
    *,
    tokenizer: str | None = None,
    image_processor: str | None = None,
    vision_tower: str | None = None,
    base_model: str | None = None,
) -> Source:
    """
    Looks at a checkpoint: finds its format, maps its config, and plans where its tensors go.

    Args:
        name: folder, weight file or hub id; a folder whose one subfolder is the checkpoint will do.
        tokenizer, image_processor: folders or hub ids to take instead of the source's own.
        vision_tower: folder or hub id of the tower of an original checkpoint, where it is not found beside it.
        base_model: folder or hub id of the language model of an original checkpoint that holds delta weights, a LoRA
            adapter or only the projector. Whole weights cannot be told from delta weights: with a base model, they
            are taken as such.
    """
    look = look_at(name, tokenizer, vision_tower, base_model)
    source = look.source
    words = engine.local_folder(tokenizer) if tokenizer else look.tokenizer_folder
    pixels = engine.local_folder(image_processor) if image_processor else look.image_processor_folder
    missing = engine.missing_parts(words, pixels)
    flow.warn_of_missing(source.name, missing)
    if missing:
        return source
    processor = look.read_processor(pixels, words)
    # Old files leave it to the model how many tokens an image has.
    processor.patch_size = source.config.vision_config.patch_size
    processor.vision_feature_select_strategy = source.config.vision_feature_select_strategy
    processor.num_additional_image_tokens = measure_tower(source.config.vision_config)[1]
    return replace(source, processor=processor, zoo_processor=zoo_processor(processor, source.config))


def look_at(
    name: str | Path, tokenizer: str | None = None, vision_tower: str | None = None, base_model: str | None = None
) -> Look:
    """Looks at a checkpoint without its processors; `open_source` says what the arguments are."""
    known_types = {*FORMATS, *llava_original.TEXT_TYPES}
    folder = engine.checkpoint_folder(engine.local_folder(name), known_types, llava_merged.FILES)
    raw_config = engine.read_json(folder / "config.json")
    if llava_original.is_original(raw_config):
        return _look_at_original(str(name), folder, raw_config, vision_tower, tokenizer, base_model)
    if base_model is not None:
        raise ConversionError(f"{name} is no checkpoint of LLaVA's own: --base-model means nothing to it.")
    if raw_config.get("model_type") not in FORMATS:
        known = ", ".join([*FORMATS, "the original's"])
        raise ConversionError(f"{name} is of model type '{raw_config.get('model_type')}'; this script reads {known}.")
    return _look_at_transformers(str(name), folder, raw_config)


def _look_at_transformers(name: str, folder: Path, raw_config: dict) -> Look:
    config_class, model_class, processor_class = FORMATS[raw_config["model_type"]]
    config = zoo_config(config_class.from_pretrained(folder))
    tensors = engine.read_checkpoint(folder)
    source = Source(
        name=name,
        kind=raw_config["model_type"],
        folder=folder,
        raw_config=raw_config,
        config=config,
        model_class=ZooLlavaForConditionalGeneration,
        tensors=tensors,
        plan=engine.plan_tensors(tensors, FROM_TRANSFORMERS, zoo_target(config), name),
        load=lambda: parity.load_strictly(model_class, folder),
        implementation=f"transformers' {model_class.__name__}",
    )
    return Look(source, functools.partial(flow.read_processor, processor_class, folder), folder, folder)


def _look_at_original(
    name: str,
    folder: Path,
    raw_config: dict,
    vision_tower: str | None,
    tokenizer: str | None,
    base_model: str | None,
) -> Look:
    tower = llava_original.find_tower(folder, raw_config, vision_tower)
    weights = llava_merged.read_weights(folder, base_model)
    tensors, home = weights.tensors, folder
    if weights.base is not None and not engine.has_tokenizer(folder):
        home = weights.base
    if not any(key.startswith("model.vision_tower.") for key in tensors):
        tensors |= llava_original.tower_tensors(tower)
    words, image_token_id = engine.local_folder(tokenizer) if tokenizer else home, raw_config["vocab_size"]
    if engine.has_tokenizer(words):
        image_token_id = llava_original.read_tokenizer(words).image_token_id
    config = llava_original.zoo_config(raw_config, llava_original.tower_config(tower), image_token_id)
    target, rows = zoo_target(config), config.text_config.vocab_size
    target.ignored = (*target.ignored, *llava_original.IGNORED)
    grown = rows > raw_config["vocab_size"]
    shapes = (
        {key: (raw_config["vocab_size"], *target.wanted[key][1:]) for key in llava_original.GROWN} if grown else {}
    )
    source = Source(
        name=name,
        kind=raw_config["model_type"],
        folder=folder,
        raw_config=raw_config,
        config=config,
        model_class=ZooLlavaForConditionalGeneration,
        tensors=tensors,
        plan=engine.plan_tensors(tensors, llava_original.FROM_ORIGINAL, target, name, shapes),
        load=lambda: llava_original.OriginalLlava(raw_config, config, tensors, folder),
        implementation="what LLaVA's code computes, on transformers' tower and language model",
        vocab_size=raw_config["vocab_size"] if grown else None,
        edits=dict.fromkeys(shapes, FillRows(rows)),
        apart={tower: llava_original.tower_name(raw_config), **({weights.base: None} if weights.base else {})},
        note=weights.note,
    )
    return Look(source, lambda pixels, words: llava_original.read_processor(words, pixels, raw_config), tower, home)


# ---------------------------------------------------------------------------------------------------------------------
# In memory
# ---------------------------------------------------------------------------------------------------------------------


def zoo_from_transformers(
    model: LlavaForConditionalGeneration | LlavaNextForConditionalGeneration,
) -> ZooLlavaForConditionalGeneration:
    """
    The zoo's model with the weights of a model of transformers, in memory: same dtype, device, mode and attention.

    The weights are copies; the two models share nothing.
    """
    config = zoo_config(model.config)
    return flow.in_memory(
        model, ZooLlavaForConditionalGeneration, config, FROM_TRANSFORMERS, target=zoo_target(config)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Proof
# ---------------------------------------------------------------------------------------------------------------------


PROMPT = "What is shown here? IMAGE\nAnd what is beside it? "


def prove(source: Source, folder: Path) -> dict:
    """
    Runs the source's implementation and the zoo's on the same inputs: random images through both processors, whose
    ids and pixels are compared too; random pixels and ids where there is no processor.

    Returns:
        The report, `passed` or not.
    """
    if source.processor is not None:
        return flow.prove(source, folder, [], PROMPT.replace("IMAGE", source.processor.image_token))
    return flow.prove(source, folder, lambda model: random_rows(model, source.config))


def random_rows(model: nn.Module, config: ZooLlavaConfig) -> list[parity.Row]:
    """Random pixels and ids; the source itself says how many tokens an image has."""
    generator = torch.Generator().manual_seed(0)
    size, channels = config.vision_config.image_size, config.vision_config.num_channels
    plain = parity.plain_tokens(config)
    rows = []
    for image_size in parity.probe_sizes(size):
        views, vision_inputs = (1,), {}
        if config.image_grid_pinpoints is not None:
            height, width = select_best_resolution(image_size, config.image_grid_pinpoints)
            views = (1, 1 + (height // size) * (width // size))
            vision_inputs = {"image_sizes": torch.tensor([image_size])}
        vision_inputs["pixel_values"] = torch.randn(*views, channels, size, size, generator=generator)
        with torch.no_grad():
            count = len(model.get_image_features(**vision_inputs, return_dict=True).pooler_output[0])
        before, after = parity.random_text(plain, (4, 6), generator)
        ids = torch.cat((before, torch.full((count,), config.image_token_id), after))
        rows.append(parity.Row(parity.text_inputs(ids), vision_inputs))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Back
# ---------------------------------------------------------------------------------------------------------------------


def reverse(
    name: str | Path,
    destination: str | Path,
    *,
    layout: str = "source",
    origin: str | None = None,
    verify: bool = True,
    shard_bytes: int = engine.SHARD_BYTES,
    **options,
) -> dict | None:
    """
    Converts a zoo folder back to the format that it came from.

    Args:
        name: the zoo folder.
        destination: a folder that does not exist yet, or is empty.
        layout: `"source"` writes the files that the source had, `"hub"` transformers' LLaVA with the names of version
            4, which versions 4 and 5 read; a folder that never was converted has no source, and gets the latter.
        origin: the folder of the first conversion, where `name` is a later state of the model (trained, saved again)
            without the side files.
        verify: run both on the same inputs and write `parity.json`.
        shard_bytes: size at which a new shard begins.
        options: see `open_source`.

    Returns:
        The parity report, `None` without `verify`.

    Raises:
        ConversionError: the format has no such model, or tensors that it asks for are nowhere.
    """
    zoo_folder = engine.local_folder(name)
    home = engine.local_folder(origin or name)
    if layout == "source" and (home / engine.RECORD).is_file():
        return SCRIPT.reverse(name, destination, origin=origin, verify=verify, shard_bytes=shard_bytes, **options)
    config, raw_config, tensors = plan_hub_layout(zoo_folder, home)
    with engine.staged(Path(destination)) as folder:
        engine.write_shards(folder, tensors, shard_bytes=shard_bytes)
        engine.write_json(folder / "config.json", raw_config)
        if (zoo_folder / "generation_config.json").is_file():
            written = folder / "generation_config.json"
            engine.allow_image_token(zoo_folder / written.name, written, config.image_token_id)
        if not engine.missing_parts(zoo_folder, zoo_folder):
            write_processor(zoo_folder, folder, config, raw_config)
        report = None
        if verify:
            source = replace(look_at(folder).source, name=str(name), config=config)
            report = prove(source, zoo_folder)
            flow.file_staged(report, folder, destination)
    return report


def plan_hub_layout(zoo_folder: Path, home: Path) -> tuple[ZooLlavaConfig, dict, dict[str, TensorInfo]]:
    """The zoo's config, transformers' `config.json`, and every tensor by its name there; `home` is the folder of the
    first conversion, where the side file is."""
    config = ZooLlavaConfig.from_pretrained(zoo_folder)
    tensors, side = engine.read_checkpoint(zoo_folder), home / engine.DROPPED
    if side.is_file():
        tensors |= {name: info for name, info in engine.read_file(side).items() if not name.startswith(way_back.MARKS)}
    target = zoo_target(config)
    whole = Target(
        {**target.wanted, **target.unused}, tied=target.tied, ignored=(*target.ignored, *llava_original.IGNORED)
    )
    hint = "" if side.is_file() else f" ({home} has no {side.name}: --origin names the folder of the first conversion)"
    engine.plan_tensors(tensors, ((r"^", ""),), whole, f"{zoo_folder}{hint}")
    table = TO_HUB_WRAPPED if config.vision_config.model_type in WRAPPED_TOWERS else TO_HUB
    kept = [name for name in tensors if name in whole.wanted and name not in target.tied]
    named = {engine.rename(target.former(name), table): tensors[name] for name in kept}
    return config, hub_config(transformers_config(config)), named


def write_processor(zoo_folder: Path, folder: Path, config: ZooLlavaConfig, raw_config: dict) -> None:
    """Writes tokenizer, image processor and processor in files that transformers 4 and 5 read."""
    processor = ZooLlavaProcessor.from_pretrained(zoo_folder)
    engine.write_hub_tokenizer(processor.tokenizer, folder)
    settings = processor.image_processor.to_dict()
    fields = {name: settings[name] for name in (*PIXEL_FIELDS, "do_center_crop")}
    kind, tiled = "CLIPImageProcessor", config.image_grid_pinpoints is not None
    if tiled:
        kind = "LlavaNextImageProcessor"
        fields |= {"do_pad": settings["do_pad"], "image_grid_pinpoints": settings["image_grid_pinpoints"]}
        if not settings["do_center_crop"]:
            fields["crop_size"] = settings["size"]  # it is the tile's size, cropped or not
    elif settings["do_pad_to_square"]:
        kind = "LlavaImageProcessor"
        fields["do_pad"] = True
    elif not settings["do_center_crop"]:
        kind = "SiglipImageProcessor"
    shared = {"processor_class": FORMATS[raw_config["model_type"]][2].__name__}
    engine.write_json(folder / "preprocessor_config.json", {"image_processor_type": kind, **fields, **shared})
    engine.write_json(
        folder / "processor_config.json",
        {
            "image_token": processor.image_token,
            "num_additional_image_tokens": measure_tower(config.vision_config)[1],
            "patch_size": config.vision_config.patch_size,
            "vision_feature_select_strategy": raw_config["vision_feature_select_strategy"],
            **shared,
        },
    )
    if processor.chat_template is not None:
        (folder / "chat_template.jinja").write_text(processor.chat_template, encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


OPTIONS = ("tokenizer", "image_processor", "vision_tower", "base_model")
SCRIPT = flow.Script("llava", open_source, prove, OPTIONS, ZooLlavaConfig)
convert, verify = SCRIPT.convert, SCRIPT.verify


def job(arguments: argparse.Namespace) -> str:
    """Does what the command line asks for and returns what there is to say about it."""
    folder = engine.local_folder(arguments.source) if arguments.reverse else Path()
    home = engine.local_folder(arguments.origin) if arguments.origin else folder
    if not arguments.reverse or (arguments.layout == "source" and (home / engine.RECORD).is_file()):
        return SCRIPT.job(arguments)
    if arguments.dry_run:
        tensors = plan_hub_layout(folder, home)[2]
        return "\n".join(f"{info.name} -> {name}" for name, info in tensors.items())
    report = reverse(
        folder,
        arguments.destination,
        layout=arguments.layout,
        origin=arguments.origin,
        verify=not arguments.no_verify,
        shard_bytes=flow.shard_bytes(arguments),
    )
    return flow.summary(report, arguments.destination)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 0 only when everything was read, written and checked."""
    parser = engine.command_line("conversion.llava", __doc__)
    parser.add_argument(
        "--layout", choices=("source", "hub"), default="source", help="with --reverse: which names; default: source"
    )
    parser.add_argument("--vision-tower", help="folder or hub id of the tower of an original checkpoint")
    parser.add_argument("--base-model", help="folder or hub id of the language model of one that is not whole")
    return engine.run(parser, job, arguments)


if __name__ == "__main__":
    sys.exit(main())
