"""Flamingo checkpoints to the zoo and back.

    python -m conversion.flamingo SRC DST                to the zoo, verified; DST/parity.json holds the proof
    python -m conversion.flamingo SRC --dry-run          show which tensor becomes which
    python -m conversion.flamingo SRC DST --verify       prove a conversion that exists already
    python -m conversion.flamingo DST BACK --reverse     back to the source's files, bit for bit

SRC is a folder or a hub id in one of these formats:

    IDEFICS         IdeficsForVisionText2Text of transformers 4 or 5
    OpenFlamingo    what a training saved, as a file or in its folder; vision tower and language model beside it, or
                    named by --vision-tower and --language-model

Where a format and the zoo differ, the config says so and the numbers stay the source's:

    The feed-forward of the gated blocks runs on tokens that see no image too: `feed_forward_without_media`.
    IDEFICS keeps the tokens that it adds in tables of their own; here they are the last rows of one table.
    IDEFICS takes a mask that says which token sees which images. Its processor lets a token see the last image before
    it, as the zoo does by itself; after an end of sequence its processor lets a token see nothing, where the zoo's
    model, without that mask, still sees that image. The converted model takes the mask and the padded images too.
"""

import copy
import logging
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import (
    BatchFeature,
    CLIPVisionConfig,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsProcessor,
    LlamaConfig,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlm_zoo.models.flamingo import (
    ZooFlamingoConfig,
    ZooFlamingoForConditionalGeneration,
    ZooFlamingoProcessor,
)
from vlm_zoo.models.image_processing_vlm import ZooImageProcessor

from . import engine, flow, openflamingo, openflamingo_model, parity
from .engine import ConversionError, Table, TensorInfo
from .flow import Source


logger = logging.getLogger(__name__)

IMAGE_TOKEN, FAKE_TOKEN, END_OF_UTTERANCE = "<image>", "<fake_token_around_image>", "<end_of_utterance>"
AROUND = f"{FAKE_TOKEN}{IMAGE_TOKEN}{FAKE_TOKEN}"  # how IDEFICS writes an image

# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------

FROM_IDEFICS: Table = (
    (r"^model\.vision_model\.(.+)$", r"model.vision_tower.\1"),
    (r"^model\.perceiver_resampler\.latents$", "model.connector.latents"),
    (r"^model\.perceiver_resampler\.layer_norm\.(.+)$", r"model.connector.norm.\1"),
    *(
        (rf"^model\.perceiver_resampler\.blocks\.(\d+)\.{source}\.(.+)$", rf"model.connector.layers.\1.{zoo}.\2")
        for source, zoo in {
            r"0\.context_layer_norm": "media_norm",
            r"0\.latents_layer_norm": "latents_norm",
            r"0\.q_proj": "query",
            r"0\.k_proj": "key",
            r"0\.v_proj": "value",
            r"0\.output_proj": "output",
            r"0\.q_layer_norm": "query_norm",
            r"0\.k_layer_norm": "key_norm",
            r"1\.ln": "feed_forward_norm",
            r"1\.fc": "feed_forward_in",
            r"1\.c_proj": "feed_forward_out",
        }.items()
    ),
    (r"^model\.gated_cross_attn_layers\.(\d+)\.alpha_cross_attn$", r"model.fusion.blocks.\1.attention_gate"),
    (r"^model\.gated_cross_attn_layers\.(\d+)\.alpha_dense$", r"model.fusion.blocks.\1.feed_forward_gate"),
    *(
        (rf"^model\.gated_cross_attn_layers\.(\d+)\.{source}\.(.+)$", rf"model.fusion.blocks.\1.{zoo}.\2")
        for source, zoo in {
            "input_layernorm": "attention_norm",
            r"cross_attn\.q_proj": "query",
            r"cross_attn\.k_proj": "media.key",
            r"cross_attn\.v_proj": "media.value",
            r"cross_attn\.o_proj": "output",
            r"cross_attn\.q_layer_norm": "query_norm",
            r"cross_attn\.k_layer_norm": "media.key_norm",
            r"cross_attn\.rotary_emb": "rotary_emb",
            "post_attention_layernorm": "feed_forward_norm",
            r"mlp\.up_proj": "feed_forward_in",
            r"mlp\.gate_proj": "feed_forward_gate_in",
            r"mlp\.down_proj": "feed_forward_out",
        }.items()
    ),
    (r"^model\.((?:embed_tokens|layers|norm)\..+)$", r"model.language_model.\1"),
    (r"^lm_head\.weight$", "lm_head.weight"),
)
# Rows of one table that IDEFICS keeps in two.
JOINED = {
    "model.embed_tokens.weight": "model.embed_tokens.additional_embedding.weight",
    "lm_head.weight": "lm_head.additional_fc.weight",
}
# A vector for each channel that IDEFICS keeps as [1, 1, channels].
FLAT = r"\.alpha_(?:cross_attn|dense)$"


def one_table(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of an IDEFICS as the zoo has them: one vocabulary, gates that are vectors."""
    prepared = {}
    for name, info in tensors.items():
        added = tensors.get(JOINED.get(name))
        if added is not None:
            prepared[name] = engine.join_rows((info, added))
        elif re.search(FLAT, name):
            prepared[name] = replace(info, shape=(torch.Size(info.shape).numel(),))
        elif not any(name == other and first in tensors for first, other in JOINED.items()):
            prepared[name] = info
    return prepared


# ---------------------------------------------------------------------------------------------------------------------
# Configs
# ---------------------------------------------------------------------------------------------------------------------

TEXT_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "rms_norm_eps",
    "initializer_range",
    "max_position_embeddings",
    "rope_parameters",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "use_cache",
    "tie_word_embeddings",
)
VISION_FIELDS = (
    "image_size",
    "intermediate_size",
    "patch_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
    "initializer_range",
    "initializer_factor",
)
# IDEFICS adds `<fake_token_around_image>`, then `<image>`.
IMAGE_PLACE = 1


def zoo_config(source: IdeficsConfig, image_token_id: int | None = None) -> ZooFlamingoConfig:
    """
    The zoo's config of an IDEFICS.

    Args:
        source: the config, which does not say which token is the image's.
        image_token_id: that token; by default the second of the additional ones, as in the published models.
    """
    if image_token_id is None:
        if source.additional_vocab_size <= IMAGE_PLACE:
            raise ConversionError(
                f"This IDEFICS has {source.additional_vocab_size} additional tokens, and no config says which one "
                "is the image's: its tokenizer must, or --image-token-id."
            )
        image_token_id = source.vocab_size + IMAGE_PLACE
    if source.dropout:
        logger.warning("IDEFICS drops out %s of its residual states in training, the zoo none.", source.dropout)
    perceiver, vision = source.perceiver_config, source.vision_config
    resampler = {"resampler_depth": 0}
    if source.use_resampler:
        resampler = {
            "num_latents": perceiver.resampler_n_latents,
            "resampler_depth": perceiver.resampler_depth,
            "resampler_num_heads": perceiver.resampler_n_heads,
            "resampler_head_dim": perceiver.resampler_head_dim,
            "resampler_qk_norm": perceiver.qk_layer_norms_perceiver,
            "resampler_hidden_act": "relu",
        }
    return ZooFlamingoConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision.embed_dim, **{name: getattr(vision, name) for name in VISION_FIELDS}
        ),
        text_config=LlamaConfig(
            vocab_size=source.vocab_size + source.additional_vocab_size,
            attention_dropout=source.dropout,
            **{name: copy.deepcopy(getattr(source, name)) for name in TEXT_FIELDS},
        ),
        image_token_id=image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        **resampler,
        num_frame_embeddings=0,
        cross_attention_interval=source.cross_layer_interval,
        cross_attention_layers=list(range(0, source.num_hidden_layers, source.cross_layer_interval)),
        cross_attention_num_heads=source.num_attention_heads,
        cross_attention_head_dim=source.hidden_size // source.num_attention_heads,
        cross_attention_norm="rms_norm",
        cross_attention_norm_eps=source.rms_norm_eps,
        cross_attention_qk_norm=source.qk_layer_norms,
        feed_forward_size=source.intermediate_size,
        feed_forward_act=source.hidden_act,
        gated_feed_forward=True,
        gate_type="vector" if source.alpha_type == "vector" else "scalar",
        feed_forward_without_media=True,
        tie_word_embeddings=source.tie_word_embeddings,
        dtype=source.dtype,
        architectures=["ZooFlamingoForConditionalGeneration"],
    )


# ---------------------------------------------------------------------------------------------------------------------
# Processors
# ---------------------------------------------------------------------------------------------------------------------

# IDEFICS was instructed in this conversation; its first model, which has no END, was not.
CHAT_TEMPLATE = """\
{%- macro render(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for item in content -%}
            {%- if item.type != 'image' -%}
                {{- item.text -}}
            {%- elif loop.first or loop.previtem.type != 'image' -%}
                {{- '<fake_token_around_image><image><fake_token_around_image>' -}}
            {%- else -%}
                {{- '<image><fake_token_around_image>' -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {{- 'Assistant:' -}}
        {%- generation -%}
        {{- ' ' + render(message.content) + 'END' -}}
        {%- endgeneration -%}
        {{- '\\n' -}}
    {%- elif message.role == 'user' -%}
        {{- 'User: ' + render(message.content) + 'END\\n' -}}
    {%- else -%}
        {{- render(message.content) + 'END\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'Assistant:' -}}
{%- endif -%}
"""


def idefics_processor(source: IdeficsProcessor) -> ZooFlamingoProcessor:
    """The zoo's processor with the tokens and pixels of an IDEFICS'."""
    tokenizer = engine.name_image_token(source.tokenizer, IMAGE_TOKEN)
    end = END_OF_UTTERANCE if END_OF_UTTERANCE in tokenizer.get_vocab() else ""
    return ZooFlamingoProcessor(
        ZooImageProcessor(**flow.pixel_settings(source.image_processor), do_center_crop=False),
        tokenizer,
        chat_template=source.chat_template or CHAT_TEMPLATE.replace("END", end),
    )


class IdeficsPrompts:
    """An IDEFICS' processor, which takes texts and images in turn and begins them, called as others are: images, and
    text with image tokens."""

    def __init__(self, processor: IdeficsProcessor):
        self.processor, self.image_processor = processor, processor.image_processor

    def __call__(self, images, text, return_tensors="pt") -> BatchFeature:
        rest, prompts = iter(images), []
        for sample in text:
            first, *others = sample.removeprefix(self.processor.tokenizer.bos_token).split(AROUND)
            prompts.append([first, *(part for other in others for part in (next(rest), other))])
        batch = self.processor(text=prompts, return_tensors=return_tensors)
        pixels = [
            row[: (ids == self.processor.image_token_id).sum()]
            for row, ids in zip(batch["pixel_values"], batch["input_ids"], strict=True)
        ]
        return BatchFeature({**batch, "pixel_values": torch.cat(pixels)})

    def decode(self, ids: list[int]) -> str:
        return self.processor.tokenizer.decode(ids)


# ---------------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------------

PROMPT = "What is shown here?IMAGEAnd what is beside it?"


def idefics_inputs(
    input_ids: torch.Tensor, pixel_values: torch.Tensor, image_token_id: int, only_immediate_media: bool = True
) -> dict[str, torch.Tensor]:
    """
    The images of a batch as an IDEFICS takes them.

    Args:
        input_ids (`int[B, T]`): tokens, with an image token for each image.
        pixel_values (`float[I, C, H, W]`): the images of all rows, one after the other.
        image_token_id: that token.
        only_immediate_media: a token sees the last image before it, or all images before it.

    Returns:
        `pixel_values` float[B, M, C, H, W], padded with blank images, and `image_attention_mask` int[B, T, M].
    """
    time = (input_ids == image_token_id).cumsum(dim=1)  # int[B, T], how many images of the row came so far
    counts = time[:, -1].tolist()
    padded = pixel_values.new_zeros(len(counts), max(1, *counts), *pixel_values.shape[1:])
    for row, images in zip(padded, pixel_values.split(counts), strict=True):
        row[: len(images)] = images
    order = torch.arange(1, padded.shape[1] + 1, device=time.device)
    time = time[..., None]
    mask = time == order if only_immediate_media else time >= order
    return {"pixel_values": padded, "image_attention_mask": mask.long()}


class UpstreamIdefics(nn.Module):
    """transformers' IDEFICS with the inputs of the zoo's model."""

    def __init__(self, upstream: IdeficsForVisionText2Text, image_token_id: int):
        super().__init__()
        self.upstream, self.image_token_id = upstream, image_token_id
        self.generation_config = upstream.generation_config
        self.model = nn.Module()
        self.model.vision_tower = UpstreamTower(upstream.model.vision_model)

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        states = self.model.vision_tower(pixel_values).last_hidden_state
        if self.upstream.config.use_resampler:
            states = self.upstream.model.perceiver_resampler(states)
        return BaseModelOutputWithPooling(pooler_output=list(states))

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor, **kwargs):
        return self.upstream(input_ids, **idefics_inputs(input_ids, pixel_values, self.image_token_id), **kwargs)

    def generate(self, input_ids: torch.Tensor, pixel_values: torch.Tensor, **kwargs) -> torch.Tensor:
        images = idefics_inputs(input_ids, pixel_values, self.image_token_id)
        return self.upstream.generate(input_ids=input_ids, **images, **kwargs)


class UpstreamTower(nn.Module):
    """An IDEFICS' tower, which returns its last hidden state alone, with a place for the others."""

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.tower = tower

    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        outputs = self.tower(pixel_values)
        before = (None,) * len(self.tower.encoder.layers)
        return BaseModelOutputWithPooling(
            outputs.last_hidden_state, hidden_states=(*before, outputs.last_hidden_state)
        )


def open_source(
    name: str | Path,
    *,
    tokenizer: str | None = None,
    image_processor: str | None = None,
    image_token_id: int | None = None,
    **parts,
) -> Source:
    """
    Looks at a checkpoint: finds its format, maps its config, and plans where its tensors go.

    Args:
        name: file, folder or hub id; a folder whose one subfolder is the checkpoint will do.
        tokenizer, image_processor: folders or hub ids to take instead of the source's own.
        image_token_id: the image token, where neither tokenizer nor config say it.
        parts: those of an OpenFlamingo and what they do not say, see `openflamingo.read_parts`.
    """
    folder = engine.local_folder(name)
    if openflamingo.is_openflamingo(folder):
        if image_processor is not None:
            raise ConversionError(
                f"{name} is a save of OpenFlamingo, which treats all images alike: --image-processor "
                "means nothing to it."
            )
        return _open_openflamingo(str(name), folder, tokenizer, image_token_id, parts)
    given = [f"--{option.replace('_', '-')}" for option, value in parts.items() if value is not None]
    if given:
        raise ConversionError(f"{name} is no save of OpenFlamingo: {', '.join(given)} mean nothing to it.")
    folder = engine.checkpoint_folder(folder, {"idefics"})
    return _open_idefics(str(name), folder, tokenizer, image_processor, image_token_id)


def _open_idefics(
    name: str, folder: Path, tokenizer: str | None, image_processor: str | None, image_token_id: int | None
) -> Source:
    raw_config = engine.read_json(folder / "config.json")
    if raw_config.get("model_type") != "idefics":
        raise ConversionError(
            f"{name} is of model type '{raw_config.get('model_type')}'; this script reads idefics and OpenFlamingo's."
        )
    words = engine.local_folder(tokenizer) if tokenizer else folder
    pixels = engine.local_folder(image_processor) if image_processor else folder
    processor, missing = None, engine.missing_parts(words, pixels)
    flow.warn_of_missing(name, missing)
    if not missing:
        processor = flow.read_processor(IdeficsProcessor, folder, pixels, words)
        image_token_id = _same_image_token(processor.tokenizer, image_token_id)
    config = zoo_config(IdeficsConfig.from_pretrained(folder), image_token_id)
    tensors = one_table(engine.read_checkpoint(folder))
    target = flow.zoo_target(ZooFlamingoForConditionalGeneration, config, flow.IGNORED)
    return Source(
        name=name,
        kind="idefics",
        folder=folder,
        raw_config=raw_config,
        config=config,
        model_class=ZooFlamingoForConditionalGeneration,
        tensors=tensors,
        plan=engine.plan_tensors(tensors, FROM_IDEFICS, target, name),
        load=lambda: UpstreamIdefics(parity.load_strictly(IdeficsForVisionText2Text, folder), config.image_token_id),
        implementation="transformers' IdeficsForVisionText2Text",
        processor=None if processor is None else IdeficsPrompts(processor),
        zoo_processor=None if processor is None else idefics_processor(processor),
    )


def _same_image_token(tokenizer: PreTrainedTokenizerBase, expected: int | None) -> int:
    found = tokenizer.get_vocab().get(IMAGE_TOKEN)
    if found is None or expected not in (None, found):
        raise ConversionError(
            f"The tokenizer's {IMAGE_TOKEN} is {found}, expected {'an id' if expected is None else expected}: "
            "tokenizer and model belong to different checkpoints."
        )
    return found


def _open_openflamingo(
    name: str, path: Path, tokenizer: str | None, image_token_id: int | None, options: Mapping
) -> Source:
    parts = openflamingo.read_parts(path, **options)
    words = engine.local_folder(tokenizer) if tokenizer else parts.language_folder
    processor = zoo_processor = found = None
    if words is not None and engine.has_tokenizer(words):
        found = openflamingo.read_tokenizer(words)
        processor = openflamingo.OriginalProcessor(found, parts.vision_config.image_size)
        zoo_processor = openflamingo.zoo_processor(processor)
    else:
        flow.warn_of_missing(name, ["tokenizer"])
    rows = openflamingo.embedding_rows(parts)
    image_token_id = openflamingo.find_image_token(parts, rows, found, image_token_id)
    config = openflamingo.zoo_config(parts, image_token_id)
    target = flow.zoo_target(ZooFlamingoForConditionalGeneration, config, openflamingo.IGNORED)
    tensors, shapes = openflamingo.split_tensors(parts.tensors), openflamingo.resized(parts, rows)
    return Source(
        name=name,
        kind="openflamingo",
        folder=parts.language_folder or parts.home,
        raw_config=parts.text_config.to_dict(),
        config=config,
        model_class=ZooFlamingoForConditionalGeneration,
        tensors=tensors,
        plan=engine.plan_tensors(tensors, parts.table, target, name, shapes),
        load=lambda: openflamingo_model.OriginalFlamingo(parts, config),
        implementation="what OpenFlamingo's code computes, on transformers' language model",
        processor=processor,
        zoo_processor=zoo_processor,
        eos_token_id=openflamingo.end_of_chunk(config),
        edits={key: openflamingo.resize(shape, rows) for key, shape in shapes.items()},
        apart=parts.apart(),
        beside=parts.beside(),
    )


# ---------------------------------------------------------------------------------------------------------------------
# To the zoo
# ---------------------------------------------------------------------------------------------------------------------


def zoo_from_transformers(
    model: IdeficsForVisionText2Text, image_token_id: int | None = None
) -> ZooFlamingoForConditionalGeneration:
    """
    The zoo's model with the weights of a model of transformers, in memory: same dtype, device, mode and attention.

    The weights are copies; the two models share nothing.

    Args:
        model: an IDEFICS.
        image_token_id: see `zoo_config`.
    """
    config = zoo_config(model.config, image_token_id)
    return flow.in_memory(model, ZooFlamingoForConditionalGeneration, config, FROM_IDEFICS, one_table)


# ---------------------------------------------------------------------------------------------------------------------
# Proof
# ---------------------------------------------------------------------------------------------------------------------


def prove(source: Source, folder: Path) -> dict:
    """
    Runs the source's implementation and the zoo's on the same inputs: several images in a row, tokens before the
    first, clips where the source takes them; with a processor, also random images through both processors.

    Returns:
        The report, `passed` or not.
    """
    rows = random_rows(source.config, clips=source.kind == "openflamingo")
    prompt = PROMPT.replace("IMAGE", IMAGE_TOKEN)
    if source.kind == "idefics" and source.zoo_processor is not None:
        tokenizer = source.zoo_processor.tokenizer
        begins_itself = tokenizer("a").input_ids[0] == tokenizer.bos_token_id
        prompt = ("" if begins_itself else tokenizer.bos_token) + PROMPT.replace("IMAGE", AROUND)
    return flow.prove(source, folder, rows, prompt)


def random_rows(config: ZooFlamingoConfig, clips: bool) -> list[parity.Row]:
    """Random pixels and ids: an image, images side by side, several images, and two clips of other lengths."""
    generator = torch.Generator().manual_seed(0)
    plain, vision = parity.plain_tokens(config), config.vision_config
    rows = []
    for gaps in ([4, 6], [0, 3, 0, 5], [3, 4, 2, 4], [2, 4, 4]):
        pieces = parity.random_text(plain, gaps, generator)
        image = torch.tensor([config.image_token_id])
        ids = torch.cat([pieces[0], *(piece for gap in pieces[1:] for piece in (image, gap))])
        frames = [1] * (len(gaps) - 1)
        if clips and len(gaps) == 3:
            frames = [2, 3]
        shape = (sum(frames), vision.num_channels, vision.image_size, vision.image_size)
        vision_inputs = {"pixel_values": torch.randn(shape, generator=generator)}
        if max(frames) > 1:
            vision_inputs["image_grid_thw"] = torch.tensor([[count, 1, 1] for count in frames])
        rows.append(parity.Row(parity.text_inputs(ids), vision_inputs))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------

OPTIONS = ("tokenizer", "image_processor", "image_token_id", "language_model", "vision_tower", "vision_heads",
           "vision_act")  # fmt: skip


SCRIPT = flow.Script("flamingo", open_source, prove, OPTIONS, ZooFlamingoConfig)
convert, verify, reverse = SCRIPT.convert, SCRIPT.verify, SCRIPT.reverse


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 0 only when everything was read, written and checked."""
    parser = engine.command_line("conversion.flamingo", __doc__)
    parser.add_argument("--image-token-id", type=int, help="the image token, where no tokenizer and no config say it")
    parser.add_argument("--language-model", help="folder or hub id of an OpenFlamingo's language model")
    parser.add_argument("--vision-tower", help="folder or hub id of its CLIP, or a file of open_clip")
    parser.add_argument("--vision-heads", type=int, help="heads of open_clip's tower, where no release is as wide")
    parser.add_argument("--vision-act", help="activation of open_clip's tower, such as quick_gelu")
    return engine.run(parser, SCRIPT.job, arguments)


if __name__ == "__main__":
    sys.exit(main())
