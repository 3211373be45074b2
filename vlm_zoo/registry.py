"""The registry: every architecture of the zoo, entered with the Auto classes of transformers.

A new architecture is one more module in `ARCHITECTURES`.
"""

from dataclasses import dataclass
from types import ModuleType

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForPreTraining,
    AutoProcessor,
)

from .models import arr_coc, blip2, flamingo, llava, mrope, vet
from .models.blip2_pretraining import ZooBlip2ForPretraining
from .models.configuration_vlm import ZooConfig
from .models.image_processing_vlm import ZooImageProcessor
from .models.modeling_vlm import ZooForConditionalGeneration, ZooModel
from .models.processing_vlm import ZooProcessor


ARCHITECTURES = (llava, blip2, flamingo, mrope, vet, arr_coc)


@dataclass(frozen=True)
class ZooEntry:
    """The classes of one architecture."""

    name: str
    config: type[ZooConfig]
    model: type[ZooModel]
    head: type[ZooForConditionalGeneration]
    processor: type[ZooProcessor]
    image_processor: type[ZooImageProcessor]


class AutoModelForVision2Seq(AutoModelForImageTextToText):
    """
    Opens every model of the zoo and every image-text-to-text model of transformers, which removed its own class of
    this name in version 5. Remote code is opened through `AutoModelForImageTextToText`, the door transformers knows.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        return AutoModelForImageTextToText.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    @classmethod
    def from_config(cls, config, **kwargs):
        return AutoModelForImageTextToText.from_config(config, **kwargs)


def _entry(module: ModuleType) -> ZooEntry:
    """Reads an architecture's classes from its file, by the naming rule `Zoo<Name>…`."""
    config = next(
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, ZooConfig) and value.__module__ == module.__name__
    )
    stem = config.__name__.removesuffix("Config")
    return ZooEntry(
        name=config.model_type.removeprefix("zoo_"),
        config=config,
        model=getattr(module, f"{stem}Model"),
        head=getattr(module, f"{stem}ForConditionalGeneration"),
        processor=getattr(module, f"{stem}Processor"),
        image_processor=getattr(module, f"{stem}ImageProcessor", ZooImageProcessor),
    )


def _register(entry: ZooEntry) -> None:
    AutoConfig.register(entry.config.model_type, entry.config)
    AutoModel.register(entry.config, entry.model)
    AutoModelForImageTextToText.register(entry.config, entry.head)
    AutoModelForMultimodalLM.register(entry.config, entry.head)
    AutoProcessor.register(entry.config, entry.processor)
    AutoImageProcessor.register(
        entry.config,
        image_processor_classes={"pil": entry.image_processor, "torchvision": entry.image_processor},
    )


ZOO: dict[str, ZooEntry] = {entry.config.model_type: entry for entry in map(_entry, ARCHITECTURES)}
for _zoo_entry in ZOO.values():
    _register(_zoo_entry)
AutoModelForPreTraining.register(ZooBlip2ForPretraining.config_class, ZooBlip2ForPretraining)
