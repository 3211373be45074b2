"""BLIP-2's two stages on the embedded data: what stage 1 learns, and what stage 2 gains from it.

    python examples/blip2_stages.py runs/blip2_stages               # a few minutes on two CPU cores

Stage 1 trains tower and Q-Former on drawings and their names, without a language model, in transformers' `Trainer`;
then it must find the name of each drawing among all names, and the other way around. Stage 2 joins a language model
and trains on questions about drawings, from what stage 1 learned and from random weights, for equally many steps.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import AutoProcessor, Trainer, TrainingArguments

from vlm_zoo import ZOO, build, data
from vlm_zoo.demo.parts import write_parts
from vlm_zoo.demo.recipe import FAST
from vlm_zoo.demo.train import train_stage
from vlm_zoo.evaluation.answering import evaluate_rows, sample_rows
from vlm_zoo.models.blip2_pretraining import ZooBlip2ForPretraining
from vlm_zoo.training import CaptionCollator


def captions(split: str) -> Dataset:
    """Drawings whose caption, the answer, is their name."""
    rows = load_dataset(str(data.path("emoji_tiles")), split=split)
    return rows.filter(lambda task: task == "name", input_columns="task")


@torch.no_grad()
def retrieval(model: ZooBlip2ForPretraining, collator: CaptionCollator, rows: Dataset) -> dict[str, float]:
    """Recall at 1 in both directions, over one drawing of each name."""
    first = {row["answer"]: row for row in reversed(list(rows))}
    batch = collator(list(first.values()))
    similarity = model.eval().get_image_text_similarity(**batch)  # [I, I]
    right = torch.arange(len(similarity))
    return {
        "image_to_text": (similarity.argmax(1) == right).float().mean().item(),
        "text_to_image": (similarity.argmax(0) == right).float().mean().item(),
        "chance": 1 / len(similarity),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--epochs", type=float, default=12, help="of stage 1 (default: %(default)s)")
    parser.add_argument("--stage-2-epochs", type=float, default=2, help="(default: %(default)s)")
    options = parser.parse_args()
    out, small = options.out, ZOO["zoo_blip2"].config.small_fields(FAST.vision["hidden_size"], from_scratch=True)
    vision, language = write_parts(FAST, out / "parts")
    build("blip2", vision, language, out / "built", overwrite=True, vision_feature_layer=-1, **small)

    processor = AutoProcessor.from_pretrained(out / "built")
    collator = CaptionCollator(processor)
    model = ZooBlip2ForPretraining.from_pretrained(out / "built")
    settings = TrainingArguments(
        output_dir=str(out / "stage-1"),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=64,
        learning_rate=1e-3,
        warmup_steps=0.05,
        adam_beta2=0.98,
        weight_decay=0.1,
        logging_steps=75,
        save_strategy="no",
        remove_unused_columns=False,
        dataloader_drop_last=True,
        report_to=[],
    )
    before = retrieval(model, collator, captions("validation"))
    Trainer(model, settings, train_dataset=captions("train"), data_collator=collator).train()
    results = {"retrieval before": before, "retrieval after": retrieval(model, collator, captions("validation"))}
    model.save_pretrained(out / "stage-1")

    head = ZOO["zoo_blip2"].head
    learned = dict.fromkeys(("connector", "vision"), str(out / "stage-1"))
    head.from_pretrained(out / "built", parts_from=learned).save_pretrained(out / "prepared")
    processor.save_pretrained(out / "prepared")
    stage = replace(FAST.stages[0], epochs=options.stage_2_epochs)
    rows = sample_rows(load_dataset(str(data.path("emoji_tiles")), split="validation"), FAST.sample, FAST.seed)
    for start in ("built", "prepared"):
        train_stage(stage, out / start, out / f"stage-2 from {start}", FAST.seed)
        trained = head.from_pretrained(out / f"stage-2 from {start}")
        scores = evaluate_rows(trained.eval(), processor, rows).to_dict()
        results[f"stage 2 from {start}"] = {name: scores[name] for name in ("accuracy", "blind_accuracy")}
    sys.stdout.write(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
