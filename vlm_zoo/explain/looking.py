"""Two looks into a model: the answer's attention to the image's tokens, and its gradient with respect to the pixels.

Everything runs on a twin, modules of their own over the same weights, so that nothing about the model changes.
"""

import copy

import torch
from torch import nn

from ..models.layers import grid_places
from ..models.modeling_vlm import WholePrompt, ZooForConditionalGeneration, ZooModelOutputWithPast
from ..models.native_vlm import patch_places
from ..models.parts_vlm import pair
from .asking import Asked, ExplainError


def twin_of(model: ZooForConditionalGeneration) -> ZooForConditionalGeneration:
    """The same model again, in eval mode: its own modules, hooks and config, over the weights of the original."""
    shared = [*model.parameters(), *model.buffers()]
    # Some modules keep tensors that are neither; those with a graph could not be copied
    shared += [value for module in model.modules() for value in vars(module).values() if torch.is_tensor(value)]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared}).eval()


# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------


def attention_to_image(twin: ZooForConditionalGeneration, asked: Asked) -> list[torch.Tensor]:
    """
    How much of its attention each layer of the language model spends on each token of the image, while it says the
    answer: the mean over heads and over the tokens of the answer, each seen from where it is predicted.

    The prompt is read with whatever kernels the model has. Then the answer is read token by token behind a cache, as
    in `generate`, with plain attention: its weights are one row a token, however long the prompt is. The twin keeps
    plain attention in its language model.

    Returns:
        `float[K]` for each layer that has attention, none for a language model that shows none.
    """
    base, ids, prompt = twin.model, asked.input_ids, asked.prompt_length
    ones = torch.ones_like(ids)
    # What a prefill by `generate` is told too: its last token comes later, but belongs to the question
    carry = WholePrompt(ids[:, :prompt], ones[:, :prompt]) if base.reads_question else None
    outputs = base(
        input_ids=ids[:, : prompt - 1],
        attention_mask=ones[:, : prompt - 1],
        use_cache=True,
        carry=carry,
        **asked.vision_inputs,
        **asked.query_inputs,
    )
    base.language_model.set_attn_implementation("eager")
    length = ids.shape[1]
    looks = []
    for end in range(prompt, length):
        outputs = base(
            input_ids=ids[:, end - 1 : end],
            attention_mask=ones[:, :end],
            past_key_values=outputs.past_key_values,
            carry=outputs.carry,
            use_cache=True,
            output_attentions=True,
        )
        weights = [layer for layer in outputs.attentions or () if layer is not None]  # float[1, H, 1, S]
        rows = [layer[0, :, -1].float().mean(dim=0).cpu() for layer in weights]
        # A sliding window holds the last S tokens alone
        looks.append([nn.functional.pad(row, (end - len(row), length - end)) for row in rows])
    image = base.placeholder_mask(ids, None)[0].cpu()
    return [torch.stack(steps).mean(dim=0)[image] for steps in zip(*looks, strict=True)]


def depths(layers: int) -> dict[str, range]:
    """The layers whose mean is shown: the middle third, and the last one."""
    middle = range(layers // 3, max(2 * layers // 3, layers // 3 + 1))
    late = range(min(middle.stop, layers - 1), layers)
    return {"attention_middle": middle, "attention_late": late} if middle != late else {"attention_late": late}


# ---------------------------------------------------------------------------------------------------------------------
# Gradient
# ---------------------------------------------------------------------------------------------------------------------


def gradient_of_answer(twin: ZooForConditionalGeneration, asked: Asked) -> tuple[torch.Tensor, ZooModelOutputWithPast]:
    """
    The gradient of the answer's log-probability with respect to the pixels, times the pixels.

    No weight gets a gradient. It works with frozen towers too: pixels that want a gradient make them keep a graph.

    Returns:
        A tensor like `pixel_values`, and the output of the base model.

    Raises:
        ExplainError: when the gradient is not finite.
    """
    with torch.enable_grad():
        pixels = asked.vision_inputs["pixel_values"].detach().float().requires_grad_()
        outputs = twin.model(
            input_ids=asked.input_ids,
            attention_mask=torch.ones_like(asked.input_ids),
            use_cache=False,
            **{**asked.vision_inputs, "pixel_values": pixels},
            **asked.query_inputs,
        )
        logits = twin.logits_of(outputs.last_hidden_state[:, asked.prompt_length - 1 : -1])
        answer = asked.input_ids[:, asked.prompt_length :, None].to(logits.device)
        chosen = logits.float().log_softmax(dim=-1).gather(2, answer)
        (gradient,) = torch.autograd.grad(chosen.sum(), pixels, allow_unused=True)
    if gradient is None:  # no pixel has a say
        gradient = torch.zeros_like(pixels)
    weights = (gradient * pixels).detach()
    if not weights.isfinite().all():
        raise ExplainError("The gradient of the pixels is not finite: load the model in float32 or bfloat16.")
    return weights.cpu(), outputs


def cells_of_pixels(
    weights: torch.Tensor, asked: Asked, twin: ZooForConditionalGeneration, merge_size: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Pixels summed up to the patches that the tower sees them in.

    Args:
        weights: like `pixel_values`: one picture `float[1, C, H, W]`, its views `float[1, P, C, H, W]`, or patches
            `float[N, C * F * P * P]`.
        merge_size: of the image processor, for patches.

    Returns:
        Values `float[M]`, none below 0, and where they stand, `float[M, 5]`.
    """
    if weights.ndim == 2 and "image_grid_thw" in asked.vision_inputs:
        grids = asked.vision_inputs["image_grid_thw"].cpu()
        rows, columns = patch_places(grids, merge_size).unbind(dim=1)
        size = tuple(grids[0, 1:].tolist())
        return weights.sum(dim=1).abs(), grid_places(size)[rows * size[1] + columns]
    if weights.ndim not in (4, 5):
        raise ExplainError(
            f"pixel_values {list(weights.shape)} are neither pictures [I, C, H, W], nor views [I, P, C, H, W], nor "
            "patches [N, values] with image_grid_thw: explain cannot tell where their pixels are."
        )
    views = weights.flatten(0, -4).sum(dim=1)  # float[P, H, W]
    size, (height, width) = tuple(views.shape[1:]), pair(twin.config.vision_config.patch_size)
    padded = nn.functional.pad(views, (0, -size[1] % width, 0, -size[0] % height))
    cells = padded.unflatten(2, (-1, width)).unflatten(1, (-1, height)).sum(dim=(2, 4))  # float[P, h, w]
    places = torch.cat([grid_places(size, (height, width), view) for view in range(len(views))])
    return cells.flatten().abs(), places
