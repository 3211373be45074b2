"""Towers, decoders and heads: building any of them from its config, and finding what is inside.

Every question about a foreign model (where are its layers, how many prefix tokens, what does its head do) is answered
here, and an answer that cannot be found is an error by name.
"""

import math

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


def build_part(config: PreTrainedConfig, role: str) -> PreTrainedModel:
    """Builds a vision tower or a decoder from its config; an unknown model type is a `ValueError` that names the
    role."""
    try:
        return AutoModel.from_config(config)
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


def cut_tower(tower: PreTrainedModel, last_layer: int) -> None:
    """
    Removes what no feature depends on: the layers after hidden state `last_layer`, the pooling head, and the final
    norm (a tower's hidden states are taken before it).
    """
    depth = tower.config.num_hidden_layers
    unused = ["head", "pooler", "post_layernorm"]
    if last_layer < depth:
        holder, name = find_layers(tower)
        setattr(holder, name, getattr(holder, name)[: max(last_layer, 1)])
        unused += ["layernorm", "norm"]
    for name in unused:
        if isinstance(getattr(tower, name, None), nn.Module):
            setattr(tower, name, nn.Identity())


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
    Measures on the meta device what a fixed-size tower makes of an image.

    Returns:
        Patches a side times a side, and the prefix tokens (CLS, registers) before them.
    """
    size, patch = vision_config.image_size, vision_config.patch_size
    height, width = (size, size) if isinstance(size, int) else size
    patch_height, patch_width = (patch, patch) if isinstance(patch, int) else patch
    with torch.device("meta"):
        tower = build_part(vision_config, "vision tower")
        pixels = torch.zeros(1, getattr(vision_config, "num_channels", 3), height, width)
        tokens = tower(pixels, output_hidden_states=True).hidden_states[0].shape[1]
    patches = math.prod((height // patch_height, width // patch_width))
    return patches, tokens - patches
