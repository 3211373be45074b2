"""The rows of M-RoPE, against transformers' Qwen2-VL and Qwen3-VL: places, patches and pixels at native resolution."""

import copy
import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
    BaseImageProcessor,
    DynamicCache,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchEmbed

from conversion.mrope import zoo_from_transformers

from ..models.image_processing_vlm import ZooImageProcessor
from ..models.mrope import ZooMropeForConditionalGeneration
from ..models.native_vlm import PatchEmbedding
from .engine import Case, Equality, NotRun, close, row, same
from .rows import photo
from .scale import Scale


MERGE, FRAMES = 2, 2  # of all Qwen-VL: patches a side of a token, frames of a patch
CHANNELS = 3
IMAGES = 4
POSITION_ROWS = 32


# ---------------------------------------------------------------------------------------------------------------------
# Models and inputs
# ---------------------------------------------------------------------------------------------------------------------


def decoder_fields(width: int, layers: int, intermediate_size: int, vocab_size: int) -> dict:
    """Fields of a decoder with heads of 64 channels."""
    heads = max(width // 64, 1)
    return {
        "hidden_size": width,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(heads // 4, 1),
        "vocab_size": vocab_size,
        "max_position_embeddings": 32_768,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def qwen2_vl(scale: Scale, **decoder: int) -> Qwen2VLForConditionalGeneration:
    """A Qwen2-VL of transformers with random weights, in eval mode; the last ids of its vocabulary are those of clips
    and images. `decoder` are the arguments of `decoder_fields`."""
    fields = decoder_fields(**decoder)
    config = Qwen2VLConfig(
        vision_config={
            "depth": scale.tower_layers,
            "embed_dim": scale.tower_width,
            "hidden_size": fields["hidden_size"],
            "num_heads": max(scale.tower_width // 64, 1),
            "patch_size": scale.patch_size,
        },
        text_config={
            **fields,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
        },
        video_token_id=fields["vocab_size"] - 2,
        image_token_id=fields["vocab_size"] - 1,
    )
    torch.manual_seed(0)
    return Qwen2VLForConditionalGeneration._from_config(config, dtype=scale.dtype).to(scale.device).eval()


def qwen3_vl(scale: Scale, **decoder: int) -> Qwen3VLForConditionalGeneration:
    """The same as a Qwen3-VL: interleaved frequencies, and DeepStack from as many as three depths of the tower."""
    fields = decoder_fields(**decoder)
    section = {"mrope_section": [12, 10, 10], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        vision_config={
            "depth": scale.tower_layers,
            "hidden_size": scale.tower_width,
            "intermediate_size": 4 * scale.tower_width,
            "out_hidden_size": fields["hidden_size"],
            "num_heads": max(scale.tower_width // 64, 1),
            "patch_size": scale.patch_size,
            "deepstack_visual_indexes": list(range(min(scale.tower_layers - 1, 3))),
        },
        text_config={
            **fields,
            "head_dim": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, **section},
        },
        video_token_id=fields["vocab_size"] - 2,
        image_token_id=fields["vocab_size"] - 1,
    )
    torch.manual_seed(0)
    return Qwen3VLForConditionalGeneration._from_config(config, dtype=scale.dtype).to(scale.device).eval()


def image_grids(scale: Scale) -> torch.Tensor:
    """Four images of three shapes and as many patches each as a token of LLaVA has: `int[4, 3]`."""
    side = scale.image_size // scale.patch_size
    shapes = [(side, side), (side // 2, 2 * side), (2 * side, side // 2), (side, side)]
    return torch.tensor([[1, height, width] for height, width in shapes])


def single_frames(scale: Scale, grids: torch.Tensor) -> torch.Tensor:
    """Patches of images as the zoo's image processor makes them, each of one frame: `float[N, C * P * P]`."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(int(grids.prod(dim=1).sum()), CHANNELS * scale.patch_size**2, generator=generator)
    return patches.to(scale.device, scale.dtype)


def doubled(patches: torch.Tensor) -> torch.Tensor:
    """The same as transformers' image processor makes them, every frame twice: `float[N, C * F * P * P]`."""
    return patches.unflatten(1, (CHANNELS, 1, -1)).expand(-1, -1, FRAMES, -1).flatten(1)


class Sides:
    """Both models with the same weights, and a row of four images with text before each and an answer behind."""

    def __init__(self, scale: Scale, peer: PreTrainedModel):
        self.peer, self.ours = peer, zoo_from_transformers(peer)
        self.grids = image_grids(scale)
        self.patches = single_frames(scale, self.grids)
        image = peer.config.image_token_id
        generator = torch.Generator().manual_seed(1)
        text = torch.randint(3, image - 1, (1, scale.prompt_tokens + scale.answer_tokens), generator=generator)
        pieces = []
        counts = (self.grids.prod(dim=1) // MERGE**2).tolist()
        for words, count in zip(text[:, : scale.prompt_tokens].chunk(IMAGES, dim=1), counts, strict=True):
            pieces += [words, torch.full((1, count), image)]
        ids = torch.cat((*pieces, text[:, scale.prompt_tokens :]), dim=1)
        self.labels = ids.clone()
        self.labels[:, : -scale.answer_tokens] = -100
        self.labels = self.labels.to(scale.device)
        self.text = {"input_ids": ids.to(scale.device), "attention_mask": torch.ones_like(ids).to(scale.device)}
        self.grids = self.grids.to(scale.device)
        self.length = ids.shape[1]
        self.options = {
            "max_new_tokens": scale.new_tokens,
            "min_new_tokens": scale.new_tokens,
            "do_sample": False,
            "suppress_tokens": [image],
        }
        self.description = f"{IMAGES} images of {counts[0]} tokens among {text.shape[1]} of text"

    def inputs(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """Text and images as this side's processor makes them."""
        batch = {**self.text, "pixel_values": self.patches.to(model.dtype), "image_grid_thw": self.grids}
        if isinstance(model, ZooMropeForConditionalGeneration):
            return batch
        types = (self.text["input_ids"] == model.config.image_token_id).int()
        return {**batch, "pixel_values": doubled(batch["pixel_values"]), "mm_token_type_ids": types}

    def share_weights(self) -> None:
        """Both read the same memory: copies that lie elsewhere differ by more than what is to be seen."""
        ours, peer = self.ours.model, self.peer.model
        ours.vision_tower.load_state_dict(peer.visual.state_dict(), assign=True, strict=False)
        ours.language_model.load_state_dict(peer.language_model.state_dict(), assign=True)
        self.ours.lm_head.load_state_dict(self.peer.lm_head.state_dict(), assign=True)

    @torch.no_grad()
    def prefill(self, model: PreTrainedModel, inputs: dict | None = None) -> tuple[torch.Tensor, DynamicCache, dict]:
        """The last logits, the cache, and what a later call must be given beside it."""
        cache = DynamicCache(config=model.config.get_text_config())
        inputs = inputs or self.inputs(model)
        outputs = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        carried = {"carry": outputs.carry} if isinstance(model, ZooMropeForConditionalGeneration) else {}
        return outputs.logits, cache, carried

    def go_on(self, model: PreTrainedModel, cache: DynamicCache, carried: dict, **options) -> object:
        """What `generate` makes of a cache of all but the last token, which is left as it was."""
        found = model.generate(**self.text, past_key_values=cache, **carried, **self.options, **options)
        cache.crop(self.length - 1 - cache.get_seq_length())
        return found

    @torch.no_grad()
    def features(self, model: PreTrainedModel, inputs: dict) -> torch.Tensor:
        """Images to tokens: `float[K, Dt]`."""
        images = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
        outputs = model.get_image_features(**images, return_dict=True)
        return torch.cat(list(outputs.pooler_output))

    def allowed(self) -> float:
        """Relative difference in the dtype that is timed; single frames sum a kernel's weights, which rounds."""
        return 1e-5 if self.ours.dtype == torch.float32 else 0.05

    def compare(self) -> Equality:
        """Greedy tokens in float32, where rounding decides no tie, and the logits in the dtype that is timed."""
        answers, continued, later, logits = [], [], [], []
        for model in (self.ours, self.peer):
            exact = copy.deepcopy(model).float()
            answers.append(exact.generate(**self.inputs(exact), **self.options))
            _, cache, carried = self.prefill(exact)
            cache.crop(-1)
            found = self.go_on(exact, cache, carried, output_logits=True, return_dict_in_generate=True)
            continued.append(found.sequences)
            later.append(torch.cat(found.logits))
            logits.append(self.prefill(model)[0])
        equality = same(f"{self.options['max_new_tokens']} greedy tokens in float32", *answers)
        equality &= same("tokens continued from a cache", *continued)
        equality &= close("their logits", *later, 1e-5, relative=True)
        return equality & close(f"last logits in {self.ours.dtype}", *logits, self.allowed(), relative=True)


def sizes(model: ZooMropeForConditionalGeneration) -> str:
    """Parameters of the parts, as text."""
    parts = {"language model": model.model.language_model.layers, "tower": model.model.vision_tower}
    millions = {name: sum(parameter.numel() for parameter in part.parameters()) / 1e6 for name, part in parts.items()}
    return ", ".join(f"{name} {size:.0f} M" for name, size in millions.items())


def decoder(scale: Scale) -> dict[str, int]:
    """The language model of the rows without training."""
    return {
        "width": scale.decoder_width,
        "layers": scale.decoder_layers,
        "intermediate_size": 4 * scale.decoder_width,
        "vocab_size": scale.small_vocab_size,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Positions
# ---------------------------------------------------------------------------------------------------------------------


def positions_case(scale: Scale, padded: bool) -> Case:
    """Rows of text and images of all sizes; they are as long as the longest by more text, or by padding before."""
    small = dataclasses.replace(scale, tower_width=64, tower_layers=1, dtype=torch.float32)
    peer = qwen2_vl(small, width=64, layers=2, intermediate_size=64, vocab_size=300)
    ours, image = zoo_from_transformers(peer).model, peer.config.image_token_id
    randomness = np.random.default_rng(0)
    sides = torch.from_numpy(randomness.integers(4, 17, (POSITION_ROWS * IMAGES, 2)))  # of an image, in tokens
    grids = F.pad(MERGE * sides, (1, 0), value=1)
    rows = []
    for counts in sides.prod(dim=1).unflatten(0, (-1, IMAGES)).tolist():
        lengths = randomness.integers(1, 40, IMAGES)
        rows.append(
            [token for pair in zip(lengths, counts, strict=True) for token in [5] * pair[0] + [image] * pair[1]]
        )
    longest = 16 + max(map(len, rows))
    if padded:
        rows = [[0] * (longest - 16 - len(one)) + one + [5] * 16 for one in rows]
    else:
        rows = [one + [5] * (longest - len(one)) for one in rows]
    ids, grids = torch.tensor(rows, device=scale.device), grids.to(scale.device)
    types, mask = (ids == image).int(), ids.ne(0).long() if padded else None

    def step_ours() -> tuple[torch.Tensor, torch.Tensor]:
        return ours.positions(ours.placeholder_mask(ids, None), {"image_grid_thw": grids}, mask)

    def step_peer() -> tuple[torch.Tensor, torch.Tensor]:
        return peer.model.get_rope_index(ids, types, image_grid_thw=grids, attention_mask=mask)

    def compare() -> Equality:
        found, expected = step_ours(), step_peer()
        return same("positions", found[0], expected[0]) & same("deltas", found[1], expected[1])

    return Case(
        peer=f"Qwen2VLModel.get_rope_index, {POSITION_ROWS} rows of {longest} tokens with {IMAGES} images each"
        + (", padded" if padded else ""),
        ours=step_ours,
        theirs=step_peer,
        compare=compare,
        limit="the places of visual tokens must be made, a few operations for all of them",
        note="the peer reads every image's size from its tensor, for which a GPU is waited for",
    )


@row("mrope_positions", target=10.0)
def mrope_positions(scale: Scale) -> Case:
    """All images of a batch at once."""
    return positions_case(scale, padded=False)


@row("mrope_positions_padded", target=10.0)
def mrope_positions_padded(scale: Scale) -> Case:
    """The same with rows of different lengths."""
    return positions_case(scale, padded=True)


# ---------------------------------------------------------------------------------------------------------------------
# Patches
# ---------------------------------------------------------------------------------------------------------------------


def patch_embedding_case(scale: Scale, double: bool) -> Case:
    """Patches to the tower's width; the peer's are those of still images, every frame twice."""
    torch.manual_seed(0)
    peer = PatchEmbed(scale.patch_size, FRAMES, CHANNELS, scale.tower_width).to(scale.device, scale.dtype)
    ours = PatchEmbedding(peer.proj)
    frames = single_frames(scale, image_grids(scale))
    twice = doubled(frames)
    given = twice if double else frames
    kernel = peer.proj.weight.detach()
    kernel = kernel.flatten(1) if double else kernel.sum(dim=2).flatten(1)

    @torch.no_grad()
    def step(embed: torch.nn.Module, patches: torch.Tensor) -> torch.Tensor:
        return embed(patches)

    def compare() -> Equality:
        exact = copy.deepcopy(peer).float()
        rounding = 1e-5 if scale.dtype == torch.float32 else 0.01
        equality = close(
            "float32", step(PatchEmbedding(exact.proj), given.float()), step(exact, twice.float()), 1e-5, relative=True
        )
        return equality & close(f"{scale.dtype}", step(ours, given), step(peer, twice), rounding, relative=True)

    return Case(
        peer=f"Qwen2-VL's PatchEmbed (Conv3d), {len(twice)} patches of {twice.shape[1]} values to {scale.tower_width}"
        + ("" if double else f"; ours get the single frames, {frames.shape[1]} values"),
        ours=lambda: step(ours, given),
        theirs=lambda: step(peer, twice),
        compare=compare,
        limit="the matrix product alone",
        limit_step=lambda: F.linear(given, kernel),
    )


@row("mrope_patch_embedding", target=4.0)
def mrope_patch_embedding(scale: Scale) -> Case:
    """A still image as the zoo's processor makes it: half the values, and a matrix product."""
    return patch_embedding_case(scale, double=False)


@row("mrope_patch_embedding_full")
def mrope_patch_embedding_full(scale: Scale) -> Case:
    """The same input on both sides: the convolution as the matrix product that it is."""
    return patch_embedding_case(scale, double=True)


# ---------------------------------------------------------------------------------------------------------------------
# Pixels
# ---------------------------------------------------------------------------------------------------------------------


def pixels_case(scale: Scale, peer: BaseImageProcessor) -> Case:
    """Our image processor with the peer's settings, on a PIL picture."""
    ours = ZooImageProcessor(
        size={"shortest_edge": peer.size["shortest_edge"], "longest_edge": peer.size["longest_edge"]},
        patch_size=peer.patch_size,
        temporal_patch_size=peer.temporal_patch_size,
        merge_size=peer.merge_size,
        do_center_crop=False,
    )
    image = photo(scale.picture)
    height, width = scale.picture
    resized = ours.processed_size(height, width)
    raw = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # uint8[1, C, H, W] in the order [H, W, C]
    level = 1 / (255 * min(ours.image_std))

    def compare() -> Equality:
        found, expected = (side(image, return_tensors="pt") for side in (ours, peer))
        pixels = [doubled(found["pixel_values"]), expected["pixel_values"]]
        equality = same("image_grid_thw", found["image_grid_thw"], expected["image_grid_thw"])
        equality &= close("pixel_values (one 8-bit level allowed)", *pixels, level + 1e-6)
        share = (pixels[0] - pixels[1]).abs().gt(1e-5).float().mean().item() if equality.equal else float("nan")
        return Equality(equality.equal, f"{equality.text}; {share:.2%} of the values differ")

    return Case(
        peer=f"{type(peer).__name__}, {width}x{height} PIL picture in, {resized[1]}x{resized[0]} out",
        ours=lambda: ours(image, return_tensors="pt"),
        theirs=lambda: peer(image, return_tensors="pt"),
        compare=compare,
        limit="bicubic antialiased resizing of the decoded uint8 pixels alone",
        limit_step=lambda: F.interpolate(raw, resized, mode="bicubic", antialias=True),
        host=True,
        note="resizing alone {limit}; ours returns each frame once, the peer twice",
    )


@row("mrope_pixels", target=2.5)
def mrope_pixels(scale: Scale) -> Case:
    """Against the backend that users without torchvision have."""
    return pixels_case(scale, Qwen2VLImageProcessorPil())


@row("mrope_pixels_torchvision", target=1.0)
def mrope_pixels_torchvision(scale: Scale) -> Case:
    """Against the backend that users with torchvision have."""
    try:
        import torchvision.transforms.v2.functional  # noqa: F401  a build for another torch fails here
        from transformers import Qwen2VLImageProcessor

        peer = Qwen2VLImageProcessor()
    except Exception as error:  # a mismatched torchvision raises all sorts of errors
        raise NotRun(f"torchvision cannot be imported ({type(error).__name__}: {error})") from error
    return pixels_case(scale, peer)


# ---------------------------------------------------------------------------------------------------------------------
# Forward
# ---------------------------------------------------------------------------------------------------------------------


@row("mrope_tower", target=1.0, rounds=2)
def mrope_tower(scale: Scale) -> Case:
    """Images of different sizes to tokens."""
    sides = Sides(scale, qwen2_vl(scale, **decoder(scale)))
    given = {model: sides.inputs(model) for model in (sides.ours, sides.peer)}

    def compare() -> Equality:
        exact = {model: copy.deepcopy(model).float() for model in given}
        found = [sides.features(model, sides.inputs(model)) for model in exact.values()]
        equality = close("features in float32", *found, 1e-5, relative=True)
        found = [sides.features(*pair) for pair in given.items()]
        equality &= close(f"in {sides.ours.dtype}", *found, sides.allowed(), relative=True)
        sides.share_weights()
        return equality

    return Case(
        peer=f"Qwen2VLForConditionalGeneration.get_image_features, {IMAGES} images of {len(sides.patches) // IMAGES} "
        f"patches and three shapes, {scale.tower_layers} layers",
        ours=lambda: sides.features(sides.ours, given[sides.ours]),
        theirs=lambda: sides.features(sides.peer, given[sides.peer]),
        compare=compare,
        limit="both run the same layers",
        limit_ratio=1.0,
        note=sizes(sides.ours),
    )


def prefill_case(scale: Scale, peer: PreTrainedModel) -> Case:
    """A prompt with images, from patches to the cache and the last logits."""
    sides = Sides(scale, peer)
    given = {model: sides.inputs(model) for model in (sides.ours, sides.peer)}

    def compare() -> Equality:
        equality = sides.compare()
        sides.share_weights()
        return equality

    return Case(
        peer=f"{type(peer).__name__}, {sides.description}",
        ours=lambda: sides.prefill(sides.ours, given[sides.ours]),
        theirs=lambda: sides.prefill(sides.peer, given[sides.peer]),
        compare=compare,
        limit="both read the same weights, the same images and the same text",
        limit_ratio=1.0,
        note=sizes(sides.ours),
    )


@row("mrope_prefill", target=1.0, rounds=2)
def mrope_prefill(scale: Scale) -> Case:
    """Tower, merger, positions and language model."""
    return prefill_case(scale, qwen2_vl(scale, **decoder(scale)))


@row("mrope_prefill_deepstack", target=1.0, rounds=2)
def mrope_prefill_deepstack(scale: Scale) -> Case:
    """The same with features of several depths, interleaved frequencies, and a tower with a table of positions."""
    return prefill_case(scale, qwen3_vl(scale, **decoder(scale)))


@row("mrope_decode", target=1.0, rounds=2)
def mrope_decode(scale: Scale) -> Case:
    """Tokens after the prefill cost what they cost in transformers."""
    sides = Sides(scale, qwen2_vl(scale, **decoder(scale)))
    equality = sides.compare()
    sides.share_weights()
    states = {model: sides.prefill(model)[1:] for model in (sides.ours, sides.peer)}
    for cache, _ in states.values():
        cache.crop(-1)
    return Case(
        peer=f"Qwen2VLForConditionalGeneration.generate, {scale.new_tokens} tokens from a cache of {sides.length}, "
        f"{sides.description}",
        ours=lambda: sides.go_on(sides.ours, *states[sides.ours]),
        theirs=lambda: sides.go_on(sides.peer, *states[sides.peer]),
        compare=lambda: equality,
        limit="both read the same weights and the same cache",
        limit_ratio=1.0,
        note=sizes(sides.ours),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Gradients from both ends of a model, by names that both sides share."""
    if isinstance(model, ZooMropeForConditionalGeneration):
        tower, merger = model.model.vision_tower, model.model.connector.merger.linear_1
    else:
        tower, merger = model.model.visual, model.model.visual.merger.mlp[0]
    parts = {"head": model.lm_head, "merger": merger, "patch embedding": tower.patch_embed.proj}
    return {name: part.weight.grad.clone() for name, part in parts.items()}


@row("mrope_step", target=1.0, memory_target=0.5)
def mrope_step(scale: Scale) -> Case:
    """A training step of all parts."""
    peer = qwen2_vl(
        scale,
        width=scale.text_width,
        layers=scale.text_layers,
        intermediate_size=3 * scale.text_width,
        vocab_size=scale.vocab_size,
    )
    sides = Sides(scale, peer.train())
    labels = sides.labels
    given = {model: sides.inputs(model) for model in (sides.ours, sides.peer)}

    def step(model: PreTrainedModel, inputs: dict) -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        return loss.detach()

    def supervised(model: PreTrainedModel, inputs: dict) -> torch.Tensor:
        """The peer's own parts, without what its `forward(labels=)` projects for nothing."""
        model.zero_grad(set_to_none=True)
        hidden = model.model(**inputs).last_hidden_state[:, :-1][labels[:, 1:] != -100]
        loss = F.cross_entropy(model.lm_head(hidden).float(), labels[labels != -100])
        loss.backward()
        return loss.detach()

    def trained(model: PreTrainedModel, dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and gradients of a step in this dtype, on a copy that is gone afterwards."""
        model = copy.deepcopy(model).to(dtype)
        return step(model, sides.inputs(model)), gradients(model)

    def compare() -> Equality:
        equality = Equality(True, f"{int((labels != -100).sum())} supervised tokens")
        # Rounding in the dtype that is timed grows from layer to layer and back; float32 shows what is computed
        allowances = {sides.ours.dtype: (1e-3, sides.allowed()), torch.float32: (1e-5, 1e-4)}
        for dtype, (allowed_loss, allowed) in allowances.items():
            (loss, ours), (expected, wanted) = trained(sides.ours, dtype), trained(sides.peer, dtype)
            equality &= close(f"loss in {dtype}", loss, expected, allowed_loss * max(1.0, abs(expected.item())))
            for name, gradient in ours.items():
                equality &= close(f"gradient of the {name}", gradient, wanted[name], allowed, relative=True)
        return equality

    def without_head() -> None:
        sides.ours.zero_grad(set_to_none=True)
        sides.ours.model(**given[sides.ours]).last_hidden_state.sum().backward()

    return Case(
        peer=f"Qwen2VLForConditionalGeneration, forward(labels=) and backward of all parts, vocabulary "
        f"{scale.vocab_size:,}, {sides.description}",
        ours=lambda: step(sides.ours, given[sides.ours]),
        theirs=lambda: step(sides.peer, given[sides.peer]),
        compare=compare,
        limit="the same step without a head",
        limit_step=without_head,
        note=f"{sizes(sides.ours)}: by default the peer projects all positions onto the vocabulary; with the "
        "supervised ones alone it takes {supervised}",
        parts={"supervised": lambda: supervised(sides.peer, given[sides.peer])},
    )
