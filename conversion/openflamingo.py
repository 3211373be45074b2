"""OpenFlamingo's own checkpoints: their parts, their names, their config.

A training saves what it trained: the resampler, the gated blocks, and whatever has "embed" in its name. The vision
tower of open_clip and the language model are checkpoints of their own, unless all of it was saved at once.

    checkpoint.pt, checkpoint_3.pt   perceiver.*, the gated_cross_attn_layer.* and *embed* of lang_encoder.*
    open_clip_visual.pt              conv1, class_embedding, ln_pre, transformer.resblocks.N.*, ln_post, proj
    llm/, clip/                      a language model and a tower in transformers' format, under any name
    full.pt                          all of it, and the same tensors again under the names of `ALIASES`

What trained stands in for what it was trained from. No file says which token is the image's, nor how many heads and
which activation the tower of open_clip has, nor what config the language model of a full save has. Options say it, or
a JSON file beside the parts: `lang_config`, `media_token_id`, `vision_heads`, `vision_hidden_act`.

Features are those of open_clip up to 2.23, patches before `ln_post`; later versions hand over other ones, for which no
model was trained. One deviation in pixels: where three are to be cut in all, or seven, the upstream's crop lies one
pixel further down or right.
"""

import copy
import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    BatchFeature,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from vlm_zoo.models.flamingo import ZooFlamingoConfig, ZooFlamingoProcessor
from vlm_zoo.models.image_processing_vlm import ZooImageProcessor

from . import engine, flow, llava_original
from .edits import CutRows, Edit, FillRows
from .engine import ConversionError, Table, TensorInfo


logger = logging.getLogger(__name__)

IMAGE_TOKEN, END_OF_CHUNK, PAD_TOKEN = "<image>", "<|endofchunk|>", "<PAD>"
# Its attention always has these.
NUM_HEADS, HEAD_DIM = 8, 64
LANGUAGE = "language model: "  # marks the names of a language model that is a checkpoint of its own
TOWER = "open_clip: "  # and those of a tower of open_clip
TOWER_FILE = "open_clip_visual.pt"
# By width, the heads of open_clip's towers: B, L, H, g and G.
TOWER_HEADS = {768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}
# All published OpenFlamingos see with OpenAI's L.
OPENAI_WIDTH = 1024


@dataclass(frozen=True)
class Decoder:
    """Where a language model keeps its layers and embeddings, its body's name, and its head's name in older files."""

    layers: str
    embeddings: str
    body: str = "model"
    head: str = "lm_head"


DECODERS = {
    "llama": Decoder("model.layers", "embed_tokens"),
    "opt": Decoder("model.decoder.layers", "decoder.embed_tokens"),
    "gpt_neox": Decoder("gpt_neox.layers", "embed_in", "gpt_neox", "embed_out"),
}

# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------

# Second names of tensors in full saves, and of gated layers in the first training saves.
ALIASES = {
    "gated_cross_attn_layers": "gated_cross_attn_layer",
    "old_decoder_blocks": "decoder_layer",
}
# Tensors that are several of the zoo's, one below the other.
SPLIT = (
    (r"\.to_kv\.", (".to_k.", ".to_v.")),
    (r"\.attn\.in_proj_", (".attn.q_proj.", ".attn.k_proj.", ".attn.v_proj.")),
)
# Buffers that files carry and no model reads, and open_clip's projection, which OpenFlamingo never uses.
IGNORED = (r"\.rotary_emb\.inv_freq$", r"\.attention\.(?:masked_)?bias$", r"\.embeddings\.position_ids$", r"^proj$")

OPEN_CLIP = rf"^(?:(?:module\.)?vision_encoder\.|{TOWER})"
SAVED = r"^(?:module\.)?"
GATED = r"\.(\d+)\.gated_cross_attn_layer\."


def name_table(decoder: Decoder, gated_layers: list[int]) -> Table:
    """The renames for a language model with a block before each of these layers."""
    layers = re.escape(decoder.layers)
    blocks = [
        (
            rf"{SAVED}lang_encoder\.{layers}\.{layer}\.gated_cross_attn_layer\.{source}",
            rf"model.fusion.blocks.{place}.{zoo}",
        )
        for place, layer in enumerate(gated_layers)
        for source, zoo in {
            "attn_gate$": "attention_gate",
            "ff_gate$": "feed_forward_gate",
            r"attn\.norm\.(.+)$": r"attention_norm.\1",
            r"attn\.to_q\.(.+)$": r"query.\1",
            r"attn\.to_k\.(.+)$": r"media.key.\1",
            r"attn\.to_v\.(.+)$": r"media.value.\1",
            r"attn\.to_out\.(.+)$": r"output.\1",
            r"ff\.0\.(.+)$": r"feed_forward_norm.\1",
            r"ff\.1\.(.+)$": r"feed_forward_in.\1",
            r"ff\.3\.(.+)$": r"feed_forward_out.\1",
        }.items()
    ]
    resampler = [
        (rf"{SAVED}perceiver\.layers\.(\d+)\.{source}\.(.+)$", rf"model.connector.layers.\1.{zoo}.\2")
        for source, zoo in {
            r"0\.norm_media": "media_norm",
            r"0\.norm_latents": "latents_norm",
            r"0\.to_q": "query",
            r"0\.to_k": "key",
            r"0\.to_v": "value",
            r"0\.to_out": "output",
            r"1\.0": "feed_forward_norm",
            r"1\.1": "feed_forward_in",
            r"1\.3": "feed_forward_out",
        }.items()
    ]
    tower = [
        (rf"{OPEN_CLIP}transformer\.resblocks\.(\d+)\.{source}(.+)$", rf"model.vision_tower.encoder.layers.\1.{zoo}\2")
        for source, zoo in {
            r"ln_1\.": "layer_norm1.",
            r"ln_2\.": "layer_norm2.",
            r"attn\.": "self_attn.",
            r"mlp\.c_fc\.": "mlp.fc1.",
            r"mlp\.c_proj\.": "mlp.fc2.",
        }.items()
    ]
    return (
        *tower,
        (rf"{OPEN_CLIP}class_embedding$", "model.vision_tower.embeddings.class_embedding"),
        (rf"{OPEN_CLIP}positional_embedding$", "model.vision_tower.embeddings.position_embedding.weight"),
        (rf"{OPEN_CLIP}conv1\.(.+)$", r"model.vision_tower.embeddings.patch_embedding.\1"),
        (rf"{OPEN_CLIP}ln_pre\.(.+)$", r"model.vision_tower.pre_layrnorm.\1"),
        (rf"{OPEN_CLIP}ln_post\.(.+)$", r"model.vision_tower.post_layernorm.\1"),
        (rf"{OPEN_CLIP}(proj)$", r"\1"),
        (rf"^{llava_original.APART}(?:vision_model\.)?(.+)$", r"model.vision_tower.\1"),
        (rf"{SAVED}perceiver\.latents$", "model.connector.latents"),
        (rf"{SAVED}perceiver\.frame_embs$", "model.connector.frame_embeddings"),
        (rf"{SAVED}perceiver\.norm\.(.+)$", r"model.connector.norm.\1"),
        *resampler,
        *blocks,
        (rf"^(?:(?:module\.)?lang_encoder\.|{LANGUAGE})(?:lm_head|{decoder.head})\.(.+)$", r"lm_head.\1"),
        (
            rf"{SAVED}lang_encoder\.{decoder.body}\.(.*\d+)\.decoder_layer\.(.+)$",
            r"model.language_model.\1.\2",
        ),
        (rf"{SAVED}lang_encoder\.{decoder.body}\.(.+)$", r"model.language_model.\1"),
        (rf"^{LANGUAGE}(?:{decoder.body}\.)?(.+)$", r"model.language_model.\1"),
    )


def without_aliases(tensors: Mapping[str, TensorInfo], decoder: Decoder) -> dict[str, TensorInfo]:
    """The tensors of a save, each under one name; what has an alias alone gets its proper name. Two different tensors
    under the names of one are a `ConversionError`."""
    found, twins = {}, {}
    for name, info in tensors.items():
        proper = name
        for alias, inner in ALIASES.items():
            proper = re.sub(rf"lang_encoder\.{alias}\.(\d+)\.", rf"lang_encoder.{decoder.layers}.\1.{inner}.", proper)
        if proper == name or proper not in tensors:
            found[proper] = info
        else:
            twins[name] = proper
    pairs = {key: tensors[key] for pair in twins.items() for key in pair}
    read = engine.read_tensors(pairs)
    different = [
        f"{name} and {twin}"
        for (name, one), (twin, other) in zip(read, read, strict=True)
        if not torch.equal(one, other)
    ]
    if different:
        raise ConversionError("The save holds one tensor under two names, with two values:", {"duplicated": different})
    return found


def split_tensors(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors with those of `SPLIT` in pieces."""
    pieces = {}
    for name, info in tensors.items():
        for pattern, replacements in SPLIT:
            if re.search(pattern, name):
                size = info.shape[0] // len(replacements)
                parts = engine.split_rows(info, [size] * len(replacements))
                pieces |= {
                    re.sub(pattern, replacement, name): part
                    for replacement, part in zip(replacements, parts, strict=True)
                }
                break
        else:
            pieces[name] = info
    return pieces


# ---------------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Parts:
    """
    A checkpoint and what belongs to it.

    home: the folder of what trained.
    facts: what a JSON file beside it says; facts_file: that file.
    decoder, text_config: the language model.
    language_folder: its folder in transformers' format, if there is one.
    vision_config: the tower's config; `CLIPVisionConfig` for open_clip's too.
    tower_file: where the tower's tensors are.
    tensors: all tensors, named as in their files, those of parts with a mark before.
    gated_layers: the layers with a block before them.
    """

    home: Path
    facts: dict
    facts_file: Path | None
    decoder: Decoder
    text_config: PreTrainedConfig
    language_folder: Path | None
    vision_config: PreTrainedConfig
    tower_file: Path | None
    tensors: dict[str, TensorInfo]
    gated_layers: list[int]

    def apart(self) -> dict[Path, str]:
        """Its parts, and where they are looked for beside the save."""
        parts = {} if self.language_folder is None else {self.language_folder: "llm"}
        if self.tower_file is not None and self.vision_config_is_saved():
            parts[self.tower_file.parent] = "clip"
        elif self.tower_file is not None:
            parts[self.tower_file] = TOWER_FILE
        return parts

    def beside(self) -> tuple[Path, ...]:
        """The file of facts, if there is one."""
        return () if self.facts_file is None else (self.facts_file,)

    def vision_config_is_saved(self) -> bool:
        """Whether the tower is a folder of transformers."""
        return any(name.startswith(llava_original.APART) for name in self.tensors)

    @property
    def table(self) -> Table:
        return name_table(self.decoder, self.gated_layers)


def is_openflamingo(path: Path) -> bool:
    """Whether this is a save of OpenFlamingo, or a folder with one."""
    return not _is_another(path.parent) if path.is_file() else bool(_saves(path))


def _is_another(folder: Path) -> bool:
    """Whether a folder's config is one of a model that is no language model of an OpenFlamingo."""
    config = folder / "config.json"
    return config.is_file() and engine.read_json(config).get("model_type") not in DECODERS


def _saves(folder: Path) -> list[Path]:
    """What trained, best first: the last epoch, then everything at once."""
    if _is_another(folder):
        return []
    epochs = [path for path in folder.glob("checkpoint_*.pt") if path.stem.split("_")[1].isdigit()]
    epochs.sort(key=lambda path: int(path.stem.split("_")[1]), reverse=True)
    return [path for path in (folder / "checkpoint.pt", *epochs, folder / "full.pt") if path.is_file()]


def read_parts(
    path: Path,
    language_model: str | None = None,
    vision_tower: str | None = None,
    vision_heads: int | None = None,
    vision_act: str | None = None,
) -> Parts:
    """
    Finds a checkpoint and its parts and reads the headers of all.

    Args:
        path: the save, or its folder.
        language_model: folder or hub id; by default a subfolder of the save's, or the full save beside it.
        vision_tower: folder or hub id of a CLIP, or a file of open_clip; by default what lies beside the save.
        vision_heads, vision_act: what a file of open_clip does not say.
    """
    save = path if path.is_file() else _saves(path)[0]
    home = save.parent
    facts_file, facts = find_facts(home)
    folder = engine.local_folder(language_model) if language_model else find_folder(home, DECODERS)
    text_config = read_text_config(folder, facts)
    decoder = DECODERS[text_config.model_type]
    trained = without_aliases(engine.read_file(save), decoder)
    rest = home / "full.pt"
    whole = without_aliases(engine.read_file(rest), decoder) if rest.is_file() and rest != save else {}
    tower, vision_config = read_tower(home, vision_tower, {**whole, **trained}, facts, vision_heads, vision_act)
    language = {name: info for name, info in whole.items() if "vision_encoder." not in name}
    if folder is not None:
        language = {f"{LANGUAGE}{name}": info for name, info in engine.read_checkpoint(folder).items()}
    trained = {name: info for name, info in trained.items() if "vision_encoder." not in name}
    found = {int(match[1]) for name in (*trained, *language) if (match := re.search(GATED, name))}
    gated_layers = sorted(found)
    if not gated_layers:
        raise ConversionError(
            f"{save} has no gated_cross_attn_layer of a {text_config.model_type}: it is no save of OpenFlamingo, or "
            "of one with another language model."
        )
    table = name_table(decoder, gated_layers)
    replaced = {engine.rename(name, table) for name in trained}
    language = {name: info for name, info in language.items() if engine.rename(name, table) not in replaced}
    tensors = {**tower, **language, **trained}
    tower_file = next((info.file for info in tower.values()), None)
    return Parts(
        home, facts, facts_file, decoder, text_config, folder, vision_config, tower_file, tensors, gated_layers
    )


def find_facts(folder: Path) -> tuple[Path | None, dict]:
    """The JSON file beside the checkpoint that says what the checkpoint does not, if there is one, and its content."""
    for path in sorted(folder.glob("*.json")):
        try:
            content = engine.read_json(path)
        except ConversionError:  # anything may lie there
            continue
        if content.keys() & {"lang_config", "media_token_id", "vision_heads", "vision_hidden_act"}:
            return path, content
    return None, {}


def find_folder(home: Path, model_types: Iterable[str]) -> Path | None:
    """The folder with a model of one of these types, this one or inside it; two of them are an error."""
    found = [
        path.parent
        for path in (*home.glob("config.json"), *sorted(home.glob("*/config.json")))
        if engine.read_json(path).get("model_type") in model_types
    ]
    if len(found) > 1:
        raise ConversionError(
            f"{home} holds several models that could be meant: {', '.join(path.name for path in found)}. Name one "
            "with --language-model or --vision-tower."
        )
    return found[0] if found else None


def read_text_config(folder: Path | None, facts: dict) -> PreTrainedConfig:
    if folder is not None:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    elif "lang_config" in facts:
        config = _config_of(facts["lang_config"])
    else:
        raise ConversionError(
            "The language model is not beside the checkpoint, and no JSON file there has its lang_config: name its "
            "folder or hub id with --language-model."
        )
    if config.model_type not in DECODERS:
        raise ConversionError(
            f"The language model is of type '{config.model_type}'; known are {', '.join(DECODERS)}. Others do not "
            "hand images on to their layers, or were not proven."
        )
    return config


def _config_of(content: dict) -> PreTrainedConfig:
    """Today's config of an old one, without what every config had then."""
    kind = content.get("model_type")
    if kind not in DECODERS:
        raise ConversionError(f"lang_config is of type '{kind}'; known are {', '.join(DECODERS)}.")
    known = {*AutoConfig.for_model(kind).to_dict(), "rope_theta", "rope_scaling"} - {"model_type", "dtype"}
    return AutoConfig.for_model(kind, **{name: value for name, value in content.items() if name in known})


def read_tower(
    home: Path,
    option: str | None,
    saved: Mapping[str, TensorInfo],
    facts: dict,
    heads: int | None,
    act: str | None,
) -> tuple[dict[str, TensorInfo], PreTrainedConfig]:
    """The tower's tensors, from what the option names, the file or the folder beside the save, or the save itself."""
    file, folder = home / TOWER_FILE, find_folder(home, ("clip", "clip_vision_model"))
    if option is not None:
        file = Path(option).absolute()
        folder = None if file.is_file() else engine.local_folder(option)
    own = {name: info for name, info in saved.items() if "vision_encoder." in name}
    config = None if folder is None else llava_original.tower_config(folder)
    if file.is_file():
        tensors = _visual(engine.read_file(file))
    elif folder is not None:
        return llava_original.tower_tensors(folder), config
    elif own:
        tensors = own
    else:
        raise ConversionError(f"The vision tower is not beside {home}: name it with --vision-tower.")
    if config is None:
        heads, act = heads or facts.get("vision_heads"), act or facts.get("vision_hidden_act")
        config = open_clip_config(tensors, heads, act)
    return tensors, config


def _visual(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The visual half of a file of open_clip, its names marked."""
    halves = any(name.startswith("visual.") for name in tensors)
    return {
        f"{TOWER}{name.removeprefix('visual.')}": info
        for name, info in tensors.items()
        if name.startswith("visual.") or not halves
    }


def open_clip_config(tensors: Mapping[str, TensorInfo], heads: int | None, act: str | None) -> CLIPVisionConfig:
    """The config of a tower of open_clip: most of it stands in the shapes. What is assumed is logged as a warning."""
    shapes = {re.sub(OPEN_CLIP, "", name): info.shape for name, info in tensors.items()}
    blocks = {match[1] for name in shapes if (match := re.match(r"transformer\.resblocks\.(\d+)\.", name))}
    try:
        width, channels, patch, _ = shapes["conv1.weight"]
        places = shapes["positional_embedding"][0] - 1
        intermediate = shapes["transformer.resblocks.0.mlp.c_fc.weight"][0]
    except KeyError as error:
        raise ConversionError(f"The vision tower has no {error}: it is no ViT of open_clip.") from error
    heads = flow.attention_heads("tower of open_clip", "--vision-heads", width, TOWER_HEADS, heads)
    if act is None:
        act = "quick_gelu" if width == OPENAI_WIDTH else "gelu"
        logger.warning(
            "The file of open_clip's tower does not say which activation it has: %s is assumed; --vision-act says "
            "otherwise (OpenAI's weights have quick_gelu, others gelu).",
            act,
        )
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=len(blocks),
        num_attention_heads=heads,
        num_channels=channels,
        image_size=math.isqrt(places) * patch,
        patch_size=patch,
        hidden_act=act,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Config and vocabulary
# ---------------------------------------------------------------------------------------------------------------------


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The language model's tokenizer with the tokens that OpenFlamingo adds, in its order."""
    tokenizer = flow.read_tokenizer(folder)
    tokenizer.add_tokens([END_OF_CHUNK, IMAGE_TOKEN], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return engine.name_image_token(tokenizer, IMAGE_TOKEN)


def find_image_token(
    parts: Parts, rows: int, tokenizer: PreTrainedTokenizerBase | None, image_token_id: int | None
) -> int:
    """
    The id of the image token.

    Args:
        parts: the checkpoint.
        rows: of its embeddings.
        tokenizer: with the added tokens, if there is one.
        image_token_id: the option, which wins.
    """
    if image_token_id is None:
        image_token_id = parts.facts.get("media_token_id")
    if tokenizer is not None:
        if len(tokenizer) != rows:
            raise ConversionError(
                f"The tokenizer has {len(tokenizer)} tokens with those that OpenFlamingo adds, the checkpoint {rows}: "
                "they belong to different language models."
            )
        found = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if image_token_id not in (None, found):
            raise ConversionError(f"The tokenizer's {IMAGE_TOKEN} is {found}, expected {image_token_id}.")
        return found
    if image_token_id is None:  # added behind the vocabulary: <|endofchunk|>, <image>, and <PAD> if there was none
        if parts.language_folder is not None and rows - parts.text_config.vocab_size in (2, 3):
            return parts.text_config.vocab_size + 1
        raise ConversionError(
            "The checkpoint does not say which token is the image's, and there is no tokenizer: give --tokenizer or "
            "--image-token-id."
        )
    return image_token_id


def end_of_chunk(config: ZooFlamingoConfig) -> int:
    """OpenFlamingo adds it just before the image token, and stops at it."""
    return config.image_token_id - 1


def embedding_rows(parts: Parts) -> int:
    """How many tokens the checkpoint knows."""
    name = f"model.language_model.{parts.decoder.embeddings}.weight"
    rows = [info.shape[0] for key, info in parts.tensors.items() if engine.rename(key, parts.table) == name]
    if not rows:
        raise ConversionError(f"Neither checkpoint nor language model have {parts.decoder.embeddings}.weight.")
    return rows[0]


def zoo_config(parts: Parts, image_token_id: int) -> ZooFlamingoConfig:
    """The zoo's config of a checkpoint; what no config says stands in the shapes."""
    tensors = split_tensors(parts.tensors)
    shapes = {engine.rename(name, parts.table): info.shape for name, info in tensors.items()}
    dtypes = {engine.rename(name, parts.table): info.dtype for name, info in tensors.items()}
    latents = shapes.get("model.connector.latents")
    if latents is None:
        raise ConversionError(f"{parts.home} has no perceiver.latents: it is no save of OpenFlamingo.")
    text_config = copy.deepcopy(parts.text_config)
    text_config.vocab_size = embedding_rows(parts)
    depth = {match[1] for name in shapes if name and (match := re.match(r"model\.connector\.layers\.(\d+)\.", name))}

    def width(name: str) -> int | None:
        return shapes.get(name, (None,))[0]

    return ZooFlamingoConfig(
        vision_config=copy.deepcopy(parts.vision_config),
        text_config=text_config,
        image_token_id=image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        num_prefix_tokens=1,
        num_latents=latents[0],
        resampler_depth=len(depth),
        resampler_num_heads=NUM_HEADS,
        resampler_head_dim=HEAD_DIM,
        resampler_intermediate_size=width("model.connector.layers.0.feed_forward_in.weight"),
        num_frame_embeddings=width("model.connector.frame_embeddings") or 0,
        cross_attention_interval=parts.gated_layers[0] + 1,
        cross_attention_layers=parts.gated_layers,
        cross_attention_num_heads=NUM_HEADS,
        cross_attention_head_dim=HEAD_DIM,
        feed_forward_size=width("model.fusion.blocks.0.feed_forward_in.weight"),
        feed_forward_without_media=True,
        tie_word_embeddings=text_config.tie_word_embeddings,
        dtype=dtypes["model.connector.latents"],
        architectures=["ZooFlamingoForConditionalGeneration"],
    )


def resize(shape: tuple[int, ...], rows: int) -> Edit:
    """The edit that cuts a matrix of this shape to this many rows, or fills it up."""
    return CutRows(rows) if shape[0] > rows else FillRows(rows)


def resized(parts: Parts, rows: int) -> dict[str, tuple[int, ...]]:
    """The zoo's names of tensors with another vocabulary than the checkpoint's, and the shapes that they have: a
    frozen head, which no training saves."""
    renamed = {engine.rename(name, parts.table): info.shape for name, info in parts.tensors.items()}
    return {name: shape for name, shape in renamed.items() if name == "lm_head.weight" and shape[0] != rows}


# ---------------------------------------------------------------------------------------------------------------------
# Processor
# ---------------------------------------------------------------------------------------------------------------------

# A chunk is an image and its text; what the assistant says ends it.
CHAT_TEMPLATE = """\
{%- macro render(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for item in content -%}
            {{- '<image>' if item.type == 'image' else item.text -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}
        {{- render(message.content) + '<|endofchunk|>' -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- render(message.content) -}}
    {%- endif -%}
{%- endfor -%}
"""


class OriginalProcessor:
    """What OpenFlamingo does to images, with the image processor that does the same, and to text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_size: int):
        self.tokenizer = tokenizer
        side = {"height": image_size, "width": image_size}
        self.image_processor = CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=side)

    def __call__(self, images, text, return_tensors="pt") -> BatchFeature:
        pixels = self.image_processor(images, return_tensors=return_tensors)
        return BatchFeature({**self.tokenizer(text, return_tensors=return_tensors), **pixels})

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)


def zoo_processor(original: OriginalProcessor) -> ZooFlamingoProcessor:
    """The zoo's processor with these pixels and tokens."""
    size, crop = original.image_processor.size, original.image_processor.crop_size
    pixels = ZooImageProcessor(size=dict(size), crop_size=dict(crop), do_center_crop=True)
    return ZooFlamingoProcessor(pixels, original.tokenizer, chat_template=CHAT_TEMPLATE)
