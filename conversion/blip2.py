"""BLIP-2 and InstructBLIP checkpoints to the zoo and back.

    python -m conversion.blip2 SRC DST                to the zoo, verified; DST/parity.json holds the proof
    python -m conversion.blip2 SRC --dry-run          show which tensor becomes which
    python -m conversion.blip2 SRC DST --verify       prove a conversion that exists already
    python -m conversion.blip2 DST BACK --reverse     back to the source's files, bit for bit

SRC is a folder or a hub id in one of these formats:

    transformers    Blip2ForConditionalGeneration and InstructBlipForConditionalGeneration of version 4 or 5
    LAVIS           what a training saved, as a file or in its folder; vision tower and language model beside it, or
                    named by --vision-tower and --language-model; `conversion.lavis_pretraining` reads what the
                    first stage saved, which has no language model

Where a format and the zoo differ, the config says so and the numbers stay the source's:

    The norm behind the tower is the connector's, with an epsilon of its own.
    LAVIS has no image token: one is added behind the vocabulary, with the mean embedding where the model has no row.
    An encoder-decoder (FLAN-T5) is refused: trainers need one hidden state for every token of input_ids.

Both formats put an image's tokens before everything else, even before the token that opens a text. The zoo takes them
anywhere; the upstream's order is `<image>`, then that token, then the text, with `add_special_tokens=False`
(`ZooPrompts` writes it).
"""

import copy
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    BatchFeature,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessorPil,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    PreTrainedConfig,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlm_zoo.chat_templates import plain_template, response_tokens
from vlm_zoo.models.blip2 import (
    Blip2Connector,
    ZooBlip2Config,
    ZooBlip2ForConditionalGeneration,
    ZooBlip2Processor,
)
from vlm_zoo.models.image_processing_vlm import ZooImageProcessor
from vlm_zoo.models.layers import compact

from . import engine, flow, lavis, parity
from .edits import AddKeyBias, Edit, FillRows
from .engine import ConversionError, Table, Target
from .flow import Source


# model_type: config, model, processor
FORMATS = {
    "blip-2": (Blip2Config, Blip2ForConditionalGeneration, Blip2Processor),
    "instructblip": (InstructBlipConfig, InstructBlipForConditionalGeneration, InstructBlipProcessor),
}
QFORMER_TOKENIZER = "qformer_tokenizer"

# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------

FROM_TRANSFORMERS: Table = (
    (r"^vision_model\.post_layernorm\.(.+)$", r"model.connector.vision_norm.\1"),
    (r"^vision_model\.(.+)$", r"model.vision_tower.\1"),
    (r"^query_tokens$", "model.connector.query_tokens"),
    (r"^language_projection\.(.+)$", r"model.connector.projection.\1"),
    *lavis.QFORMER,
)
# Buffers that old files carry: computed at construction, read by no model.
IGNORED = (r"\.rotary_emb\.inv_freq$", r"\.position_ids$")


def language_table(text_config: PreTrainedConfig, marker: str) -> Table:
    """The renames of a language model whose names follow `marker`, a pattern."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text_config)
    output = model.get_output_embeddings()
    head = next(name for name, module in model.named_modules() if module is output)
    return (
        (rf"^{marker}{head}\.(weight|bias)$", r"lm_head.\1"),
        (rf"^{marker}{model.base_model_prefix}\.(.+)$", r"model.language_model.\1"),
    )


def transformers_table(config: ZooBlip2Config) -> Table:
    """The renames of a model of transformers with this language model."""
    return (*FROM_TRANSFORMERS, *language_table(config.text_config, r"language_model\."))


def lavis_table(config: ZooBlip2Config) -> Table:
    """The renames of a checkpoint of LAVIS with this language model."""
    return (
        *lavis.FROM_LAVIS,
        *lavis.QFORMER,
        *language_table(config.text_config, rf"(?:(?:opt|llm)_model\.|{lavis.LANGUAGE})"),
        (rf"^{lavis.LANGUAGE}(.+)$", r"model.language_model.\1"),  # files of a body without its head
    )


def vocabulary_names(config: ZooBlip2Config) -> list[str]:
    """The zoo's names of the matrices with a row for each token."""
    with torch.device("meta"):
        model = ZooBlip2ForConditionalGeneration(config)
    return [name for pair in model._tied_weights_keys.items() for name in pair]


def zoo_target(config: ZooBlip2Config, text_layers: bool) -> Target:
    """
    What the zoo's model asks for.

    Args:
        config: of the zoo's model.
        text_layers: whether every layer of the source's Q-Former has a feed-forward for text; those that nothing reads
            are `unused`.
    """
    target = flow.zoo_target(ZooBlip2ForConditionalGeneration, config, IGNORED)
    with torch.device("meta"):
        whole = Blip2Connector(config, pretraining=True).state_dict()
    whole = {f"model.connector.{name}": tuple(tensor.shape) for name, tensor in whole.items()}
    for name, shape in whole.items():
        if text_layers and ".text_feed_forward." in name and name not in target.wanted:
            target.unused[name] = shape
    for name in ("weight", "bias"):  # it is the connector's norm
        target.unused.pop(f"model.vision_tower.post_layernorm.{name}")
    return target


# ---------------------------------------------------------------------------------------------------------------------
# Configs
# ---------------------------------------------------------------------------------------------------------------------

# The Q-Former's fields in transformers, and in the zoo behind `qformer_`.
QFORMER_FIELDS = {
    "max_position_embeddings": "max_position_embeddings",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "hidden_act": "hidden_act",
    "hidden_dropout_prob": "hidden_dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "layer_norm_eps": "layer_norm_eps",
    "cross_attention_frequency": "cross_attention_frequency",
}


def zoo_config(source: Blip2Config | InstructBlipConfig) -> ZooBlip2Config:
    """The zoo's config of a model of transformers."""
    lavis.check_decoder(source.text_config)
    if source.image_token_index is None:
        raise ConversionError(
            "The config has no image_token_index, the token that stands for the image: it is older than that token. "
            "Set it, after the token was added to tokenizer and language model."
        )
    qformer, asked = source.qformer_config, {}
    if isinstance(source, InstructBlipConfig):
        asked = {"text_conditioned": True, "qformer_vocab_size": qformer.vocab_size}
    else:
        asked = {"image_text_hidden_size": source.image_text_hidden_size}
    return ZooBlip2Config(
        vision_config=copy.deepcopy(source.vision_config),
        text_config=copy.deepcopy(source.text_config),
        image_token_id=source.image_token_index,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        num_prefix_tokens=1,
        vision_layer_norm=True,
        vision_layer_norm_eps=source.vision_config.layer_norm_eps,
        num_query_tokens=source.num_query_tokens,
        **asked,
        **{f"qformer_{zoo}": getattr(qformer, name) for name, zoo in QFORMER_FIELDS.items()},
        tie_word_embeddings=source.text_config.tie_word_embeddings,
        dtype=source.dtype,
        architectures=["ZooBlip2ForConditionalGeneration"],
    )


def has_text_layers(source: Blip2Config | InstructBlipConfig) -> bool:
    """Whether this Q-Former has feed-forwards for text."""
    return isinstance(source, InstructBlipConfig) or source.qformer_config.use_qformer_text_input


# ---------------------------------------------------------------------------------------------------------------------
# Processors
# ---------------------------------------------------------------------------------------------------------------------


def zoo_processor(source: Blip2Processor | InstructBlipProcessor, config: ZooBlip2Config) -> ZooBlip2Processor:
    """The zoo's processor for a model of this config, with the tokens and pixels of transformers' processor."""
    kind = flow.class_name(source.image_processor)
    if kind != "BlipImageProcessor":
        raise ConversionError(f"The source's image processor is a {kind}, expected a BlipImageProcessor.")
    image_token = str(source.image_token)
    tokenizer = engine.name_image_token(source.tokenizer, image_token)
    flow.check_image_token(tokenizer, image_token, config.image_token_id)
    asked = {}
    if isinstance(source, InstructBlipProcessor):
        asked = {"qformer_tokenizer": source.qformer_tokenizer}
        if len(source.qformer_tokenizer) > config.qformer_vocab_size:
            raise ConversionError(
                f"The Q-Former's tokenizer has {len(source.qformer_tokenizer)} tokens, the Q-Former reads "
                f"{config.qformer_vocab_size}: they belong to different checkpoints."
            )
    return ZooBlip2Processor(
        ZooImageProcessor(**flow.pixel_settings(source.image_processor), do_center_crop=False),
        tokenizer,
        chat_template=plain_template(image_token),
        **ZooBlip2Processor.fields_from(config),
        **asked,
    )


class UpstreamPrompts:
    """
    transformers' processor, which puts image tokens before a text that has none, called as others are: with texts that
    start with their image's token.
    """

    def __init__(self, processor: Blip2Processor | InstructBlipProcessor):
        self.processor, self.image_processor = processor, processor.image_processor

    def __call__(self, images, text, return_tensors="pt") -> BatchFeature:
        text = [sample.removeprefix(str(self.processor.image_token)) for sample in text]
        return self.processor(images=images, text=text, return_tensors=return_tensors)

    def decode(self, ids: list[int]) -> str:
        return self.processor.tokenizer.decode(ids)


class ZooPrompts:
    """
    The zoo's processor, given the same texts in the upstream's order: image, opening token, text. A tokenizer that
    puts a space before a text, but not before what follows a token, is given that space.
    """

    def __init__(self, processor: ZooBlip2Processor):
        self.processor = processor

    def __call__(self, images, text, return_tensors="pt") -> BatchFeature:
        image, start = self.processor.image_token, self.start()
        return self.processor(
            images=images,
            text=[start + sample.removeprefix(image) for sample in text],
            add_special_tokens=False,
            return_tensors=return_tensors,
        )

    def start(self) -> str:
        """What stands before a text."""
        tokenizer = self.processor.tokenizer

        def plain(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        opens = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        start = self.processor.image_token + (tokenizer.bos_token if opens else "")
        return start if plain(f"{start}a") == plain(start) + plain("a") else f"{start} "


# ---------------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------------


def open_source(
    name: str | Path,
    *,
    tokenizer: str | None = None,
    image_processor: str | None = None,
    qformer_tokenizer: str | None = None,
    language_model: str | None = None,
    vision_tower: str | None = None,
    vision_heads: int | None = None,
    qformer_heads: int | None = None,
) -> Source:
    """
    Looks at a checkpoint: finds its format, maps its config, and plans where its tensors go.

    Args:
        name: file, folder or hub id; a folder whose one subfolder is the checkpoint will do.
        tokenizer, image_processor, qformer_tokenizer: folders or hub ids to take instead of the source's own.
        language_model: of a LAVIS checkpoint, folder or hub id; by default `llm` beside it.
        vision_tower: of a LAVIS checkpoint, a file; by default `eva_vit_g.pth` beside it.
        vision_heads, qformer_heads: attention heads of a LAVIS checkpoint, where they are not those of the released.
    """
    path = engine.local_folder(name)
    words = {"tokenizer": tokenizer, "image_processor": image_processor, "qformer_tokenizer": qformer_tokenizer}
    if lavis.is_lavis(path):
        parts = lavis.read_parts(path, language_model, vision_tower)
        return _open_lavis(str(name), parts, words, {"vision_heads": vision_heads, "qformer_heads": qformer_heads})
    folder = engine.checkpoint_folder(path, FORMATS)
    raw_config = engine.read_json(folder / "config.json")
    if raw_config.get("model_type") not in FORMATS:
        raise ConversionError(
            f"{name} is of model type '{raw_config.get('model_type')}'; this script reads {', '.join(FORMATS)} and "
            "LAVIS' saves."
        )
    return _open_transformers(str(name), folder, raw_config, words)


def _open_transformers(name: str, folder: Path, raw_config: dict, words: Mapping[str, str | None]) -> Source:
    config_class, model_class, processor_class = FORMATS[raw_config["model_type"]]
    architecture = (raw_config.get("architectures") or [model_class.__name__])[0]
    if architecture != model_class.__name__:
        raise ConversionError(f"{name} is a {architecture}, expected a {model_class.__name__}.")
    upstream_config = config_class.from_pretrained(folder)
    config = zoo_config(upstream_config)
    tensors = engine.read_checkpoint(folder)
    homes = {part: engine.local_folder(given) if given else folder for part, given in words.items()}
    if not words["qformer_tokenizer"]:
        homes["qformer_tokenizer"] = folder / QFORMER_TOKENIZER
    processor = None
    if _complete(name, homes, config):
        if any(words.values()):
            tokenizers = [homes["tokenizer"], *([homes["qformer_tokenizer"]] if config.text_conditioned else [])]
            processor = flow.read_processor(processor_class, folder, homes["image_processor"], *tokenizers)
        else:
            processor = processor_class.from_pretrained(folder, trust_remote_code=False)
    return _source(
        config,
        processor,
        name=name,
        kind=raw_config["model_type"],
        folder=folder,
        raw_config=raw_config,
        tensors=tensors,
        plan=engine.plan_tensors(
            tensors, transformers_table(config), zoo_target(config, has_text_layers(upstream_config)), name
        ),
        load=lambda: UpstreamBlip2(parity.load_strictly(model_class, folder)),
        implementation=f"transformers' {model_class.__name__}",
    )


def _open_lavis(name: str, parts: lavis.Parts, words: Mapping[str, str | None], heads: Mapping[str, int | None]):
    lavis.check_decoder(parts.text_config)
    kind = parts.text_config.model_type
    homes = {"tokenizer": engine.local_folder(words["tokenizer"]) if words["tokenizer"] else parts.language_folder}
    own = words["qformer_tokenizer"]
    homes["qformer_tokenizer"] = engine.local_folder(own) if own else parts.save.parent / QFORMER_TOKENIZER
    image_token_id, tokenizer = parts.text_config.vocab_size, None
    if engine.has_tokenizer(homes["tokenizer"]):
        tokenizer = lavis.read_tokenizer(homes["tokenizer"], kind)
        image_token_id = tokenizer.convert_tokens_to_ids(lavis.IMAGE_TOKEN)
    config = lavis.zoo_config(parts, image_token_id, **heads)
    processor = None
    if _complete(name, homes, config):
        size = config.vision_config.image_size
        pixels = BlipImageProcessorPil(size={"height": size, "width": size})
        if parts.text_conditioned:
            processor = InstructBlipProcessor(pixels, tokenizer, flow.read_tokenizer(homes["qformer_tokenizer"]))
        else:
            processor = Blip2Processor(pixels, tokenizer)
    target = zoo_target(config, parts.text_conditioned)
    target.ignored = lavis.IGNORED
    tensors, shapes = lavis.join_biases(parts.tensors), lavis.shapes_before(target)
    edits: dict[str, Edit] = dict.fromkeys(shapes, AddKeyBias())
    rows, had = config.text_config.vocab_size, parts.text_config.vocab_size
    if rows > had:
        for key in vocabulary_names(config):
            shapes[key], edits[key] = (had, *target.wanted[key][1:]), FillRows(rows)
    return _source(
        config,
        processor,
        name=name,
        kind="lavis",
        folder=parts.language_folder,
        raw_config=parts.text_config.to_dict(),
        tensors=tensors,
        plan=engine.plan_tensors(tensors, lavis_table(config), target, name, shapes),
        load=lambda: lavis.OriginalBlip2(parts, config),
        implementation="what LAVIS' code computes, on transformers' tower, Q-Former and language model",
        eos_token_id=None if tokenizer is None else lavis.end_of_answer(tokenizer, kind),
        vocab_size=had,
        edits=edits,
        apart=parts.apart(),
    )


def _source(config: ZooBlip2Config, processor, **fields) -> Source:
    """A source with its processors, where there is one, and the config that depends on them."""
    if processor is None:
        return Source(config=config, model_class=ZooBlip2ForConditionalGeneration, **fields)
    processor.num_query_tokens = config.num_query_tokens  # old files leave it to the model
    processor.image_token = AddedToken(str(processor.image_token), special=True)  # of a named token it has the text
    zoo = zoo_processor(processor, config)
    config.response_token_ids = response_tokens(zoo.tokenizer, zoo.chat_template)
    return Source(
        config=config,
        model_class=ZooBlip2ForConditionalGeneration,
        processor=UpstreamPrompts(processor),
        zoo_processor=zoo,
        **fields,
    )


def _complete(name: str, homes: Mapping[str, Path], config: ZooBlip2Config) -> bool:
    """Whether all files of a processor are there; a warning names those that are not."""
    missing = []
    if not engine.has_tokenizer(homes["tokenizer"]):
        missing.append("tokenizer")
    if "image_processor" in homes and not engine.has_image_processor(homes["image_processor"]):
        missing.append("image processor")
    if config.text_conditioned and not engine.has_tokenizer(homes["qformer_tokenizer"]):
        missing.append("qformer tokenizer")
    flow.warn_of_missing(name, missing)
    return not missing


# ---------------------------------------------------------------------------------------------------------------------
# In memory
# ---------------------------------------------------------------------------------------------------------------------


def zoo_from_transformers(
    model: Blip2ForConditionalGeneration | InstructBlipForConditionalGeneration,
) -> ZooBlip2ForConditionalGeneration:
    """
    The zoo's model with the weights of a model of transformers, in memory: same dtype, device, mode and attention.

    The weights are copies; the two models share nothing. A Q-Former that transformers keeps in float32 takes the dtype
    of the rest.

    Raises:
        ConversionError: the language model is an encoder-decoder.
    """
    config = zoo_config(model.config)
    target = zoo_target(config, has_text_layers(model.config))
    table = transformers_table(config)
    return flow.in_memory(model, ZooBlip2ForConditionalGeneration, config, table, target=target)


# ---------------------------------------------------------------------------------------------------------------------
# Proof
# ---------------------------------------------------------------------------------------------------------------------

PROMPT = "Question: what is shown here? Answer:"


class UpstreamBlip2(nn.Module):
    """transformers' BLIP-2 or InstructBLIP with the outputs that a proof compares."""

    def __init__(self, upstream: Blip2ForConditionalGeneration | InstructBlipForConditionalGeneration):
        super().__init__()
        self.upstream, self.generation_config = upstream, upstream.generation_config
        self.model = nn.Module()
        self.model.vision_tower = upstream.vision_model

    def get_image_features(self, **kwargs) -> BaseModelOutputWithPooling:
        return self.upstream.get_image_features(**kwargs, output_hidden_states=True)

    def forward(self, **kwargs):
        return self.upstream(**kwargs).language_model_outputs

    def generate(self, **kwargs) -> torch.Tensor:
        return self.upstream.generate(**kwargs, generation_config=self.generation_config)


class ZooStages(nn.Module):
    """The zoo's model, whose image features are those after the Q-Former, whoever reads the question."""

    def __init__(self, zoo: ZooBlip2ForConditionalGeneration):
        super().__init__()
        self.zoo, self.model, self.generation_config = zoo, zoo.model, zoo.generation_config

    def get_image_features(
        self, pixel_values, qformer_input_ids=None, qformer_attention_mask=None, **kwargs
    ) -> BaseModelOutputWithPooling:
        connector = self.model.connector
        features = self.model.see(pixel_values)[1]
        question = () if qformer_input_ids is None else compact(qformer_input_ids, qformer_attention_mask)
        return BaseModelOutputWithPooling(pooler_output=list(connector(features, *question)))

    def forward(self, **kwargs):
        return self.zoo(**kwargs)

    def generate(self, **kwargs) -> torch.Tensor:
        return self.zoo.generate(**kwargs)


def prove(source: Source, folder: Path) -> dict:
    """
    Runs the source's implementation and the zoo's on the same inputs: random pixels and ids, with the image first and
    amid text; with a processor, also random images through both processors.

    Returns:
        The report, `passed` or not.
    """
    prompt = "" if source.processor is None else source.zoo_processor.image_token + PROMPT
    rows = random_rows(source.config)
    return flow.prove(source, folder, rows, prompt, zoo_model=ZooStages, zoo_processor=ZooPrompts)


def random_rows(config: ZooBlip2Config) -> list[parity.Row]:
    """Random pixels and ids, and questions of their own where the Q-Former reads them."""
    generator = torch.Generator().manual_seed(0)
    plain, size = parity.plain_tokens(config), config.vision_config.image_size
    image, rows = torch.full((config.num_query_tokens,), config.image_token_id), []
    for before, after in ((0, 5), (0, 9), (4, 3)):
        first, last = parity.random_text(plain, (before, after), generator)
        ids = torch.cat((first, image, last))
        vision_inputs = {"pixel_values": torch.randn(1, 3, size, size, generator=generator)}
        if config.text_conditioned:
            asked = torch.randint(config.qformer_vocab_size, (1, 3 + after), generator=generator)
            mask = (torch.arange(3 + after) < 3 + after // 2).long()[None]
            vision_inputs |= {"qformer_input_ids": asked, "qformer_attention_mask": mask}
        rows.append(parity.Row(parity.text_inputs(ids), vision_inputs))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


OPTIONS = (
    "tokenizer",
    "image_processor",
    "qformer_tokenizer",
    "language_model",
    "vision_tower",
    "vision_heads",
    "qformer_heads",
)
SCRIPT = flow.Script("blip2", open_source, prove, OPTIONS, ZooBlip2Config)
convert, verify, reverse = SCRIPT.convert, SCRIPT.verify, SCRIPT.reverse


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 0 only when everything was read, written and checked."""
    parser = engine.command_line("conversion.blip2", __doc__)
    parser.add_argument("--qformer-tokenizer", help="folder or hub id of the Q-Former's tokenizer, where SRC has none")
    parser.add_argument("--language-model", help="folder or hub id of a LAVIS checkpoint's language model")
    parser.add_argument("--vision-tower", help="file of its vision tower")
    parser.add_argument("--vision-heads", type=int, help="heads of its tower, where no release is as wide")
    parser.add_argument("--qformer-heads", type=int, help="heads of its Q-Former, where no release is as wide")
    return engine.run(parser, SCRIPT.job, arguments)


if __name__ == "__main__":
    sys.exit(main())
