"""One question about one picture: the batch that asks it, and the answer's tokens behind the prompt's."""

from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch
from transformers import BatchFeature

from ..models.geometry_vlm import ImageError
from ..models.modeling_vlm import QUERY_INPUTS, VISION_INPUTS, ZooForConditionalGeneration
from ..models.processing_vlm import ZooProcessor
from ..models.video_vlm import Clip


class ExplainError(ValueError):
    """A question that cannot be explained; the message says what is wrong with it."""


@dataclass(frozen=True)
class Asked:
    """
    A prompt and its answer as a model reads them.

    input_ids (`int[1, T]`): the prompt's tokens, then the answer's.
    prompt_length: how many are the prompt's.
    answer: as text.
    vision_inputs, query_inputs: the other inputs of a forward.
    """

    input_ids: torch.Tensor
    prompt_length: int
    answer: str
    vision_inputs: dict[str, torch.Tensor]
    query_inputs: dict[str, torch.Tensor]


def check_pair(model: Any, processor: Any) -> None:
    """Raises `ExplainError` unless these are a head model and a processor of the zoo that belong together."""
    if not isinstance(model, ZooForConditionalGeneration):
        raise ExplainError(
            f"explain takes a model of the zoo with its head (Zoo…ForConditionalGeneration), got "
            f"{type(model).__name__}. Of a model with adapters give `get_base_model()`, and load a checkpoint that "
            "carries its code without trust_remote_code."
        )
    if not isinstance(processor, ZooProcessor):
        raise ExplainError(f"explain takes the model's processor, got {type(processor).__name__}.")
    if processor.image_token_id != model.config.image_token_id:
        raise ExplainError(
            f"The processor's image token {processor.image_token!r} has the id {processor.image_token_id}, the model "
            f"expects {model.config.image_token_id}: is it the processor of another model?"
        )


def read_picture(processor: ZooProcessor, image: Any) -> tuple[Any, PIL.Image.Image]:
    """
    Opens one picture, within the bounds of the image processor.

    Returns:
        The picture as the processor takes it, and as it is drawn: upright, RGB.

    Raises:
        ExplainError: for none, several, or a clip.
        ImageError: for a picture that cannot be read.
    """
    if isinstance(image, list | tuple):
        if len(image) != 1:
            raise ExplainError(f"explain takes one image, got {len(image)}.")
        image = image[0]
    if image is None:
        raise ExplainError("explain takes one image, got none.")
    if isinstance(image, Clip | list | tuple):
        raise ExplainError(f"explain takes one image, got a {type(image).__name__}: give a frame of it.")
    image_processor = processor.image_processor
    fetched = image_processor.fetch_images([image])[0]
    try:
        pixels = image_processor.process_image(fetched)[0]  # uint8[C, H, W]
    except ImageError as error:
        raise ImageError(f"The image {error}") from error
    pixels = pixels[:3] if len(pixels) >= 3 else pixels[:1].expand(3, -1, -1)
    return fetched, PIL.Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def ask(
    model: ZooForConditionalGeneration,
    processor: ZooProcessor,
    image: Any,
    question: str,
    answer: str | None,
    max_new_tokens: int,
) -> Asked:
    """
    Asks, and takes the answer that is given or else the model's own, greedily.

    Args:
        image: of `read_picture`.
    """
    _check_text(processor, question, "question")
    prompt = _prompt(processor, question)
    if answer is None:
        batch = _batch(processor, image, prompt).to(model.device)
        ids, length = _answered(model, batch, max_new_tokens), batch["input_ids"].shape[1]
        answer = processor.tokenizer.decode(ids[0, length:], skip_special_tokens=True).strip()
    else:
        _check_text(processor, answer, "answer")
        whole = prompt + _behind(processor, question, prompt, answer.strip())
        batch = _batch(processor, image, whole).to(model.device)
        ids = batch["input_ids"]
        length = ids.shape[1] - _added_tokens(processor, prompt, whole)
    if ids[0, length - 1] == processor.image_token_id:
        raise ExplainError("The prompt ends with its image token: nothing is asked about the image.")
    vision_inputs = {name: batch[name] for name in VISION_INPUTS if name in batch}
    query_inputs = {name: batch[name] for name in QUERY_INPUTS if name in batch}
    return Asked(ids, length, answer.strip(), vision_inputs, query_inputs)


def _check_text(processor: ZooProcessor, text: Any, what: str) -> None:
    if not isinstance(text, str) or not text.strip():
        raise ExplainError(f"The {what} has no text: got {text!r:.80}.")
    if what == "answer" and processor.image_token in text:
        raise ExplainError(f"The answer holds the image token {processor.image_token}, which stands for an image.")


def _messages(question: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


def _prompt(processor: ZooProcessor, question: str) -> str:
    """The question as the chat template asks it, or as it is where there is no template."""
    token, template = processor.image_token, processor.chat_template
    prompt = question
    if template is not None:
        if token in question:
            raise ExplainError(f"The question holds the image token {token}; the chat template places the image.")
        prompt = processor.apply_chat_template(_messages(question), add_generation_prompt=True, tokenize=False)
    found = prompt.count(token)
    if found != 1:
        cause = (
            "the processor has no chat template, so the question must hold it where the image is to stand"
            if template is None
            else "the chat template drops or repeats images"
        )
        raise ExplainError(
            f"The prompt holds {found} image tokens {token}, expected one: {cause}. Got {prompt!r:.200}"
        )
    return prompt


def _batch(processor: ZooProcessor, image: Any, text: str) -> BatchFeature:
    # A template writes the special tokens itself
    return processor(
        images=[image], text=[text], return_tensors="pt", add_special_tokens=processor.chat_template is None
    )


def _answered(model: ZooForConditionalGeneration, batch: BatchFeature, max_new_tokens: int) -> torch.Tensor:
    """Prompt and greedy answer `int[1, T]` without the token that ends it, unless that is all there is."""
    ids = model.generate(**batch, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens)
    ends = model.generation_config.eos_token_id
    ends = torch.tensor([] if ends is None else ends, device=ids.device).reshape(-1)
    length = batch["input_ids"].shape[1]
    stops = torch.isin(ids[0, length:], ends).nonzero().flatten().tolist()
    return ids[:, : length + max(stops[0], 1)] if stops else ids


def _behind(processor: ZooProcessor, question: str, prompt: str, answer: str) -> str:
    """The answer with the white space that the chat template puts before it."""
    if processor.chat_template is None:
        return answer
    turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    whole = processor.apply_chat_template([*_messages(question), turn], tokenize=False)
    before, found, _ = whole.removeprefix(prompt).partition(answer)
    return before + answer if found and not before.strip() else answer


def _added_tokens(processor: ZooProcessor, prompt: str, whole: str) -> int:
    """How many tokens of the whole text are not those of the prompt, the image being a single one."""
    special = processor.chat_template is None
    short, long = (processor.tokenizer(text, add_special_tokens=special)["input_ids"] for text in (prompt, whole))
    shared = next((at for at, (one, other) in enumerate(zip(short, long, strict=False)) if one != other), len(short))
    return len(long) - shared
