"""From a source that was looked at to a folder that is written and proven: what conversion scripts have in common."""

import argparse
import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from vlm_zoo.models.configuration_vlm import ZooConfig
from vlm_zoo.models.parts_vlm import build_part

from . import engine, parity, way_back
from .edits import Edit
from .engine import ConversionError, Plan, Table, Target, TensorInfo


logger = logging.getLogger(__name__)

# What is assumed of a width that was never released.
USUAL_HEAD_DIM, FEWEST_HEADS = 64, 2
# Options that say where parts are: on the way back they lie where they are looked for.
PATHS = ("tokenizer", "image_processor", "qformer_tokenizer", "language_model", "vision_tower", "base_model")
# Buffers that old files carry: computed at construction, read by no model.
IGNORED = (r"\.rotary_emb\.inv_freq$", r"\.embeddings\.position_ids$")

# ---------------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Source:
    """
    An upstream checkpoint that was looked at and not read yet.

    name: as it was given.
    kind: its format, for the card.
    folder: where its generation config is, if it has one.
    raw_config: what it says about itself.
    config: the zoo's config of it.
    model_class: the zoo's class of it.
    tensors, plan: what it holds, and where each tensor goes.
    load: builds its own implementation, which is called `implementation`.
    processor: its own processor, `None` where its files are not there.
    zoo_processor: the zoo's processor of it, `None` likewise.
    eos_token_id: with what its code ends an answer, where that is not what its language model ends with.
    vocab_size: how many logits it has, where the zoo has more.
    edits: by the zoo's name, what happens to a tensor between reading and writing.
    apart: folders and files of its parts that may lie elsewhere, and where they belong on the way back; `None` for
        what belongs beside its config.
    beside: files it was read from that are neither weights nor files of transformers.
    note: what the card says beside where the weights came from.
    """

    name: str
    kind: str
    folder: Path
    raw_config: dict
    config: ZooConfig
    model_class: type[PreTrainedModel]
    tensors: Mapping[str, TensorInfo]
    plan: Plan
    load: Callable[[], nn.Module]
    implementation: str
    processor: Callable | None = None
    zoo_processor: ProcessorMixin | None = None
    eos_token_id: int | None = None
    vocab_size: int | None = None
    edits: dict[str, Edit] = field(default_factory=dict)
    apart: dict[Path, str | None] = field(default_factory=dict)
    beside: tuple[Path, ...] = ()
    note: str = ""

    def places(self) -> way_back.Places:
        """Where its files belong on the way back."""
        path = Path(self.name).absolute()
        root = self.folder.absolute() if not path.exists() else path.parent if path.is_file() else path
        home = way_back.Places(root).label(self.folder.absolute())
        apart = {part: home if label is None else label for part, label in self.apart.items()}
        return way_back.Places(root, apart, self.beside, home)


def attention_heads(part: str, option: str, width: int, released: Mapping[int, int], given: int | None) -> int:
    """
    The attention heads of a part whose config no file says; what is assumed is logged as a warning.

    Args:
        part: whose, in words.
        option: what says it on the command line.
        width: of the part, which its shapes show.
        released: the heads of all widths that were released.
        given: what the option says, which wins.
    """
    if given is not None:
        return given
    if width in released:
        return released[width]
    assumed = width // USUAL_HEAD_DIM if width % USUAL_HEAD_DIM == 0 else FEWEST_HEADS
    logger.warning(
        "No released %s is %s wide, and the file does not say how many heads it has: %s are assumed; %s says "
        "otherwise. A proof cannot find this out: it assumes the same.",
        part,
        width,
        assumed,
        option,
    )
    return assumed


def zoo_target(model_class: type[PreTrainedModel], config: ZooConfig, ignored: Sequence[str] = ()) -> Target:
    """
    What the zoo's model asks for; the tensors of the uncut tower that it does not build are `unused`.

    Args:
        model_class: the zoo's class.
        config: its config.
        ignored: patterns of buffers that files carry and no model reads.
    """
    with torch.device("meta"):
        model = model_class(config)
        tower = build_part(copy.deepcopy(config.vision_config), "vision tower")
    parts = {"model.vision_tower.": tower, "model.language_model.": model.model.language_model}
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    whole = {f"model.vision_tower.{name}": tuple(tensor.shape) for name, tensor in tower.state_dict().items()}
    return Target(
        wanted=wanted,
        unused={name: shape for name, shape in whole.items() if name not in wanted},
        tied=dict(model._tied_weights_keys) if config.tie_word_embeddings else {},
        ignored=ignored,
        renamings={prefix: engine.renamings_of(part) for prefix, part in parts.items()},
    )


# ---------------------------------------------------------------------------------------------------------------------
# Processors
# ---------------------------------------------------------------------------------------------------------------------

# What an image processor of transformers and the zoo's both call so.
PIXEL_FIELDS = (
    "do_convert_rgb",
    "do_resize",
    "size",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)


def pixel_settings(image_processor, fields: Sequence[str] = PIXEL_FIELDS) -> dict:
    """Those of the fields that an image processor sets."""
    settings = image_processor.to_dict()
    return {name: settings[name] for name in fields if settings.get(name) is not None}


def class_name(image_processor) -> str:
    """Its name without the backend's."""
    return type(image_processor).__name__.removesuffix("Pil").removesuffix("Fast")


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def read_processor(
    processor_class: type[ProcessorMixin], home: Path, image_processor: Path, *tokenizers: Path
) -> ProcessorMixin:
    """A processor of transformers: the one in `home`, or one that is made of parts where they lie elsewhere."""
    if {image_processor, *tokenizers} == {home}:
        return processor_class.from_pretrained(home, trust_remote_code=False)
    pixels = AutoImageProcessor.from_pretrained(image_processor, trust_remote_code=False)
    return processor_class(pixels, *map(read_tokenizer, tokenizers))


def warn_of_missing(name: str, missing: Sequence[str]) -> None:
    """Names the parts of a processor that are not there, if any, and the options that can."""
    if missing:
        logger.warning(
            "%s has no %s: the model is converted, no processor is written; %s can name what is missing.",
            name,
            " and no ".join(missing),
            " and ".join(f"--{part.replace(' ', '-')}" for part in missing),
        )


def check_image_token(tokenizer: PreTrainedTokenizerBase, image_token: str, image_token_id: int) -> None:
    """Raises `ConversionError` where the tokenizer's is not the model's."""
    found = tokenizer.convert_tokens_to_ids(image_token)
    if found != image_token_id:
        raise ConversionError(
            f"The tokenizer's '{image_token}' is {found}, the model's image_token_id is {image_token_id}: "
            "tokenizer and model belong to different checkpoints."
        )


# ---------------------------------------------------------------------------------------------------------------------
# To the zoo
# ---------------------------------------------------------------------------------------------------------------------


def in_memory(
    model: PreTrainedModel,
    model_class: type[PreTrainedModel],
    config: ZooConfig,
    table: Table,
    prepare: Callable[[Mapping[str, TensorInfo]], dict[str, TensorInfo]] = dict,
    target: Target | None = None,
) -> PreTrainedModel:
    """
    The zoo's model with copies of the weights of a model of transformers: same dtype, device, mode and attention.

    Args:
        model: the model of transformers.
        model_class, config: the zoo's.
        table: the renames.
        prepare: joins and splits tensors before they are renamed.
        target: what the zoo's model asks for, where that is not what `zoo_target` says.
    """
    target, state = target or zoo_target(model_class, config), model.state_dict()
    infos = prepare(
        {name: TensorInfo(Path(), name, tuple(tensor.shape), tensor.dtype) for name, tensor in state.items()}
    )
    # A state dict lists tied tensors under both of their names
    infos = {name: info for name, info in infos.items() if engine.rename(name, table) not in target.tied}
    plan = engine.plan_tensors(infos, table, target, type(model).__name__)

    def read(info: TensorInfo) -> torch.Tensor:
        return state[info.name].clone() if info.rows is None else state[info.name][slice(*info.rows)].clone()

    zoo = model_class.from_pretrained(
        None,
        config=config,
        state_dict={plan.names[name]: engine.assemble(infos[name], read) for name in plan.kept()},
        dtype=model.dtype,
        attn_implementation={
            "": model.config._attn_implementation,
            "vision_config": model.config.vision_config._attn_implementation,
            "text_config": model.config.get_text_config()._attn_implementation,
        },
    )
    return zoo.to(model.device).train(model.training)


def failed_path(destination: str | Path) -> Path:
    """Where the report of a conversion goes that did not pass."""
    destination = Path(destination).absolute()
    return destination.with_name(f"{destination.name}.{parity.REPORT}")


def file_staged(report: dict, folder: Path, destination: str | Path) -> None:
    """Writes the report into a folder that is not at its destination yet; one that did not pass goes beside it."""
    parity.file_report(report, folder / parity.REPORT if report["passed"] else failed_path(destination))


def write(
    source: Source,
    destination: str | Path,
    script: str,
    prove: Callable[[Source, Path], dict] | None,
    shard_bytes: int = engine.SHARD_BYTES,
    options: Mapping[str, Any] | None = None,
) -> dict | None:
    """
    Writes the zoo folder of a source.

    Args:
        source: the checkpoint.
        destination: a folder that does not exist yet, or is empty.
        script: the conversion's name, for the card.
        prove: compares the source with the written folder; its report, `passed` or not, is written too.
        shard_bytes: size at which a new shard begins.
        options: what the way back needs of those that the source was opened with; `None` where the script has a way
            back of its own.

    Returns:
        The report, `None` without `prove`.

    Raises:
        ConversionError: the result differs from the source. `destination` is then left as it was, and
            `<destination>.parity.json` says where they differ.
    """
    with engine.staged(Path(destination)) as folder:
        record, aside = {}, {}
        if options is not None:
            record, aside = way_back.make_record(source.tensors, source.plan, source.edits, source.places())
            homes = [source.folder, *(part for part in source.apart if part.is_dir())]
            record["beside"] = way_back.copy_beside(source.tensors, folder, homes, source.places())
            record["options"] = dict(options)
        edits = {name: edit.apply for name, edit in source.edits.items()}
        engine.write_converted(folder, source.tensors, source.plan, shard_bytes=shard_bytes, edits=edits, aside=aside)
        source.config.save_pretrained(folder)
        record["settings"] = way_back.settings_of(type(source.config).from_pretrained(folder))
        own, written = source.folder / "generation_config.json", folder / "generation_config.json"
        if own.is_file():
            engine.suppress_image_token(own, written, source.config.image_token_id)
        else:
            with torch.device("meta"):
                source.model_class(source.config).generation_config.save_pretrained(folder)
        if source.eos_token_id is not None:
            engine.write_json(written, {**engine.read_json(written), "eos_token_id": source.eos_token_id})
        if source.zoo_processor is not None:
            source.zoo_processor.save_pretrained(folder)
        names = {name: to for name, to in source.plan.names.items() if source.tensors[name].value is None}
        engine.write_json(
            folder / engine.RECORD,
            {
                "source": source.name,
                "script": script,
                "config": source.raw_config,
                "names": names,
                **record,
                "versions": parity.versions(),
            },
        )
        report, proof = None, "The result was not verified."
        if prove is not None:
            report = prove(source, folder)
            file_staged(report, folder, destination)
            proof = f"Compared with {report['compared_with']}:\n\n```\n{parity.table(report)}\n```"
        back = ""
        if options is not None:
            back = (
                f"`python -m conversion.{script} FOLDER BACK --reverse` writes the source's files again, out of the "
                f"weights, `{engine.RECORD}`, `{way_back.UPSTREAM}` and, where it is there, `{engine.DROPPED}`."
            )
        proof = "\n\n".join(filter(None, (source.note, proof, back)))
        card = engine.model_card(source.name, source.kind, source.config.model_type, script, proof)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return report


# ---------------------------------------------------------------------------------------------------------------------
# Proof
# ---------------------------------------------------------------------------------------------------------------------


def prove(
    source: Source,
    folder: Path,
    rows: Sequence[parity.Row] | Callable[[nn.Module], list[parity.Row]],
    prompt: str = "",
    *,
    sizes: Sequence[tuple[int, int]] | None = None,
    zoo_model: Callable[[PreTrainedModel], nn.Module] = lambda model: model,
    zoo_processor: Callable[[ProcessorMixin], Callable] = lambda processor: processor,
) -> dict:
    """
    Runs the source's implementation and the zoo's on the same inputs; with a processor, on random images through both
    processors too.

    Args:
        source: the checkpoint.
        folder: what it was converted to.
        rows: random pixels and ids, or what makes them once the source's model is there.
        prompt: a text with image tokens, for the processors.
        sizes: heights and widths of random images for the processors, neither of them grown while the other shrinks;
            by default those that a tower of one size treats differently.
        zoo_model, zoo_processor: give the zoo's the outputs or inputs of the source's.

    Returns:
        The report, `passed` or not.
    """
    before, decode, inputs = [], None, ["random pixels and ids"] if rows else []
    if source.processor is not None:
        zoo = type(source.zoo_processor).from_pretrained(folder)
        size = 0 if sizes else source.config.vision_config.image_size
        before, pictures = parity.compare_processors(
            source.processor, zoo_processor(zoo), prompt, sizes or parity.probe_sizes(size), size
        )
        rows, decode = [*pictures, *rows], source.processor.decode
        inputs = ["random images through the source's processor", *inputs]
    results = parity.compare_models(
        source.load,
        lambda: zoo_model(parity.load_strictly(source.model_class, folder)),
        source.config,
        rows,
        decode=decode,
        vocab_size=source.vocab_size,
    )
    return parity.make_report(source.name, source.implementation, ", and ".join(inputs), results, before)


# ---------------------------------------------------------------------------------------------------------------------
# Scripts
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Script:
    """
    What every conversion script does.

    name: the script's.
    open_source: looks at a checkpoint.
    prove: compares it with what it was converted to.
    options: the names of those that `open_source` takes, on the command line too.
    config_class: of the zoo; `None` where the script has a way back of its own.
    """

    name: str
    open_source: Callable[..., Source]
    prove: Callable[[Source, Path], dict]
    options: tuple[str, ...]
    config_class: type[PreTrainedConfig] | None = None

    def convert(
        self,
        name: str | Path,
        destination: str | Path,
        *,
        verify: bool = True,
        shard_bytes: int = engine.SHARD_BYTES,
        **options,
    ) -> dict | None:
        """
        Converts a checkpoint to a zoo folder.

        Args:
            name: file, folder or hub id of the source.
            destination: a folder that does not exist yet, or is empty.
            verify: run source and result on the same inputs and write `parity.json`.
            shard_bytes: size at which a new shard begins.
            options: see the script's `open_source`.

        Returns:
            The parity report, `None` without `verify`.

        Raises:
            ConversionError: the source cannot be read completely, or the result differs from it. `destination` is
                then left as it was, and `<destination>.parity.json` says where they differ.
        """
        source, kept = self.open_source(name, **options), None
        if self.config_class is not None:
            kept = {option: value for option, value in options.items() if option not in PATHS and value is not None}
            if "image_token_id" in self.options:
                kept["image_token_id"] = source.config.image_token_id
        return write(source, destination, self.name, self.prove if verify else None, shard_bytes, kept)

    def verify(self, name: str | Path, converted: str | Path, **options) -> dict:
        """
        Proves a conversion that exists and writes its `parity.json` anew; `ConversionError` where the two differ.

        Args:
            name: file, folder or hub id of the source.
            converted: the zoo folder.
            options: see the script's `open_source`.
        """
        report = self.prove(self.open_source(name, **options), Path(converted))
        parity.file_report(report, Path(converted) / parity.REPORT)
        return report

    def find_way_back(self, name: str | Path, origin: str | Path | None = None) -> tuple[way_back.Return, ZooConfig]:
        """Every tensor of the way back of a zoo folder, and its config; see `reverse`."""
        folder = engine.local_folder(name)
        config = self.config_class.from_pretrained(folder)
        return way_back.find(folder, engine.local_folder(origin or folder), self.name, config), config

    def reverse(
        self,
        name: str | Path,
        destination: str | Path,
        *,
        origin: str | Path | None = None,
        verify: bool = True,
        shard_bytes: int = engine.SHARD_BYTES,
        **options,
    ) -> dict | None:
        """
        Converts a zoo folder back to the files that it came from, bit for bit where nothing was trained.

        Args:
            name: the zoo folder.
            destination: a folder that does not exist yet, or is empty.
            origin: the folder of the first conversion, where `name` is a later state of the model (trained, saved
                again) without record and side file.
            verify: run both on the same inputs and write `parity.json`.
            shard_bytes: size at which a new shard begins, of weights that lay in no file as they are.
            options: see the script's `open_source`; what the first conversion recorded is known.

        Returns:
            The parity report, `None` without `verify`.

        Raises:
            ConversionError: there is no record, the model has another shape now, tensors are nowhere, or what was
                written differs from the zoo's folder. `destination` is then left as it was.
        """
        zoo_folder = engine.local_folder(name)
        back, config = self.find_way_back(name, origin)
        with engine.staged(Path(destination)) as folder:
            way_back.write(back, folder, shard_bytes)
            report = None
            if verify:
                given = {option: value for option, value in options.items() if value is not None}
                source = self.open_source(folder, **{**back.record["options"], **given})
                if engine.missing_parts(zoo_folder, zoo_folder):
                    source = replace(source, processor=None, zoo_processor=None)
                report = self.prove(replace(source, name=str(name), config=config), zoo_folder)
                file_staged(report, folder, destination)
        return report

    def job(self, arguments: argparse.Namespace) -> str:
        """Does what the command line asks for and returns what there is to say about it."""
        options = {name: getattr(arguments, name) for name in self.options}
        if self.config_class is not None and arguments.reverse:
            if arguments.dry_run:
                return self.find_way_back(arguments.source, arguments.origin)[0].describe()
            report = self.reverse(
                arguments.source,
                arguments.destination,
                origin=arguments.origin,
                verify=not arguments.no_verify,
                shard_bytes=shard_bytes(arguments),
                **options,
            )
            return summary(report, arguments.destination)
        if arguments.dry_run:
            source = self.open_source(arguments.source, **options)
            return engine.describe_plan(source.tensors, source.plan)
        if arguments.verify and (Path(arguments.destination) / "config.json").is_file():
            return parity.table(self.verify(arguments.source, arguments.destination, **options))
        report = self.convert(
            arguments.source,
            arguments.destination,
            verify=not arguments.no_verify,
            shard_bytes=shard_bytes(arguments),
            **options,
        )
        return summary(report, arguments.destination)


def shard_bytes(arguments: argparse.Namespace) -> int:
    return int(arguments.shard_size * 1e9)


def summary(report: dict | None, destination: str) -> str:
    """What the command line says of a folder that was written."""
    return f"{destination} is written, not verified." if report is None else parity.table(report)
