"""The rows of BLIP-2, against transformers' BLIP-2: a frozen tower's work done once, instead of at every step."""

import copy
from collections.abc import Callable

import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    DynamicCache,
    LlamaConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from conversion.blip2 import transformers_table, zoo_from_transformers
from conversion.engine import rename

from ..models.blip2 import ZooBlip2ForConditionalGeneration
from .engine import Case, Equality, close, row, same
from .scale import Scale


QUERIES = 32
IMAGE_SIZE, PATCH_SIZE = 224, 14  # of all published BLIP-2
BATCH = 4
PROMPT_TOKENS, CAPTION_TOKENS = 4, 28  # 32 of text, as stage 2 was published


def blip2(scale: Scale, text_width: int, text_layers: int, intermediate_size: int) -> Blip2ForConditionalGeneration:
    """
    A BLIP-2 of transformers with random weights and no dropout, in eval mode; the last id of its vocabulary is the
    image token. Tower and Q-Former have the width of the scale's towers, and the Q-Former has the depth of the deepest
    of them: at full size it is the published one.
    """
    text_heads, tower_heads = max(text_width // 64, 1), max(scale.tower_width // 64, 1)
    config = Blip2Config(
        vision_config=Blip2VisionConfig(
            hidden_size=scale.tower_width,
            intermediate_size=4 * scale.tower_width,
            num_hidden_layers=scale.deep_tower_layers,
            num_attention_heads=tower_heads,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            initializer_range=0.02,
        ),
        qformer_config=Blip2QFormerConfig(
            hidden_size=scale.tower_width,
            num_hidden_layers=scale.frozen_tower_layers,
            num_attention_heads=tower_heads,
            intermediate_size=4 * scale.tower_width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        text_config=LlamaConfig(
            hidden_size=text_width,
            intermediate_size=intermediate_size,
            num_hidden_layers=text_layers,
            num_attention_heads=text_heads,
            num_key_value_heads=text_heads,
            vocab_size=scale.small_vocab_size,
            max_position_embeddings=4096,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        num_query_tokens=QUERIES,
        image_token_index=scale.small_vocab_size - 1,
    )
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration._from_config(config, dtype=scale.dtype)
    with torch.no_grad():
        model.query_tokens.normal_(std=0.02)  # zeros have gradients that no two computations share
    return model.to(scale.device).eval()


def captions(scale: Scale, rows: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """
    Rows of an image, a short prompt and a caption.

    Returns:
        `input_ids` and `attention_mask` int[B, T] and `pixel_values` float[B, C, H, W]; and labels int[B, T] that
        supervise the caption.
    """
    generator = torch.Generator().manual_seed(0)
    length = PROMPT_TOKENS + CAPTION_TOKENS
    text = torch.randint(3, scale.small_vocab_size - 1, (rows, length), generator=generator)
    ids = torch.cat((torch.full((rows, QUERIES), scale.small_vocab_size - 1), text), dim=1)
    labels = ids.clone()
    labels[:, :-CAPTION_TOKENS] = -100
    pixels = torch.randn(rows, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    batch = {
        "input_ids": ids.to(scale.device),
        "attention_mask": torch.ones_like(ids).to(scale.device),
        "pixel_values": pixels.to(scale.device, scale.dtype),
    }
    return batch, labels.to(scale.device)


def sizes(model: ZooBlip2ForConditionalGeneration) -> str:
    """Parameters of the parts, as text."""
    parts = {
        "language model": model.model.language_model.layers,
        "tower": model.model.vision_tower,
        "Q-Former": model.model.connector,
    }
    millions = {name: sum(parameter.numel() for parameter in part.parameters()) / 1e6 for name, part in parts.items()}
    return ", ".join(f"{name} {size:.0f} M" for name, size in millions.items())


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class Training:
    """Both models with a frozen tower and a frozen language model, a batch, and what the tower makes of its images."""

    def __init__(self, scale: Scale):
        self.peer = blip2(scale, scale.text_width, scale.text_layers, 3 * scale.text_width).train()
        self.ours = zoo_from_transformers(self.peer)
        self.ours.set_trainable_parts(["connector"])
        self.freeze_peer(self.peer)
        self.batch, self.labels = captions(scale, BATCH)
        self.text = {name: value for name, value in self.batch.items() if name != "pixel_values"}
        self.patches = self.ours.model.see(self.batch["pixel_values"])[1]

    def freeze_peer(self, peer: Blip2ForConditionalGeneration) -> None:
        peer.vision_model.requires_grad_(False)
        peer.vision_model.post_layernorm.requires_grad_(True)  # it belongs to the connector
        peer.language_model.requires_grad_(False)

    def step(self, model: PreTrainedModel, **inputs) -> torch.Tensor:
        """Forward and backward; the loss."""
        model.zero_grad(set_to_none=True)
        loss = model(**inputs, labels=self.labels).loss
        loss.backward()
        return loss.detach()

    def step_with_tower(self, model: PreTrainedModel) -> torch.Tensor:
        """From pixels."""
        return self.step(model, **{**self.batch, "pixel_values": self.batch["pixel_values"].to(model.dtype)})

    def step_with_patches(self, model: ZooBlip2ForConditionalGeneration, patches: torch.Tensor) -> torch.Tensor:
        """From what the tower made of the pixels; the Q-Former runs, and trains."""
        known = BaseModelOutputWithPooling(pooler_output=model.model.align(patches))
        return self.step(model, **self.text, mm_encoder_outputs={"image": known})

    def step_without_head(self) -> None:
        """`step_with_patches` as far as the hidden states."""
        self.ours.zero_grad(set_to_none=True)
        known = BaseModelOutputWithPooling(pooler_output=self.ours.model.align(self.patches))
        self.ours.model(**self.text, mm_encoder_outputs={"image": known}).last_hidden_state.sum().backward()

    def compare(self) -> Equality:
        """Losses, and every gradient of norm, queries, Q-Former and projection, in float32; the loss that is timed."""
        ours, peer = (copy.deepcopy(model).float() for model in (self.ours, self.peer))
        patches = ours.model.see(self.batch["pixel_values"])[1]
        expected = self.step_with_tower(peer)
        equality = close("loss", self.step_with_tower(ours), expected, 1e-5 * expected.item())
        equality &= compare_gradients("from pixels", ours, peer)
        equality &= close("loss from patches", self.step_with_patches(ours, patches), expected, 1e-5 * expected.item())
        equality &= compare_gradients("from patches", ours, peer)
        if self.ours.dtype == torch.float32:
            return equality
        losses = self.step_with_patches(self.ours, self.patches), self.step_with_tower(self.peer)
        return equality & close(f"loss in {self.ours.dtype}", *losses, allowed=0.01 * expected.item())


def compare_gradients(what: str, ours: ZooBlip2ForConditionalGeneration, peer: PreTrainedModel) -> Equality:
    """All gradients there are, those of each part of the connector as one vector."""
    table = transformers_table(ours.config)
    found = {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.grad is not None}
    theirs = {
        rename(name, table): parameter.grad
        for name, parameter in peer.named_parameters()
        if parameter.grad is not None
    }
    if found.keys() != theirs.keys():
        return Equality(False, f"{what}: gradients of {sorted(found.keys() ^ theirs.keys())} on one side alone")
    equality = Equality(True, f"{len(found)} gradients {what}")
    for part in ("vision_norm", "query_tokens", "qformer", "projection"):
        names = sorted(name for name in found if name.startswith(f"model.connector.{part}"))
        vectors = [torch.cat([gradients[name].flatten() for name in names]) for gradients in (found, theirs)]
        equality &= close(part, *vectors, 1e-3, relative=True)
    return equality


def training_case(scale: Scale, ours: Callable[[Training], Callable], what: str) -> Case:
    """
    A step of both sides.

    Args:
        ours: makes our step.
        what: how the two differ.
    """
    training = Training(scale)
    note = (
        f"{sizes(training.ours)}: the larger the tower's share, the larger the ratio (published with OPT: language "
        "model 2,517 M, tower 986 M, Q-Former 105 M); the peer projects every position onto the vocabulary"
    )
    return Case(
        peer=f"Blip2ForConditionalGeneration, forward(labels=) and backward, tower and language model frozen, {BATCH} "
        f"rows of {QUERIES} queries and {PROMPT_TOKENS} + {CAPTION_TOKENS} of text; {what}",
        ours=ours(training),
        theirs=lambda: training.step_with_tower(training.peer),
        compare=training.compare,
        limit="our step from the tower's features, without a head",
        limit_step=training.step_without_head,
        note=note,
    )


@row("blip2_step", target=1.8)
def blip2_step(scale: Scale) -> Case:
    """The tower's features were kept, the Q-Former trains on them."""
    return training_case(
        scale,
        lambda training: lambda: training.step_with_patches(training.ours, training.patches),
        "ours is given the tower's features",
    )


@row("blip2_step_uncached")
def blip2_step_uncached(scale: Scale) -> Case:
    """The same from pixels on both sides."""
    return training_case(scale, lambda training: lambda: training.step_with_tower(training.ours), "both run the tower")


# ---------------------------------------------------------------------------------------------------------------------
# Inference
# ---------------------------------------------------------------------------------------------------------------------


class Inference:
    """Both models, and one image with a prompt."""

    def __init__(self, scale: Scale):
        self.peer = blip2(scale, scale.decoder_width, scale.decoder_layers, 4 * scale.decoder_width)
        self.ours = zoo_from_transformers(self.peer)
        # Both read the same memory: copies that lie elsewhere differ by more than what is to be seen
        language_model = self.peer.language_model
        self.ours.model.language_model.load_state_dict(language_model.model.state_dict(), assign=True)
        self.ours.lm_head.load_state_dict(language_model.lm_head.state_dict(), assign=True)
        self.batch, _ = captions(scale, 1)
        self.text = {name: value for name, value in self.batch.items() if name != "pixel_values"}
        self.length = self.text["input_ids"].shape[1]
        self.options = {
            "max_new_tokens": scale.new_tokens,
            "min_new_tokens": scale.new_tokens,
            "do_sample": False,
            "suppress_tokens": [self.ours.config.image_token_id],
        }

    @torch.no_grad()
    def prefill(self, model: PreTrainedModel) -> tuple[torch.Tensor, DynamicCache]:
        """The last logits, and the cache."""
        cache = DynamicCache(config=model.config.get_text_config())
        outputs = model(**self.batch, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return outputs.logits, cache

    def compare(self) -> Equality:
        """Greedy tokens in float32, where rounding decides no tie, and the logits in the dtype that is timed."""
        pixels = self.batch["pixel_values"].float()
        answers = [
            copy.deepcopy(model).float().generate(**{**self.batch, "pixel_values": pixels}, **self.options)
            for model in (self.ours, self.peer)
        ]
        logits = [self.prefill(model)[0] for model in (self.ours, self.peer)]
        allowed = 1e-5 if self.ours.dtype == torch.float32 else 0.05
        equality = same(f"{self.options['max_new_tokens']} greedy tokens in float32", *answers)
        return equality & close(f"logits of the prompt in {self.ours.dtype}", *logits, allowed, relative=True)


@row("blip2_prefill", target=1.0)
def blip2_prefill(scale: Scale) -> Case:
    """A prompt with an image: here both sides do the same work."""
    inference = Inference(scale)
    return Case(
        peer=f"Blip2ForConditionalGeneration, prompt of {inference.length} tokens with an image",
        ours=lambda: inference.prefill(inference.ours),
        theirs=lambda: inference.prefill(inference.peer),
        compare=inference.compare,
        limit="both read the same image and the same prompt",
        limit_ratio=1.0,
        note=sizes(inference.ours),
    )


@row("blip2_decode", target=1.0, rounds=2)
def blip2_decode(scale: Scale) -> Case:
    """Tokens after the prefill cost what they cost in transformers."""
    inference = Inference(scale)
    caches = {}
    for model in (inference.ours, inference.peer):
        caches[model] = inference.prefill(model)[1]
        caches[model].crop(-1)

    def step(model: PreTrainedModel, decoder: PreTrainedModel) -> torch.Tensor:
        cache = caches[model]
        tokens = decoder.generate(**inference.text, past_key_values=cache, **inference.options)
        cache.crop(inference.length - 1 - cache.get_seq_length())
        return tokens[:, inference.length :]

    ours, peer = inference.ours, inference.peer
    return Case(
        peer=f"Blip2ForConditionalGeneration.language_model.generate, {scale.new_tokens} tokens from a cache of "
        f"{inference.length}",
        ours=lambda: step(ours, ours),
        theirs=lambda: step(peer, peer.language_model),
        compare=inference.compare,
        limit="both read the same weights and the same cache",
        limit_ratio=1.0,
        note=sizes(ours),
    )
