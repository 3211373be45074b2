"""From a source that was looked at to a folder that is written and proven: what conversion scripts have in common."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from vlm_zoo.models.configuration_vlm import ZooConfig
from vlm_zoo.models.parts_vlm import build_part

from . import engine, parity
from .engine import Plan, Table, Target, TensorInfo


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
    edits: by the zoo's name, what happens to a tensor between reading and writing.
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
    edits: dict[str, Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=dict)


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


def write(
    source: Source,
    destination: str | Path,
    script: str,
    prove: Callable[[Source, Path], dict] | None,
    shard_bytes: int = engine.SHARD_BYTES,
) -> dict | None:
    """
    Writes the zoo folder of a source.

    Args:
        source: the checkpoint.
        destination: a folder that does not exist yet, or is empty.
        script: the conversion's name, for the card.
        prove: compares the source with the written folder; its report, `passed` or not, is written too.
        shard_bytes: size at which a new shard begins.

    Returns:
        The report, `None` without `prove`.

    Raises:
        ConversionError: the result differs from the source. `destination` is then left as it was, and
            `<destination>.parity.json` says where they differ.
    """
    with engine.staged(Path(destination)) as folder:
        engine.write_converted(folder, source.tensors, source.plan, shard_bytes=shard_bytes, edits=source.edits)
        source.config.save_pretrained(folder)
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
        record = {"source": source.name, "config": source.raw_config, "names": source.plan.names}
        engine.write_json(folder / engine.RECORD, {**record, "versions": parity.versions()})
        report, proof = None, "The result was not verified."
        if prove is not None:
            report = prove(source, folder)
            if not report["passed"]:
                parity.file_report(report, failed_path(destination))
            parity.file_report(report, folder / parity.REPORT)
            proof = f"Compared with {report['compared_with']}:\n\n```\n{parity.table(report)}\n```"
        card = engine.model_card(source.name, source.kind, source.config.model_type, script, proof)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return report
