"""How large the models and inputs of the rows are."""

from dataclasses import dataclass

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration


@dataclass(frozen=True)
class Scale:
    """
    Sizes of the rows, and how often they are timed.

    rounds: fewest rounds of a row.
    seconds: a row goes on until its rounds took this long, though never beyond ten times `rounds`.
    device: where models run; pictures and text are always the CPU's work.
    tower_width, tower_layers: the tower of most rows; `deep_tower_layers` that of `unused_layer`, and
        `frozen_tower_layers` that of the frozen towers.
    text_width, text_layers: the language model of the training rows; `decoder_*` is that of `decode`.
    vocab_size: of `loss_152k`. The other rows do not depend on it and take `small_vocab_size`.
    prompt_tokens, answer_tokens: text tokens before and after the answer starts; the answer is supervised.
    new_tokens: tokens that a step of `decode` generates.
    visual_vocab_size: rows of the visual embedding table; `visual_features` and `visual_embeddings` are the widths of
        a token before and behind it.
    texts: rows of the batch of `processor_text`.
    picture, photo: (height, width) of the pictures of `pixels_1080p` and of `processor_text`.
    """

    rounds: int = 6
    seconds: float = 2.0
    device: str = "cpu"
    dtype: torch.dtype = torch.bfloat16
    image_size: int = 336
    patch_size: int = 14
    tower_width: int = 768
    tower_layers: int = 4
    deep_tower_layers: int = 8
    frozen_tower_layers: int = 12
    text_width: int = 512
    text_layers: int = 8
    decoder_width: int = 768
    decoder_layers: int = 12
    vocab_size: int = 151_936
    small_vocab_size: int = 32_000
    prompt_tokens: int = 64
    answer_tokens: int = 64
    new_tokens: int = 16
    visual_vocab_size: int = 65_536
    visual_features: int = 1024
    visual_embeddings: int = 1536
    texts: int = 16
    picture: tuple[int, int] = (1080, 1920)
    photo: tuple[int, int] = (480, 640)

    @property
    def image_tokens(self) -> int:
        """Visual tokens of an image."""
        return (self.image_size // self.patch_size) ** 2

    def training_llava(
        self, vocab_size: int, tower_layers: int | None = None, **fields
    ) -> LlavaForConditionalGeneration:
        """The model of the training rows; see `llava`."""
        layers = self.tower_layers if tower_layers is None else tower_layers
        return self.llava(layers, self.text_width, self.text_layers, 3 * self.text_width, vocab_size, **fields)

    def llava(
        self,
        tower_layers: int,
        text_width: int,
        text_layers: int,
        intermediate_size: int,
        vocab_size: int,
        vision_feature_layer: int = -1,
    ) -> LlavaForConditionalGeneration:
        """A LLaVA-1.5 of transformers with random weights, in eval mode; the last id of its vocabulary is the image
        token."""
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=self.tower_width,
                intermediate_size=4 * self.tower_width,
                num_hidden_layers=tower_layers,
                num_attention_heads=max(self.tower_width // 64, 1),
                image_size=self.image_size,
                patch_size=self.patch_size,
            ),
            text_config=LlamaConfig(
                hidden_size=text_width,
                intermediate_size=intermediate_size,
                num_hidden_layers=text_layers,
                num_attention_heads=max(text_width // 64, 1),
                num_key_value_heads=max(text_width // 64, 1),
                vocab_size=vocab_size,
                max_position_embeddings=4096,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            ),
            image_token_index=vocab_size - 1,
            image_seq_length=self.image_tokens,
            vision_feature_layer=vision_feature_layer,
        )
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration._from_config(config, dtype=self.dtype)
        return model.to(self.device).eval()


FULL = Scale()
QUICK = Scale(
    rounds=4,
    seconds=0.5,
    tower_layers=2,
    deep_tower_layers=4,
    frozen_tower_layers=4,
    text_layers=4,
    decoder_width=512,
    decoder_layers=8,
    vocab_size=64_000,
    small_vocab_size=8_000,
    new_tokens=8,
    visual_vocab_size=16_384,
    visual_features=512,
    visual_embeddings=512,
    texts=8,
)
