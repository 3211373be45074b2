"""The frame's configuration: what every architecture of the zoo has in common.

An architecture subclasses `ZooConfig`, sets its `model_type` and adds the fields of its connector. The file of an
architecture ends with `publish(Zoo<Name>Config)`, so that a checkpoint which carries its own code is found by the
tools that look model types up by name.
"""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)


# The doors through which a head class opens; `AutoModel` opens the base model.
HEAD_DOORS = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForVision2Seq")


# What is wrong with an encoder-decoder, wherever one is refused.
NO_DECODER = (
    "is an encoder-decoder, expected a decoder: trainers need one hidden state for every token of input_ids, but here "
    "the encoder reads those, and the answer's hidden states are others."
)


@strict
class ZooConfig(PreTrainedConfig):
    r"""
    Shared configuration: a vision tower, a language model, and what joins them.

    vision_config (`dict` or `PreTrainedConfig`, *optional*):
        Any vision tower that `AutoModel` builds. Defaults to CLIP ViT-L/14 at 336 px.
    text_config (`dict` or `PreTrainedConfig`, *optional*):
        Any decoder that `AutoModel` builds. Defaults to Llama.
    image_token_id (`int`):
        Id of the placeholder that stands once for every visual token in `input_ids`.
    vision_feature_layer (`int` or `list[int]`):
        Index (or indices) into the tower's hidden states, 0 being the embeddings; several are concatenated on the
        channel axis. Layers after the last one used are not built.
    vision_feature_select_strategy (`"default"` or `"full"`):
        `"default"` keeps the patch tokens alone, `"full"` keeps the tower's prefix tokens (CLS, registers) too.
    num_prefix_tokens (`int`):
        How many prefix tokens the tower puts before its patches: CLIP 1, SigLIP 0, DINOv2 1 plus its registers.
    response_token_ids (`list[int]`, *optional*):
        The tokens with which the chat template opens the assistant's turn. What a row says before the first of them
        is its question, for architectures that look at it.
    supervised_logits_only (`bool`):
        In training mode, project only the positions that carry a label; `logits` is then `None`.
    """

    _auto_class = "AutoConfig"
    takes_native_towers = False  # those that take patches of images of any size, not pictures of one size
    # What an evaluation loop must not gather
    keys_to_ignore_at_inference = ["past_key_values", "carry", "fusion_outputs"]
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(
            config_class=AutoConfig,
            model_type="clip_vision_model",
            init_kwargs={
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "image_size": 336,
                "patch_size": 14,
                "projection_dim": 768,
            },
        ),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama", init_kwargs={"vocab_size": 32064}),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 32000
    vision_feature_layer: int | list[int] = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    num_prefix_tokens: int = 1
    response_token_ids: list[int] | None = None
    supervised_logits_only: bool = True
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        # Decoders keep the flag in their own config; tying is decided at the top, where the head lives.
        if getattr(self.text_config, "tie_word_embeddings", False):
            self.tie_word_embeddings = True

    def validate_language_model(self):
        """Part of `@strict` validation: the language model is a decoder."""
        if getattr(self.text_config, "is_encoder_decoder", False):
            raise ValueError(f"The language model ({self.text_config.model_type}) {NO_DECODER}")

    def validate_feature_layers(self):
        """Part of `@strict` validation: every feature layer is one that the tower has."""
        depth = getattr(self.vision_config, "num_hidden_layers", None)
        if depth is None:
            return
        for layer in self.feature_layers:
            if not 0 <= layer <= depth:
                raise ValueError(
                    f"vision_feature_layer {self.vision_feature_layer} does not exist: the vision tower has {depth} "
                    f"layers, so its hidden states are numbered 0 to {depth} (or -{depth + 1} to -1)."
                )

    @property
    def feature_layers(self) -> list[int]:
        """The used hidden states as non-negative indices, in the order they are concatenated."""
        layers = self.vision_feature_layer
        layers = [layers] if isinstance(layers, int) else list(layers)
        if not layers:
            raise ValueError("vision_feature_layer is an empty list: name at least one hidden state of the tower.")
        depth = self.vision_config.num_hidden_layers
        return [layer if layer >= 0 else depth + 1 + layer for layer in layers]

    @property
    def eos_token_id(self) -> int | list[int] | None:
        """The language model's own; adapters look for it here."""
        return self.text_config.eos_token_id

    @eos_token_id.setter
    def eos_token_id(self, value: int | list[int] | None) -> None:
        self.text_config.eos_token_id = value

    @classmethod
    def small_fields(cls, width: int, from_scratch: bool = False) -> dict:
        """
        The fields that make the connector as small as parts of this width ask for, where its defaults are large: what
        demonstrations and tests build.

        Args:
            from_scratch: whether the parts have learned nothing yet that must be kept.
        """
        return {}

    @classmethod
    def doors(cls) -> dict[str, str]:
        """The `auto_map` of a checkpoint: every Auto class and the `file.Class` that it opens."""
        stem = f"{cls.__module__.rsplit('.', 1)[-1]}.{cls.__name__.removesuffix('Config')}"
        return {
            "AutoConfig": f"{stem}Config",
            "AutoModel": f"{stem}Model",
            **dict.fromkeys(HEAD_DOORS, f"{stem}ForConditionalGeneration"),
            "AutoProcessor": f"{stem}Processor",
        }

    def own_doors(self) -> dict[str, str]:
        """Further doors of the checkpoint with this very config, for heads of another kind than `doors` opens."""
        return {}

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """Saves the config with the whole `auto_map`, whichever door it was opened through."""
        self.auto_map = {**self.doors(), **self.own_doors()}
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


def publish(config_class: type[ZooConfig]) -> None:
    """
    Enters the model type and its class names into transformers' static name tables, which `AutoModel….register` does
    not reach and from which `transformers serve` and the pipelines read.
    """
    stem = config_class.__name__.removesuffix("Config")
    MODEL_MAPPING_NAMES.setdefault(config_class.model_type, f"{stem}Model")
    for table in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES):
        table.setdefault(config_class.model_type, f"{stem}ForConditionalGeneration")
