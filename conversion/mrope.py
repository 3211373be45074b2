"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL checkpoints to the zoo and back.

    python -m conversion.mrope SRC DST                to the zoo, verified; DST/parity.json holds the proof
    python -m conversion.mrope SRC --dry-run          show which tensor becomes which
    python -m conversion.mrope SRC DST --verify       prove a conversion that exists already
    python -m conversion.mrope DST BACK --reverse     back to the source's files, bit for bit

SRC is a folder or a hub id of transformers, with the tensor names of version 5 or of version 4 (those found on the
Hub). Qwen3-VL's mixtures of experts are read too.

Where the format and the zoo differ, the config says so and the numbers stay the source's:

    The language model is a plain Qwen2 or Qwen3; what its positions have of three axes is M-RoPE's.
    Clips have the image token too, the source a token of their own.
    Places after a clip are those of transformers 5. Versions 4.45 to 4.57 moved on by its extent in time as well:
    `positions_after_image="extent"` in the config of the result.
    What stands around a clip of Qwen3-VL is what transformers 5 leaves there: its frames within the marks of vision,
    each with marks of its own. Version 4 took the outer ones away: a tokenizer whose `video_token` is
    `<|vision_start|><|video_pad|><|vision_end|>` does so too.

Pixels of images are the source's, and proven. Clips go through the zoo's processor, which is not compared with
transformers' video processors and is not theirs in all:

    Which frames, Qwen2-VL and Qwen2.5-VL: theirs samples `arange(0, total, total / n)`, never the last frame, and only
    when asked to; the zoo's evenly from the first frame to the last, as Qwen3-VL's does.
    Which size, Qwen2-VL and Qwen2.5-VL: theirs bounds the pixels of each frame, by the `size` of a video processor's
    own, which is not read. Here a frame has at most the pixels of an image, and all frames of a clip together at least
    those of the smallest image and at most `max_clip_tokens`.
    Which size, Qwen3-VL: the most pixels of a clip are those of the video processor's file, where it is there, but a
    frame has at most those of an image; the fewest pixels of a clip are those of an image, not of that file.

Frames that were chosen and resized as transformers would go in as they are with `do_sample_frames=False` and
`do_resize=False`.
"""

import copy
import dataclasses
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoImageProcessor,
    BatchFeature,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlm_zoo.models.image_processing_vlm import ZooImageProcessor
from vlm_zoo.models.mrope import ZooMropeConfig, ZooMropeForConditionalGeneration, ZooMropeProcessor
from vlm_zoo.models.native_vlm import patch_geometry

from . import engine, flow, parity
from .edits import Transpose
from .engine import ConversionError, Table, Target, TensorInfo
from .flow import Source


@dataclass(frozen=True)
class Format:
    """
    A model type of transformers.

    config, model: its classes.
    text_type: the model type of its language model without axes.
    fields: those of the zoo's config that are the same for all of this type.
    """

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    text_type: str
    fields: Mapping


QWEN3 = {"mrope_layout": "interleaved", "video_time": "timestamps"}
FORMATS = {
    "qwen2_vl": Format(
        Qwen2VLConfig, Qwen2VLForConditionalGeneration, "qwen2", {"mrope_layout": "chunked", "video_time": "index"}
    ),
    "qwen2_5_vl": Format(
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        "qwen2",
        {"mrope_layout": "chunked", "video_time": "seconds", "merger_norm": "rms_norm"},
    ),
    "qwen3_vl": Format(Qwen3VLConfig, Qwen3VLForConditionalGeneration, "qwen3", QWEN3),
    "qwen3_vl_moe": Format(Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration, "qwen3_moe", QWEN3),
}

# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------

_VISUAL = r"^(?:model\.)?visual\."
_DEEPER = "model.connector.deepstack_mergers"
FROM_TRANSFORMERS: Table = (
    (rf"{_VISUAL}merger\.(?:ln_q|norm)\.(.+)$", r"model.connector.merger.norm.\1"),
    (rf"{_VISUAL}merger\.(?:mlp\.0|linear_fc1)\.(.+)$", r"model.connector.merger.linear_1.\1"),
    (rf"{_VISUAL}merger\.(?:mlp\.2|linear_fc2)\.(.+)$", r"model.connector.merger.linear_2.\1"),
    (rf"{_VISUAL}deepstack_merger_list\.(\d+)\.norm\.(.+)$", rf"{_DEEPER}.\1.norm.\2"),
    (rf"{_VISUAL}deepstack_merger_list\.(\d+)\.linear_fc([12])\.(.+)$", rf"{_DEEPER}.\1.linear_\2.\3"),
    (rf"{_VISUAL}(.+)$", r"model.vision_tower.\1"),
    (r"^model\.(?:language_model\.)?(.+)$", r"model.language_model.\1"),
    (r"^lm_head\.(.+)$", r"lm_head.\1"),
)
EXPERTS = r"\.mlp\.experts\.(?:gate_up|down)_proj$"


def zoo_target(config: ZooMropeConfig) -> Target:
    """What the zoo's model asks for; the mergers that Qwen's towers hold inside are its connector's."""
    target = flow.zoo_target(ZooMropeForConditionalGeneration, config, flow.IGNORED)
    target.unused = {
        name: shape
        for name, shape in target.unused.items()
        if not name.startswith(("model.vision_tower.merger.", "model.vision_tower.deepstack_merger_list."))
    }
    return target


def transposed_experts(tensors: Mapping[str, TensorInfo], target: Target) -> dict[str, tuple[int, ...]]:
    """
    The experts `[E, in, out]` of a file of version 4, by the zoo's names, with their shapes; version 5 has `[E, out,
    in]`.

    Raises:
        ConversionError: the shapes do not tell the two apart. transformers itself would guess, and say nothing.
    """
    found = {}
    for name, info in tensors.items():
        renamed = engine.rename(name, FROM_TRANSFORMERS)
        if renamed not in target.wanted or not re.search(EXPERTS, renamed):
            continue
        experts, outputs, inputs = target.wanted[renamed]
        if outputs == inputs:
            raise ConversionError(
                f"{name} holds square matrices, {list(info.shape)}: whether version 4 or 5 wrote them, and so which "
                "side of them is the input, cannot be told."
            )
        if info.shape == (experts, inputs, outputs):
            found[renamed] = info.shape
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Configs
# ---------------------------------------------------------------------------------------------------------------------

# What rope_parameters say of the axes, and an older name of rope_type.
AXES = ("mrope_section", "mrope_interleaved", "type")


def plain_text_config(source: PreTrainedConfig, text_type: str) -> PreTrainedConfig:
    """The config of a language model of Qwen-VL as the one without axes has it."""
    config_class = CONFIG_MAPPING[text_type]
    inverse = {stored: name for name, stored in source.attribute_map.items()}
    settings = {inverse.get(name, name): value for name, value in source.to_dict().items()}
    names = {field.name for field in dataclasses.fields(config_class)} | {"head_dim"}  # Qwen3-MoE's is no field
    names -= {"architectures", "transformers_version"}
    kept = {name: value for name, value in settings.items() if name in names}
    kept["rope_parameters"] = {name: value for name, value in source.rope_parameters.items() if name not in AXES}
    if text_type == "qwen3_moe":
        kept["norm_topk_prob"] = True
    return config_class(**kept)


def zoo_config(source: PreTrainedConfig) -> ZooMropeConfig:
    """The zoo's config of a model of transformers."""
    form, vision = FORMATS[source.model_type], source.vision_config
    text = plain_text_config(source.text_config, form.text_type)
    text.tie_word_embeddings = source.tie_word_embeddings
    fields = dict(form.fields)
    if fields["video_time"] == "seconds":
        fields["tokens_per_second"] = vision.tokens_per_second
    if form.text_type != "qwen2":
        fields["deepstack_layers"] = [index + 1 for index in vision.deepstack_visual_indexes] or None
    return ZooMropeConfig(
        vision_config=copy.deepcopy(vision),
        text_config=text,
        image_token_id=source.image_token_id,
        vision_feature_layer=-1,
        num_prefix_tokens=0,
        spatial_merge_size=vision.spatial_merge_size,
        mrope_section=source.text_config.rope_parameters.get("mrope_section"),
        tie_word_embeddings=source.tie_word_embeddings,
        dtype=source.dtype,
        architectures=["ZooMropeForConditionalGeneration"],
        **fields,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Processors
# ---------------------------------------------------------------------------------------------------------------------

IMAGE_TOKEN, VIDEO_TOKEN = "<|image_pad|>", "<|video_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
GEOMETRY_FIELDS = ("patch_size", "temporal_patch_size", "merge_size")


class UpstreamPrompts:
    """
    transformers' image processor and tokenizer, put together as its processor does, which cannot be built without a
    video processor and torchvision.
    """

    def __init__(self, image_processor, tokenizer: PreTrainedTokenizerBase):
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.image_token = str(getattr(tokenizer, "image_token", None) or IMAGE_TOKEN)

    def __call__(self, images, text, return_tensors="pt") -> BatchFeature:
        pixels = self.image_processor(images, return_tensors=return_tensors)
        counts = iter((pixels["image_grid_thw"].prod(dim=1) // self.image_processor.merge_size**2).tolist())
        text = [re.sub(re.escape(self.image_token), lambda found: found[0] * next(counts), sample) for sample in text]
        return BatchFeature({**self.tokenizer(text, return_tensors=return_tensors), **pixels})

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)


class ZooFrames:
    """The zoo's processor, whose images are one frame, with the frames that transformers repeats."""

    def __init__(self, processor: ZooMropeProcessor):
        self.processor = processor

    def __call__(self, **kwargs) -> BatchFeature:
        batch, frames = self.processor(**kwargs), self.processor.image_processor.temporal_patch_size
        patches = batch["pixel_values"].unflatten(1, (3, 1, -1))
        return BatchFeature({**batch, "pixel_values": patches.expand(-1, -1, frames, -1).flatten(1)})


def check_image_processor(source, config: ZooMropeConfig) -> None:
    """Raises `ConversionError` where an image processor of transformers does not belong to the model."""
    kind = flow.class_name(source)
    if kind != "Qwen2VLImageProcessor":
        raise ConversionError(f"The source's image processor is a {kind}, expected a Qwen2VLImageProcessor.")
    geometry = patch_geometry(config.vision_config)
    expected = (geometry.size, geometry.frames, config.spatial_merge_size)
    found = (source.patch_size, source.temporal_patch_size, source.merge_size)
    if found != expected:
        raise ConversionError(
            f"{', '.join(GEOMETRY_FIELDS)} are {found} in the image processor and {expected} in the model: they "
            "belong to different checkpoints."
        )


def zoo_processor(source: UpstreamPrompts, config: ZooMropeConfig, words: Path, pixels: Path) -> ZooMropeProcessor:
    """
    The zoo's processor for a model of this config, with the tokens, pixels and template of transformers' own.

    Args:
        source: transformers' own.
        words, pixels: the folders of its tokenizer and of its image processor.
    """
    fields = flow.pixel_settings(source.image_processor, (*flow.PIXEL_FIELDS, *GEOMETRY_FIELDS))
    named = {"video_token": VIDEO_TOKEN} if VIDEO_TOKEN in source.tokenizer.get_vocab() else {}
    tokenizer = engine.name_image_token(source.tokenizer, source.image_token, **named)
    flow.check_image_token(tokenizer, source.image_token, config.image_token_id)
    fields = {**ZooMropeProcessor.image_fields_from(config), **fields}
    marks = {}
    if config.video_time == "timestamps":
        marks = {"frame_start": VISION_START, "frame_end": VISION_END}
        fields["max_clip_pixels"] = read_clip_pixels(pixels) or fields["max_clip_pixels"]
    return ZooMropeProcessor(
        ZooImageProcessor(**fields),
        tokenizer,
        chat_template=read_template(words, source.tokenizer),
        **ZooMropeProcessor.fields_from(config),
        **marks,
    )


def bound_tokens(config: ZooMropeConfig, image_processor) -> None:
    """Sets the config's bounds to those of an image processor of transformers, which counts pixels."""
    area = (image_processor.patch_size * image_processor.merge_size) ** 2
    config.min_image_tokens = max(1, image_processor.size["shortest_edge"] // area)
    config.max_image_tokens = max(config.min_image_tokens, image_processor.size["longest_edge"] // area)
    config.max_clip_tokens = max(config.max_clip_tokens, config.max_image_tokens)


def read_template(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The processor's chat template, which old files keep apart, or the tokenizer's."""
    path = folder / "chat_template.json"
    return engine.read_json(path)["chat_template"] if path.is_file() else tokenizer.chat_template


def read_clip_pixels(folder: Path) -> int | None:
    """How many pixels Qwen3-VL's video processor gives to all frames of a clip, where its file is there."""
    for name, inner in (("video_preprocessor_config.json", None), ("processor_config.json", "video_processor")):
        if (folder / name).is_file():
            settings = engine.read_json(folder / name)
            settings = settings if inner is None else settings.get(inner, {})
            if "longest_edge" in settings.get("size", {}):
                return settings["size"]["longest_edge"]
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------------


def open_source(name: str | Path, *, tokenizer: str | None = None, image_processor: str | None = None) -> Source:
    """
    Looks at a checkpoint: finds its model type, maps its config, and plans where its tensors go.

    Args:
        name: folder or hub id; a folder whose one subfolder is the checkpoint will do.
        tokenizer, image_processor: folders or hub ids to take instead of the source's own.
    """
    folder = engine.checkpoint_folder(engine.local_folder(name), FORMATS)
    raw_config = engine.read_json(folder / "config.json")
    form = FORMATS.get(raw_config.get("model_type"))
    if form is None:
        raise ConversionError(
            f"{name} is of model type '{raw_config.get('model_type')}'; this script reads {', '.join(FORMATS)}."
        )
    config = zoo_config(form.config.from_pretrained(folder))
    tensors, target = engine.read_checkpoint(folder), zoo_target(config)
    shapes = transposed_experts(tensors, target)
    source = Source(
        name=str(name),
        kind=raw_config["model_type"],
        folder=folder,
        raw_config=raw_config,
        config=config,
        model_class=ZooMropeForConditionalGeneration,
        tensors=tensors,
        plan=engine.plan_tensors(tensors, FROM_TRANSFORMERS, target, str(name), shapes),
        load=lambda: UpstreamQwen(parity.load_strictly(form.model, folder)),
        implementation=f"transformers' {form.model.__name__}",
        edits=dict.fromkeys(shapes, Transpose()),
    )
    words = engine.local_folder(tokenizer) if tokenizer else folder
    pixels = engine.local_folder(image_processor) if image_processor else folder
    missing = engine.missing_parts(words, pixels)
    flow.warn_of_missing(source.name, missing)
    if missing:
        return source
    own = UpstreamPrompts(
        AutoImageProcessor.from_pretrained(pixels, trust_remote_code=False), flow.read_tokenizer(words)
    )
    check_image_processor(own.image_processor, config)
    bound_tokens(config, own.image_processor)
    zoo = zoo_processor(own, config, words, pixels)
    return dataclasses.replace(source, processor=own, zoo_processor=zoo)


# ---------------------------------------------------------------------------------------------------------------------
# In memory
# ---------------------------------------------------------------------------------------------------------------------


def zoo_from_transformers(model: PreTrainedModel) -> ZooMropeForConditionalGeneration:
    """
    The zoo's model with the weights of a model of transformers, in memory: same dtype, device, mode and attention.

    The weights are copies; the two models share nothing.

    Args:
        model: a Qwen2-VL, Qwen2.5-VL or Qwen3-VL for conditional generation.
    """
    config = zoo_config(model.config)
    target = zoo_target(config)
    return flow.in_memory(model, ZooMropeForConditionalGeneration, config, FROM_TRANSFORMERS, target=target)


# ---------------------------------------------------------------------------------------------------------------------
# Proof
# ---------------------------------------------------------------------------------------------------------------------

PROMPT = f"What is shown here? {VISION_START}IMAGE{VISION_END}\nAnd beside it? "


class UpstreamQwen(nn.Module):
    """A Qwen-VL of transformers that takes the zoo's inputs and has the outputs that a proof compares."""

    def __init__(self, upstream: PreTrainedModel):
        super().__init__()
        self.upstream, self.generation_config = upstream, upstream.generation_config
        self.model = nn.Module()
        self.model.vision_tower = upstream.model.visual

    def get_image_features(self, pixel_values, image_grid_thw, image_position_ids=None, **kwargs):
        outputs = self.upstream.get_image_features(
            pixel_values, image_grid_thw=image_grid_thw, output_hidden_states=True, **kwargs
        )
        deeper = [torch.cat(layer) for layer in outputs.get("deepstack_features") or []]
        features = torch.cat((torch.cat(outputs.pooler_output), *deeper), dim=-1)
        return BaseModelOutputWithPooling(pooler_output=[features])

    def forward(self, **kwargs):
        return self.upstream(**self.translated(**kwargs))

    def generate(self, **kwargs) -> torch.Tensor:
        return self.upstream.generate(**self.translated(**kwargs))

    def translated(
        self, input_ids, pixel_values=None, image_grid_thw=None, image_position_ids=None, **kwargs
    ) -> dict[str, torch.Tensor]:
        """Clips apart from images, with their own token."""
        config = self.upstream.config
        visual = input_ids == config.image_token_id
        if image_grid_thw is None:
            return {"input_ids": input_ids, "mm_token_type_ids": visual.int(), **kwargs}
        is_clip, counts = image_grid_thw[:, 0] > 1, image_grid_thw.prod(dim=1)
        of_clip = torch.zeros_like(visual)
        of_clip[visual] = is_clip.repeat_interleave(counts // config.vision_config.spatial_merge_size**2)
        kwargs |= {
            "input_ids": input_ids.masked_fill(of_clip, config.video_token_id),
            "mm_token_type_ids": visual.int() + of_clip.int(),
        }
        for name, own in (("image", ~is_clip), ("video", is_clip)):
            if own.any():
                pixels = "pixel_values" if name == "image" else "pixel_values_videos"
                kwargs[pixels] = pixel_values[own.repeat_interleave(counts)]
                kwargs[f"{name}_grid_thw"] = image_grid_thw[own]
        if image_position_ids is not None:
            kwargs["second_per_grid_ts"] = image_position_ids[is_clip, 1] / config.vision_config.tokens_per_second
        return kwargs


def prove(source: Source, folder: Path) -> dict:
    """
    Runs the source's implementation and the zoo's on the same inputs: random patches and ids, of images of several
    sizes, several images, and clips; with a processor, also random images through both processors.

    Returns:
        The report, `passed` or not.
    """
    rows = random_rows(source.config, source.raw_config.get("video_token_id"))
    prompt = "" if source.processor is None else PROMPT.replace("IMAGE", source.processor.image_token)
    edge = patch_geometry(source.config.vision_config).size * source.config.spatial_merge_size
    more, sizes = edge // 4, [(4 * edge, 6 * edge)]  # of which both sides stay, shrink, or grow
    sizes += [(3 * edge + more, 5 * edge + more), (7 * edge - more, 3 * edge - more)]
    return flow.prove(source, folder, rows, prompt, sizes=sizes, zoo_processor=ZooFrames)


def random_rows(config: ZooMropeConfig, video_token_id: int | None = None) -> list[parity.Row]:
    """
    Random patches and ids of `parity.NATIVE_GRIDS`.

    Args:
        config: the zoo's config.
        video_token_id: a token of the source that must not stand in its text.
    """
    generator = torch.Generator().manual_seed(0)
    plain, geometry = parity.plain_tokens(config), patch_geometry(config.vision_config)
    plain, rows = plain[plain != video_token_id], []
    for grids in map(torch.tensor, parity.NATIVE_GRIDS):
        pieces = parity.random_text(plain, (3,), generator)
        for times, height, width in grids.tolist():
            frames = [1] * times if config.video_time == "timestamps" else [times]
            for count in frames:
                pieces.append(torch.full((count * height * width,), config.image_token_id))
                pieces += parity.random_text(plain, (2,), generator)
        side = torch.tensor([1, config.spatial_merge_size, config.spatial_merge_size])
        shape = int((grids * side).prod(dim=1).sum()), geometry.values * geometry.frames
        vision_inputs = {
            "pixel_values": torch.randn(*shape, generator=generator),
            "image_grid_thw": grids * side,
        }
        if config.video_time == "seconds" and bool((grids[:, 0] > 1).any()):
            seconds = torch.arange(int(grids[:, 0].max()))
            vision_inputs["image_position_ids"] = (seconds * config.tokens_per_second).long().expand(len(grids), -1)
        rows.append(parity.Row(parity.text_inputs(torch.cat(pieces)), vision_inputs))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


SCRIPT = flow.Script("mrope", open_source, prove, ("tokenizer", "image_processor"), ZooMropeConfig)
convert, verify, reverse = SCRIPT.convert, SCRIPT.verify, SCRIPT.reverse


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 0 only when everything was read, written and checked."""
    return engine.run(engine.command_line("conversion.mrope", __doc__), SCRIPT.job, arguments)


if __name__ == "__main__":
    sys.exit(main())
