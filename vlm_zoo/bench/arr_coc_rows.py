"""The rows of ARR-COC, against M-RoPE with all tokens and the same weights: what a budget saves, and what it costs."""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from conversion.arr_coc import ALL_TOKENS, from_mrope

from ..models.modeling_vlm import FuseContext
from ..models.mrope import ZooMropeConfig, ZooMropeForConditionalGeneration
from ..models.native_vlm import patch_geometry
from ..models.texture_vlm import texture_of_patches, unnormalize
from .engine import Case, Equality, close, row, same
from .mrope_rows import sizes
from .scale import Scale


# Of 576 tokens 288, 144 and 64 are left.
HALF, QUARTER, NINTH = 2, 4, 9
OPENING = [3, 4]  # the tokens that open an answer
TEXT = 16  # tokens of a question as benchmarks ask them, with what a template puts around it
# sRGB pictures that were normalised as CLIP's towers want them
MEAN, DEVIATION = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def mrope(scale: Scale) -> ZooMropeForConditionalGeneration:
    """An M-RoPE with random weights, in eval mode: a token for every patch of a CLIP tower, and a Llama whose last id
    is the image token."""
    heads, tower_heads = max(scale.decoder_width // 64, 1), max(scale.tower_width // 64, 1)
    config = ZooMropeConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": scale.tower_width,
            "intermediate_size": 4 * scale.tower_width,
            "num_hidden_layers": scale.deep_tower_layers,
            "num_attention_heads": tower_heads,
            "image_size": scale.image_size,
            "patch_size": scale.patch_size,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": scale.decoder_width,
            "intermediate_size": 4 * scale.decoder_width,
            "num_hidden_layers": scale.decoder_layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "vocab_size": scale.small_vocab_size,
            "max_position_embeddings": 4096,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        image_token_id=scale.small_vocab_size - 1,
        response_token_ids=OPENING,
        spatial_merge_size=1,
    )
    torch.manual_seed(0)
    return ZooMropeForConditionalGeneration._from_config(config, dtype=scale.dtype).to(scale.device).eval()


class Sides:
    """Both models with the same weights, a picture, and a question about it."""

    def __init__(self, scale: Scale, part: int = QUARTER):
        """
        Args:
            part: which part of its tokens an image keeps, a half of them with 2.
        """
        self.native, self.budget = scale.image_tokens, max(scale.image_tokens // part, 1)
        self.peer = mrope(scale)
        self.ours = from_mrope(self.peer, token_budget=self.budget, image_mean=MEAN, image_std=DEVIATION)
        generator = torch.Generator().manual_seed(0)
        side = scale.image_size // scale.patch_size
        self.images = {
            "pixel_values": torch.randn(self.native, 3 * scale.patch_size**2, generator=generator).to(
                scale.device, scale.dtype
            ),
            "image_grid_thw": torch.tensor([[1, side, side]], device=scale.device),
        }
        words = torch.randint(5, scale.small_vocab_size - 1, (TEXT - len(OPENING),), generator=generator)
        self.question = torch.cat((words, torch.tensor(OPENING))).to(scale.device)
        self.description = f"a picture and {len(self.question)} tokens of text"

    def inputs(self, tokens: int) -> dict[str, torch.Tensor]:
        """The batch with so many placeholders, which follow the first word."""
        image = self.question.new_full((tokens,), self.peer.config.image_token_id)
        ids = torch.cat((self.question[:1], image, self.question[1:]))[None]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.images}

    def tokens(self, model: PreTrainedModel) -> int:
        """Visual tokens on this side."""
        return self.native if model is self.peer else self.budget

    @torch.no_grad()
    def prefill(self, model: PreTrainedModel, inputs: dict) -> torch.Tensor:
        """From patches to the cache and the last logits."""
        return model(**inputs, use_cache=True, logits_to_keep=1).logits

    @torch.no_grad()
    def encode(self, model: PreTrainedModel) -> list[torch.Tensor]:
        """The picture's features."""
        return list(model.get_image_features(**self.images, return_dict=True).pooler_output)

    @torch.no_grad()
    def fuse(self, model: PreTrainedModel, features: list[torch.Tensor], inputs: dict) -> dict[str, Any]:
        """What lies between features and language model: for ARR-COC relevance, allocation and pooling, and on both
        sides embeddings and positions."""
        context = FuseContext(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            position_ids=None,
            past_key_values=None,
            mm_token_type_ids=None,
            vision_inputs=self.images,
            query_inputs={},
            carry=None,
        )
        embeddings = model.get_input_embeddings()(inputs["input_ids"])
        lm_inputs, _ = model.model.fuse(embeddings, features, context)
        return {"attention_mask": inputs["attention_mask"], **lm_inputs}

    @torch.no_grad()
    def read(self, model: PreTrainedModel, lm_inputs: dict[str, Any]) -> torch.Tensor:
        """The language model alone."""
        return model.model.language_model(**lm_inputs, use_cache=True).last_hidden_state

    def share_weights(self) -> None:
        """Both read the same memory: copies that lie elsewhere differ by more than what is to be seen."""
        for part in ("vision_tower", "connector", "language_model"):
            state = self.peer.model.get_submodule(part).state_dict()
            self.ours.model.get_submodule(part).load_state_dict(state, assign=True)
        self.ours.lm_head.load_state_dict(self.peer.lm_head.state_dict(), assign=True)

    @torch.no_grad()
    def compare(self) -> Equality:
        """With a budget of all tokens both sides must be the same; under the budget, the steps that are timed must
        make up the whole."""
        self.ours.config.token_budget = ALL_TOKENS
        found = [self.prefill(model, self.inputs(self.native)) for model in (self.ours, self.peer)]
        equality = same(f"logits with a budget of all {self.native} tokens", *found)
        self.ours.config.token_budget = self.budget
        inputs = self.inputs(self.budget)
        whole = self.ours.model(**inputs)
        kept = [len(report.boxes) for report in whole.fusion_outputs.images]
        equality &= same("tokens under the budget", kept, [self.budget])
        steps = self.read(self.ours, self.fuse(self.ours, self.encode(self.ours), inputs))
        equality &= same("hidden states step by step", steps, whole.last_hidden_state)
        self.share_weights()
        return equality


# ---------------------------------------------------------------------------------------------------------------------
# What a budget saves
# ---------------------------------------------------------------------------------------------------------------------


def language_case(scale: Scale, part: int) -> Case:
    """The language model alone, on the tokens that either side has."""
    sides = Sides(scale, part)
    equality = sides.compare()
    given = {}
    for model in (sides.ours, sides.peer):
        given[model] = sides.fuse(model, sides.encode(model), sides.inputs(sides.tokens(model)))
    ratio = (sides.native + len(sides.question)) / (sides.budget + len(sides.question))
    return Case(
        peer=f"M-RoPE's language model on {sides.native} visual tokens, ours on {sides.budget}; "
        f"{len(sides.question)} tokens of text on both sides",
        ours=lambda: sides.read(sides.ours, given[sides.ours]),
        theirs=lambda: sides.read(sides.peer, given[sides.peer]),
        compare=lambda: equality,
        limit=f"{ratio:.2f} times the tokens; attention grows faster than they do, and weights are read all the same",
        note=sizes(sides.ours),
    )


@row("arr_coc_language_288", target=1.9)
def arr_coc_language_288(scale: Scale) -> Case:
    """Half of the tokens."""
    return language_case(scale, HALF)


@row("arr_coc_language_144", target=3.5)
def arr_coc_language_144(scale: Scale) -> Case:
    """A quarter of them."""
    return language_case(scale, QUARTER)


@row("arr_coc_language_64", target=5.0)
def arr_coc_language_64(scale: Scale) -> Case:
    """A ninth of them."""
    return language_case(scale, NINTH)


def prefill_case(scale: Scale, part: int) -> Case:
    """The whole forward: the tower sees all patches on both sides, ours looks for what is relevant besides."""
    sides = Sides(scale, part)
    given = {model: sides.inputs(sides.tokens(model)) for model in (sides.ours, sides.peer)}
    fused = sides.fuse(sides.ours, sides.encode(sides.ours), given[sides.ours])

    def without_relevance() -> None:
        sides.encode(sides.peer)
        sides.read(sides.ours, fused)

    return Case(
        peer=f"M-RoPE, {sides.description}: {sides.native} visual tokens, ours {sides.budget}",
        ours=lambda: sides.prefill(sides.ours, given[sides.ours]),
        theirs=lambda: sides.prefill(sides.peer, given[sides.peer]),
        compare=sides.compare,
        limit="the tower, and the language model on as many tokens as ours keeps",
        limit_step=without_relevance,
        note=f"{sizes(sides.ours)}; without texture and relevance {{limit}}",
    )


@row("arr_coc_prefill_288", target=1.35, memory_target=0.7)
def arr_coc_prefill_288(scale: Scale) -> Case:
    """Half of the tokens."""
    return prefill_case(scale, HALF)


@row("arr_coc_prefill_144", target=1.7, memory_target=0.5)
def arr_coc_prefill_144(scale: Scale) -> Case:
    """A quarter of them."""
    return prefill_case(scale, QUARTER)


@row("arr_coc_prefill_64", target=2.0, memory_target=0.5)
def arr_coc_prefill_64(scale: Scale) -> Case:
    """A ninth of them."""
    return prefill_case(scale, NINTH)


# ---------------------------------------------------------------------------------------------------------------------
# What it costs
# ---------------------------------------------------------------------------------------------------------------------


def relevance_case(scale: Scale, part: int) -> Case:
    """Fusion with relevance, allocation and pooling, beside the whole forward that it belongs to."""
    sides = Sides(scale, part)
    given = {model: sides.inputs(sides.tokens(model)) for model in (sides.ours, sides.peer)}
    features = {model: sides.encode(model) for model in given}

    def fused(model: PreTrainedModel) -> dict[str, Any]:
        return sides.fuse(model, features[model], given[model])

    return Case(
        peer=f"ARR-COC's whole forward on {sides.description} with {sides.budget} of {sides.native} visual tokens; "
        "ours is its fusion alone",
        ours=lambda: fused(sides.ours),
        theirs=lambda: sides.prefill(sides.ours, given[sides.ours]),
        compare=sides.compare,
        limit="",
        note="relevance, allocation, pooling, embeddings and positions; M-RoPE's fusion of all tokens takes {plain}",
        parts={"plain": lambda: fused(sides.peer)},
    )


@row("arr_coc_relevance_288", target=50.0)
def arr_coc_relevance_288(scale: Scale) -> Case:
    """At most a fiftieth of the forward with half of the tokens."""
    return relevance_case(scale, HALF)


@row("arr_coc_relevance_144", target=50.0)
def arr_coc_relevance_144(scale: Scale) -> Case:
    """At most a fiftieth of the forward with a quarter of the tokens."""
    return relevance_case(scale, QUARTER)


@row("arr_coc_relevance_64", target=50.0)
def arr_coc_relevance_64(scale: Scale) -> Case:
    """At most a fiftieth of the forward with a ninth of the tokens."""
    return relevance_case(scale, NINTH)


@row("arr_coc_texture", target=50.0)
def arr_coc_texture(scale: Scale) -> Case:
    """At most a fiftieth of what the tower takes for the same picture."""
    sides = Sides(scale)
    config, patches, grid = sides.ours.config, sides.images["pixel_values"], sides.images["image_grid_thw"]
    geometry = patch_geometry(config.vision_config)

    @torch.no_grad()
    def step() -> torch.Tensor:
        return texture_of_patches(patches, grid, geometry, 1, config.image_mean, config.image_std)

    def compare() -> Equality:
        equality, found = sides.compare(), step()
        (features,) = sides.encode(sides.ours)
        equality &= same("texture beside the tokens", features[:, -found.shape[1] :], found.to(features.dtype))
        # one patch a cell, of which every channel has as many values
        pictures = patches.unflatten(1, (geometry.channels, geometry.size, geometry.size))
        colours = F.avg_pool2d(unnormalize(pictures, MEAN, DEVIATION), geometry.size).flatten(1)
        return equality & close("mean colours of the cells", found[:, : geometry.channels], colours, 1e-5)

    return Case(
        peer=f"tower and connector on {sides.native} patches of {geometry.size} x {geometry.size} pixels; ours is the "
        "texture array alone",
        ours=step,
        theirs=lambda: sides.encode(sides.peer),
        compare=compare,
        limit="",
        note=sizes(sides.ours),
    )
