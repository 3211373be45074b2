"""M-RoPE: images keep their own size, and every visual token a place in time, height and width.

Papers: Qwen2-VL (huggingface.co/papers/2409.12191), Qwen2.5-VL (huggingface.co/papers/2502.13923), Qwen3-VL
(huggingface.co/papers/2511.21631), DeepStack (huggingface.co/papers/2406.04334).

Paper map:
    Qwen2-VL 2.1, naive dynamic resolution    `native_vlm`; the image processor's `merge_size`; `PatchMerger`
    Qwen2-VL 2.1, M-RoPE                      `MultiAxisRope` with `mrope_layout="chunked"`; `multi_axis_positions`
    Qwen2.5-VL 2.1.2, absolute time           `video_time="seconds"`
    Qwen3-VL 2, interleaved M-RoPE            `mrope_layout="interleaved"` (the default)
    Qwen3-VL 2, DeepStack                     `deepstack_layers`; `DeepStackFeatures`
    Qwen3-VL 2, text timestamps               `video_time="timestamps"` (the default)

Deviations: towers and language models are any, not Qwen's. Images and clips share one placeholder and one batch key:
a clip is an image with several frames. The time ids of `video_time="seconds"` come from the processor, which knows the
clip, as `image_position_ids`. DeepStack's features travel beside the tokens' own, in the channels after them.
"""

from huggingface_hub.dataclasses import strict
from transformers import GenerationMixin

from .configuration_vlm import publish
from .multi_axis_vlm import (
    MultiAxisConfig,
    MultiAxisForConditionalGeneration,
    MultiAxisModel,
    MultiAxisProcessor,
)


@strict
class ZooMropeConfig(MultiAxisConfig):
    """Configuration of M-RoPE; its fields are those of `MultiAxisConfig`."""

    model_type = "zoo_mrope"


class ZooMropeModel(MultiAxisModel):
    """Vision tower, mergers, language model with positions on three axes."""

    config: ZooMropeConfig


class ZooMropeForConditionalGeneration(MultiAxisForConditionalGeneration, GenerationMixin):
    """M-RoPE with the language model's head."""

    config: ZooMropeConfig
    base_model_class = ZooMropeModel


class ZooMropeProcessor(MultiAxisProcessor):
    """Images, clips and text to a batch for M-RoPE; its fields are those of `MultiAxisProcessor`."""


publish(ZooMropeConfig)
