"""A process of its own that opens a saved folder and answers questions: `python -m vlm_zoo.demo.reload REQUEST
RESULT`.

Every score in the demo's report comes from here, so from the checkpoint and not from the trainer's memory.
"""

import json
import sys
from functools import partial
from pathlib import Path

from datasets import load_dataset
from transformers import AutoProcessor

from .. import AutoModelForVision2Seq, data
from ..evaluation.answering import evaluate_rows, sample_rows


def main(request: str, result_file: str) -> None:
    """Writes the scores of each split that `{"model", "dataset", "splits", "sample", "seed"}`, as JSON, asks for."""
    request = json.loads(request)
    model = AutoModelForVision2Seq.from_pretrained(request["model"])
    processor = AutoProcessor.from_pretrained(request["model"])
    folder = str(data.path(request["dataset"]))
    result = {}
    for split in request["splits"]:
        rows = sample_rows(load_dataset(folder, split=split), request["sample"], request["seed"])

        show = partial(_show, split, len(rows))
        result[split] = evaluate_rows(model, processor, rows, seed=request["seed"], batch_size=100, progress=show)
        sys.stderr.write("\n")
    whole = Path(f"{result_file}.unfinished")
    whole.write_text(json.dumps({split: scores.to_dict() for split, scores in result.items()}), encoding="utf-8")
    whole.rename(result_file)


def _show(split: str, total: int, done: int) -> None:
    sys.stderr.write(f"\r{split}: {done} of {total} answered")
    sys.stderr.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
