"""Where a model looked when it answered, drawn over the picture.

    >>> from vlm_zoo import explain
    >>> explain(model, processor, "page.png", "What is on the left?", out="map.png").maps["gradient"]

    asking     the prompt, and the answer's tokens behind it
    looking    attention to the image's tokens, gradient of the answer with respect to the pixels
    maps       from tokens and pixels to maps over the picture, whatever tiles, padding and merging made of it
    drawing    the figure of an `Explanation`

Every architecture has the gradient. One whose visual tokens stand for places says so (`ZooModel.token_places`) and has
attention too; one that computes maps of its own shows them (`ZooModel.fusion_maps`).
"""

import os
from typing import Any

import torch
from transformers import PreTrainedModel, ProcessorMixin

from ..models.geometry_vlm import ViewRegion
from ..models.layers import grid_places
from .asking import ExplainError, ask, check_pair, read_picture
from .explanation import Explanation, checked_path
from .looking import attention_to_image, cells_of_pixels, depths, gradient_of_answer, twin_of
from .maps import average, boxes_on_picture, spread


__all__ = ["ExplainError", "Explanation", "explain"]


def explain(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    image: Any,
    question: str,
    *,
    answer: str | None = None,
    out: str | os.PathLike | None = None,
    max_new_tokens: int = 32,
) -> Explanation:
    """
    Maps of where a model of the zoo looked when it answered a question about a picture.

    The maps, as far as the architecture has them, in this order:

    - those that it computes itself, by their names; one that goes below 0 is lifted to it;
    - `attention_middle`, `attention_late`: the share of attention that the language model spends on each place while
      it says the answer, the mean over heads, over the tokens of the answer, and over the middle and the last third of
      its layers (`labels` says which). The sum of a map is what the picture gets of all attention. Only where visual
      tokens stand for places, and the language model returns its attention;
    - `gradient`: by how much the log-probability of the answer would change, to first order, if a patch were as the
      image processor's mean colour. Each patch has the absolute value of the sum of gradient times pixel.

    Attention says what was read, not what it was good for, and the gradient is local: neither proves a cause.

    The model is left as it is, in training mode or not, frozen or not: it runs as a twin over the same weights.

    Args:
        model: with its head, on any device.
        image: one picture, as its processor takes pictures.
        question: the text of a user turn. Without a chat template it is the whole prompt, image token and all.
        answer: what to explain; by default the model's own answer, decoded greedily.
        out: where to write the picture of the maps, a PNG; see `Explanation.save`.
        max_new_tokens: of the model's own answer.

    Raises:
        ExplainError: for a model that is not of the zoo, no image or several, a question or an answer without text, a
            prompt without its image token, or a file name that is not a PNG's. It is a `ValueError`.
        ImageError: for a picture that cannot be read.
    """
    check_pair(model, processor)
    if out is not None:
        checked_path(out)
    with torch.inference_mode(False), torch.no_grad():
        given, picture = read_picture(processor, image)
        twin = twin_of(model)
        asked = ask(twin, processor, given, question, answer, max_new_tokens)
        weights, outputs = gradient_of_answer(twin, asked)
        size = picture.height, picture.width
        regions = processor.image_processor.view_regions(*size)

        maps, labels = {}, {}
        for name, values in next(iter(twin.model.fusion_maps(outputs.fusion_outputs)), {}).items():
            maps[name] = _over_picture(values.detach().float().cpu(), regions, size)
        boxes = None
        places = twin.model.token_places(asked.vision_inputs, outputs.fusion_outputs)
        if places is not None:
            places = places[0].detach().float().cpu()
            tokens = int(twin.model.placeholder_mask(asked.input_ids, None).sum())
            if len(places) != tokens:
                raise ExplainError(
                    f"token_places of {type(twin.model).__name__} gives {len(places)} places, the image has {tokens} "
                    "placeholders: an architecture that changes what tokens stand for must say where they stand."
                )
            placed = places[:, 0] >= 0
            stands = boxes_on_picture(places[placed], regions, size)
            boxes = stands.part[stands.seen]
            layers = attention_to_image(twin, asked)
            for name, chosen in depths(len(layers)).items() if layers else ():
                values = torch.stack([layers[layer][placed] for layer in chosen]).mean(dim=0)
                maps[name] = spread(values, stands, stands.grid)
                labels[name] = f"attention, {_named(chosen)} of {len(layers)}"
        values, cells = cells_of_pixels(weights, asked, twin, processor.image_processor.merge_size)
        cells = boxes_on_picture(cells, regions, size)
        maps["gradient"] = spread(values, cells, cells.grid)
        labels["gradient"] = "gradient x pixels"
    explanation = Explanation(question, asked.answer, picture, maps, labels, boxes)
    if out is not None:
        explanation.save(out)
    return explanation


def _named(layers: range) -> str:
    return f"layer {layers.stop}" if len(layers) == 1 else f"layers {layers.start + 1} to {layers.stop}"


def _over_picture(values: torch.Tensor, regions: list[ViewRegion], size: tuple[int, int]) -> torch.Tensor:
    """A map over the first view as a map over the picture: the same where the view shows exactly that. One that goes
    below 0 is lifted to it."""
    values = values - values.min().clamp(max=0)
    if regions[0].frame == (0, 0, *size):
        return values
    boxes = boxes_on_picture(grid_places(tuple(values.shape)), regions, size)
    return average(values.flatten(), boxes, boxes.grid)
