"""LAVIS' own checkpoints of BLIP-2 and InstructBLIP: their parts, their names, and what their code computes.

A save holds what trained (and every buffer): the tower and the language model are frozen, and lie apart.

    <name>.pth         {"model": query_tokens  ln_vision.*  Qformer.*  opt_proj.* or llm_proj.*}
    eva_vit_g.pth      cls_token  pos_embed  patch_embed.*  blocks.N.*
    llm/               a language model in transformers' format

What of the parts was saved along (`visual_encoder.*`, `opt_model.*`, `llm_model.*`) stands in for the parts. There is
no config: sizes are those of the tensors. Heads are not among them: those of the released widths are known, those
of others are for options to say.

`OriginalBlip2` computes what the upstream's code does from transformers' tower, Q-Former and language model, so that a
conversion can be proven where that code does not run. They differ in one number: LAVIS' norm after the tower has
another epsilon than the norms inside it.
"""

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Blip2VisionConfig,
    Blip2VisionModel,
    GenerationConfig,
    InstructBlipQFormerConfig,
    InstructBlipQFormerModel,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    T5Config,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlm_zoo.models.blip2 import ZooBlip2Config
from vlm_zoo.models.configuration_vlm import NO_DECODER

from . import engine, flow
from .engine import ConversionError, Table, Target, TensorInfo


IMAGE_TOKEN, PAD_TOKEN, END_TOKEN = "<image>", "[PAD]", "</s>"
TOWER_FILE, LANGUAGE_FOLDER = "eva_vit_g.pth", "llm"
TOWER = "eva_vit_g: "  # marks the names of a tower that is a file of its own
LANGUAGE = "language model: "  # and those of a language model
TOWER_SAVED = "visual_encoder.cls_token"  # in saves that hold the tower
_SAVED_AS = ((TOWER, "visual_encoder."), (LANGUAGE, "opt_model."), (LANGUAGE, "llm_model."))

# LAVIS builds 39 layers of this width, whatever the tower's file holds.
TOWER_DEPTH = {1408: 39}
# By width, the heads of what was released.
TOWER_HEADS, QFORMER_HEADS = {1408: 16}, {768: 12}
TOWER_EPS, VISION_NORM_EPS = 1e-6, 1e-5

_TOWER = rf"^(?:visual_encoder\.|{TOWER})"
_BLOCK = rf"{_TOWER}blocks\.(\d+)"
FROM_LAVIS: Table = (
    (rf"{_TOWER}cls_token$", "model.vision_tower.embeddings.class_embedding"),
    (rf"{_TOWER}pos_embed$", "model.vision_tower.embeddings.position_embedding"),
    (rf"{_TOWER}patch_embed\.proj\.(.+)$", r"model.vision_tower.embeddings.patch_embedding.\1"),
    *(
        (rf"{_BLOCK}\.{source}(.+)$", rf"model.vision_tower.encoder.layers.\1.{zoo}\2")
        for source, zoo in {
            r"norm1\.": "layer_norm1.",
            r"norm2\.": "layer_norm2.",
            r"attn\.qkv\.": "self_attn.qkv.",
            r"attn\.proj\.": "self_attn.projection.",
            r"mlp\.": "mlp.",
        }.items()
    ),
    (rf"{_BLOCK}\.attn\.q_bias$", r"model.vision_tower.encoder.layers.\1.self_attn.qkv.bias"),
    (rf"{_TOWER}((?:norm|fc_norm|head)\..+)$", r"model.vision_tower.\1"),
    (r"^ln_vision\.(.+)$", r"model.connector.vision_norm.\1"),
    (r"^query_tokens$", "model.connector.query_tokens"),
    (r"^Qformer\.bert\.embeddings\.(position_ids)$", r"model.connector.qformer.\1"),
    (r"^(?:opt|llm)_proj\.(.+)$", r"model.connector.projection.\1"),
)
# The Q-Former, as transformers and as LAVIS name it.
_LAYER = r"^(?:qformer|Qformer\.bert)\.encoder\.layer\.(\d+)"
QFORMER: Table = (
    (
        r"^(?:qformer|Qformer\.bert)\.(?:embeddings\.)?(?:layernorm|LayerNorm)\.(.+)$",
        r"model.connector.qformer.norm.\1",
    ),
    (
        r"^(?:qformer|Qformer\.bert)\.embeddings\.((?:word|position)_embeddings\..+)$",
        r"model.connector.qformer.\1",
    ),
    *(
        (rf"{_LAYER}\.{source}\.(.+)$", rf"model.connector.qformer.layers.\1.{zoo}.\2")
        for source, zoo in {
            r"attention\.(?:attention|self)": "self_attention",
            r"attention\.output\.dense": "self_attention.dense",
            r"attention\.output\.LayerNorm": "self_attention.norm",
            r"crossattention\.(?:attention|self)": "cross_attention",
            r"crossattention\.output\.dense": "cross_attention.dense",
            r"crossattention\.output\.LayerNorm": "cross_attention.norm",
            r"intermediate_query\.dense": "query_feed_forward.up",
            r"output_query\.dense": "query_feed_forward.down",
            r"output_query\.LayerNorm": "query_feed_forward.norm",
            r"intermediate\.dense": "text_feed_forward.up",
            r"output\.dense": "text_feed_forward.down",
            r"output\.LayerNorm": "text_feed_forward.norm",
        }.items()
    ),
)
# Buffers, and what EVA has behind the layers that LAVIS builds, a fortieth layer among it.
IGNORED = (
    r"\.rotary_emb\.inv_freq$",
    r"\.position_ids$",
    r"^model\.vision_tower\.(?:norm|fc_norm|head|encoder\.layers\.39)\.",
)


def is_lavis(path: Path) -> bool:
    """Whether this is a save of LAVIS, or a folder with one."""
    return path.suffix == ".pth" if path.is_file() else bool(_saves(path))


def _saves(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.pth")) if path.name != TOWER_FILE]


# ---------------------------------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Parts:
    """
    A checkpoint and what belongs to it.

    save: what trained.
    language_folder: the language model's folder.
    text_config: its config.
    tensors: all tensors, named as in their files, those of parts with a mark before.
    tower_file: the tower's file, where the save does not hold it.
    """

    save: Path
    language_folder: Path
    text_config: PreTrainedConfig
    tensors: dict[str, TensorInfo]
    tower_file: Path | None

    def apart(self) -> dict[Path, str]:
        """Its parts, and where they are looked for beside the save."""
        parts = {self.language_folder: LANGUAGE_FOLDER}
        return parts if self.tower_file is None else {**parts, self.tower_file: TOWER_FILE}

    @property
    def text_conditioned(self) -> bool:
        """Whether it is an InstructBLIP: its Q-Former reads text."""
        return "Qformer.bert.embeddings.word_embeddings.weight" in self.tensors


def read_parts(path: Path, language_model: str | None = None, vision_tower: str | None = None) -> Parts:
    """
    Finds a checkpoint and its parts and reads the headers of all.

    Args:
        path: the save, or its folder.
        language_model: folder or hub id; by default `llm` beside the save.
        vision_tower: file; by default `eva_vit_g.pth` beside the save.
    """
    save = path
    if path.is_dir():
        save, *others = _saves(path)
        if others:
            names = ", ".join(found.name for found in (save, *others))
            raise ConversionError(f"{path} holds several saves, name one of them: {names}.")
    saved = engine.read_file(save)
    _check_kind(save, saved)
    folder = engine.local_folder(language_model) if language_model else save.parent / LANGUAGE_FOLDER
    if not (folder / "config.json").is_file():
        raise ConversionError(
            f"The language model is not in {folder}, expected a folder in transformers' format: name it with "
            "--language-model."
        )
    text_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    tower = {} if TOWER_SAVED in saved else read_tower(save, vision_tower)
    language = {}
    if not any(re.match(r"(?:opt|llm)_model\..*embed_tokens", name) for name in saved):
        language = {f"{LANGUAGE}{name}": info for name, info in engine.read_checkpoint(folder).items()}
    apart = {
        name: info
        for name, info in {**tower, **language}.items()
        if not any(name.replace(mark, own) in saved for mark, own in _SAVED_AS)
    }
    tower_file = next((info.file for info in tower.values()), None)
    return Parts(save, folder, text_config, {**apart, **saved}, tower_file)


def _check_kind(save: Path, saved: Mapping[str, TensorInfo]) -> None:
    if "query_tokens" not in saved:
        raise ConversionError(f"{save} has no query_tokens: it is no BLIP-2 of LAVIS.")
    if any(name.startswith("t5_") for name in saved):
        check_decoder(T5Config())
    if any(name.startswith("itm_head.") for name in saved):
        raise ConversionError(
            f"{save} is of stage 1, which has no language model: conversion.lavis_pretraining reads it."
        )


def check_decoder(text_config: PreTrainedConfig) -> None:
    """Raises `ConversionError` for an encoder-decoder."""
    if text_config.is_encoder_decoder:
        raise ConversionError(f"The language model ({text_config.model_type}) {NO_DECODER}")


def read_tower(save: Path, option: str | None) -> dict[str, TensorInfo]:
    """The tower that is a file of its own, its names marked: what the option names, or what lies beside the save."""
    path = Path(option).absolute() if option else save.parent / TOWER_FILE
    if not path.is_file():
        raise ConversionError(f"The vision tower {path} does not exist: name its file with --vision-tower.")
    return {f"{TOWER}{name}": info for name, info in engine.read_file(path).items()}


def join_biases(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors with the biases of queries and values as one, under the name of the former."""
    joined = {}
    for name, info in tensors.items():
        partner = tensors.get(name.removesuffix("q_bias") + "v_bias")
        if name.endswith(".attn.q_bias") and partner is not None:
            joined[name] = engine.join_rows((info, partner))
        elif not (name.endswith(".attn.v_bias") and name.removesuffix("v_bias") + "q_bias" in tensors):
            joined[name] = info
    return joined


def tower_biases(target: Target) -> list[str]:
    """The zoo's names of the biases that `AddKeyBias` makes."""
    return [name for name in target.wanted if re.match(r"model\.vision_tower\..+\.self_attn\.qkv\.bias$", name)]


def shapes_before(target: Target) -> dict[str, tuple[int, ...]]:
    """The shapes that these have before it."""
    return {name: (target.wanted[name][0] // 3 * 2,) for name in tower_biases(target)}


# ---------------------------------------------------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------------------------------------------------


def zoo_config(
    parts: Parts, image_token_id: int, vision_heads: int | None = None, qformer_heads: int | None = None
) -> ZooBlip2Config:
    """
    The zoo's config of a checkpoint; the vocabulary reaches up to the image token.

    Args:
        parts: the checkpoint.
        image_token_id: the token that was added for images.
        vision_heads, qformer_heads: see `read_sizes`.
    """
    text_config = copy.deepcopy(parts.text_config)
    text_config.vocab_size = max(text_config.vocab_size, image_token_id + 1)
    return ZooBlip2Config(
        **read_sizes(parts.tensors, vision_heads, qformer_heads),
        text_config=text_config,
        image_token_id=image_token_id,
        tie_word_embeddings=text_config.tie_word_embeddings,
        architectures=["ZooBlip2ForConditionalGeneration"],
    )


def read_sizes(
    tensors: Mapping[str, TensorInfo], vision_heads: int | None = None, qformer_heads: int | None = None
) -> dict:
    """
    Fields of the zoo's config about tower and Q-Former, from the shapes of their tensors.

    Args:
        tensors: of a checkpoint.
        vision_heads, qformer_heads: attention heads, which no shape shows.
    """
    shapes = {re.sub(_TOWER, "visual_encoder.", name): info.shape for name, info in tensors.items()}
    layer = "Qformer.bert.encoder.layer"
    looks = sorted(set(_numbers(shapes, rf"{layer}\.(\d+)\.crossattention\.")))
    depth, qformer_depth = (
        1 + max(_numbers(shapes, pattern), default=-1)
        for pattern in (r"visual_encoder\.blocks\.(\d+)\.", rf"{layer}\.(\d+)\.")
    )
    try:
        width, _, patch, _ = shapes["visual_encoder.patch_embed.proj.weight"]
        _, queries, qformer_width = shapes["query_tokens"]
        patches = shapes["visual_encoder.pos_embed"][1] - 1
        intermediate = shapes["visual_encoder.blocks.0.mlp.fc1.weight"][0]
        qformer_intermediate = shapes[f"{layer}.0.intermediate_query.dense.weight"][0]
    except KeyError as error:
        raise ConversionError(f"The checkpoint has no {error}, from which its config is read.") from error
    words = shapes.get("Qformer.bert.embeddings.word_embeddings.weight")
    positions = shapes.get("Qformer.bert.embeddings.position_embeddings.weight")
    return {
        "vision_config": Blip2VisionConfig(
            hidden_size=width,
            intermediate_size=intermediate,
            num_hidden_layers=min(depth, TOWER_DEPTH.get(width, depth)),
            num_attention_heads=flow.attention_heads(
                "tower of LAVIS", "--vision-heads", width, TOWER_HEADS, vision_heads
            ),
            image_size=math.isqrt(patches) * patch,
            patch_size=patch,
            layer_norm_eps=TOWER_EPS,
        ),
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "num_prefix_tokens": 1,
        "vision_layer_norm": True,
        "vision_layer_norm_eps": VISION_NORM_EPS,
        "num_query_tokens": queries,
        "text_conditioned": words is not None,
        "qformer_vocab_size": None if words is None else words[0],
        "qformer_hidden_size": qformer_width,
        "qformer_num_hidden_layers": qformer_depth,
        "qformer_num_attention_heads": flow.attention_heads(
            "Q-Former", "--qformer-heads", qformer_width, QFORMER_HEADS, qformer_heads
        ),
        "qformer_intermediate_size": qformer_intermediate,
        "qformer_cross_attention_frequency": looks[1] - looks[0] if len(looks) > 1 else max(qformer_depth, 1),
        **({} if positions is None else {"qformer_max_position_embeddings": positions[0]}),
        "dtype": tensors["query_tokens"].dtype,
    }


def _numbers(names, pattern: str) -> list[int]:
    """The layers that names which start so are about."""
    return [int(match[1]) for name in names if (match := re.match(pattern, name))]


# ---------------------------------------------------------------------------------------------------------------------
# Tokens
# ---------------------------------------------------------------------------------------------------------------------


def read_tokenizer(folder: Path, model_type: str) -> PreTrainedTokenizerBase:
    """The language model's tokenizer as LAVIS changes it, with a named image token behind its vocabulary."""
    tokenizer = flow.read_tokenizer(folder)
    if model_type != "opt":  # in InstructBLIP's Vicuna what ends a text opens one too
        tokenizer.add_special_tokens({"bos_token": END_TOKEN, "unk_token": END_TOKEN})
        tokenizer.add_bos_token = True
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return engine.name_image_token(tokenizer, IMAGE_TOKEN)


def end_of_answer(tokenizer: PreTrainedTokenizerBase, model_type: str) -> int | None:
    """The token at which LAVIS stops where that is not the language model's own: OPT's line break."""
    return tokenizer("\n", add_special_tokens=False)["input_ids"][0] if model_type == "opt" else None


# ---------------------------------------------------------------------------------------------------------------------
# What the code computes
# ---------------------------------------------------------------------------------------------------------------------


class OriginalBlip2(nn.Module):
    """What LAVIS' code computes, from the tensors of its checkpoint as they are."""

    def __init__(self, parts: Parts, config: ZooBlip2Config):
        super().__init__()
        self.config = config
        vision_config, text_config = copy.deepcopy(config.vision_config), copy.deepcopy(parts.text_config)
        shared = {
            "encoder_hidden_size": vision_config.hidden_size,
            **{
                name: getattr(config, f"qformer_{name}")
                for name in (
                    "hidden_size",
                    "num_hidden_layers",
                    "num_attention_heads",
                    "intermediate_size",
                    "max_position_embeddings",
                    "cross_attention_frequency",
                )
            },
        }
        self.model = nn.Module()
        self.model.vision_tower = Blip2VisionModel._from_config(vision_config, attn_implementation="eager")
        self.model.vision_tower.post_layernorm.eps = VISION_NORM_EPS
        if config.text_conditioned:
            qformer = InstructBlipQFormerConfig(vocab_size=config.qformer_vocab_size, **shared)
            self.qformer = InstructBlipQFormerModel._from_config(qformer, attn_implementation="eager")
        else:
            self.qformer = Blip2QFormerModel._from_config(Blip2QFormerConfig(**shared), attn_implementation="eager")
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, config.qformer_hidden_size))
        self.projection = nn.Linear(config.qformer_hidden_size, text_config.hidden_size)
        self.language_model = AutoModelForCausalLM.from_config(text_config, attn_implementation="eager")
        if (parts.language_folder / "generation_config.json").is_file():
            self.language_model.generation_config = GenerationConfig.from_pretrained(parts.language_folder)
        self.generation_config = self.language_model.generation_config
        self._read(parts.tensors)
        self.float().eval()

    def _read(self, tensors: Mapping[str, TensorInfo]) -> None:
        state, base = {}, self.language_model.base_model_prefix
        norm = "qformer.embeddings.layernorm." if self.config.text_conditioned else "qformer.layernorm."
        for name, tensor in engine.read_tensors(tensors):
            for pattern, replacement in (*_TO_TRANSFORMERS, (r"^qformer\.embeddings\.LayerNorm\.", norm)):
                name = re.sub(pattern, replacement, name)
            plain = name.removeprefix("language_model.")
            if name != plain and not plain.startswith((f"{base}.", "lm_head.")):
                name = f"language_model.{base}.{plain}"
            state[name] = tensor
        for name in [name for name in state if name.endswith("q_bias")]:
            query, value = state.pop(name), state.pop(name.replace("q_bias", "v_bias"))
            state[name.replace("q_bias", "qkv.bias")] = torch.cat((query, torch.zeros_like(query), value))
        missing = self.load_state_dict(state, strict=False).missing_keys
        tied = {"language_model.lm_head.weight"} if self.config.tie_word_embeddings else set()
        if set(missing) - tied:
            raise ConversionError("What LAVIS' code computes finds no tensors for:", {"missing": missing})

    def get_image_features(
        self, pixel_values, qformer_input_ids=None, qformer_attention_mask=None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """The queries after the Q-Former, projected."""
        patches = self.model.vision_tower(pixel_values, output_hidden_states=True).last_hidden_state
        inputs = {"query_embeds": self.query_tokens.expand(len(patches), -1, -1), "encoder_hidden_states": patches}
        if self.config.text_conditioned:
            ones = torch.ones(inputs["query_embeds"].shape[:-1], dtype=torch.long)
            inputs["input_ids"] = qformer_input_ids
            inputs["attention_mask"] = torch.cat((ones, qformer_attention_mask), dim=1)
        states = self.qformer(**inputs).last_hidden_state[:, : self.config.num_query_tokens]
        return BaseModelOutputWithPooling(pooler_output=list(self.projection(states)))

    def _embed(self, input_ids: torch.Tensor, vision_inputs: dict) -> torch.Tensor:
        places = input_ids == self.config.image_token_id
        embeds = self.language_model.get_input_embeddings()(input_ids.masked_fill(places, 0))
        features = torch.cat(self.get_image_features(**vision_inputs).pooler_output)
        return embeds.masked_scatter(places.unsqueeze(-1), features)

    def forward(self, input_ids, attention_mask=None, output_hidden_states=False, return_dict=True, **vision_inputs):
        return self.language_model(
            inputs_embeds=self._embed(input_ids, vision_inputs),
            attention_mask=attention_mask,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )

    @torch.no_grad()
    def generate(
        self, input_ids, attention_mask=None, max_new_tokens=None, do_sample=False, suppress_tokens=(), **vision_inputs
    ) -> torch.Tensor:
        vocab_size = self.language_model.config.vocab_size
        new = self.language_model.generate(
            inputs_embeds=self._embed(input_ids, vision_inputs),
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            suppress_tokens=[token for token in suppress_tokens if token < vocab_size] or None,
        )
        return torch.cat((input_ids, new), dim=1)


# Name by name what transformers' modules in `OriginalBlip2` are called; all that match apply.
_TO_TRANSFORMERS: Table = (
    (_TOWER, "model.vision_tower."),
    (r"^(model\.vision_tower\.)cls_token$", r"\1embeddings.class_embedding"),
    (r"^(model\.vision_tower\.)pos_embed$", r"\1embeddings.position_embedding"),
    (r"^(model\.vision_tower\.)patch_embed\.proj\.", r"\1embeddings.patch_embedding."),
    (r"^(model\.vision_tower\.)blocks\.", r"\1encoder.layers."),
    (r"^(model\.vision_tower\..+\.)norm(\d)\.", r"\1layer_norm\2."),
    (r"^(model\.vision_tower\..+\.)attn\.proj\.", r"\1self_attn.projection."),
    (r"^(model\.vision_tower\..+\.)attn\.", r"\1self_attn."),
    (r"^ln_vision\.", "model.vision_tower.post_layernorm."),
    (r"^Qformer\.bert\.", "qformer."),
    (r"^(qformer\..+attention\.)self\.", r"\1attention."),
    (r"^(?:opt|llm)_proj\.", "projection."),
    (rf"^(?:{LANGUAGE}|(?:opt|llm)_model\.)", "language_model."),
)
