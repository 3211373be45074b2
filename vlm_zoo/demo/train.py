"""One stage of the demo: TRL's trainer on the embedded data, resumed where a run before it stopped.

It runs in a process of its own: `python -m vlm_zoo.demo.train REQUEST`.
"""

import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import load_dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig

from .. import data
from ..saving import writing_folder
from ..training import LeanSFTTrainer, ZooDataCollator
from .recipe import Stage


LOG = "training_log.json"
CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
license: cc-by-4.0
---
# vlm-zoo demo, stage {name}

A small vision-language model, trained from scratch on the `{dataset}` data of vlm-zoo: compositions of emoji
drawings (Noto, EmojiTwo; names from the Unicode CLDR) under CC BY 4.0. It knows these drawings at {image_size} px and
nothing else.

Trained parts: {parts}.
{epochs} epochs, batch {batch_size}, learning rate {learning_rate}. Scores beside a blind baseline stand in the
`report.html` of its run.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("FOLDER", trust_remote_code=True)  # or: import vlm_zoo, no trust
processor = AutoProcessor.from_pretrained("FOLDER", trust_remote_code=True)
```
"""

# What trainings of small models from scratch have in common.
FROM_SCRATCH = {
    "warmup_steps": 0.05,
    "weight_decay": 0.1,
    "adam_beta2": 0.98,
    "assistant_only_loss": True,
    "max_length": None,
    "gradient_checkpointing": False,
    "bf16": False,
    "report_to": [],
}


@dataclass
class AugmentingCollator(ZooDataCollator):
    """The zoo's collator over images that are moved by a few pixels and whose channels are scaled, both at random."""

    shift: int = 0
    colour: float = 0.0
    seed: int = 0

    def __post_init__(self):
        self.randomness = np.random.default_rng(self.seed)

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        if self.shift or self.colour:
            examples = [{**row, "images": [self.augment(image) for image in row["images"]]} for row in examples]
        return super().torch_call(examples)

    def augment(self, image: Image.Image) -> Image.Image:
        """One image, moved with its border repeated, each channel with its own gain and offset."""
        pixels = np.asarray(image.convert("RGB"))
        height, width = pixels.shape[:2]
        down, right = self.randomness.integers(-self.shift, self.shift + 1, 2)
        pixels = pixels[(np.arange(height) + down).clip(0, height - 1)]
        pixels = pixels[:, (np.arange(width) + right).clip(0, width - 1)]
        gain = 1 + self.colour * self.randomness.uniform(-1, 1, 3)
        offset = 255 * self.colour / 2 * self.randomness.uniform(-1, 1, 3)
        pixels = ((pixels - 128.0) * gain + 128 + offset).clip(0, 255)
        return Image.fromarray(pixels.astype(np.uint8))


def train_stage(stage: Stage, source: Path, target: Path, seed: int) -> None:
    """
    Trains the model in `source` and saves it, whole and with the trainer's log, to `target`.

    A stage that died goes on from its last checkpoint.
    """
    working = target.with_name(f"{target.name}.working")
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_pretrained(source, trainable_parts=list(stage.train))
    processor = AutoProcessor.from_pretrained(source)
    rows = load_dataset(str(data.path(stage.dataset)), split="train")
    steps = max(1, round(stage.epochs * len(rows) / stage.batch_size))
    settings = SFTConfig(
        output_dir=str(working),
        max_steps=steps,
        per_device_train_batch_size=stage.batch_size,
        learning_rate=stage.learning_rate,
        lr_scheduler_type="linear",
        use_cpu=not torch.cuda.is_available(),
        seed=seed,
        **FROM_SCRATCH,
        logging_steps=max(1, steps // 50),
        save_steps=max(1, steps // 4),
        save_total_limit=1,
        dataloader_pin_memory=torch.cuda.is_available(),
        dataloader_num_workers=1,  # rows are read and tokenised while the model computes
        dataloader_persistent_workers=True,
        dataloader_prefetch_factor=8,
    )
    collator = AugmentingCollator(processor, shift=stage.shift, colour=stage.colour, seed=seed)
    trainer = LeanSFTTrainer(
        model=model, args=settings, train_dataset=rows, processing_class=processor, data_collator=collator
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(working)) if working.exists() else None)
    log = [
        {"step": entry["step"], "loss": float(entry["loss"])} for entry in trainer.state.log_history if "loss" in entry
    ]
    with writing_folder(target) as path:
        trainer.model.save_pretrained(path)
        processor.save_pretrained(path)
        (path / LOG).write_text(json.dumps(log), encoding="utf-8")
        (path / "README.md").write_text(CARD.format(**asdict(stage), parts=", ".join(stage.train)), encoding="utf-8")
    shutil.rmtree(working)


def main(request: str) -> None:
    """Trains what `{"stage", "source", "target", "seed"}`, as JSON, asks for."""
    request = json.loads(request)
    train_stage(Stage(**request["stage"]), Path(request["source"]), Path(request["target"]), request["seed"])


if __name__ == "__main__":
    main(*sys.argv[1:])
