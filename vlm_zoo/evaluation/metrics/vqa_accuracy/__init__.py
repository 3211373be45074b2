"""The `vqa_accuracy` metric; its class is in `vqa_accuracy.py`, the file that `evaluate.load` reads."""
