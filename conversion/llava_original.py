"""LLaVA's own checkpoints (1.0, 1.5, 1.6): their config, their names, and what their code computes.

The file is a language model's, with the projector in `model.mm_projector` and, from 1.6 on, `model.image_newline`.
The vision tower is `config.mm_vision_tower`, a checkpoint of its own, unless its tensors were saved along
(`model.vision_tower.vision_tower`). An image is the id -200, which is spliced out before any embedding.

`OriginalLlava` computes what the upstream's code does from transformers' tower and language model, so that a
conversion can be proven where that code does not run. One deviation: where padding is cut from a picture's features,
rounding is that of transformers (two of 124,820 random sizes end with other counts than the upstream's).
"""

import ast
import copy
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlavaImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

from vlm_zoo.models.llava import ZooLlavaConfig

from . import engine
from .engine import ConversionError, Table, TensorInfo


IMAGE_TOKEN = "<image>"
TEXT_TYPES = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
}
# What the first releases say, which alone does not make a LLaVA.
FIRST_TYPES = {"llama": "llama"}
APART = "vision tower: "  # marks the names of a tower that is a checkpoint of its own

FROM_ORIGINAL: Table = (
    (rf"^(?:model\.vision_tower\.vision_tower\.|{APART})(?:vision_model\.)?(.+)$", r"model.vision_tower.\1"),
    (r"^model\.mm_projector\.(weight|bias)$", r"model.connector.layers.0.\1"),
    *((rf"^model\.mm_projector\.{2 * n}\.(weight|bias)$", rf"model.connector.layers.{n}.\1") for n in range(8)),
    (r"^model\.image_newline$", "model.connector.image_newline"),
    (r"^model\.((?:embed_tokens|layers|norm)\..+)$", r"model.language_model.\1"),
    (r"^lm_head\.(.+)$", r"lm_head.\1"),
)
# A newline that 1.6 files keep although their images are not tiled.
IGNORED = (r"^model\.connector\.image_newline$",)
# What the added image token changes.
GROWN = ("model.language_model.embed_tokens.weight", "lm_head.weight")

# The conversation `vicuna_v1`, in which 1.5 and 1.6 were trained.
VICUNA_TEMPLATE = """\
{%- macro render(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for item in content if item.type == 'image' -%}{{- 'IMAGE\\n' -}}{%- endfor -%}
        {%- for item in content if item.type == 'text' -%}{{- item.text -}}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if messages[0].role == 'system' -%}
    {{- render(messages[0].content) + ' ' -}}
{%- else -%}
    {{- 'A chat between a curious user and an artificial intelligence assistant. ' -}}
    {{- "The assistant gives helpful, detailed, and polite answers to the user's questions. " -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {{- 'USER: ' + render(message.content) + ' ' -}}
    {%- elif message.role == 'assistant' -%}
        {{- 'ASSISTANT:' -}}
        {%- generation -%}
        {{- ' ' + render(message.content) + eos_token -}}
        {%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'ASSISTANT:' -}}
{%- endif -%}
"""


def is_original(raw_config: dict) -> bool:
    """Whether a `config.json` is one of LLaVA's own."""
    return "mm_vision_tower" in raw_config


def find_tower(folder: Path, raw_config: dict, option: str | None) -> Path:
    """The tower's own folder: the option, a folder of its name beside or inside the checkpoint, or from the hub."""
    if option is not None:
        return engine.local_folder(option)
    name = str(raw_config["mm_vision_tower"])
    for candidate in (folder / tower_name(raw_config), folder.parent / tower_name(raw_config)):
        if (candidate / "config.json").is_file():
            return candidate
    try:
        return engine.hub_folder(name)
    except ConversionError as error:
        raise ConversionError(
            f"The vision tower '{name}' is not beside {folder}, nor can it be downloaded: name it with --vision-tower."
        ) from error


def tower_config(folder: Path) -> PreTrainedConfig:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config = getattr(config, "vision_config", config)
    if config.model_type != "clip_vision_model":
        raise ConversionError(f"The vision tower is of type '{config.model_type}'; LLaVA's own checkpoints have CLIP.")
    return config


def tower_tensors(folder: Path) -> dict[str, TensorInfo]:
    """The vision half of a CLIP checkpoint, its names marked with `APART`."""
    tensors = engine.read_checkpoint(folder)
    if any(name.startswith("vision_model.") for name in tensors):
        tensors = {name: info for name, info in tensors.items() if name.startswith("vision_model.")}
    return {f"{APART}{name}": info for name, info in tensors.items()}


def tower_name(raw_config: dict) -> str:
    """The name of the tower's folder, a plain one whatever the config says."""
    return PurePosixPath(str(raw_config["mm_vision_tower"])).name.strip(".") or "vision_tower"


def projector_layers(raw_config: dict) -> int:
    kind = raw_config.get("mm_projector_type", "linear")
    match = re.fullmatch(r"mlp([1-8])x_gelu", kind)
    if kind != "linear" and match is None:
        raise ConversionError(f"mm_projector_type is '{kind}'; the zoo has linear and mlpNx_gelu.")
    return 1 if match is None else int(match[1])


def pinpoints(raw_config: dict) -> list[list[int]] | None:
    """The AnyRes resolutions as (height, width); the upstream has (width, height), as a list or as its literal."""
    if raw_config.get("image_aspect_ratio") != "anyres":
        return None
    found = raw_config.get("image_grid_pinpoints")
    found = ast.literal_eval(found) if isinstance(found, str) else found
    if not found:
        raise ConversionError("image_aspect_ratio is 'anyres', but image_grid_pinpoints is missing.")
    return [[height, width] for width, height in found]


def zoo_config(raw_config: dict, vision_config: PreTrainedConfig, image_token_id: int) -> ZooLlavaConfig:
    """The zoo's config of an original one; the vocabulary reaches up to the image token."""
    text_type = {**TEXT_TYPES, **FIRST_TYPES}.get(raw_config.get("model_type"))
    if text_type is None:
        raise ConversionError(f"model_type is '{raw_config.get('model_type')}'; known are {', '.join(TEXT_TYPES)}.")
    known = {*AutoConfig.for_model(text_type).to_dict(), "rope_theta", "rope_scaling"} - {"model_type", "dtype"}
    fields = {name: value for name, value in raw_config.items() if name in known}
    fields["vocab_size"] = max(raw_config["vocab_size"], image_token_id + 1)
    merge_type = raw_config.get("mm_patch_merge_type", "flat")
    return ZooLlavaConfig(
        vision_config=vision_config,
        text_config=AutoConfig.for_model(text_type, **fields),
        image_token_id=image_token_id,
        vision_feature_layer=raw_config.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="full"
        if raw_config.get("mm_vision_select_feature") == "cls_patch"
        else "default",
        num_prefix_tokens=1,
        projector_num_layers=projector_layers(raw_config),
        image_grid_pinpoints=pinpoints(raw_config),
        merge_type=merge_type if merge_type in ("flat", "spatial") else "spatial_unpad",
        tie_word_embeddings=raw_config.get("tie_word_embeddings", False),
        dtype=raw_config.get("torch_dtype", "float32"),
        architectures=["ZooLlavaForConditionalGeneration"],
    )


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer with a named image token, added where it has none."""
    return AutoTokenizer.from_pretrained(folder, image_token=IMAGE_TOKEN, trust_remote_code=False)


def read_processor(tokenizer: Path, image_processor: Path, raw_config: dict) -> LlavaProcessor | LlavaNextProcessor:
    """transformers' processor that sees what the upstream's `process_images` makes."""
    pixels = AutoImageProcessor.from_pretrained(image_processor, trust_remote_code=False)
    settings = {
        name: value
        for name, value in pixels.to_dict().items()
        if name not in ("image_processor_type", "processor_class")
    }
    grid, kind = pinpoints(raw_config), LlavaProcessor
    if grid is not None:
        pixels, kind = LlavaNextImageProcessorPil(**{**settings, "image_grid_pinpoints": grid}), LlavaNextProcessor
    elif raw_config.get("image_aspect_ratio") == "pad":
        pixels = LlavaImageProcessorPil(**{**settings, "do_pad": True})
    words = read_tokenizer(tokenizer)
    image_text = f"<im_start>{IMAGE_TOKEN}<im_end>" if raw_config.get("mm_use_im_start_end") else IMAGE_TOKEN
    template = words.chat_template or VICUNA_TEMPLATE.replace("IMAGE", image_text)
    return kind(pixels, words, image_token=IMAGE_TOKEN, chat_template=template)


class OriginalLlava(nn.Module):
    """What LLaVA's code computes, from the tensors of its checkpoint as they are."""

    def __init__(self, raw_config: dict, config: ZooLlavaConfig, tensors: Mapping[str, TensorInfo], folder: Path):
        super().__init__()
        self.raw_config, self.config = raw_config, config
        text_config = copy.deepcopy(config.text_config)
        text_config.vocab_size = raw_config["vocab_size"]
        width, wide = config.vision_config.hidden_size, text_config.hidden_size
        self.model = nn.Module()
        self.model.vision_tower = AutoModel.from_config(config.vision_config, attn_implementation="eager")
        layers = [nn.Linear(width, wide)]
        for _ in range(1, config.projector_num_layers):
            layers += [nn.GELU(), nn.Linear(wide, wide)]
        linear = raw_config.get("mm_projector_type", "linear") == "linear"
        self.projector = layers[0] if linear else nn.Sequential(*layers)
        self.language_model = AutoModelForCausalLM.from_config(text_config, attn_implementation="eager")
        if (folder / "generation_config.json").is_file():
            self.language_model.generation_config = GenerationConfig.from_pretrained(folder)
        self.generation_config = self.language_model.generation_config
        self._read(tensors)
        self.float().eval()

    def _read(self, tensors: Mapping[str, TensorInfo]) -> None:
        parts = {
            rf"(?:model\.vision_tower\.vision_tower\.|{APART})(?:vision_model\.)?": self.model.vision_tower,
            r"model\.mm_projector\.": self.projector,
            r"(?=model\.|lm_head\.)": self.language_model,
        }
        states = {pattern: {} for pattern in parts}
        for name, tensor in engine.read_tensors(tensors):
            if name == "model.image_newline":
                self.image_newline = nn.Parameter(tensor)
                continue
            pattern = next(pattern for pattern in parts if re.match(pattern, name))
            states[pattern][re.sub(f"^{pattern}", "", name)] = tensor
        for pattern, part in parts.items():
            missing = part.load_state_dict(states[pattern], strict=False).missing_keys
            if missing and not self.config.tie_word_embeddings:
                raise ConversionError(f"{type(part).__name__} finds no tensors for:", {"missing": missing})

    def get_image_features(self, pixel_values, image_sizes=None, **kwargs) -> BaseModelOutputWithPooling:
        """`encode_images` and the merging of tiles in `prepare_inputs_labels_for_multimodal`."""
        views = [None] * len(pixel_values)
        if image_sizes is not None:
            size = self.config.vision_config.image_size
            grids = [
                get_anyres_image_grid_shape(pair, self.config.image_grid_pinpoints, size)
                for pair in image_sizes.tolist()
            ]
            pixel_values = torch.cat(
                [tiles[: 1 + rows * columns] for tiles, (rows, columns) in zip(pixel_values, grids, strict=True)]
            )
            views = [1 + rows * columns for rows, columns in grids]
        hidden = self.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        features = hidden[self.raw_config.get("mm_vision_select_layer", -2)]
        if self.raw_config.get("mm_vision_select_feature", "patch") == "patch":
            features = features[:, 1:]
        features = self.projector(features)
        if image_sizes is None:
            return BaseModelOutputWithPooling(pooler_output=list(features))
        merged = [
            self._merge(tiles, grid, pair)
            for tiles, grid, pair in zip(features.split(views), grids, image_sizes.tolist(), strict=True)
        ]
        return BaseModelOutputWithPooling(pooler_output=merged)

    def _merge(self, tiles: torch.Tensor, grid: tuple[int, int], image_size: list[int]) -> torch.Tensor:
        merge_type = self.raw_config.get("mm_patch_merge_type", "flat")
        if merge_type == "flat":
            return tiles.flatten(0, 1)
        base, tiles = tiles[0], tiles[1:]
        side = self.config.vision_config.image_size // self.config.vision_config.patch_size
        tiles = tiles.view(*grid, side, side, -1)
        if "unpad" not in merge_type:
            return torch.cat((base, tiles.permute(0, 2, 1, 3, 4).flatten(0, 3)))
        tiles = unpad_image(tiles.permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3), image_size)
        newline = self.image_newline[:, None, None].expand(*tiles.shape[:-1], 1)
        return torch.cat((base, torch.cat((tiles, newline), dim=-1).flatten(1, 2).transpose(0, 1)))

    def _embed(self, input_ids, pixel_values, image_sizes) -> torch.Tensor:
        places = input_ids == self.config.image_token_id
        embeds = self.language_model.get_input_embeddings()(input_ids.masked_fill(places, 0))
        features = torch.cat(self.get_image_features(pixel_values, image_sizes).pooler_output)
        return embeds.masked_scatter(places.unsqueeze(-1), features)

    def forward(self, input_ids, pixel_values, image_sizes=None, attention_mask=None, **kwargs):
        embeds = self._embed(input_ids, pixel_values, image_sizes)
        return self.language_model(inputs_embeds=embeds, attention_mask=attention_mask, **kwargs)

    @torch.no_grad()
    def generate(self, input_ids, pixel_values, image_sizes=None, attention_mask=None, suppress_tokens=(), **kwargs):
        vocab_size = self.raw_config["vocab_size"]
        new = self.language_model.generate(
            inputs_embeds=self._embed(input_ids, pixel_values, image_sizes),
            attention_mask=attention_mask,
            suppress_tokens=[token for token in suppress_tokens if token < vocab_size] or None,
            **kwargs,
        )
        return torch.cat((input_ids, new), dim=1)
