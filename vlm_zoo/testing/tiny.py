"""Tiny offline models and processors: two layers a part, a byte-level tokenizer, nothing downloaded."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from ..chat_templates import plain_template, response_tokens
from ..models.processing_vlm import ZooProcessor
from ..models.video_vlm import video_marker
from ..registry import ZOO, ZooEntry


IMAGE_SIZE, PATCH_SIZE = 32, 8
IMAGE_TOKEN = "<image>"
_SPECIAL_TOKENS = ["<pad>", "<s>", "</s>"]
_VOCAB_SIZE = 320  # a multiple of 64, with room behind the tokenizer's last id

TINY_VISION = {
    "clip": {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "projection_dim": 32,
    },
    "siglip": {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
    },
    "dinov2": {
        "model_type": "dinov2",
        "hidden_size": 32,
        "mlp_ratio": 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
    },
}

_NATIVE = {"hidden_size": 32, "num_heads": 4, "depth": 2, "patch_size": PATCH_SIZE, "initializer_range": 0.1}
TINY_NATIVE_VISION = {
    "qwen2_vl": {"model_type": "qwen2_vl_vision", "embed_dim": 32, "mlp_ratio": 2, **_NATIVE},
    "qwen2_5_vl": {
        "model_type": "qwen2_5_vl_vision",
        "intermediate_size": 64,
        "window_size": 4 * PATCH_SIZE,
        "fullatt_block_indexes": [1],
        **_NATIVE,
    },
    "qwen3_vl": {
        "model_type": "qwen3_vl_vision",
        "intermediate_size": 64,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [],
        **_NATIVE,
    },
    "siglip2": {
        "model_type": "siglip2_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "patch_size": PATCH_SIZE,
        "num_patches": 16,
    },
}

_DECODER = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "vocab_size": _VOCAB_SIZE,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TINY_TEXT = {
    "llama": {"model_type": "llama", **_DECODER},
    "qwen3": {"model_type": "qwen3", "head_dim": 12, **_DECODER},
    "mistral": {"model_type": "mistral", "sliding_window": 32, **_DECODER},
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 12,
        "query_pre_attn_scalar": 12,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        **_DECODER,
    },
    "opt": {
        "model_type": "opt",
        "hidden_size": 48,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 48,
        "max_position_embeddings": 1024,
        "vocab_size": _VOCAB_SIZE,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 1024,
        "vocab_size": _VOCAB_SIZE,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


def tiny_tokenizer(image_token: str | None = IMAGE_TOKEN) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 256 bytes and a few special tokens; any text survives encoding and decoding."""
    symbols = [*_SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    pad, bos, eos = _SPECIAL_TOKENS
    named = {"extra_special_tokens": {"image_token": image_token}} if image_token else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, bos_token=bos, eos_token=eos, padding_side="left", **named
    )


def _entry(model_type: str) -> ZooEntry:
    entry = ZOO.get(model_type) or ZOO.get(f"zoo_{model_type}")
    if entry is None:
        raise ValueError(f"Unknown architecture '{model_type}'; the zoo has {', '.join(ZOO)}.")
    return entry


def tiny_config(model_type: str, vision: str = "clip", text: str = "llama", **overrides) -> PreTrainedConfig:
    """
    A config of under a million parameters.

    Args:
        model_type: a key of `vlm_zoo.ZOO`, with or without its `zoo_`.
        vision: a key of `TINY_VISION` or, for architectures of native resolution, `TINY_NATIVE_VISION`.
        text: a key of `TINY_TEXT`.
        overrides: fields of the config.
    """
    entry = _entry(model_type)
    tokenizer = tiny_tokenizer()
    tower = {**TINY_VISION, **TINY_NATIVE_VISION}[vision]
    fields = {
        "vision_config": dict(tower),
        "text_config": dict(TINY_TEXT[text]),
        "image_token_id": tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        "response_token_ids": response_tokens(tokenizer, plain_template(IMAGE_TOKEN)),
        "vision_feature_layer": -1,
        "num_prefix_tokens": 1 if vision in ("clip", "dinov2") else 0,
    }
    return entry.config(**{**fields, **entry.config.small_fields(tower["hidden_size"]), **overrides})


def tiny_processor(model_type: str, config: PreTrainedConfig | None = None) -> ZooProcessor:
    """
    The processor that belongs to `config`, or to `tiny_config(model_type)`.
    """
    entry = _entry(model_type)
    config = tiny_config(model_type) if config is None else config
    tokenizer = tiny_tokenizer()
    image_processor = entry.image_processor(**entry.processor.image_fields_from(config))
    return entry.processor(
        image_processor,
        tokenizer,
        chat_template=plain_template(IMAGE_TOKEN, video_marker(tokenizer) if entry.processor.takes_clips else None),
        **entry.processor.fields_from(config),
    )


def tiny_model(model_type: str, **overrides) -> PreTrainedModel:
    """A head model of `tiny_config(model_type, **overrides)`, in eval mode."""
    return _entry(model_type).head(tiny_config(model_type, **overrides)).eval()
