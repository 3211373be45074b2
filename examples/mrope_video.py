"""M-RoPE on clips: which way does it move, and what moves?

    python examples/mrope_video.py runs/mrope_video                 # about fifteen minutes on two CPU cores

A small tower of Qwen3-VL's kind, whose patches span two frames, and the demo's language model learn the drawings on
tiles. Then every row is one clip of six frames, in three time steps: with text timestamps (`--video-time timestamps`,
as Qwen3-VL), with time ids in seconds (`seconds`, as Qwen2.5-VL), or counted (`index`, as Qwen2-VL). The answers are
scored beside a blind baseline, which sees another row's clip, and beside the same clips with their frames shuffled, in
which no direction is left.
"""

import argparse
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    SiglipImageProcessorPil,
)
from trl import SFTConfig

from vlm_zoo import ZOO, build, data
from vlm_zoo.demo.parts import write_parts
from vlm_zoo.demo.recipe import FAST
from vlm_zoo.demo.train import FROM_SCRATCH, train_stage
from vlm_zoo.evaluation.answering import evaluate_rows
from vlm_zoo.training import LeanSFTTrainer, ZooDataCollator


TOWER = {
    "model_type": "qwen3_vl_vision",
    "hidden_size": 128,
    "intermediate_size": 512,
    "depth": 1,
    "num_heads": 4,
    "patch_size": 16,
    "temporal_patch_size": 2,
    "spatial_merge_size": 1,
    "num_position_embeddings": 9,
    "deepstack_visual_indexes": [],
    "initializer_range": 0.12,
}


def write_tower(folder: Path) -> Path:
    """Writes an untrained tower, with how its pixels are normalised."""
    torch.manual_seed(FAST.seed)
    AutoModel.from_config(AutoConfig.for_model(**TOWER)).save_pretrained(folder)
    SiglipImageProcessorPil().save_pretrained(folder)
    return folder


class ClipCollator(ZooDataCollator):
    """The zoo's collator over rows whose images are the frames of one clip."""

    def torch_call(self, examples):
        return super().torch_call(list(map(as_clip, examples)))


def as_clip(row: dict) -> dict:
    """A row with one clip in place of several images: a list of frames."""
    return {**row, "images": [row["images"]]}


def clips(split: str) -> Dataset:
    """Rows of six frames each."""
    return load_dataset(str(data.path("emoji_video")), split=split)


def shuffled(rows: list[dict]) -> list[dict]:
    """The same clips without the order of their frames."""
    order = random.Random(0)
    return [{**row, "images": [order.sample(frames, len(frames)) for frames in row["images"]]} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--epochs", type=float, default=24, help="over the clips (default: %(default)s)")
    parser.add_argument("--video-time", choices=("timestamps", "seconds", "index"), default="timestamps")
    options = parser.parse_args()
    out, stage = options.out, replace(FAST.stages[0], epochs=6)
    small = ZOO["zoo_mrope"].config.small_fields(FAST.vision["hidden_size"], from_scratch=True)
    _, language = write_parts(FAST, out / "parts")
    vision = write_tower(out / "parts" / "tower")
    build("mrope", vision, language, out / "built", overwrite=True, video_time=options.video_time, **small)
    drawings = out / f"drawings with {options.video_time}"
    if not drawings.exists():
        train_stage(stage, out / "built", drawings, FAST.seed)

    processor = AutoProcessor.from_pretrained(drawings)
    settings = SFTConfig(
        output_dir=str(out / "clips"),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=stage.batch_size,
        learning_rate=stage.learning_rate,
        save_strategy="no",
        logging_steps=25,
        seed=FAST.seed,
        **FROM_SCRATCH,
    )
    trainer = LeanSFTTrainer(
        model=AutoModelForImageTextToText.from_pretrained(drawings),
        args=settings,
        train_dataset=clips("train"),
        processing_class=processor,
        data_collator=ClipCollator(processor),
    )
    trainer.train()
    trainer.save_model(str(out / "clips"))

    rows = list(map(as_clip, clips("validation")))
    results = {}
    for name, asked in (("in order", rows), ("shuffled", shuffled(rows))):
        results[name] = evaluate_rows(trainer.model.eval(), processor, asked).to_dict()["tasks"]
    sys.stdout.write(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
