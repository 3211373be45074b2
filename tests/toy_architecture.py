"""A toy architecture, as small as the frame allows: an image is one placeholder, and every later token of the row gets
the image's summary added to its embedding. Decode steps need that summary, so it travels as the carry."""

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import GenerationMixin
from transformers.utils.generic import can_return_tuple

from vlm_zoo.models.configuration_vlm import ZooConfig, publish
from vlm_zoo.models.modeling_vlm import ZooForConditionalGeneration, ZooModel
from vlm_zoo.models.processing_vlm import ZooProcessor


@strict
class ZooToyConfig(ZooConfig):
    model_type = "zoo_toy"


class ZooToyModel(ZooModel):
    config: ZooToyConfig

    def build_connector(self, config):
        self.connector = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)

    @can_return_tuple
    def get_image_features(self, pixel_values, **kwargs):
        outputs, patches = self.see(pixel_values, **kwargs)
        outputs.pooler_output = list(self.connector(patches))
        return outputs

    places_features = False  # one placeholder stands for all features of an image

    def placeholders_of(self, features, vision_inputs):
        return [1] * len(features)

    def fuse(self, inputs_embeds, features, context):
        if features is None:
            return {"inputs_embeds": inputs_embeds + (0 if context.carry is None else context.carry)}, context.carry
        mask = self.placeholder_mask(context.input_ids, inputs_embeds)
        self.check_placeholders(mask, [1] * len(features))
        summaries = torch.stack([feature.mean(0) for feature in features])  # [I, Dt]
        summaries = torch.cat([summaries.new_zeros(1, summaries.shape[1]), summaries])
        seen = mask.cumsum(1)  # images of the row so far
        first = torch.cat([seen.new_zeros(1), mask.sum(1).cumsum(0)[:-1]])  # images of the rows before
        index = torch.where(seen > 0, first[:, None] + seen, 0)
        added = summaries[index].to(inputs_embeds.dtype)  # [B, T, Dt]
        return {"inputs_embeds": inputs_embeds + added}, added[:, -1:]


class ZooToyForConditionalGeneration(ZooForConditionalGeneration, GenerationMixin):
    config: ZooToyConfig
    base_model_class = ZooToyModel


class ZooToyProcessor(ZooProcessor):
    @classmethod
    def fields_from(cls, config):
        return {}

    def num_image_tokens(self, height, width, **images_kwargs):
        return 1


publish(ZooToyConfig)
