"""M-RoPE checkpoints to ARR-COC and back.

    python -m conversion.arr_coc SRC DST --budget 144    to ARR-COC, verified; DST/parity.json holds the proof
    python -m conversion.arr_coc SRC --dry-run           show which tensor becomes which, and which are new
    python -m conversion.arr_coc SRC DST --verify        prove a conversion that exists already
    python -m conversion.arr_coc DST BACK --reverse      back to M-RoPE, without what only ARR-COC has

SRC is a folder or a hub id of the zoo's M-RoPE (`zoo_mrope`): built, trained or converted. Qwen2-VL, Qwen2.5-VL and
Qwen3-VL get there in two steps:

    python -m conversion.mrope SRC STEP
    python -m conversion.arr_coc STEP DST --budget 144

Weights, tokenizer, image processor, chat template and generation config stay what they are. New in the config are

    token_budget              --budget: tokens of an image, or a share of them
    image_mean, image_std     those of the image processor
    response_token_ids        where the source has none, as the chat template has them
    any other field           --set gate=none --set ladder='[0, 2, 5]'; see `ZooArrCocConfig`

and in the model its fusion, which is initialised with --seed and learns in training: what the result keeps of an image
before that is for an evaluation to judge.

The proof gives the result a budget of all native tokens. It must then compute what the source computes on the same
inputs, and nothing may differ, not even by rounding. After that the result runs at its own budget.
"""

import argparse
import dataclasses
import math
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoImageProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlm_zoo.chat_templates import response_tokens
from vlm_zoo.models.arr_coc import ZooArrCocConfig, ZooArrCocForConditionalGeneration, ZooArrCocProcessor
from vlm_zoo.models.detail_vlm import budget_of
from vlm_zoo.models.image_processing_vlm import ZooImageProcessor
from vlm_zoo.models.mrope import ZooMropeConfig, ZooMropeForConditionalGeneration, ZooMropeProcessor
from vlm_zoo.models.multi_axis_vlm import MultiAxisConfig
from vlm_zoo.models.native_vlm import patch_geometry

from . import engine, flow, mrope, parity
from .engine import ConversionError, Table, Target, TensorInfo
from .flow import Source


SOURCE_TYPE = ZooMropeConfig.model_type
# Both architectures call their tensors the same.
SAME_NAMES: Table = ((r"^", ""),)
FUSION = "model.fusion."
ALL_TOKENS = 1.0  # a share: every image keeps the tokens it has
NO_TOKEN = -1  # clips have no token of their own

# ---------------------------------------------------------------------------------------------------------------------
# Configs
# ---------------------------------------------------------------------------------------------------------------------

OWN_FIELDS = tuple(
    field.name
    for field in dataclasses.fields(ZooArrCocConfig)
    if field.name not in {field.name for field in dataclasses.fields(MultiAxisConfig)}
)
# What --set takes: with any other field the result would not be the source's model.
FREE_FIELDS = (*OWN_FIELDS, "response_token_ids")
# What says which of the two a config is, and where it was.
_IDENTITY = ("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path")


def shared_settings(config: MultiAxisConfig) -> dict[str, Any]:
    """What the two architectures' configs have in common."""
    return {name: value for name, value in config.to_dict().items() if name not in (*OWN_FIELDS, *_IDENTITY)}


def arr_coc_config(source: ZooMropeConfig, **fields) -> ZooArrCocConfig:
    """The config of ARR-COC with the tower, the language model and the positions of this one."""
    foreign = sorted(set(fields) - set(FREE_FIELDS))
    if foreign:
        raise ConversionError(
            f"{', '.join(foreign)} cannot be set, the source decides; what can is {', '.join(FREE_FIELDS)}."
        )
    settings = {**shared_settings(source), "architectures": [ZooArrCocForConditionalGeneration.__name__], **fields}
    try:
        return ZooArrCocConfig.from_dict(settings)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ConversionError(f"{fields} is no config of ARR-COC: {error}") from error


def mrope_config(source: ZooArrCocConfig) -> ZooMropeConfig:
    """The config of M-RoPE with the tower, the language model and the positions of this one."""
    settings = {**shared_settings(source), "architectures": [ZooMropeForConditionalGeneration.__name__]}
    return ZooMropeConfig.from_dict(settings)


def pixel_statistics(image_processor: ZooImageProcessor) -> dict[str, list[float]]:
    """The fields of the config that say how pixels were normalised."""
    if not image_processor.do_normalize:
        return {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    return {name: list(getattr(image_processor, name)) for name in ("image_mean", "image_std")}


def read_response_tokens(tokenizer, template: str | dict | None) -> list[int] | None:
    """The tokens with which a template opens an answer; `None` where they cannot be told from a question."""
    if isinstance(template, dict):
        template = template.get("default")
    if template is None:
        return None
    try:
        return response_tokens(tokenizer, template)
    except Exception as error:  # a template may raise anything
        raise ConversionError(f"The chat template fails ({type(error).__name__}: {error}).") from error


def reads_question(config: ZooArrCocConfig) -> bool:
    """Whether such a model cannot do without `response_token_ids`."""
    return config.allocation == "relevance" and "participatory" in config.scorers


# ---------------------------------------------------------------------------------------------------------------------
# Tensors
# ---------------------------------------------------------------------------------------------------------------------


def own_target(model_class: type, config: MultiAxisConfig) -> Target:
    """What a model of the zoo asks for that is its own source: nothing of its tower is left over."""
    return dataclasses.replace(flow.zoo_target(model_class, config), unused={})


def new_tensors(config: ZooArrCocConfig, dtype: torch.dtype, seed: int) -> dict[str, TensorInfo]:
    """The tensors of the fusion, as a new model has them; those of floats in this dtype."""
    with torch.device("meta"):
        base = ZooArrCocForConditionalGeneration(config).model
    fusion = base.fusion.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fusion.apply(base._init_weights)
    found = {}
    for name, tensor in fusion.state_dict().items():
        value = tensor.to(dtype) if tensor.is_floating_point() else tensor
        found[FUSION + name] = TensorInfo(Path(), FUSION + name, tuple(value.shape), value.dtype, value=value)
    return found


def usual_dtype(tensors: Mapping[str, TensorInfo]) -> torch.dtype:
    """That of most numbers."""
    counts = Counter()
    for info in tensors.values():
        if info.dtype.is_floating_point:
            counts[info.dtype] += math.prod(info.shape)
    return counts.most_common(1)[0][0] if counts else torch.float32


def from_mrope(
    model: ZooMropeForConditionalGeneration, *, seed: int = 0, **fields
) -> ZooArrCocForConditionalGeneration:
    """
    ARR-COC with the weights of a model of M-RoPE, in memory: same dtype, device, mode and attention.

    The weights are copies; the two models share nothing.

    Args:
        model: of M-RoPE.
        seed: of the fusion's initialisation.
        fields: of the config, such as `token_budget=144`; `image_mean` and `image_std` are the image processor's.
    """
    config = arr_coc_config(model.config, **fields)
    added = new_tensors(config, model.dtype, seed)
    return flow.in_memory(
        model,
        ZooArrCocForConditionalGeneration,
        config,
        SAME_NAMES,
        prepare=lambda tensors: {**tensors, **added},
        target=own_target(ZooArrCocForConditionalGeneration, config),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------------


def open_source(
    name: str | Path,
    *,
    budget: int | float | None = None,
    fields: Mapping[str, Any] | Iterable[tuple[str, Any]] = (),
    seed: int = 0,
    tokenizer: str | None = None,
    image_processor: str | None = None,
) -> Source:
    """
    Looks at a checkpoint of M-RoPE, makes the config of ARR-COC, and plans where its tensors go.

    Args:
        name: folder or hub id; a folder whose one subfolder is the checkpoint will do.
        budget: tokens of an image, or a share of them when it is a float; by default that of `ZooArrCocConfig`.
        fields: others of `FREE_FIELDS`, with their values.
        seed: of the fusion's initialisation.
        tokenizer, image_processor: folders or hub ids to take instead of the source's own.
    """
    folder = engine.checkpoint_folder(engine.local_folder(name), [SOURCE_TYPE])
    raw_config = engine.read_json(folder / "config.json")
    check_type(str(name), raw_config.get("model_type"), SOURCE_TYPE)
    before = ZooMropeConfig.from_pretrained(folder)
    fields = {**({} if budget is None else {"token_budget": budget}), **dict(fields)}
    homes = [engine.local_folder(given) if given else folder for given in (tokenizer, image_processor)]
    processor = read_processor(str(name), folder, *homes, before)
    config = complete_config(before, fields, processor, *homes)
    tensors = engine.read_checkpoint(folder)
    added = new_tensors(config, usual_dtype(tensors), seed)
    target = own_target(ZooArrCocForConditionalGeneration, config)
    return Source(
        name=str(name),
        kind=SOURCE_TYPE,
        folder=folder,
        raw_config=raw_config,
        config=config,
        model_class=ZooArrCocForConditionalGeneration,
        tensors={**tensors, **added},
        plan=engine.plan_tensors({**tensors, **added}, SAME_NAMES, target, str(name)),
        load=lambda: aligned(parity.load_strictly(ZooMropeForConditionalGeneration, folder)),
        implementation="the zoo's M-RoPE; ARR-COC has a budget of all native tokens",
        processor=processor,
        zoo_processor=None if processor is None else arr_coc_processor(processor, config),
        note=note(config, processor, added, seed),
    )


def check_type(name: str, found: str | None, expected: str) -> None:
    """Raises `ConversionError` for another model type than this direction reads."""
    if found == expected:
        return
    hint = ""
    if found in mrope.FORMATS:
        hint = f" Convert it to M-RoPE first: python -m conversion.mrope {name} STEP, and then STEP."
    elif found in (ZooArrCocConfig.model_type, SOURCE_TYPE):
        hint = " --reverse is the other way."
    raise ConversionError(f"{name} is of model type '{found}'; this direction reads '{expected}'.{hint}")


def complete_config(
    before: ZooMropeConfig, fields: dict[str, Any], processor: ZooMropeProcessor | None, words: Path, pixels: Path
) -> ZooArrCocConfig:
    """
    The config of ARR-COC with what tokenizer and image processor know; `fields` win.

    Args:
        before: the source's.
        fields: that were asked for.
        processor: the source's, if it is whole.
        words, pixels: the folders of its parts, either of which may be there without the other.
    """
    found, template = {}, None
    if processor is not None:
        tokenizer, template, image_processor = processor.tokenizer, processor.chat_template, processor.image_processor
    else:
        tokenizer = flow.read_tokenizer(words) if engine.has_tokenizer(words) else None
        template = None if tokenizer is None else tokenizer.chat_template
        image_processor = read_image_processor(pixels) if engine.has_image_processor(pixels) else None
    if image_processor is not None:
        found = pixel_statistics(image_processor)
    if not before.response_token_ids and tokenizer is not None:
        found["response_token_ids"] = read_response_tokens(tokenizer, template)
    config = arr_coc_config(before, **{**found, **fields})
    if image_processor is None and not {"image_mean", "image_std"} <= set(fields):
        flow.logger.warning(
            "How pixels were normalised is not known, a mean of %s and a deviation of %s are assumed: --set "
            "image_mean=… and --set image_std=… say otherwise.",
            config.image_mean,
            config.image_std,
        )
    if reads_question(config) and not config.response_token_ids:
        message = (
            "The source has no response_token_ids, and {}, so questions cannot be told from answers: --set "
            "response_token_ids='[…]' names the tokens that open an answer, --set scorers='[propositional, "
            "perspectival]' makes a model that reads no question."
        )
        if tokenizer is not None:
            raise ConversionError(message.format("its chat template does not open answers with tokens of their own"))
        flow.logger.warning(message.format("no tokenizer whose chat template shows them"))
    return config


# ---------------------------------------------------------------------------------------------------------------------
# Processors
# ---------------------------------------------------------------------------------------------------------------------


def read_processor(
    name: str, folder: Path, words: Path, pixels: Path, config: ZooMropeConfig
) -> ZooMropeProcessor | None:
    """
    The source's processor, or one of parts that lie elsewhere; `None`, with a warning, where a part is missing.

    Args:
        name, folder: of the source.
        words, pixels: the folders of tokenizer and image processor.
        config: the source's.
    """
    missing = engine.missing_parts(words, pixels)
    flow.warn_of_missing(name, missing)
    if missing:
        return None
    if {words, pixels} == {folder} and (folder / "processor_config.json").is_file():
        processor = ZooMropeProcessor.from_pretrained(folder)
    else:
        tokenizer = flow.read_tokenizer(words)
        image_token = tokenizer.convert_ids_to_tokens(config.image_token_id)
        if image_token is None:
            raise ConversionError(
                f"The model's image_token_id is {config.image_token_id}, the tokenizer has {len(tokenizer)} tokens: "
                "tokenizer and model belong to different checkpoints."
            )
        processor = ZooMropeProcessor(
            read_image_processor(pixels),
            engine.name_image_token(tokenizer, image_token),
            chat_template=tokenizer.chat_template,
            **ZooMropeProcessor.fields_from(config),
        )
    flow.check_image_token(processor.tokenizer, processor.image_token, config.image_token_id)
    geometry, own = patch_geometry(config.vision_config), processor.image_processor
    expected = (geometry.size, geometry.frames, config.spatial_merge_size)
    found = (own.patch_size, own.temporal_patch_size, own.merge_size)
    if found != expected:
        raise ConversionError(
            f"{', '.join(mrope.GEOMETRY_FIELDS)} are {found} in the image processor and {expected} in the model: they "
            "belong to different checkpoints."
        )
    return processor


def read_image_processor(folder: Path) -> ZooImageProcessor:
    found = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    if not isinstance(found, ZooImageProcessor):
        raise ConversionError(f"{folder} has a {flow.class_name(found)}, expected a ZooImageProcessor.")
    return found


def arr_coc_processor(source: ZooMropeProcessor, config: ZooArrCocConfig) -> ZooArrCocProcessor:
    """The same processor, which writes as many placeholders as the budget says."""
    return ZooArrCocProcessor(token_budget=config.token_budget, **processor_parts(source))


def processor_parts(source: ZooMropeProcessor | ZooArrCocProcessor) -> dict[str, Any]:
    """What the two architectures' processors have in common."""
    for name in ("is_local", "local_files_only"):  # where it was read from is nobody's business
        source.tokenizer.init_kwargs.pop(name, None)
    names = ("image_processor", "tokenizer", "chat_template", "video_time", "tokens_per_second")
    return {name: getattr(source, name) for name in (*names, "frame_start", "frame_end")}


# ---------------------------------------------------------------------------------------------------------------------
# What the result costs
# ---------------------------------------------------------------------------------------------------------------------

PICTURES = ((336, 336), (480, 640), (1080, 1920))  # height, width


def costs(config: ZooArrCocConfig, image_processor: ZooImageProcessor | None = None) -> list[dict]:
    """
    Visual tokens of pictures: their heights and widths, their `native` tokens, and the `tokens` under the budget.

    Args:
        config: with the budget.
        image_processor: the model's, or the one that its config describes.
    """
    if image_processor is None:
        image_processor = ZooImageProcessor(**ZooArrCocProcessor.image_fields_from(config))
    found = []
    for height, width in PICTURES:
        _, rows, columns = image_processor.patch_grid(height, width)
        native = rows * columns // config.spatial_merge_size**2
        tokens = budget_of(native, config.token_budget)
        found.append({"height": height, "width": width, "native": native, "tokens": tokens})
    return found


def describe_costs(config: ZooArrCocConfig, image_processor: ZooImageProcessor | None = None) -> str:
    """The same in words."""
    pictures = [
        f"{{tokens}} of {{native}} of a picture of {picture['width']} x {picture['height']}".format(**picture)
        for picture in costs(config, image_processor)
    ]
    return f"A budget of {config.token_budget} keeps {', '.join(pictures)} visual tokens."


def note(
    config: ZooArrCocConfig, processor: ZooMropeProcessor | None, added: Mapping[str, TensorInfo], seed: int
) -> str:
    """What the card says of tensors that the source does not have, and of the budget."""
    size = sum(math.prod(info.shape) for info in added.values() if info.dtype.is_floating_point)
    return (
        f"New are the {len(added)} tensors of `{FUSION.strip('.')}` ({size:,} parameters): scorers, balancer and "
        f"adapters, initialised with seed {seed} and not trained. Train them before relying on what they choose: "
        "`model_init_kwargs: {trainable_parts: [fusion]}`.\n\n"
        + describe_costs(config, None if processor is None else processor.image_processor)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Proof
# ---------------------------------------------------------------------------------------------------------------------

OWN_BUDGET = "own_budget"


class AtAllTokens(nn.Module):
    """ARR-COC with a budget of all native tokens, whose image features come without their texture, as M-RoPE's."""

    def __init__(self, zoo: ZooArrCocForConditionalGeneration):
        super().__init__()
        self.zoo, self.model, self.generation_config = aligned(zoo), zoo.model, zoo.generation_config
        zoo.config.token_budget = ALL_TOKENS
        self.width = zoo.config.text_config.hidden_size * (1 + len(zoo.config.deepstack_layers or []))

    def get_image_features(self, **kwargs) -> BaseModelOutputWithPooling:
        features = self.zoo.get_image_features(**kwargs).pooler_output
        return BaseModelOutputWithPooling(pooler_output=[feature[:, : self.width] for feature in features])

    def forward(self, **kwargs):
        return self.zoo(**kwargs)

    def generate(self, **kwargs) -> torch.Tensor:
        return self.zoo.generate(**kwargs)


def aligned(model: nn.Module) -> nn.Module:
    """The model with its weights where torch puts new tensors. In memory that a file is mapped to they lie at other
    bytes, not the same for two files, and kernels may then sum the same numbers in another order."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def at_all_tokens(processor: ZooArrCocProcessor) -> ZooArrCocProcessor:
    processor.token_budget = ALL_TOKENS
    return processor


def prove(source: Source, folder: Path) -> dict:
    """
    Runs M-RoPE and ARR-COC with a budget of all tokens on the same inputs: random patches and ids, of images of
    several sizes, several images, and clips; with a processor, also random images through both processors. Then runs
    ARR-COC at its own budget.

    Returns:
        The report, `passed` or not; `own_budget` says what images cost.
    """
    edge = patch_geometry(source.config.vision_config).size * source.config.spatial_merge_size
    prompt = "" if source.processor is None else f"What is shown here? {source.processor.image_token}\nAnd beside it?"
    report = flow.prove(
        source,
        folder,
        mrope.random_rows(source.config, NO_TOKEN),
        prompt,
        sizes=[(4 * edge, 6 * edge), (3 * edge + edge // 4, 5 * edge + edge // 4), (7 * edge - 1, 3 * edge - 1)],
        zoo_model=AtAllTokens,
        zoo_processor=at_all_tokens,
    )
    for stage in report["stages"]:
        if "max_abs_diff" in stage:  # the same code on the same weights
            stage |= {"limit": 0.0, "equal": stage["max_abs_diff"] == 0.0}
    result = parity.load_strictly(ZooArrCocForConditionalGeneration, folder)
    if result.config.response_token_ids or not reads_question(result.config):
        report["stages"].append(run_at_own_budget(result))
    pixels = read_image_processor(folder) if engine.has_image_processor(folder) else None
    failed = [stage["stage"] for stage in report["stages"] if not stage["equal"]]
    return {
        **report,
        "tolerance": 0.0,
        "passed": not failed,
        "first_failed_stage": failed[0] if failed else None,
        OWN_BUDGET: {"token_budget": result.config.token_budget, "pictures": costs(result.config, pixels)},
    }


@torch.no_grad()
def run_at_own_budget(model: ZooArrCocForConditionalGeneration) -> dict:
    """The stage of a report that asks the model about an image of about twice its budget, within what it takes."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    wanted = 32 if isinstance(config.token_budget, float) else 2 * config.token_budget
    side = max(2, math.isqrt(min(wanted, config.max_image_tokens)))
    tokens, geometry = budget_of(side**2, config.token_budget), patch_geometry(config.vision_config)
    before, after = parity.random_text(parity.plain_tokens(config), (6, 3), generator)
    image = torch.full((tokens,), config.image_token_id)
    opening = torch.tensor(config.response_token_ids or [], dtype=torch.long)
    grid = torch.tensor([[1, side * config.spatial_merge_size, side * config.spatial_merge_size]])
    outputs = model(
        **parity.text_inputs(torch.cat((image, before, opening, after))),
        pixel_values=torch.randn(int(grid.prod()), geometry.values, generator=generator),
        image_grid_thw=grid,
    )
    kept = len(outputs.fusion_outputs.images[0].boxes)
    works = kept == tokens and bool(outputs.logits.isfinite().all())
    return {"stage": OWN_BUDGET, "native": side**2, "tokens": kept, "equal": works}


# ---------------------------------------------------------------------------------------------------------------------
# Back
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Return:
    """
    The way back of a folder of ARR-COC.

    folder: of ARR-COC.
    config: of ARR-COC; before: of M-RoPE, to be written.
    tensors: what is read for each name.
    dropped: the tensors that M-RoPE does not have.
    """

    folder: Path
    config: ZooArrCocConfig
    before: ZooMropeConfig
    tensors: dict[str, TensorInfo]
    dropped: list[str]

    def describe(self) -> str:
        """Which tensors go back and which do not, a line each."""
        kept = [f"{info.name} -> {name}" for name, info in self.tensors.items()]
        return "\n".join([*kept, *(f"{name} -> (dropped)" for name in self.dropped)])


def plan_reverse(name: str | Path) -> Return:
    """Finds every tensor of the way back, and the name that it had."""
    folder = engine.checkpoint_folder(engine.local_folder(name), [ZooArrCocConfig.model_type])
    check_type(str(name), engine.read_json(folder / "config.json").get("model_type"), ZooArrCocConfig.model_type)
    config = ZooArrCocConfig.from_pretrained(folder)
    before = mrope_config(config)
    tensors, target = engine.read_checkpoint(folder), own_target(ZooMropeForConditionalGeneration, before)
    whole = own_target(ZooArrCocForConditionalGeneration, config).wanted
    target.unused = {name: shape for name, shape in whole.items() if name.startswith(FUSION)}
    plan = engine.plan_tensors(tensors, SAME_NAMES, target, str(folder))
    found = {plan.names[name]: tensors[name] for name in plan.kept()}
    if (folder / engine.RECORD).is_file():
        record = engine.read_json(folder / engine.RECORD)
        before.response_token_ids = record["config"].get("response_token_ids")
        whole = {**found, **{name: found[twin] for name, twin in target.tied.items()}}
        found = {name: whole[renamed] for name, renamed in record["names"].items()}
    return Return(folder, config, before, found, sorted(plan.dropped))


def reverse(
    name: str | Path, destination: str | Path, *, verify: bool = True, shard_bytes: int = engine.SHARD_BYTES
) -> dict | None:
    """
    Converts a folder of ARR-COC back to M-RoPE: what that has too keeps every bit, the rest is dropped.

    Args:
        name: folder or hub id of ARR-COC.
        destination: a folder that does not exist yet, or is empty.
        verify: run both on the same inputs and write `parity.json`.
        shard_bytes: size at which a new shard begins.

    Returns:
        The parity report, `None` without `verify`.

    Raises:
        ConversionError: the checkpoint cannot be read completely, or does not compute at a budget of all tokens what
            M-RoPE computes. `destination` is then left as it was.
    """
    return _go_back(plan_reverse(name), str(name), destination, verify, shard_bytes)


def _go_back(back: Return, name: str, destination: str | Path, verify: bool, shard_bytes: int) -> dict | None:
    with engine.staged(Path(destination)) as folder:
        engine.write_shards(folder, back.tensors, shard_bytes=shard_bytes)
        back.before.save_pretrained(folder)
        if (back.folder / "generation_config.json").is_file():
            shutil.copyfile(back.folder / "generation_config.json", folder / "generation_config.json")
        if not engine.missing_parts(back.folder, back.folder):
            processor = ZooArrCocProcessor.from_pretrained(back.folder)
            ZooMropeProcessor(**processor_parts(processor)).save_pretrained(folder)
        report, proof = None, "The result was not verified."
        if verify:
            # what was written is the source now, and ARR-COC's folder its conversion
            source = dataclasses.replace(open_source(folder, fields=own_settings(back.config)), name=name)
            report = prove(source, back.folder)
            flow.file_staged(report, folder, destination)
            proof = f"Compared with {report['compared_with']}:\n\n```\n{parity.table(report)}\n```"
        left = f"Left behind are the {len(back.dropped)} tensors of `{FUSION.strip('.')}`, which M-RoPE does not have."
        card = engine.model_card(name, back.config.model_type, SOURCE_TYPE, "arr_coc", f"{left}\n\n{proof}")
        (folder / "README.md").write_text(card, encoding="utf-8")
    return report


def own_settings(config: ZooArrCocConfig) -> dict[str, Any]:
    """The values of `FREE_FIELDS`."""
    return {name: getattr(config, name) for name in FREE_FIELDS}


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


SCRIPT = flow.Script("arr_coc", open_source, prove, ("budget", "fields", "seed", "tokenizer", "image_processor"))
convert, verify = SCRIPT.convert, SCRIPT.verify


def field_value(text: str) -> tuple[str, Any]:
    """FIELD=VALUE, the value as YAML."""
    name, found, value = text.partition("=")
    if not found:
        raise argparse.ArgumentTypeError(f"expected FIELD=VALUE, got {text}")
    return name, yaml.safe_load(value)


def job(arguments: argparse.Namespace) -> str:
    """Does what the command line asks for and returns what there is to say about it."""
    if not arguments.reverse:
        said = SCRIPT.job(arguments)
        if arguments.dry_run:
            return said
        written = Path(arguments.destination)
        pixels = read_image_processor(written) if engine.has_image_processor(written) else None
        return f"{said}\n{describe_costs(ZooArrCocConfig.from_pretrained(written), pixels)}"
    back = plan_reverse(arguments.source)
    if arguments.dry_run:
        return back.describe()
    report = _go_back(
        back, arguments.source, arguments.destination, not arguments.no_verify, flow.shard_bytes(arguments)
    )
    return f"{flow.summary(report, arguments.destination)}\ndropped: {', '.join(back.dropped)}"


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 0 only when everything was read, written and checked."""
    parser = engine.command_line("conversion.arr_coc", __doc__, reverse=False)
    parser.add_argument(
        "--budget",
        type=yaml.safe_load,
        metavar="B",
        help="tokens of an image, or a share of them up to 1.0 (default: 200)",
    )
    parser.add_argument(
        "--set",
        dest="fields",
        action="append",
        default=[],
        type=field_value,
        metavar="FIELD=VALUE",
        help="another field of ARR-COC's config, as YAML",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the fusion's initialisation (default: 0)")
    parser.add_argument("--reverse", action="store_true", help="SRC is a folder of ARR-COC: go back to M-RoPE")
    return engine.run(parser, job, arguments)


if __name__ == "__main__":
    sys.exit(main())
