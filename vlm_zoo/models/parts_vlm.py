"""Towers, decoders and heads: building any of them from its config, and finding what is inside.

Every question about a foreign model (where are its layers, how many prefix tokens, what does its head do) is answered
here, and an answer that cannot be found is an error by name.
"""

import copy
import math
from typing import NamedTuple

import torch
from torch import nn
from transformers import (
    MODEL_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    Blip2VisionModel,
    InstructBlipVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel


# Towers that AutoModel does not know, by the class of their config.
_WITHOUT_AUTO_ENTRY = {
    model.config_class: model
    for model in (Blip2VisionModel, InstructBlipVisionModel, Qwen2VisionTransformerPretrainedModel)
}

# Some towers of transformers were only ever loaded: their own initialiser is too narrow to learn from.
_NARROWEST_INITIALIZER = 1e-6
_USUAL_INITIALIZER = 0.02


def pair(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """A height and a width, from one number for both or from two."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def part_class(config: PreTrainedConfig) -> type | None:
    """The class whose `from_pretrained` opens a tower or a decoder with this config, `None` when there is none."""
    return AutoModel if type(config) in MODEL_MAPPING else _WITHOUT_AUTO_ENTRY.get(type(config))


def tower_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class of a tower or a decoder with this config, `None` when there is none."""
    found = _WITHOUT_AUTO_ENTRY.get(type(config)) or MODEL_MAPPING.get(type(config), None)
    return found[0] if isinstance(found, tuple) else found


def build_part(config: PreTrainedConfig, role: str) -> PreTrainedModel:
    """Builds a vision tower or a decoder from its config; an unknown model type is a `ValueError` that names the
    role."""
    width = getattr(config, "initializer_range", None)
    if isinstance(width, float) and width < _NARROWEST_INITIALIZER:
        config.initializer_range = _USUAL_INITIALIZER
    own_class = _WITHOUT_AUTO_ENTRY.get(type(config))
    try:
        return AutoModel.from_config(config) if own_class is None else own_class._from_config(config)
    except ValueError as error:
        raise ValueError(
            f"The {role} of model type '{config.model_type}' ({type(config).__name__}) cannot be built: {error}"
        ) from error


def find_layers(model: PreTrainedModel) -> tuple[nn.Module, str]:
    """
    Finds the stack of layers of a tower or a decoder: the `nn.ModuleList` as long as `config.num_hidden_layers`.

    Returns:
        The module that holds the stack and the attribute's name, so that `getattr(holder, name)` is the stack.
    """
    depth = model.config.num_hidden_layers
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == depth:
                return module, name
    raise ValueError(f"{type(model).__name__} has no list of {depth} layers (config.num_hidden_layers = {depth}).")


def cut_tower(tower: PreTrainedModel, layers: list[int], last_hidden_state: bool = False) -> None:
    """
    Removes what none of these hidden states depends on: later layers, the pooling head, the final norm. A mask token
    becomes a buffer.

    What is unused is found by a backward pass of the same tower without weights.

    Args:
        tower: is changed.
        layers: the hidden states that are used.
        last_hidden_state: whether the tower's `last_hidden_state` is used too, which some towers norm.
    """
    last = max(*layers, 1)  # a tower keeps one layer, used or not: without any it would record no hidden state
    with torch.inference_mode(False), torch.enable_grad():
        states = hidden_states_on_meta(tower.config)
        used = [states.hidden[layer] for layer in (*layers, last)] + ([states.last] if last_hidden_state else [])
        sum(state.sum() for state in used).backward()
    unused = {name for name, parameter in states.tower.named_parameters() if parameter.grad is None}
    holder, name = find_layers(tower)
    setattr(holder, name, getattr(holder, name)[:last])
    _remove(tower, unused)


def _remove(module: nn.Module, unused: set[str], prefix: str = "") -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        if prefix + name in unused:  # kept and loaded, but no optimiser waits for its gradient
            delattr(module, name)
            module.register_buffer(name, parameter.detach())
    for name, child in list(module.named_children()):
        path = f"{prefix}{name}."
        parameters = {path + inner for inner, _ in child.named_parameters()}
        if parameters and parameters <= unused:
            setattr(module, name, nn.Identity())
        else:
            _remove(child, unused, path)


class _MetaStates(NamedTuple):
    tower: PreTrainedModel
    hidden: tuple[torch.Tensor, ...]
    last: torch.Tensor


def hidden_states_on_meta(vision_config: PreTrainedConfig) -> _MetaStates:
    """A tower without weights, its hidden states and its last one `float[1, N, Dv]` for one image: shapes and graph,
    no numbers."""
    vision_config = copy.deepcopy(vision_config)
    vision_config._attn_implementation = "eager"  # other kernels do not run without weights
    height, width = pair(vision_config.image_size)
    with torch.device("meta"):
        tower = build_part(vision_config, "vision tower")
        pixels = torch.zeros(1, getattr(vision_config, "num_channels", 3), height, width, dtype=tower.dtype)
        outputs = tower(pixels, output_hidden_states=True)
        return _MetaStates(tower, outputs.hidden_states, outputs.last_hidden_state)


def build_head(text_config: PreTrainedConfig) -> nn.Linear:
    """Builds the output projection that this language model's own `AutoModelForCausalLM` has: its width and its
    bias."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text_config)
    own = model.get_output_embeddings()
    if own is None or not isinstance(getattr(own, "weight", None), torch.Tensor):
        raise ValueError(f"{type(model).__name__} has no output projection: it cannot be the language model of a VLM.")
    vocabulary, width = own.weight.shape
    return nn.Linear(width, vocabulary, bias=getattr(own, "bias", None) is not None)


def logit_transform(text_config: PreTrainedConfig) -> tuple[float, float | None]:
    """
    The language model's own treatment of its logits: a factor, then a soft cap.

    Cohere multiplies by `logit_scale`, Muse Glimmer by `output_multiplier`, Falcon-H1 by `lm_head_multiplier`,
    HyperCLOVA X by `logits_scaling`; Granite divides by it. Gemma caps with `final_logit_softcapping`.
    """
    cap = getattr(text_config, "final_logit_softcapping", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(text_config, name, None) is not None:
            return float(getattr(text_config, name)), cap
    scaling = getattr(text_config, "logits_scaling", None)
    if scaling is not None:
        return float(scaling if text_config.model_type == "hyperclovax" else 1 / scaling), cap
    return 1.0, cap


def measure_tower(vision_config: PreTrainedConfig) -> tuple[int, int]:
    """
    Measures what a fixed-size tower makes of an image.

    Returns:
        The number of patches, and of the prefix tokens (CLS, registers) before them.
    """
    height, width = pair(vision_config.image_size)
    patch_height, patch_width = pair(vision_config.patch_size)
    tokens = hidden_states_on_meta(vision_config).hidden[0].shape[1]
    patches = math.prod((height // patch_height, width // patch_width))
    return patches, tokens - patches
