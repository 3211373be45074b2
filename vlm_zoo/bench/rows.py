"""The rows: what the zoo does faster or leaner than transformers' own classes, and what it must not do slower."""

import functools
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from transformers import (
    AutoTokenizer,
    BatchFeature,
    CLIPImageProcessorPil,
    DynamicCache,
    LlavaProcessor,
    PreTrainedModel,
    ProcessorMixin,
)

from conversion.llava import zoo_from_transformers

from ..models.image_processing_vlm import ZooImageProcessor
from ..models.llava import ZooLlavaForConditionalGeneration, ZooLlavaProcessor
from .engine import Case, Equality, NotRun, close, row, same
from .scale import Scale


# ---------------------------------------------------------------------------------------------------------------------
# Inputs
# ---------------------------------------------------------------------------------------------------------------------


def photo(size: tuple[int, int], seed: int = 0) -> PIL.Image.Image:
    """A smooth random picture with some noise: resizing noise alone would be kinder to rounding than photographs."""
    randomness = np.random.default_rng(seed)
    coarse = PIL.Image.fromarray(randomness.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(size[::-1], PIL.Image.Resampling.BICUBIC), dtype=np.int16)
    noise = randomness.integers(-24, 25, (*size, 3), dtype=np.int16)
    return PIL.Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))


def conversation(scale: Scale, vocab_size: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """
    One image, a prompt and an answer.

    Returns:
        `input_ids` and `attention_mask` int[1, T] and `pixel_values` float[1, C, H, W]; and labels int[1, T] that
        supervise the answer.
    """
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, vocab_size - 1, (1, scale.prompt_tokens + scale.answer_tokens), generator=generator)
    image = torch.full((1, scale.image_tokens), vocab_size - 1)
    input_ids = torch.cat((text[:, :1], image, text[:, 1:]), dim=1)
    labels = input_ids.clone()
    labels[:, : -scale.answer_tokens] = -100
    pixels = torch.randn(1, 3, scale.image_size, scale.image_size, generator=generator)
    batch = {
        "input_ids": input_ids.to(scale.device),
        "attention_mask": torch.ones_like(input_ids).to(scale.device),
        "pixel_values": pixels.to(scale.device, scale.dtype),
    }
    return batch, labels.to(scale.device)


def sizes(model: ZooLlavaForConditionalGeneration) -> str:
    """Parameters of the parts, as text."""
    parts = {"language model": model.model.language_model.layers, "tower": model.model.vision_tower}
    millions = {name: sum(parameter.numel() for parameter in part.parameters()) / 1e6 for name, part in parts.items()}
    return ", ".join(f"{name} {size:.0f} M" for name, size in millions.items())


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The gradients of head and connector that there are, by names that both sides share."""
    zoo = isinstance(model, ZooLlavaForConditionalGeneration)
    first = model.model.connector.layers[0] if zoo else model.model.multi_modal_projector.linear_1
    found = {"head": model.lm_head.weight.grad, "connector": first.weight.grad}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def trained_alike(models: tuple, losses: tuple, allowed_loss: float = 1e-5, allowed: float = 1e-3) -> Equality:
    """Loss, and the gradients of head and connector, after a step of each side."""
    ours, peer = map(gradients, models)
    equality = close("loss", *losses, allowed=allowed_loss * max(1.0, abs(losses[1].item())))
    equality &= Equality(ours.keys() == peer.keys(), f"gradients of the {' and the '.join(peer)}")
    for name, gradient in ours.items():
        equality &= close(name, gradient, peer.get(name, torch.zeros(0)), allowed, relative=True)
    return equality


# ---------------------------------------------------------------------------------------------------------------------
# Pixels
# ---------------------------------------------------------------------------------------------------------------------


def clip_fields(scale: Scale) -> dict:
    """What CLIP's image processor is set to at this image size."""
    return {
        "size": {"shortest_edge": scale.image_size},
        "crop_size": {"height": scale.image_size, "width": scale.image_size},
    }


def pixels_case(scale: Scale, peer_processor) -> Case:
    """Our image processor against another one, on a PIL picture."""
    ours, image = ZooImageProcessor(**clip_fields(scale)), photo(scale.picture)
    height, width = scale.picture
    short = scale.image_size / min(scale.picture)
    resized = (int(height * short), int(width * short))
    raw = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # uint8[1, C, H, W] in the order [H, W, C]
    level = 1 / (255 * min(ours.image_std))

    def compare() -> Equality:
        pixels = [side(image, return_tensors="pt")["pixel_values"] for side in (ours, peer_processor)]
        equality = close("pixel_values (one 8-bit level allowed)", *pixels, level + 1e-6)
        share = (pixels[0] - pixels[1]).abs().gt(1e-5).float().mean().item() if equality.equal else float("nan")
        return Equality(equality.equal, f"{equality.text}; {share:.2%} of the values differ")

    return Case(
        peer=f"{type(peer_processor).__name__} {scale.image_size}, {width}x{height} PIL picture in",
        ours=lambda: ours(image, return_tensors="pt"),
        theirs=lambda: peer_processor(image, return_tensors="pt"),
        compare=compare,
        limit="bicubic antialiased resizing of the decoded uint8 pixels alone",
        limit_step=lambda: F.interpolate(raw, resized, mode="bicubic", antialias=True),
        host=True,
        note="resizing alone {limit}",
    )


@row("pixels_1080p", target=5.0)
def pixels_1080p(scale: Scale) -> Case:
    """Against the backend that users without torchvision have."""
    return pixels_case(scale, CLIPImageProcessorPil(**clip_fields(scale)))


@row("pixels_1080p_torchvision", target=1.0)
def pixels_1080p_torchvision(scale: Scale) -> Case:
    """Against the backend that users with torchvision have."""
    try:
        import torchvision.transforms.v2.functional  # noqa: F401  a build for another torch fails here
        from transformers import CLIPImageProcessor

        peer = CLIPImageProcessor(**clip_fields(scale))
    except Exception as error:  # a mismatched torchvision raises all sorts of errors
        raise NotRun(f"torchvision cannot be imported ({type(error).__name__}: {error})") from error
    return pixels_case(scale, peer)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


@row("loss_152k", target=2.2, memory_target=0.37)
def loss_152k(scale: Scale) -> Case:
    """Only the supervised positions are projected onto the vocabulary."""
    peer = scale.training_llava(scale.vocab_size).train()
    ours = zoo_from_transformers(peer)
    batch, labels = conversation(scale, scale.vocab_size)

    def step(model: PreTrainedModel) -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        return loss.detach()

    def without_head() -> None:
        ours.zero_grad(set_to_none=True)
        ours.model(**batch).last_hidden_state.sum().backward()

    def compare() -> Equality:
        return trained_alike((ours, peer), (step(ours), step(peer)))

    return Case(
        peer=f"LlavaForConditionalGeneration, forward(labels=) and backward, vocabulary {scale.vocab_size:,}, "
        f"{scale.image_tokens} image tokens, {scale.prompt_tokens} + {scale.answer_tokens} of text",
        ours=lambda: step(ours),
        theirs=lambda: step(peer),
        compare=compare,
        limit="the same step without a head",
        limit_step=without_head,
        note=f"{sizes(ours)}: "
        "beside a larger language model the head is a smaller share; the gradients alone are "
        f"{sum(parameter.nbytes for parameter in ours.parameters()) / 2**20:.0f} MiB",
    )


def frozen_tower_case(scale: Scale, stage: str, parts: list[str]) -> Case:
    """A step with a frozen tower and gradient checkpointing, in which the named parts train."""
    peer = scale.training_llava(scale.small_vocab_size, scale.frozen_tower_layers).train()
    ours = zoo_from_transformers(peer)
    batch, labels = conversation(scale, scale.small_vocab_size)
    ours.set_trainable_parts(parts)
    if "language" not in parts:
        peer.requires_grad_(False)
        peer.model.multi_modal_projector.requires_grad_(True)
    peer.model.vision_tower.requires_grad_(False)
    for model in (ours, peer):
        model.activation_checkpointing_enable()
    with torch.no_grad():
        known = {"image": ours.get_image_features(batch["pixel_values"])}
    text = {name: value for name, value in batch.items() if name != "pixel_values"}

    def step(model: PreTrainedModel, **inputs) -> torch.Tensor:
        """Base model, then the supervised positions through the head: how TRL's trainers call both."""
        model.zero_grad(set_to_none=True)
        hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1][labels[:, 1:] != -100]
        loss = F.cross_entropy(model.lm_head(hidden).float(), labels[labels != -100])
        loss.backward()
        return loss.detach()

    def compare() -> Equality:
        equality = trained_alike((ours, peer), (step(ours, **batch), step(peer, **batch)))
        graph = ours.model.see(batch["pixel_values"])[1].requires_grad
        return equality & Equality(not graph, f"our tower's features {'have' if graph else 'have no'} graph")

    return Case(
        peer=f"LlavaForConditionalGeneration, {stage}, frozen tower, gradient checkpointing, forward and backward",
        ours=lambda: step(ours, **batch),
        theirs=lambda: step(peer, **batch),
        compare=compare,
        limit="the same step with the tower's features given, thus without a tower",
        limit_step=lambda: step(ours, **text, mm_encoder_outputs=known),
        note=f"{sizes(ours)}: the larger the tower's share, the larger the ratio; both sides project the supervised "
        "positions alone",
    )


@row("frozen_tower", target=1.9)
def frozen_tower(scale: Scale) -> Case:
    """A frozen tower has no graph, though gradient checkpointing asks for gradients of its embeddings."""
    return frozen_tower_case(scale, "stage 1 (the connector trains)", ["connector"])


@row("frozen_tower_stage_2")
def frozen_tower_stage_2(scale: Scale) -> Case:
    """The same where more of the step is the language model's."""
    parts = ["connector", "language", "embeddings", "head"]
    return frozen_tower_case(scale, "stage 2 (connector and language model train)", parts)


# ---------------------------------------------------------------------------------------------------------------------
# Forward
# ---------------------------------------------------------------------------------------------------------------------


@row("unused_layer", target=1.12)
def unused_layer(scale: Scale) -> Case:
    """Features from before the last layer do not need that layer."""
    layers = scale.deep_tower_layers
    peer = scale.training_llava(scale.small_vocab_size, layers, vision_feature_layer=-2)
    ours = zoo_from_transformers(peer)
    pixels = conversation(scale, scale.small_vocab_size)[0]["pixel_values"]

    @torch.no_grad()
    def features(model: PreTrainedModel) -> torch.Tensor:
        return torch.cat(list(model.get_image_features(pixels, return_dict=True).pooler_output))

    return Case(
        peer=f"LlavaForConditionalGeneration.get_image_features, {layers} layers, vision_feature_layer=-2",
        ours=lambda: features(ours),
        theirs=lambda: features(peer),
        compare=lambda: same("image features", features(ours), features(peer)),
        limit=f"{layers} layers to {layers - 1}, were nothing else to cost time",
        limit_ratio=layers / (layers - 1),
    )


@row("decode", target=1.0, rounds=2)
def decode(scale: Scale) -> Case:
    """Tokens after the prefill cost what they cost in transformers."""
    peer = scale.llava(scale.tower_layers, scale.decoder_width, scale.decoder_layers, 4 * scale.decoder_width,
                       scale.small_vocab_size)  # fmt: skip
    ours = zoo_from_transformers(peer)
    batch, _ = conversation(scale, scale.small_vocab_size)
    length = batch["input_ids"].shape[1]
    options = {
        "max_new_tokens": scale.new_tokens,
        "min_new_tokens": scale.new_tokens,
        "do_sample": False,
        "suppress_tokens": [ours.config.image_token_id],
    }

    @torch.no_grad()
    def prefilled(model: PreTrainedModel) -> DynamicCache:
        cache = DynamicCache(config=model.config.get_text_config())
        model(**batch, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.crop(-1)
        return cache

    def step(model: PreTrainedModel, cache: DynamicCache) -> torch.Tensor:
        text = {name: batch[name] for name in ("input_ids", "attention_mask")}
        tokens = model.generate(**text, past_key_values=cache, **options)
        cache.crop(length - 1 - cache.get_seq_length())
        return tokens[:, length:]

    answers = [model.generate(**batch, **options)[:, length:] for model in (ours, peer)]
    # From here on both read the same memory: copies that lie elsewhere differ by more than what is to be seen
    ours.model.language_model.load_state_dict(peer.model.language_model.state_dict(), assign=True)
    ours.lm_head.load_state_dict(peer.lm_head.state_dict(), assign=True)
    caches = {model: prefilled(model) for model in (ours, peer)}

    def compare() -> Equality:
        continued = [step(model, caches[model]) for model in (ours, peer)]
        equality = same(f"{scale.new_tokens} greedy tokens after an image", *answers)
        return equality & same("tokens continued from the cache", *continued)

    return Case(
        peer=f"LlavaForConditionalGeneration.generate, {scale.new_tokens} tokens from a cache of {length}",
        ours=lambda: step(ours, caches[ours]),
        theirs=lambda: step(peer, caches[peer]),
        compare=compare,
        limit="both read the same weights and the same cache",
        limit_ratio=1.0,
        note=sizes(ours),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


TOKENIZER = Path(__file__).parents[1] / "data" / "tokenizer"
SENTENCE = "The quick brown fox jumps over the lazy dog near the river bank while seven wizards juggle. "


class GivenPixels(ZooImageProcessor):
    """Stands in for an image processor where its work should not count: the pixels are there already."""

    def preprocess(self, images, **kwargs) -> BatchFeature:
        return BatchFeature({"pixel_values": self.pixels})


@row("processor_text", target=1.8)
def processor_text(scale: Scale) -> Case:
    """Ids are repeated, instead of tokenising a text of hundreds of placeholders."""
    fields = clip_fields(scale)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER, image_token="<image>")
    images = [[photo(scale.photo, seed)] for seed in range(scale.texts)]
    texts = [
        f"<|im_start|>user\n<image>\nWhat is in picture {index}? {SENTENCE * (1 + index % 3)}<|im_end|>\n"
        for index in range(scale.texts)
    ]
    whole, given = ZooImageProcessor(**fields), GivenPixels(**fields)
    given.pixels = whole(images, return_tensors="pt")["pixel_values"]
    shared = {"patch_size": scale.patch_size, "vision_feature_select_strategy": "default"}

    def ours(image_processor: ZooImageProcessor) -> ZooLlavaProcessor:
        return ZooLlavaProcessor(image_processor, tokenizer, num_prefix_tokens=1, **shared)

    def theirs(image_processor: ZooImageProcessor) -> LlavaProcessor:
        return LlavaProcessor(image_processor, tokenizer, num_additional_image_tokens=1, **shared)

    def step(processor: ProcessorMixin) -> BatchFeature:
        return processor(images=images, text=texts, padding=True, return_tensors="pt")

    def compare() -> Equality:
        batches = [step(ours(whole)), step(theirs(whole))]
        equality = Equality(True, f"{scale.texts} rows of up to {batches[0]['input_ids'].shape[1]} tokens")
        for name in ("input_ids", "attention_mask", "pixel_values"):
            equality &= same(name, *(batch[name] for batch in batches))
        return equality

    steps = {"ours": ours(given), "peer": theirs(given), "all_ours": ours(whole), "all_peer": theirs(whole)}
    steps = {name: functools.partial(step, processor) for name, processor in steps.items()}
    return Case(
        peer=f"LlavaProcessor, {scale.texts} texts with an image of {scale.image_tokens} tokens each, the image "
        "processor's work taken out on both sides",
        ours=steps.pop("ours"),
        theirs=steps.pop("peer"),
        compare=compare,
        limit="tokenising the texts as they are, without placeholders",
        limit_step=lambda: tokenizer(texts, padding=True, return_tensors="pt"),
        host=True,
        note="with the zoo's image processor on both sides {all_ours} and {all_peer}",
        parts=steps,
    )
