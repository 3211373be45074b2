"""Training: which parts train, what carries a label, and the stages of the field; the trainers are TRL's."""

from .collator import ZooDataCollator
from .parts import freeze, lora_targets, trainable_parts
from .stages import STAGES, stage
from .trainer import LeanSFTTrainer


__all__ = ["STAGES", "LeanSFTTrainer", "ZooDataCollator", "freeze", "lora_targets", "stage", "trainable_parts"]
