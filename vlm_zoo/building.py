"""Building a vision-language model from a vision tower and a language model.

    vision     any tower that AutoModel opens, alone or inside a composite checkpoint (CLIP, SigLIP, a VLM)
    language   any decoder that AutoModelForCausalLM opens, with its tokenizer
       |
       v       configs are read and compared before any weight is
    tokenizer  a named image token, a pad token that is not the end-of-sequence token
    template   the language model's own, extended (see `chat_templates`)
    model      both parts with the weights they had, and a new connector
    vocabulary rows for the new tokens, at the mean of the others
    processor  pixels as the tower was trained on them
       |
       v
    a folder that is complete or does not exist: weights, configs, processor, template, code, model card

What the parts were is kept: text without images gets the language model's own logits, which is checked before anything
is saved, and the tower's weights are its own.
"""

import copy
import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCardData
from PIL import Image
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import logging as transformers_logging
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)

from .chat_templates import ChatTemplateError, find_template, response_tokens
from .models.configuration_vlm import NO_DECODER
from .models.modeling_vlm import VISION_INPUTS
from .models.native_vlm import is_native
from .models.parts_vlm import measure_tower, part_class
from .models.processing_vlm import ZooProcessor
from .models.video_vlm import video_marker
from .registry import ZOO, ZooEntry
from .saving import writing_folder


logger = logging.getLogger(__name__)

# What `build` reads from the parts, and nobody else decides.
_READ_FROM_PARTS = ("vision_config", "text_config", "image_token_id", "num_prefix_tokens", "response_token_ids")

# The fields of a tower's own preprocessing that hold for every architecture; its size and crop come from the config.
_PIXEL_FIELDS = (
    "image_mean",
    "image_std",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "do_convert_rgb",
)

# Mean and standard deviation of the pixels that towers were trained on, for folders without a preprocessing config.
_PIXEL_STATISTICS = {
    "clip_vision_model": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "siglip_vision_model": (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),
    "vit": (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),
    "dinov2": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "dinov2_with_registers": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "dinov3_vit": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    "siglip2_vision_model": (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),
    "qwen2_vl_vision": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "qwen2_5_vl_vision": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "qwen3_vl_vision": (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),
}


_SAMPLING_FLAGS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


class BuildError(ValueError):
    """Parts or options of which no vision-language model can be built; it says which, and the likely cause."""


def build(
    arch: str = "llava",
    vision: str | os.PathLike | None = None,
    language: str | os.PathLike | None = None,
    out: str | os.PathLike | None = None,
    *,
    chat_template: str | os.PathLike | None = None,
    dtype: str | torch.dtype | None = None,
    trust_remote_code: bool = False,
    image_token: str = "<image>",
    overwrite: bool = False,
    **config_overrides,
) -> tuple[PreTrainedModel, ZooProcessor]:
    """
    Builds a vision-language model of one architecture from a vision tower and a language model.

    Args:
        arch: a name of the zoo, `"llava"` or `"zoo_llava"`.
        vision: folder or Hub id of the tower; of a composite checkpoint the vision part is taken.
        language: folder or Hub id of the language model and its tokenizer.
        out: folder to save to. It appears when everything in it is written, not before.
        chat_template: a file, or the text, of a Jinja template instead of the language model's own.
        dtype: of the built model; by default that of the language model.
        trust_remote_code: whether the tokenizer may run code of its repository. Towers and decoders that exist only as
            such code cannot become part of a checkpoint.
        image_token: the text that stands for an image. A special token of the tokenizer is reused, a new one is added.
        overwrite: whether a checkpoint of the zoo that lies at `out` may be replaced.
        config_overrides: fields of the architecture's config, such as `vision_feature_layer=-1`.

    Returns:
        The model, in eval mode, and its processor.

    Raises:
        BuildError: when a part is missing, is of the wrong kind, or does not fit the other.
    """
    entry = _entry(arch)
    _check_overrides(entry, config_overrides)
    dtype = _dtype(dtype)
    out = None if out is None else _free_folder(out, overwrite)
    for role, source in (("vision tower", vision), ("language model", language)):
        if source is None:
            raise BuildError(f"No {role} was named: give a folder or a Hub id.")
    vision, language = os.fspath(vision), os.fspath(language)

    whole_vision_config = _read_config(vision, "vision tower")
    vision_config, num_prefix_tokens = _vision_config(entry, vision, whole_vision_config)
    pixel_fields = _pixel_fields(vision, vision_config.model_type)
    text_config = _text_config(language, _read_config(language, "language model"))
    tokenizer = _load_tokenizer(language, image_token, trust_remote_code)
    template, end_of_turn = _chat_template(entry, tokenizer, image_token, chat_template, language)
    _resolve_pad_token(tokenizer, end_of_turn)

    tower, missing = _load_tower(vision, vision_config, whole_vision_config)
    causal = _load_language_model(language)
    config = _config(
        entry,
        vision_config=_portable(vision_config),
        text_config=_portable(text_config),
        image_token_id=tokenizer.image_token_id,
        num_prefix_tokens=num_prefix_tokens,
        response_token_ids=response_tokens(tokenizer, template),
        **{**_normalisation(entry, pixel_fields), **config_overrides},
    )
    model = _assemble(entry, config, tower, missing, causal, dtype or causal.dtype, vision, language)
    _check_text_only(model, causal, tokenizer, language)
    _fit_vocabulary(model, tokenizer)
    model.generation_config = _generation_config(causal, tokenizer, end_of_turn)

    image_fields = {**pixel_fields, **entry.processor.image_fields_from(config)}
    processor = entry.processor(
        entry.image_processor(**image_fields),
        tokenizer,
        chat_template=template,
        **entry.processor.fields_from(config),
    )
    tokenizer.chat_template = template
    _check_image(model, processor, vision, language)
    _check_training(processor)
    model.name_or_path = model.config._name_or_path = "" if out is None else str(out)
    if out is not None:
        _save(model, processor, out, _model_card(entry, out.name, vision, language, model))
    return model, processor


# ---------------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------------


def _entry(arch: str) -> ZooEntry:
    for entry in ZOO.values():
        if arch in (entry.name, entry.config.model_type):
            return entry
    raise BuildError(f"Unknown architecture '{arch}'; the zoo has {', '.join(entry.name for entry in ZOO.values())}.")


def _check_overrides(entry: ZooEntry, overrides: dict[str, Any]) -> None:
    known = {field.name for field in fields(entry.config)}
    own = sorted(known - {field.name for field in fields(PreTrainedConfig)} - set(_READ_FROM_PARTS))
    for name in overrides:
        if name in _READ_FROM_PARTS:
            raise BuildError(f"{name} cannot be given: it is read from the vision tower and the language model.")
        if name not in known:
            raise BuildError(f"{entry.config.__name__} has no field '{name}'; it has {', '.join(own)}.")


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if isinstance(dtype, torch.dtype) or dtype is None:
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise BuildError(f"'{dtype}' is not a dtype for weights: expected float32, bfloat16 or float16.")
    return found


def _free_folder(out: str | os.PathLike, overwrite: bool) -> Path:
    out = Path(out).expanduser().resolve()
    if out.is_file():
        raise BuildError(f"{out} is a file, expected the name of a folder to write.")
    if not out.is_dir() or not any(out.iterdir()):
        return out
    if not overwrite:
        raise BuildError(f"{out} is not empty. Name another folder, or give overwrite=True to replace a checkpoint.")
    try:
        model_type = json.loads((out / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError):
        model_type = None
    if model_type not in ZOO:
        raise BuildError(f"{out} holds something else than a checkpoint of the zoo, which is not replaced.")
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Configs
# ---------------------------------------------------------------------------------------------------------------------


def _read_config(source: str, role: str) -> PreTrainedConfig:
    if not os.path.isdir(source) and (source.startswith((".", "~", os.sep)) or source.count("/") > 1):
        raise BuildError(f"The {role} is to be read from '{source}', but there is no such folder.")
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise BuildError(
                f"The {role} '{source}' exists only as code of its own repository, and a checkpoint of the zoo "
                "travels with the zoo's code alone. Register its classes with AutoConfig and AutoModel, or choose a "
                "model that transformers has."
            ) from error
        raise BuildError(
            f"The config of the {role} cannot be read from '{source}': {error} Likely cause: no checkpoint in this "
            "folder, or a Hub id that is misspelt or cannot be reached."
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise BuildError(
            f"The {role} '{source}' is quantised. Build from full-precision weights and quantise what was built."
        )
    return config


def _vision_config(entry: ZooEntry, source: str, config: PreTrainedConfig) -> tuple[PreTrainedConfig, int]:
    """The config of the tower, and how many prefix tokens it puts before its patches."""
    tower = getattr(config, "vision_config", None) or config
    kind = f"'{source}' ({tower.model_type})"
    if is_native(tower):
        if entry.config.takes_native_towers:
            return tower, 0
        raise BuildError(
            f"The vision tower {kind} takes patches of images of any size; expected one that takes images of one "
            f"size, as {entry.name} does. Choose an architecture of native resolution, such as mrope, or another "
            "tower; SigLIP 2 has checkpoints of one size, of type siglip."
        )
    if not hasattr(tower, "patch_size"):
        what = "a language model" if hasattr(tower, "vocab_size") else "not a vision transformer"
        raise BuildError(
            f"The vision tower {kind} is {what}: its config has no patch_size. Were vision and language mixed up?"
        )
    for name in ("image_size", "hidden_size", "num_hidden_layers"):
        if not hasattr(tower, name):
            raise BuildError(
                f"The vision tower {kind} has no {name} in its config; expected a vision transformer that turns an "
                "image of one size into a token of one width for each patch."
            )
    if part_class(tower) is None:
        raise BuildError(f"The vision tower {kind} is none that AutoModel opens.")
    try:
        _, num_prefix_tokens = measure_tower(tower)
    except Exception as error:  # a foreign tower may fail in any way
        raise BuildError(
            f"The vision tower {kind} does not turn an image of {tower.image_size} pixels a side into tokens: {error}"
        ) from error
    if num_prefix_tokens < 0:
        raise BuildError(f"The vision tower {kind} makes fewer tokens of an image than it has patches.")
    return tower, num_prefix_tokens


def _text_config(source: str, config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the decoder."""
    kind = f"'{source}' ({config.model_type})"
    if config.is_encoder_decoder:
        raise BuildError(f"The language model {kind} {NO_DECODER}")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        if not hasattr(config.get_text_config(), "vocab_size"):
            raise BuildError(
                f"The language model {kind} is a vision model: its config has no vocab_size. Were vision and language "
                "mixed up?"
            )
        raise BuildError(
            f"The language model {kind} is none that AutoModelForCausalLM opens. Likely cause: a vision-language "
            "model, or an encoder."
        )
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise BuildError(
            f"The language model {kind} is an encoder, expected a decoder: its tokens see those that come after them."
        )
    return config.get_text_config()


def _config(entry: ZooEntry, **config_fields) -> PreTrainedConfig:
    try:
        return entry.config(**config_fields)
    except Exception as error:  # the errors of strict validation are of several kinds
        overrides = {name: value for name, value in config_fields.items() if name not in _READ_FROM_PARTS}
        raise BuildError(f"No {entry.config.__name__} can be made of these parts with {overrides}: {error}") from error


def _normalisation(entry: ZooEntry, pixel_fields: dict[str, Any]) -> dict[str, Any]:
    """How pixels are normalised, for architectures whose config says so too."""
    own = {"image_mean", "image_std"} & {field.name for field in fields(entry.config)}
    if not pixel_fields.get("do_normalize", True):
        pixel_fields = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    return {
        name: list(value) if isinstance(value := pixel_fields[name], list | tuple) else [value] * 3 for name in own
    }


def _portable(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy that says nothing of where it was read from."""
    config = copy.deepcopy(config)
    config._name_or_path = ""
    if hasattr(config, "auto_map"):
        del config.auto_map
    return config


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer and chat template
# ---------------------------------------------------------------------------------------------------------------------


def _load_tokenizer(source: str, image_token: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The language model's tokenizer with `image_token` as its named image token."""
    if not image_token.strip():
        raise BuildError(f"The image token is {image_token!r}, expected a visible text.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        is_empty = not tokenizer("The quick brown fox", add_special_tokens=False)["input_ids"]
    except Exception as error:  # every tokenizer class complains in its own way
        raise BuildError(f"The language model '{source}' brings no tokenizer that can be loaded: {error}") from error
    if is_empty:
        raise BuildError(f"The language model '{source}' brings no tokenizer: the folder has no vocabulary.")
    if not tokenizer.is_fast:
        raise BuildError(
            f"The tokenizer of '{source}' ({type(tokenizer).__name__}) is a slow one, expected a tokenizer.json: "
            "without it nothing says which characters a token came from, and which tokens are the assistant's."
        )
    if image_token in tokenizer.get_vocab():
        token_id = tokenizer.convert_tokens_to_ids(image_token)
        token = tokenizer.added_tokens_decoder.get(token_id)
        named = tokenizer.special_tokens_map.items()
        uses = [use for use, text in named if text == image_token and use != "image_token"]
        if token is None or not token.special or uses:
            use = f"its {uses[0]}" if uses else "an ordinary token"
            raise BuildError(
                f"'{image_token}' has a meaning already: for the tokenizer of '{source}' it is {use} (id {token_id}). "
                "Choose another image_token."
            )
    tokenizer = AutoTokenizer.from_pretrained(
        source, trust_remote_code=trust_remote_code, image_token=image_token, padding_side="left"
    )
    for name in ("is_local", "local_files_only"):  # where it was read from is nobody's business
        tokenizer.init_kwargs.pop(name, None)
    ids = tokenizer(f"a{image_token}b {image_token} c", add_special_tokens=False)["input_ids"]
    if ids.count(tokenizer.image_token_id) != 2:
        raise BuildError(
            f"'{image_token}' does not become a single token with the tokenizer of '{source}': found the ids {ids}. "
            "Choose another image_token."
        )
    return tokenizer


def _chat_template(
    entry: ZooEntry,
    tokenizer: PreTrainedTokenizerBase,
    image_token: str,
    chat_template: str | os.PathLike | None,
    source: str,
) -> tuple[str, str]:
    given = chat_template is not None
    if given and (isinstance(chat_template, os.PathLike) or "{" not in chat_template):
        try:
            chat_template = Path(chat_template).read_text(encoding="utf-8")
        except OSError as error:
            raise BuildError(f"The chat template cannot be read from '{chat_template}': {error}") from error
    try:
        video_token = video_marker(tokenizer) if entry.processor.takes_clips else None
        return find_template(tokenizer, image_token, chat_template, video_token)
    except ChatTemplateError as error:
        if given:
            raise BuildError(f"The given chat template does not suit the tokenizer of '{source}': {error}") from error
        raise BuildError(
            f"The chat template of '{source}' cannot be extended: {error} Give another one (--chat-template, or "
            "chat_template=): a file with the same template and {% generation %} … {% endgeneration %} around what "
            "the assistant says with the token that ends its turn."
        ) from error


def _resolve_pad_token(tokenizer: PreTrainedTokenizerBase, end_of_turn: str) -> None:
    """Sets a pad token that ends nothing: padding carries no label, so a model would never learn such an end."""
    ends = {tokenizer.eos_token, end_of_turn}
    pad = tokenizer.pad_token
    if pad is not None and pad not in ends:
        return
    reason = "has no pad token" if pad is None else f"pads with '{pad}', which ends a turn too"
    if tokenizer.unk_token is not None and tokenizer.unk_token not in ends:
        tokenizer.pad_token = tokenizer.unk_token
    else:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    logger.warning("The language model's tokenizer %s: the built model pads with '%s'.", reason, tokenizer.pad_token)


# ---------------------------------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' reports of missing and unexpected weights: they are compared here."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def _load_tower(
    source: str, config: PreTrainedConfig, whole_config: PreTrainedConfig
) -> tuple[PreTrainedModel, set[str]]:
    """The tower, and the names of the weights that the checkpoint does not have."""
    options = {"trust_remote_code": False, "output_loading_info": True}
    try:
        with _quiet():
            tower, info = part_class(config).from_pretrained(source, config=copy.deepcopy(config), **options)
            if config is whole_config or not info["missing_keys"]:
                return tower, set(info["missing_keys"])
            whole, info = AutoModel.from_pretrained(source, **options)  # a tower under a name of the composite's own
    except Exception as error:
        raise BuildError(f"The weights of the vision tower '{source}' cannot be loaded: {error}") from error
    for name, module in whole.named_modules():
        if type(module) is type(tower):
            return module, {key.removeprefix(f"{name}.") for key in info["missing_keys"] if key.startswith(f"{name}.")}
    raise BuildError(f"'{source}' holds no {type(tower).__name__}, though its vision_config is of that type.")


def _load_language_model(source: str) -> PreTrainedModel:
    try:
        with _quiet():
            causal, info = AutoModelForCausalLM.from_pretrained(
                source, trust_remote_code=False, output_loading_info=True
            )
    except Exception as error:
        raise BuildError(f"The weights of the language model '{source}' cannot be loaded: {error}") from error
    if info["missing_keys"]:
        raise BuildError(_missing_message("language model", source, info["missing_keys"]))
    return causal.eval()


def _missing_message(role: str, source: str, missing: set[str]) -> str:
    names = sorted(missing)
    return (
        f"The {role} '{source}' lacks {len(names)} weights that its config asks for, such as {', '.join(names[:3])}. "
        "Likely cause: a checkpoint of another class, or one that was not saved whole."
    )


def _assemble(
    entry: ZooEntry,
    config: PreTrainedConfig,
    tower: PreTrainedModel,
    missing: set[str],
    causal: PreTrainedModel,
    dtype: torch.dtype,
    vision: str,
    language: str,
) -> PreTrainedModel:
    """The model. Where the dtype is the same its parts share memory with those that they came from."""
    decoder_class = MODEL_MAPPING[type(config.text_config)]
    decoder = next((module for module in causal.modules() if type(module) is decoder_class), None)
    head = causal.get_output_embeddings()
    if decoder is None or head is None:
        raise BuildError(
            f"The language model '{language}' ({type(causal).__name__}) is not made of a {decoder_class.__name__} and "
            "an output projection."
        )
    parts = {"model.vision_tower.": tower, "model.language_model.": decoder, "lm_head.": head}
    state = {
        prefix + name: tensor
        for prefix, part in parts.items()
        for name, tensor in part.state_dict().items()
        if part is not tower or name not in missing
    }
    try:
        with _quiet():
            model, info = entry.head.from_pretrained(
                None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
            )
    except Exception as error:  # sizes that do not match, in whatever way they are found out
        raise BuildError(f"'{vision}' and '{language}' do not make a {entry.head.__name__}: {error}") from error
    # The tower's unused layers and its pooling head are not built; everything else must find its place.
    lost = {name for name in info["unexpected_keys"] if not name.startswith("model.vision_tower.")}
    for role, source, prefixes in (
        ("vision tower", vision, ("model.vision_tower.",)),
        ("language model", language, ("model.language_model.", "lm_head.")),
    ):
        unset = {name for name in info["missing_keys"] if name.startswith(prefixes)}
        if unset:
            raise BuildError(_missing_message(role, source, unset))
    if lost:
        raise BuildError(
            f"The language model '{language}' has {len(lost)} weights that {decoder_class.__name__} has no place for, "
            f"such as {', '.join(sorted(lost)[:3])}."
        )
    return model.eval()


@torch.no_grad()
def _check_text_only(
    model: PreTrainedModel, causal: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, language: str
) -> None:
    """The built model must treat text as its language model does, whatever that does to its logits."""
    ids = torch.tensor([tokenizer("The quick brown fox jumps over it.", add_special_tokens=False)["input_ids"][:16]])
    expected = causal(input_ids=ids.to(causal.device)).logits.float()
    found = model(input_ids=ids.to(model.device)).logits.float().to(expected.device)
    difference, scale = (found - expected).abs().max().item(), expected.abs().max().item()
    if not difference <= scale * (1e-3 if model.dtype == causal.dtype else 1e-1):
        raise BuildError(
            f"On text the built model's logits differ by {difference:.3g} from those of '{language}', which go up to "
            f"{scale:.3g}. Likely cause: {type(causal).__name__} treats its logits as the zoo does not know."
        )


@torch.no_grad()
def _fit_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """
    Makes room for the new tokens where the vocabulary has no unused rows; new rows are the mean of the others.

    The size stays a multiple of the power of two, up to 64, that it was a multiple of.
    """
    size = model.get_input_embeddings().weight.shape[0]
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > size:
        step = math.gcd(size, 64)
        model.resize_token_embeddings(math.ceil(needed / step) * step, mean_resizing=False)
        head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
        tables = [embeddings.weight, head.bias, None if head.weight is embeddings.weight else head.weight]
        for table in tables:
            if table is not None:
                mean = table[:size].mean(dim=0, dtype=torch.float32)
                # The image token's row is one that no other token has: models can be given embeddings instead of ids.
                table[size:] = (mean * (1 - 2**-6)).to(table.dtype)
                if tokenizer.image_token_id >= size:
                    table[tokenizer.image_token_id] = mean.to(table.dtype)
    model.config.text_config.pad_token_id = tokenizer.pad_token_id


def _generation_config(causal: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, end_of_turn: str):
    """The language model's own, which stops at the end of a turn and never samples a placeholder."""
    generation = copy.deepcopy(causal.generation_config)
    ends = generation.eos_token_id if generation.eos_token_id is not None else tokenizer.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    end = tokenizer.convert_tokens_to_ids(end_of_turn)
    ends += [] if end in ends else [end]
    generation.eos_token_id = ends[0] if len(ends) == 1 else ends
    generation.pad_token_id = tokenizer.pad_token_id
    if generation.bos_token_id is None:
        generation.bos_token_id = tokenizer.bos_token_id
    generation._from_model_config = False  # nobody may derive it from the config anew
    if not generation.do_sample:  # flags without effect, which many old checkpoints have, cannot be saved
        for name in _SAMPLING_FLAGS:
            setattr(generation, name, None)
    generation.suppress_tokens = sorted({*(generation.suppress_tokens or []), tokenizer.image_token_id})
    return generation


# ---------------------------------------------------------------------------------------------------------------------
# Pixels
# ---------------------------------------------------------------------------------------------------------------------


def _pixel_fields(source: str, model_type: str) -> dict[str, Any]:
    """How the tower's training images were normalised: as its folder says, else as is usual for its type."""
    try:
        found, _ = BaseImageProcessor.get_image_processor_dict(source)
    except (OSError, ValueError):
        found = {}
    pixel_fields = {name: found[name] for name in _PIXEL_FIELDS if found.get(name) is not None}
    if "image_mean" in pixel_fields and "image_std" in pixel_fields:
        return pixel_fields
    if model_type not in _PIXEL_STATISTICS:
        raise BuildError(
            f"The vision tower '{source}' ({model_type}) brings no image_mean and image_std, and what is usual is "
            f"known for {', '.join(_PIXEL_STATISTICS)} only. Add a preprocessor_config.json with them."
        )
    mean, std = _PIXEL_STATISTICS[model_type]
    logger.warning(
        "The vision tower '%s' brings no image_mean and image_std; those usual for %s are taken: %s and %s.",
        source,
        model_type,
        mean,
        std,
    )
    return {**pixel_fields, "image_mean": list(mean), "image_std": list(std)}


@torch.no_grad()
def _check_image(model: PreTrainedModel, processor: ZooProcessor, vision: str, language: str) -> None:
    """The tower must make as many features of an image as the processor writes placeholders, and a question about an
    image must pass the whole model."""
    blank = Image.fromarray(np.zeros((48, 64, 3), dtype=np.uint8))
    content = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    batch = processor(images=[blank], text=[prompt], return_tensors="pt").to(model.device)
    inputs = {name: batch[name] for name in VISION_INPUTS if name in batch}
    placeholders = int((batch["input_ids"] == processor.image_token_id).sum())
    try:
        features = model.get_image_features(**inputs).pooler_output
    except Exception as error:  # a foreign tower may fail in any way
        raise BuildError(f"The vision tower '{vision}' does not fit with '{language}': {error}") from error
    found = sum(model.model.placeholders_of(list(features), inputs))
    if found != placeholders:
        raise BuildError(
            f"The vision tower '{vision}' makes {found} features of an image, expected {placeholders} by its "
            "image_size and patch_size. Likely cause: a tower that merges patches."
        )
    try:
        model(**batch)
    except ValueError as error:
        raise BuildError(f"No question about an image passes what is built of '{language}': {error}") from error


def _check_training(processor: ZooProcessor) -> None:
    """Says where TRL will want another template than the model has."""
    from trl.chat_template_utils import get_training_chat_template

    try:
        get_training_chat_template(processor)
    except ValueError as error:
        logger.warning("TRL refuses assistant_only_loss with this chat template: %s", error)


# ---------------------------------------------------------------------------------------------------------------------
# The folder
# ---------------------------------------------------------------------------------------------------------------------


def _save(model: PreTrainedModel, processor: ZooProcessor, out: Path, card: str) -> None:
    """Writes everything that a Hub repository needs."""
    with writing_folder(out, overwrite=True) as path:
        model.save_pretrained(path)
        processor.save_pretrained(path)
        (path / "README.md").write_text(card, encoding="utf-8")


def _model_card(entry: ZooEntry, name: str, vision: str, language: str, model: PreTrainedModel) -> str:
    base_models = [source for source in (language, vision) if not os.path.isdir(source)]
    header = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["vlm-zoo", entry.config.model_type],
        base_model=base_models or None,
    )
    tower, decoder = model.model.vision_tower, model.model.language_model
    parts = [(model.part_of(key), parameter.numel()) for key, parameter in model.named_parameters()]
    new = sum(size for part, size in parts if part in ("connector", "fusion"))
    return _MODEL_CARD.format(
        header=header.to_yaml(),
        name=name,
        arch=entry.name,
        head=type(model).__name__,
        vision=_public_name(vision),
        vision_class=type(tower).__name__,
        language=_public_name(language),
        language_class=type(decoder).__name__,
        new=f"{new:,}",
        total=f"{model.num_parameters():,}",
    )


def _public_name(source: str) -> str:
    """A Hub id as it is, of a folder its name alone."""
    return Path(source).resolve().name if os.path.isdir(source) else source


_MODEL_CARD = """\
---
{header}
---

# {name}

A vision-language model of the architecture `{arch}`, built with vlm-zoo from two parts:

| part | from | class |
|---|---|---|
| vision tower | `{vision}` | `{vision_class}` |
| language model | `{language}` | `{language_class}` |

{total} parameters, {new} of them new: what joins the parts has not been trained, and until it is the model does not
understand images. Without images it answers as its language model does.

## How to load it

```python
from transformers import AutoModelForImageTextToText, AutoProcessor  # AutoModelForMultimodalLM opens it too

model = AutoModelForImageTextToText.from_pretrained("{name}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
```

With vlm-zoo installed no remote code is needed:

```python
import vlm_zoo

model = vlm_zoo.AutoModelForVision2Seq.from_pretrained("{name}")  # {head}
```

```python
content = [{{"type": "image", "url": "cat.png"}}, {{"type": "text", "text": "What is this?"}}]
messages = [{{"role": "user", "content": content}}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
answer = model.generate(**inputs, max_new_tokens=64)[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(answer, skip_special_tokens=True)[0])
```

## Training

TRL trains the folder as it is: `trl sft` with `trust_remote_code: true`, `assistant_only_loss: true` and
`max_length: null`. The connector comes first (alignment), the language model with it after that (instruction tuning).

## Licence

The code in this folder is vlm-zoo's, under Apache-2.0. The weights of the two parts stay under the licences of their
sources, and so does what is trained from them: read them there before you share the model.
"""
