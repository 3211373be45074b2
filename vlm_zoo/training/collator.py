"""What carries a label: the answer, never a placeholder."""

from dataclasses import dataclass, replace
from typing import Any

from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling


@dataclass
class ZooDataCollator(DataCollatorForVisionLanguageModeling):
    """
    TRL's collator for images and text, in which neither padding nor placeholders carry a label.

    TRL leaves the placeholders of `messages` in the labels. Counted, the reported loss falls as an architecture spends
    more visual tokens while the loss of its answers rises, and losses of two architectures cannot be compared.

    Args are those of TRL's collator; `assistant_only_loss` is on by default here, as in every stage of the zoo, and
    `completion_only_loss` is on for rows with a completion unless it is given.

    Example:
    ```python
    >>> collator = ZooDataCollator(processor)
    >>> batch = collator([{"images": [image], "messages": [
    ...     {"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "A cat."}]}])
    >>> batch["input_ids"]  # <image> <image> … What is this? A cat. </s>
    >>> batch["labels"]     #  -100    -100   …  -100 -100     A cat. </s>
    ```
    """

    assistant_only_loss: bool = True
    completion_only_loss: bool | None = None

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        if not examples:
            raise ValueError("Cannot collate an empty batch: the dataset or the sampler gave no example.")
        if any(example.keys() != examples[0].keys() for example in examples):
            raise ValueError(
                f"Rows of one batch differ in their columns: {[sorted(example) for example in examples]}."
            )
        # Plain text has no assistant to single out; prompt and completion have the completion.
        completion_only = (
            "completion" in examples[0] if self.completion_only_loss is None else self.completion_only_loss
        )
        settings = replace(
            self,
            assistant_only_loss=self.assistant_only_loss and "messages" in examples[0],
            completion_only_loss=completion_only,
        )
        batch = DataCollatorForVisionLanguageModeling.torch_call(settings, examples)
        batch["labels"] = batch["labels"].masked_fill(batch["input_ids"] == self.processor.image_token_id, -100)
        return batch
