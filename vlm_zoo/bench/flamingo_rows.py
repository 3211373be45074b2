"""The rows of Flamingo, against transformers' IDEFICS: keys and values of images once, instead of at every token."""

import copy

import torch
from transformers import DynamicCache, IdeficsConfig, IdeficsForVisionText2Text, PreTrainedModel

from conversion.flamingo import idefics_inputs, zoo_from_transformers

from ..models.flamingo import ZooFlamingoForConditionalGeneration
from .engine import Case, Equality, close, row, same
from .scale import Scale


IMAGES = 4
IMAGE_SIZE, FEATURES = 224, 257  # of an image in all published IDEFICS


def idefics(scale: Scale, interval: int = 1, latents: int | None = None) -> IdeficsForVisionText2Text:
    """
    An IDEFICS of transformers with random weights and open gates, in eval mode.

    Args:
        scale: the sizes.
        interval: a gated block stands before every so many-th layer.
        latents: of its resampler; without one the blocks look at all features.
    """
    config = IdeficsConfig(
        vocab_size=scale.small_vocab_size,
        additional_vocab_size=2,
        hidden_size=scale.decoder_width,
        intermediate_size=4 * scale.decoder_width,
        num_hidden_layers=scale.decoder_layers,
        num_attention_heads=max(scale.decoder_width // 64, 1),
        max_position_embeddings=4096,
        cross_layer_interval=min(interval, scale.decoder_layers),
        qk_layer_norms=True,
        alpha_initializer="ones",
        use_resampler=latents is not None,
        perceiver_config={"resampler_n_latents": latents or 1, "resampler_n_heads": 8, "resampler_head_dim": 64},
        vision_config={
            "embed_dim": scale.tower_width,
            "intermediate_size": 4 * scale.tower_width,
            "num_hidden_layers": scale.tower_layers,
            "num_attention_heads": max(scale.tower_width // 64, 1),
            "image_size": IMAGE_SIZE,
            "patch_size": 14,
        },
    )
    torch.manual_seed(0)
    model = IdeficsForVisionText2Text._from_config(config, dtype=scale.dtype)
    return model.to(scale.device).eval()


def conversation(scale: Scale, image_token_id: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A row of text with an image before each quarter of it: `input_ids` and `attention_mask` int[1, T], and
    `pixel_values` float[4, C, H, W]."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, scale.small_vocab_size, (1, scale.prompt_tokens), generator=generator)
    image = torch.full((1, 1), image_token_id)
    ids = torch.cat([piece for quarter in text.chunk(IMAGES, dim=1) for piece in (image, quarter)], dim=1)
    pixels = torch.randn(IMAGES, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    batch = {"input_ids": ids.to(scale.device), "attention_mask": torch.ones_like(ids).to(scale.device)}
    return batch, pixels.to(scale.device, scale.dtype)


class Sides:
    """Both models, the same prompt for both, and what each is given with it."""

    def __init__(self, scale: Scale, only_immediate_media: bool, interval: int = 1, latents: int | None = None):
        self.peer = idefics(scale, interval, latents)
        self.ours = zoo_from_transformers(self.peer)
        self.ours.config.only_immediate_media = only_immediate_media
        self.only_immediate_media = only_immediate_media
        self.text, self.pixels = conversation(scale, self.ours.config.image_token_id)
        self.length = self.text["input_ids"].shape[1]
        self.options = {
            "max_new_tokens": scale.new_tokens,
            "min_new_tokens": scale.new_tokens,
            "do_sample": False,
            "suppress_tokens": [self.ours.config.image_token_id],
        }

    def inputs(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Text and images as this side takes them."""
        pixels = self.pixels.to(model.dtype)
        if isinstance(model, ZooFlamingoForConditionalGeneration):
            return {**self.text, "pixel_values": pixels}
        ids, image = self.text["input_ids"], self.ours.config.image_token_id
        return {**self.text, **idefics_inputs(ids, pixels, image, self.only_immediate_media)}

    @torch.no_grad()
    def prefill(self, model: PreTrainedModel) -> tuple[torch.Tensor, DynamicCache]:
        """The last logits, and the cache."""
        cache = DynamicCache(config=model.config.get_text_config())
        outputs = model(**self.inputs(model), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return outputs.logits, cache

    @torch.no_grad()
    def features(self, model: PreTrainedModel) -> dict:
        """The images' features, as this side takes them with a cache; their keys and values are not in it."""
        inputs = self.inputs(model)
        if isinstance(model, ZooFlamingoForConditionalGeneration):
            return {"mm_encoder_outputs": {"image": model.get_image_features(inputs["pixel_values"])}}
        states = model.model.vision_model(inputs["pixel_values"][0]).last_hidden_state
        if model.config.use_resampler:
            states = model.model.perceiver_resampler(states)
        return {"image_hidden_states": states[None], "image_attention_mask": inputs["image_attention_mask"]}

    def go_on(self, model: PreTrainedModel, cache: DynamicCache, text: dict | None = None, **features) -> torch.Tensor:
        """New tokens from a cache of all but the last token of the prompt, which is left as it was."""
        tokens = model.generate(**(text or self.text), past_key_values=cache, **features, **self.options)
        cache.crop(self.length - 1 - cache.get_seq_length())
        return tokens[:, self.length :]

    def compare(self) -> Equality:
        """Greedy tokens in float32, where rounding decides no tie, and the logits in the dtype that is timed."""
        answers, continued, logits = [], [], []
        for model in (self.ours, self.peer):
            exact = copy.deepcopy(model).float()
            answers.append(exact.generate(**self.inputs(exact), **self.options)[:, self.length :])
            cache = self.prefill(exact)[1]
            cache.crop(-1)
            continued.append(self.go_on(exact, cache, **self.features(exact)))
            logits.append(self.prefill(model)[0])
        allowed = 1e-5 if self.ours.dtype == torch.float32 else 0.05
        equality = same(f"{self.options['max_new_tokens']} greedy tokens in float32", *answers)
        equality &= same("tokens continued from a cache", *continued)
        return equality & close(f"logits of the prompt in {self.ours.dtype}", *logits, allowed, relative=True)


def decode_case(scale: Scale, sides: Sides, size: str) -> Case:
    """Tokens from a cache of the prompt, the images' features given on both sides."""
    caches = {model: sides.prefill(model)[1] for model in (sides.ours, sides.peer)}
    for cache in caches.values():
        cache.crop(-1)
    features = {model: sides.features(model) for model in caches}
    blind = {**sides.text, "input_ids": sides.text["input_ids"].clamp(max=scale.small_vocab_size - 1)}
    seen = "a token sees the last image" if sides.only_immediate_media else "a token sees all images before it"

    def step(model: PreTrainedModel) -> torch.Tensor:
        return sides.go_on(model, caches[model], **features[model])

    return Case(
        peer=f"IdeficsForVisionText2Text.generate, {scale.new_tokens} tokens from a cache of {sides.length}, {IMAGES} "
        f"images of {size}, {seen}",
        ours=lambda: step(sides.ours),
        theirs=lambda: step(sides.peer),
        compare=sides.compare,
        limit="our tokens from the same cache without images",
        limit_step=lambda: sides.go_on(sides.ours, caches[sides.ours], blind),
        note=f"{sizes(sides.ours)}: the wider the image's features beside the language model, the larger the ratio",
    )


def sizes(model: ZooFlamingoForConditionalGeneration) -> str:
    """Parameters of the parts, as text."""
    parts = {"language model": model.model.language_model.layers, "blocks": model.model.fusion}
    millions = {name: sum(parameter.numel() for parameter in part.parameters()) / 1e6 for name, part in parts.items()}
    return ", ".join(f"{name} {size:.0f} M" for name, size in millions.items())


@row("idefics_decode", target=1.6)
def idefics_decode(scale: Scale) -> Case:
    """A block before every layer; of four images a token sees the last."""
    return decode_case(scale, Sides(scale, only_immediate_media=True), f"{FEATURES} features")


@row("idefics_decode_all_images", target=1.6)
def idefics_decode_all_images(scale: Scale) -> Case:
    """The same where a token sees all four, so that as many keys are attended to on both sides."""
    return decode_case(scale, Sides(scale, only_immediate_media=False), f"{FEATURES} features")


@row("idefics_decode_resampled", target=1.15)
def idefics_decode_resampled(scale: Scale) -> Case:
    """As IDEFICS is published: 64 latents an image, a block before every fourth layer."""
    return decode_case(scale, Sides(scale, only_immediate_media=True, interval=4, latents=64), "64 latents")


@row("idefics_prefill")
def idefics_prefill(scale: Scale) -> Case:
    """A prompt with four images: here both sides do the same work."""
    sides = Sides(scale, only_immediate_media=True)
    equality = sides.compare()
    # From here on both read the same memory: copies that lie elsewhere differ by more than what is to be seen
    ours, peer = sides.ours.model, sides.peer.model
    ours.vision_tower.load_state_dict(peer.vision_model.state_dict(), assign=True, strict=False)
    ours.language_model.layers.load_state_dict(peer.layers.state_dict(), assign=True)
    return Case(
        peer=f"IdeficsForVisionText2Text, prompt of {sides.length} tokens with {IMAGES} images of {FEATURES} features",
        ours=lambda: sides.prefill(sides.ours),
        theirs=lambda: sides.prefill(sides.peer),
        compare=lambda: equality,
        limit="both read the same weights, the same images and the same prompt",
        limit_ratio=1.0,
        note=sizes(sides.ours),
    )
