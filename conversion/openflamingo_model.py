"""What OpenFlamingo's code computes, from the tensors of its checkpoint as they are and transformers' language model.

Its own code runs with versions of transformers that are long gone; with this, a conversion can be proven all the same.
"""

import math
import re
from collections import OrderedDict

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, CLIPVisionConfig
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlm_zoo.models.flamingo import ZooFlamingoConfig

from . import engine, llava_original
from .engine import ConversionError
from .openflamingo import (
    HEAD_DIM,
    LANGUAGE,
    NUM_HEADS,
    OPEN_CLIP,
    SAVED,
    Parts,
    end_of_chunk,
    resize,
)


class OpenClipVisual(nn.Module):
    """The ViT of open_clip, under its own names."""

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty((config.image_size // patch) ** 2 + 1, width))
        self.conv1 = nn.Conv2d(config.num_channels, width, patch, stride=patch, bias=False)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(OpenClipBlock(config) for _ in range(config.num_hidden_layers))

    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        patches = self.conv1(pixel_values).flatten(2).transpose(1, 2)
        states = torch.cat((self.class_embedding.expand(len(patches), 1, -1), patches), dim=1)
        states = [self.ln_pre(states + self.positional_embedding)]
        for block in self.transformer.resblocks:
            states.append(block(states[-1]))
        return BaseModelOutputWithPooling(last_hidden_state=states[-1], hidden_states=tuple(states))


class OpenClipBlock(nn.Module):
    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        width, size = config.hidden_size, config.intermediate_size
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, config.num_attention_heads, batch_first=True)
        act = ACT2FN[config.hidden_act]
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(width, size), act=act, c_proj=nn.Linear(size, width)))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        normed = self.ln_1(states)
        states = states + self.attn(normed, normed, normed, need_weights=False)[0]
        return states + self.mlp(self.ln_2(states))


def feed_forward(width: int, size: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, size, bias=False), nn.GELU(), nn.Linear(size, width, bias=False)
    )


def heads_of(states: torch.Tensor) -> torch.Tensor:
    return states.unflatten(-1, (NUM_HEADS, HEAD_DIM)).transpose(1, 2)


class OriginalAttention(nn.Module):
    """Attention of the resampler (`media` is its own norm's) and of the gated blocks."""

    def __init__(self, width: int, media_width: int, resampler: bool):
        super().__init__()
        inner = NUM_HEADS * HEAD_DIM
        if resampler:
            self.norm_media, self.norm_latents = nn.LayerNorm(width), nn.LayerNorm(width)
        else:
            self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(media_width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def attend(self, states, media, mask=None) -> torch.Tensor:
        key, value = map(heads_of, self.to_kv(media).chunk(2, dim=-1))
        scores = heads_of(self.to_q(states)) * HEAD_DIM**-0.5 @ key.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return self.to_out((scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2))


class OriginalResampler(nn.Module):
    def __init__(self, config: ZooFlamingoConfig):
        super().__init__()
        width, size = config.media_width, config.resampler_intermediate_size
        self.latents = nn.Parameter(torch.empty(config.num_latents, width))
        self.frame_embs = None
        if config.num_frame_embeddings:
            self.frame_embs = nn.Parameter(torch.empty(config.num_frame_embeddings, width))
        self.layers = nn.ModuleList(
            nn.ModuleList((OriginalAttention(width, width, resampler=True), feed_forward(width, size)))
            for _ in range(config.resampler_depth)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """The frames of one clip, `float[F, N, D]`, to `float[K, D]`."""
        if self.frame_embs is not None:
            patches = patches + self.frame_embs[: len(patches), None]
        media, latents = patches.flatten(0, 1)[None], self.latents[None]
        for attention, inner in self.layers:
            normed = attention.norm_latents(latents)
            seen = torch.cat((attention.norm_media(media), normed), dim=1)
            latents = latents + attention.attend(normed, seen)
            latents = latents + inner(latents)
        return self.norm(latents)[0]


class OriginalBlock(nn.Module):
    def __init__(self, config: ZooFlamingoConfig):
        super().__init__()
        width = config.text_config.hidden_size
        self.attn = OriginalAttention(width, config.media_width, resampler=False)
        self.attn_gate, self.ff_gate = nn.Parameter(torch.empty(1)), nn.Parameter(torch.empty(1))
        self.ff = feed_forward(width, config.feed_forward_size)

    def forward(self, states: torch.Tensor, media: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """
        Args:
            states: `float[1, T, Dt]`.
            media: `float[1, M, K, Dv]`.
            places (`bool[1, T]`): true at image tokens.
        """
        time, count = places.cumsum(dim=-1)[..., None], torch.arange(1, media.shape[1] + 1)
        mask = (time == count).repeat_interleave(media.shape[2], dim=-1)[:, None]
        attended = self.attn.attend(self.attn.norm(states), media.flatten(1, 2), mask)
        states = states + attended.masked_fill(time == 0, 0.0) * self.attn_gate.tanh()
        return states + self.ff(states) * self.ff_gate.tanh()


class OriginalFlamingo(nn.Module):
    """What OpenFlamingo's code computes for one row, from the tensors of its checkpoint as they are."""

    def __init__(self, parts: Parts, config: ZooFlamingoConfig):
        super().__init__()
        self.config, self.decoder = config, parts.decoder
        self.model = nn.Module()
        apart = any(name.startswith(llava_original.APART) for name in parts.tensors)
        self.model.vision_tower = (
            AutoModel.from_config(config.vision_config, attn_implementation="eager")
            if apart
            else OpenClipVisual(config.vision_config)
        )
        self.perceiver = OriginalResampler(config)
        self.lang_encoder = AutoModelForCausalLM.from_config(config.text_config, attn_implementation="eager")
        self.generation_config = self.lang_encoder.generation_config
        self.blocks = nn.ModuleDict({str(layer): OriginalBlock(config) for layer in config.gated_layers})
        self.seen = None
        for layer, block in self.blocks.items():
            place = self.lang_encoder.get_submodule(f"{parts.decoder.layers}.{layer}")
            place.register_forward_pre_hook(self._before(block), with_kwargs=True)
        self._read(parts)
        self.float().eval()

    def _before(self, block: OriginalBlock):
        def enter(layer, args, kwargs):
            if args:
                return (block(args[0], *self.seen), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": block(kwargs["hidden_states"], *self.seen)}

        return enter

    def _read(self, parts: Parts) -> None:
        layers, body, head = map(re.escape, (parts.decoder.layers, parts.decoder.body, parts.decoder.head))
        places = (
            (rf"{SAVED}perceiver\.", self.perceiver, ""),
            (rf"{SAVED}lang_encoder\.{layers}\.(?=\d+\.gated_cross_attn_layer\.)", self.blocks, ""),
            (rf"(?:{OPEN_CLIP}|^{llava_original.APART}(?:vision_model\.)?)", self.model.vision_tower, ""),
            (rf"^(?:(?:module\.)?lang_encoder\.|{LANGUAGE})(?:lm_head|{head})\.", self.lang_encoder, "lm_head."),
            (
                rf"^(?:(?:module\.)?lang_encoder\.|{LANGUAGE})(?:{body}\.)?",
                self.lang_encoder,
                f"{parts.decoder.body}.",
            ),
        )
        states = {id(module): {} for _, module, _ in places}
        rows = self.config.text_config.vocab_size
        for name, tensor in engine.read_tensors(parts.tensors):
            pattern, module, prefix = next(place for place in places if re.search(place[0], name))
            inner = re.sub(pattern, prefix, name).replace(".gated_cross_attn_layer", "").replace(".decoder_layer", "")
            states[id(module)][inner] = (
                resize(tensor.shape, rows).apply(tensor) if inner == "lm_head.weight" else tensor
            )
        for module in (self.perceiver, self.blocks, self.model.vision_tower, self.lang_encoder):
            missing = module.load_state_dict(states[id(module)], strict=False).missing_keys
            tied = self.config.tie_word_embeddings and missing == ["lm_head.weight"]
            if missing and not tied:
                raise ConversionError(f"{type(module).__name__} finds no tensors for:", {"missing": missing})

    def get_image_features(self, pixel_values, image_grid_thw=None, **kwargs) -> BaseModelOutputWithPooling:
        counts = [1] * len(pixel_values) if image_grid_thw is None else image_grid_thw[:, 0].tolist()
        patches = self.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states[-1][:, 1:]
        return BaseModelOutputWithPooling(pooler_output=[self.perceiver(clip) for clip in patches.split(counts)])

    def forward(self, input_ids, pixel_values, image_grid_thw=None, attention_mask=None, **kwargs):
        media = torch.stack(self.get_image_features(pixel_values, image_grid_thw).pooler_output)[None]
        self.seen = (media, input_ids == self.config.image_token_id)
        return self.lang_encoder(input_ids, attention_mask=attention_mask, use_cache=False, **kwargs)

    @torch.no_grad()
    def generate(self, input_ids, max_new_tokens, suppress_tokens=(), attention_mask=None, do_sample=False, **inputs):
        """Greedy ids without a cache; the end of a chunk ends the answer."""
        for _ in range(max_new_tokens):
            logits = self(input_ids, **inputs).logits[:, -1]
            logits[:, list(suppress_tokens)] = -math.inf
            input_ids = torch.cat((input_ids, logits.argmax(dim=-1, keepdim=True)), dim=1)
            if input_ids[0, -1] == end_of_chunk(self.config):
                break
        return input_ids
