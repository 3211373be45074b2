"""Parts of a model by the same names in every architecture: vision, connector, fusion, language, embeddings, head."""

import re
from collections import defaultdict

from torch import nn

from ..models.modeling_vlm import PARTS, ZooPreTrainedModel, check_parts


def freeze(model: ZooPreTrainedModel, train: list[str]) -> dict[str, int]:
    """
    Trains exactly the named parts and freezes the others.

    Args:
        model: a model of the zoo.
        train: names among `PARTS`; unknown ones are a `ValueError`.

    Returns:
        Trainable parameters in each part.
    """
    model.set_trainable_parts(train)
    return trainable_parts(model)


def trainable_parts(model: ZooPreTrainedModel) -> dict[str, int]:
    """Trainable parameters in each part that the model has."""
    counts: dict[str, int] = defaultdict(int)
    for name, parameter in model.named_parameters():
        counts[model.part_of(name)] += parameter.numel() if parameter.requires_grad else 0
    return {part: counts[part] for part in PARTS if part in counts}


def lora_targets(model: ZooPreTrainedModel, parts: list[str]) -> str:
    """
    A regular expression for `LoraConfig(target_modules=…)` that matches the linear layers of these parts and no other.

    `all-linear`, and lists such as `["q_proj", "v_proj"]`, reach into the vision tower as well.
    """
    check_parts(parts)
    head = model.get_output_embeddings()
    names = [
        name
        for name, module in model.named_modules()
        if is_linear(module) and module is not head and model.part_of(f"{name}.weight") in parts
    ]
    if not names:
        raise ValueError(f"The part(s) {sorted(parts)} of this {type(model).__name__} hold no linear layer.")
    # Layers of one kind differ in their index alone.
    patterns = sorted({re.sub(r"(?<=\.)\d+(?=\\\.|$)", r"[0-9]+", name.replace(".", r"\.")) for name in names})
    return "(?:.*\\.)?(?:" + "|".join(patterns) + ")"


def is_linear(module: nn.Module) -> bool:
    """A linear layer, GPT-2's transposed one included."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
