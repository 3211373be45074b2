"""Ovis 2.5 as AIDC-AI's code writes it: what a folder holds, and what that code computes from it.

Its tower of patches, there called SigLIP 2 NaViT, is that of Qwen3-VL but for three things: a patch is one frame, its
table of positions is interpolated bicubically, and nothing merges patches inside.

The code is not run. `OriginalOvis2_5` and `OriginalProcessor` say again what it computes, from the tensors as they
are, image by image, on transformers' language model and image processor.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import PIL.Image
import torch
from torch import nn
from transformers import AutoConfig, BatchFeature, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlm_zoo.models.vet import ZooVetConfig

from . import engine, flow
from .engine import ConversionError, Table, Target, TensorInfo
from .ovis import (
    BESIDE_THE_TOWER,
    IMAGE_TOKEN,
    TEXT_KEYS,
    OriginalLanguageHalf,
    OriginalParts,
    check_keys,
    stored_dtype,
)


# That of the checkpoints on the Hub; the code that trained them writes the name of all Ovis.
MODEL_TYPES = ("ovis2_5", "ovis")
TOWER = "siglip2_navit"
# A patch; start and end of an image, start and end of a clip.
ATOM, INDICATORS = -300, (-301, -302, -303, -304)
# Of a picture, and of each frame of a clip. No file says them: they are defaults of `preprocess_inputs` (those of
# `chat` go up to 1792 x 1792).
MIN_PIXELS, MAX_PIXELS = 448 * 448, 1344 * 1792

# What the tower's config leaves out where it is usual.
TOWER_DEFAULTS = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_channels": 3,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "hidden_stride": 2,
    "fullatt_block_indexes": None,
    "temporal_patch_size": 1,
    "preserve_original_pe": True,
    "use_rope": True,
}
# What Qwen3-VL's tower cannot have otherwise.
TOWER_FIXED = {
    "temporal_patch_size": 1,
    "preserve_original_pe": True,
    "use_rope": True,
    "layer_norm_eps": 1e-6,
}

# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------

HEAD, VTE = "visual_tokenizer.head.0.weight", "vte.weight"
_VIT = "visual_tokenizer.vit.vision_model."
_PATCHES, _POSITIONS = (f"{_VIT}embeddings.{part}_embedding.weight" for part in ("patch", "position"))
_LAYER = r"^visual_tokenizer\.vit\.vision_model\.encoder\.layers\.(\d+)"
_BLOCK = r"model.vision_tower.blocks.\1"
FROM_UPSTREAM: Table = (
    *BESIDE_THE_TOWER,
    (rf"{_LAYER}\.layer_norm([12])\.(.+)$", rf"{_BLOCK}.norm\2.\3"),
    (rf"{_LAYER}\.self_attn\.qkv\.(.+)$", rf"{_BLOCK}.attn.qkv.\2"),
    (rf"{_LAYER}\.self_attn\.out_proj\.(.+)$", rf"{_BLOCK}.attn.proj.\2"),
    (rf"{_LAYER}\.mlp\.fc([12])\.(.+)$", rf"{_BLOCK}.mlp.linear_fc\2.\3"),
    (
        r"^visual_tokenizer\.vit\.vision_model\.embeddings\.patch_embedding\.(.+)$",
        r"model.vision_tower.patch_embed.proj.\1",
    ),
    (
        r"^visual_tokenizer\.vit\.vision_model\.embeddings\.position_embedding\.(.+)$",
        r"model.vision_tower.pos_embed.\1",
    ),
    (r"^visual_tokenizer\.vit\.vision_model\.(.+)$", r"model.vision_tower.\1"),
)
# The tower's last norm, behind the hidden state that is used.
IGNORED = (*flow.IGNORED, r"^model\.vision_tower\.post_layernorm\.(?:weight|bias)$")


def together(tensors: Mapping[str, TensorInfo], config: ZooVetConfig) -> dict[str, TensorInfo]:
    """The tensors as Qwen3-VL's tower has them: queries, keys and values in one, patches with an axis of frames."""
    prepared, vision = {}, config.vision_config
    for name, info in tensors.items():
        if name.startswith(_VIT) and any(f".self_attn.{part}_proj." in name for part in "qkv"):
            start, part, end = name.partition(".self_attn.")
            kind = end.rpartition(".")[2]
            trio = [f"{start}{part}{letter}_proj.{kind}" for letter in "qkv"]
            if not all(other in tensors for other in trio):
                prepared[name] = info  # the plan names what is missing
            elif name == trio[0]:
                prepared[f"{start}{part}qkv.{kind}"] = engine.join_rows([tensors[other] for other in trio])
        elif name == _PATCHES and info.shape[0] * vision.in_channels * vision.patch_size**2 == math.prod(info.shape):
            # A convolution, or a linear layer with inputs in the same order
            shape = (info.shape[0], vision.in_channels, 1, vision.patch_size, vision.patch_size)
            prepared[name] = replace(info, shape=shape)
        else:
            prepared[name] = info
    return prepared


def without_mergers(target: Target) -> Target:
    """What the zoo's model asks for; no file has the mergers that Qwen3-VL's own tower holds inside."""
    unused = {
        name: shape for name, shape in target.unused.items() if not name.startswith("model.vision_tower.merger.")
    }
    return replace(target, unused=unused, ignored=IGNORED)


# ---------------------------------------------------------------------------------------------------------------------
# Config
# ---------------------------------------------------------------------------------------------------------------------


def is_ovis2_5(raw: Mapping) -> bool:
    """Whether a `config.json` is that of an Ovis 2.5, which alone names its tower so."""
    return raw.get("model_type") in MODEL_TYPES and "vit_config" in raw


def tower_settings(raw: Mapping) -> dict:
    """What the config says of the tower, and what it leaves unsaid."""
    return {**TOWER_DEFAULTS, **raw["vit_config"]}


def windowed_layers(tower: Mapping) -> list[int]:
    """The layers whose attention stays within windows."""
    full = tower["fullatt_block_indexes"]
    if full is None:
        return []
    full = {int(layer) for layer in full.split("|")} if isinstance(full, str) else set(full)
    return sorted(set(range(tower["num_hidden_layers"])) - full)


def check(raw: Mapping, tensors: Mapping[str, TensorInfo]) -> None:
    """Raises `ConversionError` unless these are config and tensors of an Ovis 2.5 with a tower that the zoo has."""
    check_keys(raw, (*TEXT_KEYS, "visual_vocab_size"))
    tower = tower_settings(raw)
    if tower.get("model_type") != TOWER:
        raise ConversionError(f"The tower is of model type '{tower.get('model_type')}'; this reads '{TOWER}'.")
    wrong = [
        f"{name} is {tower[name]!r}, expected {wanted!r}"
        for name, wanted in TOWER_FIXED.items()
        if tower[name] != wanted
    ]
    if windowed_layers(tower):
        wrong.append(
            f"fullatt_block_indexes is {tower['fullatt_block_indexes']!r}, which keeps attention within windows in "
            f"the layers {windowed_layers(tower)}, expected None or every layer"
        )
    if wrong:
        raise ConversionError(f"The tower is none that the zoo can build: {'; '.join(wrong)}.")
    for name in (HEAD, VTE, _POSITIONS):
        if name not in tensors:
            raise ConversionError(f"The checkpoint has no {name}, it is no Ovis 2.5.")
    indicators = tensors[VTE].shape[0] - tensors[HEAD].shape[0]
    if indicators != len(INDICATORS):
        raise ConversionError(
            f"The table has {tensors[VTE].shape[0]} rows and the head {tensors[HEAD].shape[0]} words, which leaves "
            f"{indicators} indicators, expected {len(INDICATORS)}."
        )
    positions = tensors[_POSITIONS].shape[0]
    if math.isqrt(positions) ** 2 != positions:
        raise ConversionError(f"The tower has a table of {positions} positions, expected that of a square.")


def zoo_config(raw: Mapping, tensors: Mapping[str, TensorInfo], image_token_id: int) -> ZooVetConfig:
    """
    The zoo's config of a checkpoint; the vocabulary reaches up to the image token.

    Args:
        raw: its `config.json`.
        tensors: what it holds.
        image_token_id: the token that was added for images; upstream its ids are negative.
    """
    text_config, tower = AutoConfig.for_model(**raw["llm_config"]), tower_settings(raw)
    text_config.vocab_size = max(text_config.vocab_size, image_token_id + 1)
    area = (tower["patch_size"] * tower["hidden_stride"]) ** 2
    most = max(1, MAX_PIXELS // area)
    return ZooVetConfig(
        vision_config=tower_config(tower, tensors[_POSITIONS].shape[0]),
        text_config=text_config,
        image_token_id=image_token_id,
        num_prefix_tokens=0,
        visual_vocab_size=raw["visual_vocab_size"],
        num_visual_indicators=len(INDICATORS),
        hidden_stride=tower["hidden_stride"],
        native_resolution=True,
        position_interpolation="bicubic",
        min_image_tokens=max(1, MIN_PIXELS // area),
        max_image_tokens=most,
        max_clip_tokens=max(most, ZooVetConfig.max_clip_tokens),
        tie_word_embeddings=text_config.tie_word_embeddings,
        dtype=stored_dtype(raw),
        architectures=["ZooVetForConditionalGeneration"],
    )


def tower_config(tower: Mapping, num_positions: int) -> PreTrainedConfig:
    """The tower's config, as one of Qwen3-VL."""
    return AutoConfig.for_model(
        "qwen3_vl_vision",
        hidden_size=tower["hidden_size"],
        intermediate_size=tower["intermediate_size"],
        depth=tower["num_hidden_layers"],
        num_heads=tower["num_attention_heads"],
        in_channels=tower["num_channels"],
        patch_size=tower["patch_size"],
        temporal_patch_size=tower["temporal_patch_size"],
        spatial_merge_size=tower["hidden_stride"],
        num_position_embeddings=num_positions,
        hidden_act=tower["hidden_act"],
        deepstack_visual_indexes=[],
    )


def patch_settings(config: ZooVetConfig) -> dict:
    """The fields of the zoo's image processor that no file of a checkpoint says."""
    return {
        "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        "patch_size": config.vision_config.patch_size,
        "merge_size": config.hidden_stride,
    }


def probe_sizes(edge: int) -> list[tuple[int, int]]:
    """
    Heights and widths of pictures that stay as they are, and of which both sides shrink or both grow.

    Args:
        edge: of a token in pixels.
    """
    side, part = round(MIN_PIXELS**0.5 / edge), edge // 4
    sizes = [(side, side), (side // 2, 2 * side + 1)]
    return [
        *((height * edge, width * edge) for height, width in sizes),
        *(((side + 2) * edge + more, (side + 1) * edge + more) for more in (part, -part)),
        (side * edge // 2, side * edge * 2 // 3),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# What the code computes
# ---------------------------------------------------------------------------------------------------------------------


def original_places(grid: list[int], stride: int) -> tuple[list[int], list[int]]:
    """Row and column of the patches of an image, frame by frame, and there square of neighbours by square."""
    frames, height, width = grid
    places = [
        (top + down, left + right)
        for top in range(0, height, stride)
        for left in range(0, width, stride)
        for down in range(stride)
        for right in range(stride)
    ] * frames
    return [row for row, _ in places], [column for _, column in places]


class OriginalLayer(nn.Module):
    """A layer of the tower."""

    def __init__(self, tower: Mapping):
        super().__init__()
        width, inner = tower["hidden_size"], tower["intermediate_size"]
        self.heads = tower["num_attention_heads"]
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(width, eps=tower["layer_norm_eps"]) for _ in range(2))
        self.self_attn = nn.ModuleDict({f"{name}_proj": nn.Linear(width, width) for name in ("q", "k", "v", "out")})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})
        self.activation = ACT2FN[tower["hidden_act"]]

    def forward(self, states: torch.Tensor, angles: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """`float[N, D]` of all frames one after the other, with angles `float[N, d / 2]` for the heads' channels."""
        normed = self.layer_norm1(states)
        parts = (self.self_attn[f"{name}_proj"](normed).unflatten(1, (self.heads, -1)) for name in "qkv")
        query, key, value = (part.transpose(0, 1) for part in parts)  # [heads, N, d]
        query, key = turned(query, angles), turned(key, angles)
        frames = zip(*(part.split(lengths, dim=1) for part in (query, key, value)), strict=True)
        seen = [
            (own_query @ own_key.transpose(1, 2) * own_query.shape[2] ** -0.5).softmax(dim=-1) @ own_value
            for own_query, own_key, own_value in frames
        ]
        states = states + self.self_attn["out_proj"](torch.cat(seen, dim=1).transpose(0, 1).flatten(1))
        return states + self.mlp["fc2"](self.activation(self.mlp["fc1"](self.layer_norm2(states))))


def turned(states: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotates channel i of `float[heads, N, d]` with channel i + d / 2."""
    first, second = states.chunk(2, dim=-1)
    return torch.cat(
        (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), dim=-1
    )


class OriginalTower(nn.Module):
    """The tower, image by image."""

    def __init__(self, tower: Mapping, num_positions: int):
        super().__init__()
        self.stride, self.head_dim = tower["hidden_stride"], tower["hidden_size"] // tower["num_attention_heads"]
        values = tower["num_channels"] * tower["patch_size"] ** 2
        self.embeddings = nn.ModuleDict(
            {
                "patch_embedding": nn.Linear(values, tower["hidden_size"]),
                "position_embedding": nn.Embedding(num_positions, tower["hidden_size"]),
            }
        )
        layers = [OriginalLayer(tower) for _ in range(tower["num_hidden_layers"])]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})

    def forward(self, pixel_values: torch.Tensor, image_grid_thw: torch.Tensor) -> BaseModelOutputWithPooling:
        table, quarter = self.embeddings["position_embedding"].weight, self.head_dim // 2
        side = math.isqrt(len(table))
        frequencies = 10000.0 ** -(torch.arange(0, quarter, 2) / quarter)
        positions, angles, lengths = [], [], []
        for grid in image_grid_thw.tolist():
            rows, columns = original_places(grid, self.stride)
            picture = table.view(1, side, side, -1).permute(0, 3, 1, 2)
            grown = nn.functional.interpolate(picture, size=grid[1:], mode="bicubic", align_corners=False)
            positions.append(grown[0, :, rows, columns].t())
            along = [torch.tensor(axis)[:, None] * frequencies for axis in (rows, columns)]
            angles.append(torch.cat(along, dim=1))
            lengths += [grid[1] * grid[2]] * grid[0]
        states = [self.embeddings["patch_embedding"](pixel_values) + torch.cat(positions)]
        for layer in self.encoder["layers"]:
            states.append(layer(states[-1], torch.cat(angles), lengths))
        return BaseModelOutputWithPooling(states[-1], hidden_states=tuple(states))


class OriginalOvis2_5(OriginalLanguageHalf):
    """What AIDC-AI's code computes."""

    def __init__(self, raw: Mapping, tensors: Mapping[str, TensorInfo], folder: Path):
        super().__init__(raw, folder)
        tower, self.model = tower_settings(raw), nn.Module()
        self.model.vision_tower = OriginalTower(tower, tensors[_POSITIONS].shape[0])
        self.neighbours, words = tower["hidden_stride"] ** 2, tensors[HEAD].shape[0]
        self.head = nn.Sequential(
            nn.Linear(tower["hidden_size"] * self.neighbours, words, bias=False), nn.LayerNorm(words)
        )
        self.vte = nn.Embedding(raw["visual_vocab_size"], self.language_model.config.hidden_size)
        self._read(tensors)
        self.float().eval()

    def _read(self, tensors: Mapping[str, TensorInfo]) -> None:
        names = {"llm.": "language_model.", "visual_tokenizer.head.": "head.", _VIT: "model.vision_tower."}
        state = {}
        for name, tensor in engine.read_tensors(tensors):
            for theirs, ours in names.items():
                name = ours + name.removeprefix(theirs) if name.startswith(theirs) else name
            state[name] = tensor.flatten(1) if name.endswith(".patch_embedding.weight") else tensor
        self._load(state)

    def get_image_features(self, pixel_values, image_grid_thw, **kwargs) -> BaseModelOutputWithPooling:
        """Patches `float[N, C * P * P]` to the embeddings of their squares, without indicators."""
        states = self.model.vision_tower(pixel_values, image_grid_thw).hidden_states[-1]
        scores = self.head(states.reshape(len(states) // self.neighbours, -1))
        tokens = scores.softmax(dim=-1, dtype=torch.float32).to(scores.dtype)
        tokens = nn.functional.pad(tokens, (0, len(INDICATORS)))
        return BaseModelOutputWithPooling(pooler_output=[tokens @ self.vte.weight])

    def _embed(self, input_ids: torch.Tensor, pixel_values: torch.Tensor, **kwargs) -> torch.Tensor:
        embeds = self.language_model.get_input_embeddings()(input_ids.clamp(min=0)).clone()
        for number, indicator in enumerate(INDICATORS):
            embeds[input_ids == indicator] = self.vte.weight[number - len(INDICATORS)]
        embeds[input_ids == ATOM] = self.get_image_features(pixel_values, **kwargs).pooler_output[0]
        return embeds


class OriginalProcessor(OriginalParts):
    """What AIDC-AI's code makes of a text with one image: ids with an image's own, and its patches."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_processor, config: ZooVetConfig):
        super().__init__(tokenizer, image_processor)
        self.patch_size, self.stride = config.vision_config.patch_size, config.hidden_stride

    def __call__(self, images: list[PIL.Image.Image], text: list[str], return_tensors: str = "pt") -> BatchFeature:
        (image,), (before, after) = images, text[0].split(IMAGE_TOKEN)
        height, width = original_size(image.height, image.width, self.patch_size * self.stride)
        grid = [1, height // self.patch_size, width // self.patch_size]
        atoms = [ATOM] * (math.prod(grid) // self.stride**2)
        before, after = (self.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after))
        ids = [*before, INDICATORS[0], *atoms, INDICATORS[1], *after]
        options = {"size": {"height": height, "width": width}, "do_center_crop": False, "return_tensors": "pt"}
        (pixels,) = self.image_processor(image.convert("RGB"), **options)["pixel_values"]
        squares = pixels.unfold(1, self.patch_size, self.patch_size).unfold(2, self.patch_size, self.patch_size)
        rows, columns = original_places(grid, self.stride)
        batch = {
            "input_ids": [ids],
            "attention_mask": [[1] * len(ids)],
            "pixel_values": squares[:, rows, columns].transpose(0, 1).flatten(1),  # of [C, h, w, P, P]
            "image_grid_thw": [grid],
        }
        return BatchFeature(batch, tensor_type=return_tensors)


def original_size(height: int, width: int, factor: int) -> tuple[int, int]:
    """
    The height and width that AIDC-AI's code gives a picture.

    Args:
        height, width: its own.
        factor: edge of a token in pixels.
    """
    shorter, longer = sorted((height, width))
    if shorter < factor:
        height, width = (factor if edge == shorter else round(factor / shorter * edge) for edge in (height, width))
    elif longer > 200 * shorter:
        height, width = (min(edge, 200 * shorter) for edge in (height, width))
    rounded = tuple(round(edge / factor) * factor for edge in (height, width))
    if math.prod(rounded) > MAX_PIXELS:
        shrink = math.sqrt(height * width / MAX_PIXELS)
        return tuple(math.floor(edge / shrink / factor) * factor for edge in (height, width))
    if math.prod(rounded) < MIN_PIXELS:
        grow = math.sqrt(MIN_PIXELS / (height * width))
        return tuple(math.ceil(edge * grow / factor) * factor for edge in (height, width))
    return rounded
