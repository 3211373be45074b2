"""Images with captions, for the first stage of BLIP-2."""

from dataclasses import dataclass
from typing import Any

from transformers import BatchFeature, ProcessorMixin


@dataclass
class CaptionCollator:
    """
    Images and their captions to a batch, without a chat template and without image tokens.

    A row has one image (`images`, or `image`) and a caption: a column `caption` or `text`, or `messages`, of which the
    assistant's answer is the caption.

    Args:
        processor: of a model of the zoo. Captions are read by its `qformer_tokenizer` where it has one.
        max_length: tokens that are kept of a caption, its end among them.

    Example:
    ```python
    >>> settings = TrainingArguments("stage-1", remove_unused_columns=False, dataloader_drop_last=True)
    >>> Trainer(model, settings, train_dataset=rows, data_collator=CaptionCollator(processor)).train()
    ```
    """

    processor: ProcessorMixin
    max_length: int = 32

    def __post_init__(self):
        if self.max_length < 2:
            raise ValueError(f"max_length must leave room for a word and the end of a caption, got {self.max_length}.")

    def __call__(self, rows: list[dict[str, Any]]) -> BatchFeature:
        """
        Returns:
            `pixel_values` (`float[B, C, H, W]`), `input_ids` and `attention_mask` (`int[B, L]`, padded at the right).

        Raises:
            ValueError: for an empty batch, or a row without exactly one image and a caption.
        """
        if not rows:
            raise ValueError("Cannot collate an empty batch: the dataset or the sampler gave no example.")
        tokenizer = self.processor.caption_tokenizer
        end = tokenizer.sep_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        captions = [self.caption_of(row) for row in rows]
        ids = tokenizer(captions, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        ends = [] if end is None else [end]
        ids = [row[: self.max_length - len(ends)] + ends for row in ids]
        texts = tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt")
        images = self.processor.image_processor([self.image_of(row) for row in rows], return_tensors="pt")
        return BatchFeature(
            {
                "pixel_values": images["pixel_values"],
                "input_ids": texts["input_ids"],
                "attention_mask": texts["attention_mask"],
            }
        )

    def image_of(self, row: dict[str, Any]) -> Any:
        """The one image of a row."""
        images = row["images"] if "images" in row else [row["image"]] if "image" in row else []
        if len(images) != 1:
            raise ValueError(f"A caption belongs to one image, this row has {len(images)}: {sorted(row)}.")
        return images[0]

    def caption_of(self, row: dict[str, Any]) -> str:
        """The caption of a row."""
        for column in ("caption", "text"):
            if isinstance(row.get(column), str):
                return row[column]
        answers = [message["content"] for message in row.get("messages") or [] if message["role"] == "assistant"]
        if len(answers) != 1:
            raise ValueError(
                f"A row has the columns {sorted(row)} and {len(answers)} answers; expected a column 'caption' or "
                "'text', or messages with one answer."
            )
        if isinstance(answers[0], str):
            return answers[0]
        return "".join(part.get("text") or "" for part in answers[0])
