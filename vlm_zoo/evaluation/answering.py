"""Questions about images answered in batches, and scored beside a blind model."""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedModel, ProcessorMixin

from . import metrics


@dataclass(frozen=True)
class Answered:
    """One row of a data set with its answer, with the image and with another row's."""

    id: str
    task: str
    question: str
    reference: str
    answer: str
    blind_answer: str


@dataclass(frozen=True)
class Scores:
    """
    Exact match over a sample, with the images in place and permuted among the rows.

    accuracy, blind_accuracy: over all rows, between 0 and 1. tasks: the same, and the number of rows, for each task.
    """

    rows: int
    accuracy: float
    blind_accuracy: float
    tasks: dict[str, dict[str, float]]
    answers: list[Answered]

    def to_dict(self) -> dict:
        return asdict(self)


def prompt_of(row: dict) -> list[dict]:
    """The messages of a row up to its answer, the images at the head of the first user message; a list in place of an
    image holds the frames of a clip."""
    messages = [dict(message) for message in row["messages"]]
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    first = next((index for index, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise ValueError(f"Row {row.get('id')} asks nothing: no message before the answer has the role 'user'.")
    content = messages[first]["content"]
    content = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    kinds = ["video" if isinstance(image, list | tuple) else "image" for image in row["images"]]
    images = [{"type": kind, kind: image} for kind, image in zip(kinds, row["images"], strict=True)]
    messages[first]["content"] = images + [item for item in content if item["type"] != "image"]
    return messages


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: Sequence[dict],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """
    Answers the question of each row, greedily.

    Args:
        rows: dictionaries with `images` and `messages`, as TRL's data sets have them.
        progress: called with the number of rows answered after each batch.

    Returns:
        One text a row, without special tokens and outer white space.
    """
    model.eval()
    answers: list[str] = []
    for start in range(0, len(rows), batch_size):
        batch = processor.apply_chat_template(
            [prompt_of(row) for row in rows[start : start + batch_size]],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left", "add_special_tokens": False},
        ).to(model.device)
        sequences = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
        texts = processor.batch_decode(sequences[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        answers += [text.strip() for text in texts]
        if progress is not None:
            progress(len(answers))
    return answers


def sample_rows(dataset, size: int, seed: int = 0) -> list[dict]:
    """The same rows for the same seed, whatever came before; all of them where there are fewer than `size`."""
    indices = list(range(len(dataset)))
    random.Random(seed).shuffle(indices)
    return [dataset[index] for index in sorted(indices[:size])]


def permuted_images(rows: Sequence[dict], seed: int = 0) -> list[dict]:
    """The rows with their images handed round: every row keeps its question and sees another row's images."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    images = {row: rows[order[position - 1]]["images"] for position, row in enumerate(order)}
    return [{**row, "images": images[index]} for index, row in enumerate(rows)]


def evaluate_rows(
    model: PreTrainedModel, processor: ProcessorMixin, rows: Sequence[dict], *, seed: int = 0, **options
) -> Scores:
    """
    Exact match, overall and for each task, beside the blind baseline (images permuted among the rows).

    Args:
        rows: with `images`, `messages`, `answer`, and `task` where there are several.
        options: of `answer`.
    """
    if len(rows) < 2:
        raise ValueError(f"Got {len(rows)} row(s): with fewer than 2 there is no other image for the blind baseline.")
    seen = answer(model, processor, rows, **options)
    blind = answer(model, processor, permuted_images(rows, seed), **options)
    answered = [
        Answered(str(row.get("id", index)), row.get("task") or "all", prompt_text(row), row["answer"], text, other)
        for index, (row, text, other) in enumerate(zip(rows, seen, blind, strict=True))
    ]
    groups: dict[str, list[Answered]] = defaultdict(list)
    for item in answered:
        groups[item.task].append(item)
    metric = metrics.load("exact_match")

    def score(items: list[Answered], field: str) -> float:
        predictions = [getattr(item, field) for item in items]
        return metric.compute(predictions=predictions, references=[item.reference for item in items])["exact_match"]

    def both(items: list[Answered]) -> dict[str, float]:
        return {"accuracy": score(items, "answer"), "blind_accuracy": score(items, "blind_answer")}

    tasks = {task: {"rows": len(items), **both(items)} for task, items in sorted(groups.items())}
    return Scores(rows=len(rows), **both(answered), tasks=tasks, answers=answered)


def prompt_text(row: dict) -> str:
    """The question of a row as plain text."""
    content = prompt_of(row)[-1]["content"]
    if isinstance(content, str):
        return content
    return " ".join(item["text"] for item in content if item["type"] == "text")
