"""TRL's SFT trainer, without the work that nobody asked for on machines that have no GPU."""

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
        plain = self.args.loss_type == "nll" and not self.aux_loss_enabled
        plain = plain and self.label_smoother is None and self.compute_loss_func is None
        if self.accelerator.device.type == "cuda" or not plain:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
