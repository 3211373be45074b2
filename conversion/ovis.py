"""Ovis 1.6 and 2 as AIDC-AI's code writes them: what a folder holds, and what that code computes from it.

The code is not run. `OriginalOvis` and `OriginalProcessor` say again what it computes, from the tensors as they are,
on transformers' tower, language model and image processor.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import PIL.Image
import torch
from torch import nn
from transformers import (
    Aimv2VisionConfig,
    AutoConfig,
    AutoModelForCausalLM,
    BatchFeature,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.ovis2.image_processing_pil_ovis2 import get_min_tile_covering_grid, split_image_into_grid

from vlm_zoo.models.parts_vlm import build_part, pair
from vlm_zoo.models.vet import ZooVetConfig

from . import engine, flow
from .edits import Scale
from .engine import ConversionError, Table, TensorInfo


MODEL_TYPE = "ovis"
# A patch, and what stands around patches: start, end of the whole picture, column, row, end.
ATOM, INDICATORS = -300, (-301, -302, -303, -304, -305)
IMAGE_TOKEN = "<image>"
# Upstream an option of a call, with this default.
MAX_TILES = 9
TOWERS = ("clip_vision_model", "siglip_vision_model", "aimv2")
# Language models that multiplied all embeddings when Ovis was written with them, those of images too; today they
# multiply those of text alone.
SCALES_ALL_EMBEDDINGS = ("gemma", "gemma2")
TABLE = "model.connector.table.weight"

# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------

_TRUNK = r"^visual_tokenizer\.backbone\.trunk\.blocks\.(\d+)"
_LAYER = r"model.vision_tower.encoder.layers.\1"
_TOWER: Table = (
    (
        r"^visual_tokenizer\.backbone\.preprocessor\.pos_embed$",
        "model.vision_tower.embeddings.position_embedding.weight",
    ),
    (
        r"^visual_tokenizer\.backbone\.preprocessor\.patchifier\.proj\.(.+)$",
        r"model.vision_tower.embeddings.patch_embed.\1",
    ),
    (
        r"^visual_tokenizer\.backbone\.preprocessor\.patchifier\.norm\.(.+)$",
        r"model.vision_tower.embeddings.rms_norm.\1",
    ),
    (rf"{_TRUNK}\.norm_([12])\.(.+)$", rf"{_LAYER}.rms_norm\2.\3"),
    (rf"{_TRUNK}\.attn\.qkv\.([qkv])\.(.+)$", rf"{_LAYER}.attention.\2_proj.\3"),
    (rf"{_TRUNK}\.attn\.proj\.(.+)$", rf"{_LAYER}.attention.out_proj.\2"),
    (rf"{_TRUNK}\.mlp\.fc1\.(.+)$", rf"{_LAYER}.ffn.gate_proj.\2"),
    (rf"{_TRUNK}\.mlp\.fc3\.(.+)$", rf"{_LAYER}.ffn.up_proj.\2"),
    (rf"{_TRUNK}\.mlp\.fc2\.(.+)$", rf"{_LAYER}.ffn.down_proj.\2"),
    (r"^visual_tokenizer\.backbone\.trunk\.post_trunk_norm\.(.+)$", r"model.vision_tower.rms_norm.\1"),
    (r"^visual_tokenizer\.backbone\.(?:vision_model\.)?(.+)$", r"model.vision_tower.\1"),
)
# Of every Ovis.
BESIDE_THE_TOWER: Table = (
    (r"^llm\.model\.(.+)$", r"model.language_model.\1"),
    (r"^llm\.lm_head\.(.+)$", r"lm_head.\1"),
    (r"^vte\.weight$", TABLE),
    (r"^visual_tokenizer\.head\.0\.(.+)$", r"model.connector.head.\1"),
    (r"^visual_tokenizer\.head\.1\.(.+)$", r"model.connector.norm.\1"),
)
FROM_UPSTREAM: Table = (*BESIDE_THE_TOWER, *_TOWER)


def apart(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of an AIMv2 as transformers has them: queries, keys and values apart, positions as a table."""
    prepared = {}
    for name, info in tensors.items():
        if ".trunk." in name and ".attn.qkv." in name:
            pieces = engine.split_rows(info, [info.shape[0] // 3] * 3)
            prepared |= {
                name.replace(".qkv.", f".qkv.{part}."): piece for part, piece in zip("qkv", pieces, strict=True)
            }
        elif name.endswith(".preprocessor.pos_embed"):
            prepared[name] = replace(info, shape=tuple(info.shape[1:]))
        else:
            prepared[name] = info
    return prepared


# ---------------------------------------------------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------------------------------------------------

AIMV2_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "rms_norm_eps",
    "attention_dropout",
    "qkv_bias",
)
TEXT_KEYS = ("llm_config.model_type", "llm_config.vocab_size")
VISUAL_KEYS = ("vocab_size", "tokenize_function", "backbone_config.model_type")


def check_keys(raw: Mapping, names: Iterable[str]) -> None:
    """Raises `ConversionError` that lists which of these keys a `config.json` lacks; a dot leads into an object."""
    missing = []
    for name in names:
        value = raw
        for key in name.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is None:
            missing.append(name)
    if missing:
        raise ConversionError(
            f"config.json says that the checkpoint is an Ovis ('{raw.get('model_type')}') and lacks keys that every "
            "such config has; it may be of another version, or cut short.",
            {"missing keys": missing},
        )


def stored_dtype(raw: Mapping) -> torch.dtype:
    """The dtype that a `config.json` says, as version 4 of transformers names it or version 5; float32 without one."""
    return getattr(torch, raw.get("torch_dtype") or raw.get("dtype") or "float32")


def check(raw: Mapping, tensors: Mapping[str, TensorInfo]) -> None:
    """Raises `ConversionError` unless these are config and tensors of an Ovis 1.6 or 2 with a tower of the zoo."""
    if raw.get("model_type") != MODEL_TYPE:
        raise ConversionError(
            f"The checkpoint is of model type '{raw.get('model_type')}', this reads '{MODEL_TYPE}' (Ovis 1.6 and 2), "
            "'ovis2_5' with a vit_config, and transformers' 'ovis2'."
        )
    check_keys(raw, (*TEXT_KEYS, *(f"visual_tokenizer_config.{name}" for name in VISUAL_KEYS)))
    tokenizer = raw["visual_tokenizer_config"]
    kind, head = tokenizer["backbone_config"]["model_type"], tensors.get("visual_tokenizer.head.0.weight")
    if kind not in TOWERS:
        raise ConversionError(f"The tower is of model type '{kind}'; this reads {', '.join(TOWERS)}.")
    if kind == "aimv2":
        check_keys(raw, (f"visual_tokenizer_config.backbone_config.{name}" for name in AIMV2_FIELDS))
    if head is None:
        raise ConversionError("The checkpoint has no visual_tokenizer.head.0.weight, it is no Ovis 1.6 or 2.")
    indicators = tokenizer["vocab_size"] - head.shape[0]
    if indicators != len(INDICATORS) or tokenizer.get("hd_booster") is not None:
        raise ConversionError(
            f"The visual vocabulary of {tokenizer['vocab_size']} has {indicators} indicators (hd_booster: "
            f"{tokenizer.get('hd_booster')}), expected {len(INDICATORS)} and no booster: Ovis 1.0 and 1.5 see images "
            "in other ways."
        )


def zoo_config(raw: Mapping, tensors: Mapping[str, TensorInfo], image_token_id: int, max_tiles: int) -> ZooVetConfig:
    """
    The zoo's config of a checkpoint; the vocabulary reaches up to the image token.

    Args:
        raw: its `config.json`.
        tensors: what it holds.
        image_token_id: the token that was added for images; upstream its ids are negative.
        max_tiles: see `ZooVetConfig`.
    """
    tokenizer, text_config = raw["visual_tokenizer_config"], AutoConfig.for_model(**raw["llm_config"])
    text_config.vocab_size = max(text_config.vocab_size, image_token_id + 1)
    tower = tokenizer["backbone_config"]
    return ZooVetConfig(
        vision_config=tower_config(tower),
        text_config=text_config,
        image_token_id=image_token_id,
        num_prefix_tokens=1 if tower["model_type"] == "clip_vision_model" else 0,
        vision_feature_select_strategy="default" if tokenizer.get("drop_cls_token") else "full",
        visual_vocab_size=tokenizer["vocab_size"],
        num_visual_indicators=len(INDICATORS),
        hidden_stride=tokenizer.get("hidden_stride", 1),
        tokenize_function=tokenizer["tokenize_function"],
        tau=float(tokenizer.get("tau", 1.0)),
        head_layer_norm="visual_tokenizer.head.1.weight" in tensors,
        max_tiles=max_tiles,
        tie_word_embeddings=text_config.tie_word_embeddings,
        dtype=stored_dtype(raw),
        architectures=["ZooVetForConditionalGeneration"],
    )


def tower_config(raw: Mapping) -> PreTrainedConfig:
    """The tower's config."""
    if raw["model_type"] != "aimv2":
        return AutoConfig.for_model(**raw)
    return Aimv2VisionConfig(
        **{name: raw[name] for name in AIMV2_FIELDS}, mlp_bias=raw.get("use_bias", False), use_head=False
    )


def scaled(config: ZooVetConfig) -> Scale | None:
    """The edit that makes the factor of all embeddings part of the table, in float32, where it does not round; `None`
    where there is no factor."""
    if config.text_config.model_type not in SCALES_ALL_EMBEDDINGS:
        return None
    return Scale(config.text_config.hidden_size**0.5)


# ---------------------------------------------------------------------------------------------------------------------
# What the code computes
# ---------------------------------------------------------------------------------------------------------------------


class OriginalLanguageHalf(nn.Module):
    """
    What AIDC-AI's code computes from embeddings on, the same for every Ovis.

    Args:
        raw: its `config.json`.
        folder: where its generation config is, if it has one.
    """

    def __init__(self, raw: Mapping, folder: Path):
        super().__init__()
        text_config = AutoConfig.for_model(**raw["llm_config"])
        self.language_model = AutoModelForCausalLM.from_config(text_config, attn_implementation="eager")
        if (folder / "generation_config.json").is_file():
            self.language_model.generation_config = GenerationConfig.from_pretrained(folder)
        self.generation_config = self.language_model.generation_config

    def _load(self, state: Mapping[str, torch.Tensor]) -> None:
        missing = self.load_state_dict(state, strict=False).missing_keys
        tied = {"language_model.lm_head.weight"} if self.language_model.config.tie_word_embeddings else set()
        if set(missing) - tied:
            raise ConversionError("What Ovis' code computes finds no tensors for:", {"missing": missing})

    def _embed(self, input_ids: torch.Tensor, pixel_values: torch.Tensor, **kwargs) -> torch.Tensor:
        """Ids `int[B, T]`, those of images negative, to what the language model reads, `float[B, T, Dt]`."""
        raise NotImplementedError

    def forward(self, input_ids, pixel_values, attention_mask=None, output_hidden_states=False, **kwargs):
        return self.language_model(
            inputs_embeds=self._embed(input_ids, pixel_values, **kwargs),
            attention_mask=attention_mask,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids,
        pixel_values,
        attention_mask=None,
        max_new_tokens=None,
        do_sample=False,
        suppress_tokens=(),
        **kwargs,
    ) -> torch.Tensor:
        vocab_size = self.language_model.config.vocab_size
        new = self.language_model.generate(
            inputs_embeds=self._embed(input_ids, pixel_values, **kwargs),
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            suppress_tokens=[token for token in suppress_tokens if token < vocab_size] or None,
        )
        return torch.cat((input_ids, new), dim=1)


class OriginalOvis(OriginalLanguageHalf):
    """
    What AIDC-AI's code computes.

    Where it samples words, the most probable ones are taken: samples of two models cannot be compared.
    """

    def __init__(self, raw: Mapping, config: ZooVetConfig, tensors: Mapping[str, TensorInfo], folder: Path):
        super().__init__(raw, folder)
        self.config, self.model = config, nn.Module()
        self.model.vision_tower = build_part(config.vision_config, "vision tower")
        self.model.vision_tower.set_attn_implementation("eager")
        width = config.vision_config.hidden_size * config.hidden_stride**2
        self.head = nn.Sequential(nn.Linear(width, config.num_visual_words, bias=False))
        if config.head_layer_norm:
            self.head.append(nn.LayerNorm(config.num_visual_words))
        self.vte = nn.Embedding(config.visual_vocab_size, self.language_model.config.hidden_size)
        self._read(tensors)
        if config.vision_config.model_type == "aimv2":
            self.model.vision_tower.rms_norm = nn.Identity()  # features are taken before it
        self.float().eval()

    def _read(self, tensors: Mapping[str, TensorInfo]) -> None:
        state = {}
        for name, tensor in engine.read_tensors(apart(tensors)):
            name = name.replace("llm.", "language_model.", 1) if name.startswith("llm.") else name
            name = name.replace("visual_tokenizer.head.", "head.", 1)
            state[engine.rename(name, _TOWER) or name] = tensor
        self._load(state)

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """Views `float[P, C, H, W]` to their embeddings, without indicators."""
        states = self.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states[-1]
        if self.config.vision_feature_select_strategy == "default":
            states = states[:, 1:]
        stride = self.config.hidden_stride
        if stride > 1:
            views, tokens, width = states.shape
            side = round(tokens**0.5)
            whole = -(-side // stride) * stride
            square = states.new_zeros(views, whole, whole, width)
            square[:, :side, :side] = states.view(views, side, side, width)
            squares = [square[:, row::stride, column::stride] for row in range(stride) for column in range(stride)]
            states = torch.cat(squares, dim=-1).flatten(1, 2)
        scores = self.head(states)
        if self.config.tokenize_function == "softmax":
            tokens = scores.softmax(dim=-1)
        else:
            tokens = nn.functional.one_hot(scores.argmax(dim=-1), scores.shape[-1]).to(scores.dtype)
        tokens = nn.functional.pad(tokens, (0, len(INDICATORS)))
        return BaseModelOutputWithPooling(pooler_output=list(tokens @ self._rows()))

    def _rows(self) -> torch.Tensor:
        """The table as the language model reads it."""
        config = self.language_model.config
        return self.vte.weight * (config.hidden_size**0.5 if config.model_type in SCALES_ALL_EMBEDDINGS else 1.0)

    def _embed(self, input_ids: torch.Tensor, pixel_values: torch.Tensor, **kwargs) -> torch.Tensor:
        embeds = self.language_model.get_input_embeddings()(input_ids.clamp(min=0))
        visual = torch.zeros_like(embeds)
        visual[input_ids == ATOM] = torch.cat(self.get_image_features(pixel_values).pooler_output)
        for number, indicator in enumerate(INDICATORS):
            visual[input_ids == indicator] = self._rows()[self.config.num_visual_words + number]
        return torch.where((input_ids < 0).unsqueeze(-1), visual, embeds)


class OriginalParts:
    """The parts of a processor, and the text of ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_processor):
        self.tokenizer, self.image_processor = tokenizer, image_processor

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)


class OriginalProcessor(OriginalParts):
    """
    What AIDC-AI's code makes of a text with one image: ids with an image's own, and its views.

    Its search for a grid is the one that transformers' Ovis2 took over.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_processor, config: ZooVetConfig):
        super().__init__(tokenizer, image_processor)
        self.side, self.max_tiles = pair(config.vision_config.image_size)[0], config.max_tiles
        patches = self.side // pair(config.vision_config.patch_size)[0]
        self.tokens = (-(-patches // config.hidden_stride)) ** 2
        if config.vision_feature_select_strategy == "full":
            self.tokens += config.num_prefix_tokens

    def __call__(self, images: list[PIL.Image.Image], text: list[str], return_tensors: str = "pt") -> BatchFeature:
        (image,), (before, after) = images, text[0].split(IMAGE_TOKEN)
        size = (image.height, image.width)
        rows, columns = get_min_tile_covering_grid(size, self.side, self.max_tiles)
        views = [image.crop(box) for box in split_image_into_grid(*size, (rows, columns))]
        start, whole, column, row, end = INDICATORS
        atoms = [ATOM] * self.tokens
        ids = [*self.tokenizer(before)["input_ids"], start, *atoms, whole]
        if len(views) > 1:
            views = [image, *views]
            for place in range(rows):
                ids += [*atoms, *(columns - 1) * [column, *atoms]]
                ids += [row] if place < rows - 1 else []
        ids += [end, *self.tokenizer(after, add_special_tokens=False)["input_ids"]]
        batch = {
            "input_ids": [ids],
            "attention_mask": [[1] * len(ids)],
            "pixel_values": torch.cat([self.view(view) for view in views]),
            "image_sizes": [size],
        }
        return BatchFeature(batch, tensor_type=return_tensors)

    def view(self, image: PIL.Image.Image) -> torch.Tensor:
        """A picture at its own aspect ratio, amid zeros: `float[1, C, side, side]`."""
        longest = max(image.size)
        width, height = (
            self.side if edge == longest else int(edge / longest * self.side) for edge in (image.width, image.height)
        )
        options = {"size": {"height": height, "width": width}, "do_center_crop": False, "return_tensors": "pt"}
        pixels = self.image_processor(image, **options)["pixel_values"]
        left, top = (self.side - width) // 2, (self.side - height) // 2
        return nn.functional.pad(pixels, (left, self.side - width - left, top, self.side - height - top))


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The language model's tokenizer with a named image token, which upstream it has not."""
    return engine.name_image_token(flow.read_tokenizer(folder), IMAGE_TOKEN)
