"""TRL's SFT trainer, without the work that nobody asked for on machines that have no GPU."""

import torch
from transformers import Trainer
from trl import SFTTrainer


class LeanSFTTrainer(SFTTrainer):
    """
    `trl.SFTTrainer` whose loss is the model's own where there is no CUDA.

    There TRL scores every position of the batch for its token metrics; a model of the zoo projects the supervised
    positions alone. The loss is the same; `entropy` and `mean_token_accuracy` are not logged. With CUDA this is
    `trl.SFTTrainer`.
    """

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if torch.cuda.is_available():
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
