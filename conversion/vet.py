"""Visual embedding tables to the zoo, in memory.

    from conversion.vet import read_upstream, zoo_from_transformers

    zoo_from_transformers(model)                    Ovis2ForConditionalGeneration of transformers
    read_upstream(folder, image_token_id)           Ovis 1.6 and 2 as AIDC-AI's code writes them

The two formats of Ovis 2 compute different features: transformers' passes the tower's last norm, AIDC-AI's does not.
The config says which (`tower_norm`), and the numbers stay the source's. When Ovis 1.6 was written, Gemma 2 multiplied
the embeddings of images too: that factor is part of the table here. Ovis 2.5 reads images at their own size, for which
there is no tower here; it is refused by name.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from transformers import Aimv2VisionConfig, AutoConfig, Ovis2Config, Ovis2ForConditionalGeneration, PreTrainedConfig

from vlm_zoo.models.vet import ZooVetConfig, ZooVetForConditionalGeneration

from . import engine, flow
from .engine import ConversionError, Table, TensorInfo


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

_TRUNK = r"^visual_tokenizer\.backbone\.trunk\.blocks\.(\d+)"
_LAYER = r"model.vision_tower.encoder.layers.\1"
FROM_UPSTREAM: Table = (
    (r"^llm\.model\.(.+)$", r"model.language_model.\1"),
    (r"^llm\.lm_head\.(.+)$", r"lm_head.\1"),
    (r"^vte\.(.+)$", r"model.connector.table.\1"),
    (r"^visual_tokenizer\.head\.0\.(.+)$", r"model.connector.head.\1"),
    (r"^visual_tokenizer\.head\.1\.(.+)$", r"model.connector.norm.\1"),
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
# Configs
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
# Language models that multiplied all embeddings when Ovis was written with them, those of images too; today they
# multiply those of text alone.
SCALES_ALL_EMBEDDINGS = ("gemma", "gemma2")
TOWERS = ("clip_vision_model", "siglip_vision_model", "aimv2")


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
    fields = (*AIMV2_FIELDS, "mlp_bias", "hidden_act", "initializer_range")
    return ZooVetConfig(
        vision_config=Aimv2VisionConfig(**{name: getattr(vision, name) for name in fields}, use_head=False),
        text_config=text,
        image_token_id=source.image_token_id,
        num_prefix_tokens=0,
        visual_vocab_size=vision.vocab_size,
        num_visual_indicators=vision.num_visual_indicator_tokens,
        hidden_stride=vision.hidden_stride,
        tokenize_function=vision.tokenize_function,
        tower_norm=True,
        max_tiles=max_tiles,
        tie_word_embeddings=text.tie_word_embeddings,
        dtype=source.dtype,
        architectures=["ZooVetForConditionalGeneration"],
    )


def upstream_config(
    raw: Mapping, tensors: Iterable[str], num_words: int, image_token_id: int, max_tiles: int | None
) -> ZooVetConfig:
    """
    The zoo's config of an upstream Ovis.

    Args:
        raw: its `config.json`.
        tensors: the names of what it holds.
        num_words: words that a patch can become.
        image_token_id: a token of the language model that no text contains; upstream its ids are negative.
        max_tiles: see `ZooVetConfig`; upstream it is an option of a call, 9 by default.

    Raises:
        ConversionError: another format, or a tower that the zoo has not.
    """
    if raw.get("model_type") != "ovis":
        raise ConversionError(
            f"The checkpoint is of model type '{raw.get('model_type')}', this reads 'ovis' (Ovis 1.6 and 2). Ovis 2.5 "
            "('ovis2_5') reads images at their own size, for which the zoo has no tower."
        )
    tokenizer = raw["visual_tokenizer_config"]
    return ZooVetConfig(
        vision_config=upstream_tower(tokenizer["backbone_config"]),
        text_config=AutoConfig.for_model(**raw["llm_config"]),
        image_token_id=image_token_id,
        num_prefix_tokens=1 if tokenizer["backbone_config"]["model_type"] == "clip_vision_model" else 0,
        vision_feature_select_strategy="default" if tokenizer.get("drop_cls_token") else "full",
        visual_vocab_size=tokenizer["vocab_size"],
        num_visual_indicators=tokenizer["vocab_size"] - num_words,
        hidden_stride=tokenizer.get("hidden_stride", 1),
        tokenize_function=tokenizer["tokenize_function"],
        tau=tokenizer.get("tau", 1.0),
        head_layer_norm="visual_tokenizer.head.1.weight" in tensors,
        max_tiles=max_tiles,
        dtype=torch.float32 if raw.get("torch_dtype") is None else getattr(torch, raw["torch_dtype"]),
        architectures=["ZooVetForConditionalGeneration"],
    )


def upstream_tower(raw: Mapping) -> PreTrainedConfig:
    """The tower's config; an unknown tower is a `ConversionError`."""
    if raw["model_type"] not in TOWERS:
        raise ConversionError(f"The tower is of model type '{raw['model_type']}'; this reads {', '.join(TOWERS)}.")
    if raw["model_type"] != "aimv2":
        return AutoConfig.for_model(**raw)
    return Aimv2VisionConfig(
        **{name: raw[name] for name in AIMV2_FIELDS}, mlp_bias=raw.get("use_bias", False), use_head=False
    )


# ---------------------------------------------------------------------------------------------------------------------
# To the zoo
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
    # A file of version 4 may hold an untied head under a config that says otherwise
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    config = zoo_config(model.config, max_tiles, tied)
    return flow.in_memory(model, ZooVetForConditionalGeneration, config, FROM_OVIS2)


def read_upstream(
    folder: str | Path, image_token_id: int, max_tiles: int | None = 9
) -> ZooVetForConditionalGeneration:
    """
    The zoo's model with the weights of a folder that AIDC-AI's code wrote, in eval mode.

    Args:
        folder: with `config.json` and safetensors.
        image_token_id, max_tiles: see `upstream_config`.

    Raises:
        ConversionError: the folder cannot be read completely.
    """
    folder = Path(folder)
    raw, tensors = engine.read_json(folder / "config.json"), engine.read_checkpoint(folder)
    head = tensors.get("visual_tokenizer.head.0.weight")
    if head is None:
        raise ConversionError(f"{folder} has no visual_tokenizer.head.0.weight, it is no Ovis 1.6 or 2.")
    config = upstream_config(raw, tensors, head.shape[0], image_token_id, max_tiles)
    tensors = apart(tensors)
    target = flow.zoo_target(ZooVetForConditionalGeneration, config)
    plan = engine.plan_tensors(tensors, FROM_UPSTREAM, target, str(folder))
    kept = set(plan.kept())
    state = {
        plan.names[name]: tensor.reshape(tensors[name].shape)
        for name, tensor in engine.read_tensors(tensors)
        if name in kept
    }
    if config.text_config.model_type in SCALES_ALL_EMBEDDINGS:
        state["model.connector.table.weight"] *= config.text_config.hidden_size**0.5
    model = ZooVetForConditionalGeneration.from_pretrained(None, config=config, state_dict=state, dtype=config.dtype)
    return model.eval()


def one_placeholder(input_ids: torch.Tensor, indicator_ids: Iterable[int], image_token_id: int) -> torch.Tensor:
    """Ids `int[B, T]` of an Ovis2 as the zoo has them: indicators are placeholders of their image."""
    indicators = torch.tensor(list(indicator_ids), device=input_ids.device)
    return input_ids.masked_fill(torch.isin(input_ids, indicators), image_token_id)
