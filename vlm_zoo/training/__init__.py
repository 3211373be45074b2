"""Training: which parts train, what carries a label, and the stages of the field; the trainers are TRL's."""

from .captions import CaptionCollator
from .collator import ZooDataCollator
from .parts import freeze, lora_targets, trainable_parts
from .stages import STAGES, stage
from .trainer import LeanSFTTrainer


__all__ = [
    "STAGES",
    "CaptionCollator",
    "LeanSFTTrainer",
    "ZooDataCollator",
    "freeze",
    "lora_targets",
    "stage",
    "trainable_parts",
]
