"""Joins a tower and a language model in Python, and trains chosen parts with TRL.

    python examples/parts_from_scratch.py openai/clip-vit-large-patch14-336 Qwen/Qwen3-0.6B runs/mine

The two stages of the field: the connector alone (alignment), then connector and language model (instruction tuning).
"""

import argparse

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

import vlm_zoo
from vlm_zoo import data
from vlm_zoo.training import ZooDataCollator, stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vision", help="folder or Hub id of the tower")
    parser.add_argument("language", help="folder or Hub id of the language model")
    parser.add_argument("out", help="folder to write")
    options = parser.parse_args()
    vlm_zoo.build("llava", options.vision, options.language, f"{options.out}/built")
    model = f"{options.out}/built"
    for name, dataset in (("alignment", "emoji_tiles"), ("instruction", "emoji_pages")):
        settings = SFTConfig(output_dir=f"{options.out}/{name}", report_to=[], **stage(name))
        rows = load_dataset(str(data.path(dataset)), split="train")
        trainer = SFTTrainer(model=model, args=settings, train_dataset=rows)
        trainer.data_collator = ZooDataCollator(trainer.processing_class)
        trainer.train()
        trainer.save_model()
        model = settings.output_dir


if __name__ == "__main__":
    main()
