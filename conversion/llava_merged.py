"""LLaVA's own checkpoints that hold no whole model: they are merged with a base model, tensor by tensor.

    delta weights    target minus base (1.0 and before): the sum, in the delta's dtype, as the upstream's `apply_delta`
    LoRA             `adapter_config.json`, `adapter_model`, `non_lora_trainables.bin`: base + scale * B @ A in
                     float32, cast to the base's dtype; any other tensor replaces the base's
    stage 1          `mm_projector.bin` alone: it completes the base

A tensor is computed when it is written. Delta weights look like whole ones: only the name of a base model tells them
apart. Since a sum cannot be taken apart bit for bit, every tensor of a merged source is a computed one.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from . import engine, flow
from .engine import ConversionError, TensorInfo
from .llava_original import TEXT_TYPES


ADAPTER_CONFIG = "adapter_config.json"
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
TRAINED = "non_lora_trainables.bin"
PROJECTOR = "mm_projector.bin"
# Files that stand for their folder as those of whole weights do.
FILES = (*ADAPTERS, PROJECTOR)
# Model types of a base model: a language model, or a LLaVA that was trained on.
BASE_TYPES = (*TEXT_TYPES, *TEXT_TYPES.values())

EMBEDDINGS = "model.embed_tokens.weight"
VOCABULARY = (EMBEDDINGS, "lm_head.weight")
# What LLaVA adds to a language model: no base has it, no delta was taken of it.
OWN = re.compile(r"^model\.(?:mm_projector|vision_tower|image_newline)(?:\.|$)")
# PEFT's wrapping, and that of a save in which the whole model was wrapped once more.
WRAPPING = re.compile(r"^(?:base_model\.)?(?:model\.(?=model\.|lm_head\.|mm_projector\.))?")
UNWRAPPED_PROJECTOR = re.compile(r"^mm_projector\.")
FACTOR = re.compile(r"^(.+)\.lora_([AB])(?:\.default)?\.weight$")
INSERTED = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.)")

# Fields of an adapter's config that are used here, and those that say nothing about what it computes.
USED_FIELDS = (
    "alpha_pattern",
    "base_model_name_or_path",
    "bias",
    "exclude_modules",
    "fan_in_fan_out",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "use_rslora",
)
IDLE_FIELDS = (
    "auto_mapping",
    "eva_config",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "task_type",
)
# Initialisations that leave the base as it was.
INITIALISATIONS = (None, True, False, "gaussian", "eva")


@dataclass(frozen=True)
class Weights:
    """
    The tensors of a checkpoint without its tower.

    tensors: whole ones, by LLaVA's names.
    base: the folder of the base model they were merged with.
    note: what was merged, for the card.
    """

    tensors: dict[str, TensorInfo]
    base: Path | None = None
    note: str = ""


def read_weights(folder: Path, base_model: str | Path | None = None) -> Weights:
    """
    Lists what a folder of LLaVA's own holds, merged with its base model where it holds no whole model; reads nothing.

    Args:
        folder: the checkpoint's.
        base_model: folder, file or hub id of the base model. Whole weights beside it are taken as delta weights.

    Raises:
        ConversionError: the folder needs a base model and names none, base and folder do not fit, or the adapter is
            more than LoRA.
    """
    whole = engine.weights_file(folder)
    adapted = [name for name in (ADAPTER_CONFIG, *ADAPTERS, TRAINED) if (folder / name).is_file()]
    if whole is not None and adapted:
        raise ConversionError(
            f"{folder} holds both weights ({whole.name}) and an adapter ({', '.join(adapted)}): which of them is "
            "meant cannot be told. Move one of them to a folder of its own."
        )
    if adapted:
        return _read_lora(folder, base_model)
    if whole is None and (folder / PROJECTOR).is_file():
        if base_model is None:
            raise ConversionError(
                f"{folder} has no weights but {PROJECTOR}: --base-model names the language model it was trained for."
            )
        return _read_projector(folder, base_model)
    if base_model is not None:
        return _read_delta(folder, base_model)
    return Weights(engine.read_checkpoint(folder))


def _base_folder(base_model: str | Path) -> Path:
    return engine.checkpoint_folder(engine.local_folder(base_model), BASE_TYPES)


def _merged(tensors: Mapping[str, TensorInfo], base_model: str | Path, base: Path, how: str) -> Weights:
    """Sorted so that reading them opens their files as seldom as can be."""
    files = dict.fromkeys(part.file for info in tensors.values() for part in info.parts)
    numbers = {file: number for number, file in enumerate(files)}
    tensors = dict(sorted(tensors.items(), key=lambda item: [numbers[part.file] for part in item[1].parts]))
    name = Path(base_model).resolve().name if Path(base_model).exists() else base_model
    return Weights(tensors, base, f"It held no whole model: the weights are {how} the base model `{name}`.")


# ---------------------------------------------------------------------------------------------------------------------
# What is computed
# ---------------------------------------------------------------------------------------------------------------------


def computed(combine: Callable[[list[torch.Tensor]], torch.Tensor], *parts: TensorInfo) -> TensorInfo:
    """A tensor of the first part's shape and dtype."""
    return replace(parts[0], rows=None, parts=parts, combine=combine)


def alone(parts: list[torch.Tensor]) -> torch.Tensor:
    """A tensor that is taken as it is."""
    return parts[0]


def add(parts: list[torch.Tensor]) -> torch.Tensor:
    """A delta and its base in the delta's dtype; a base of fewer rows adds to the first ones."""
    delta, base = parts
    total = delta[: len(base)] + base.to(delta.dtype)
    return total if len(base) == len(delta) else torch.cat((total, delta[len(base) :]))


def replace_last_rows(parts: list[torch.Tensor]) -> torch.Tensor:
    """A matrix whose last rows are others."""
    matrix, rows = parts
    return torch.cat((matrix[: len(matrix) - len(rows)], rows.to(matrix.dtype)))


@dataclass(frozen=True)
class AddLowRank:
    """
    A weight and what LoRA adds to it, in float32, cast to the weight's dtype.

    scale: of the product.
    transposed: whether the weight is `float[in, out]`.
    """

    scale: float
    transposed: bool

    def __call__(self, parts: list[torch.Tensor]) -> torch.Tensor:
        weight, down, up = parts
        change = up.float() @ down.float()
        if self.transposed:
            change = change.T
        return change.mul_(self.scale).add_(weight).to(weight.dtype)


def _is_buffer(name: str) -> bool:
    return any(re.search(pattern, name) for pattern in flow.IGNORED)


def _unwrapped(tensors: Mapping[str, TensorInfo], what: Path) -> dict[str, TensorInfo]:
    """LLaVA's names of tensors that training saved."""
    found, duplicated = {}, []
    for name, info in tensors.items():
        plain = UNWRAPPED_PROJECTOR.sub("model.mm_projector.", INSERTED.sub("", WRAPPING.sub("", name)))
        if plain in found:
            duplicated.append(f"{plain} from {found[plain].name} and {name}")
        found[plain] = info
    if duplicated:
        raise ConversionError(f"{what} holds tensors twice:", {"duplicated": duplicated})
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Delta weights and stage 1
# ---------------------------------------------------------------------------------------------------------------------


def _read_delta(folder: Path, base_model: str | Path) -> Weights:
    base = _base_folder(base_model)
    delta, ground = engine.read_checkpoint(folder), engine.read_checkpoint(base)
    tensors, lacking, wrong = {}, [], []
    for name, info in delta.items():
        if OWN.match(name) or _is_buffer(name):
            tensors[name] = computed(alone, info)
        elif name not in ground:
            lacking.append(name)
        elif not _adds_up(name, info.shape, ground[name].shape):
            wrong.append(f"{name} is {list(info.shape)}, the base's is {list(ground[name].shape)}")
        else:
            tensors[name] = computed(add, info, ground[name])
    unmet = [name for name in ground if (name not in delta or OWN.match(name)) and not _is_buffer(name)]
    if lacking or wrong or unmet:
        raise ConversionError(
            f"{folder} holds no delta weights of {base} (the wrong base model, or whole weights, which need none):",
            {"missing in the base": lacking, "wrong shape": wrong, "only in the base": unmet},
        )
    return _merged(tensors, base_model, base, "the sum of its delta weights and")


def _adds_up(name: str, shape: tuple[int, ...], base: tuple[int, ...]) -> bool:
    """Whether the shapes are the same, or those of a vocabulary and of a part of its rows."""
    return shape == base or (name in VOCABULARY and shape[1:] == base[1:] and shape[0] > base[0])


def _read_projector(folder: Path, base_model: str | Path) -> Weights:
    base = _base_folder(base_model)
    tensors = {name: computed(alone, info) for name, info in engine.read_checkpoint(base).items()}
    for name, info in _unwrapped(engine.read_file(folder / PROJECTOR), folder / PROJECTOR).items():
        whole = tensors.get(name)
        if name == EMBEDDINGS and whole is not None and _adds_up(name, whole.shape, info.shape):
            tensors[name] = computed(replace_last_rows, whole.parts[0], info)
        else:
            tensors[name] = computed(alone, info)
    return _merged(tensors, base_model, base, f"its `{PROJECTOR}` and")


# ---------------------------------------------------------------------------------------------------------------------
# LoRA
# ---------------------------------------------------------------------------------------------------------------------


def _read_lora(folder: Path, base_model: str | Path | None) -> Weights:
    adapter = next((folder / name for name in ADAPTERS if (folder / name).is_file()), None)
    if adapter is None or not (folder / ADAPTER_CONFIG).is_file():
        raise ConversionError(
            f"{folder} holds part of an adapter: expected {ADAPTER_CONFIG} and {' or '.join(ADAPTERS)}."
        )
    settings = engine.read_json(folder / ADAPTER_CONFIG)
    _check_settings(folder / ADAPTER_CONFIG, settings)
    base_model = base_model or _named_base(folder, settings)
    base = _base_folder(base_model)
    saved = _unwrapped(engine.read_file(adapter), adapter)
    trained = folder / TRAINED
    others = _unwrapped(engine.read_file(trained), trained) if trained.is_file() else {}
    try:
        tensors = _add_adapter(settings, engine.read_checkpoint(base), saved, others, f"{folder} on {base}")
    except re.error as error:
        raise ConversionError(f"{folder / ADAPTER_CONFIG} has a pattern that cannot be read: {error}") from error
    return _merged(tensors, base_model, base, "its LoRA adapter, merged into")


def _check_settings(path: Path, settings: dict) -> None:
    """Raises `ConversionError` where an adapter is more than LoRA."""
    if settings.get("peft_type") != "LORA":
        raise ConversionError(f"{path}: peft_type is '{settings.get('peft_type')}', expected LORA.")
    known = {*USED_FIELDS, *IDLE_FIELDS}
    unknown = [f"{name} = {value}" for name, value in settings.items() if value and name not in known]
    if settings.get("init_lora_weights") not in INITIALISATIONS:
        unknown.append(f"init_lora_weights = {settings['init_lora_weights']}, which changes the base model")
    if unknown:
        raise ConversionError(f"{path} asks for more than base + scale * B @ A:", {"refused": unknown})
    numbers = {"r": settings.get("r"), "lora_alpha": settings.get("lora_alpha")}
    for field in ("rank_pattern", "alpha_pattern"):
        numbers |= {f"{field}['{key}']": value for key, value in (settings.get(field) or {}).items()}
    wrong = [f"{name} = {value}" for name, value in numbers.items() if not isinstance(value, int | float)]
    wrong += [f"{name} = {value}" for name, value in numbers.items() if "lora_alpha" not in name and value == 0]
    if wrong:
        raise ConversionError(f"{path} has ranks or scales that are no numbers:", {"refused": wrong})


def _named_base(folder: Path, settings: dict) -> str | Path:
    """The base model that an adapter's config names: a folder, seen from here or from the adapter, or a hub id."""
    name = settings.get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise ConversionError(f"{folder / ADAPTER_CONFIG} names no base model: name it with --base-model.")
    for candidate in (folder / name, folder.parent / name, Path(name)):
        if candidate.is_dir():
            return candidate
    if settings.get("revision") not in (None, "main"):
        raise ConversionError(
            f"{folder / ADAPTER_CONFIG} asks for the revision '{settings['revision']}' of '{name}': download it and "
            "name its folder with --base-model."
        )
    try:
        engine.hub_folder(name)
    except ConversionError as error:
        raise ConversionError(
            f"The base model '{name}' is neither beside {folder}, nor can it be downloaded: name it with --base-model."
        ) from error
    return name


def _add_adapter(
    settings: dict,
    base: Mapping[str, TensorInfo],
    saved: Mapping[str, TensorInfo],
    trained: Mapping[str, TensorInfo],
    what: str,
) -> dict[str, TensorInfo]:
    """
    Merges a base model with an adapter and with what was trained beside it.

    Args:
        settings: the adapter's config.
        base, saved, trained: tensors of the base, of the adapter, and of `TRAINED`.
        what: the two, for messages.
    """
    factors, plain = {}, {}
    for name, info in saved.items():
        match = FACTOR.match(name)
        if match:
            factors.setdefault(match[1], {})[match[2]] = info
        else:
            plain[name] = info
    kept = settings.get("modules_to_save") or []
    unmet = [name for name in plain if name not in base and not _names_one(_module(name), kept)]
    unmet += [f"{module}.lora_{half}" for module, halves in factors.items() if f"{module}.weight" not in base
              for half in sorted(halves)]  # fmt: skip
    halved = [f"{module}.lora_{half}" for module, halves in factors.items() for half in halves if len(halves) == 1]
    state, wrong = {**base, **plain, **trained}, []
    tensors = {name: computed(alone, info) for name, info in state.items()}
    for module, halves in factors.items():
        name = f"{module}.weight"
        if name in base and len(halves) == 2:
            rank, scale = _rank_and_scale(settings, module)
            transposed = bool(settings.get("fan_in_fan_out"))
            whole, down, up = state[name].shape, halves["A"].shape, halves["B"].shape
            made = (down[1:] + up[:1]) if transposed else (up[:1] + down[1:])
            if made != whole or down[:1] != (rank,) or up[1:] != (rank,):
                wrong.append(f"{name} is {list(whole)}, lora_A {list(down)}, lora_B {list(up)}, r = {rank}")
            tensors[name] = computed(AddLowRank(scale, transposed), state[name], halves["A"], halves["B"])
    problems = {
        "no tensor in the base": unmet,
        "without its other half": halved,
        "wrong shape": wrong,
        "duplicated": [name for name in plain if name in trained],
        "missing": _missing(settings, base, factors, {**plain, **trained}),
    }
    if any(problems.values()):
        raise ConversionError(f"{what}: adapter and base model do not fit:", problems)
    return tensors


def _missing(
    settings: dict, base: Mapping[str, TensorInfo], adapted: Mapping[str, dict], plain: Mapping[str, TensorInfo]
) -> list[str]:
    """What an adapter's config promises and its files lack."""
    targets, chosen = settings.get("target_modules"), ("layers_to_transform", "layers_pattern", "exclude_modules")
    missing = []
    if targets and not any(settings.get(field) for field in chosen):
        inner = [_module(name) for name in base if name.startswith("model.layers.") and name.endswith(".weight")]
        missing += [f"{name}.lora_A and B" for name in inner if _is_target(name, targets) and name not in adapted]
    for module in settings.get("modules_to_save") or []:
        if not any(_names_one(_module(name), [module]) for name in plain):
            missing.append(f"{module}, of modules_to_save")
    bias = settings.get("bias") or "none"
    if bias != "none":
        biases = [name for name in base if name.endswith(".bias") and (bias == "all" or _module(name) in adapted)]
        missing += [f"{name}, since bias is '{bias}'" for name in biases if name not in plain]
    return missing


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _names_one(module: str, names: Sequence[str]) -> bool:
    """Whether a module, or one that it is in, goes by one of the names."""
    return any(f".{name}." in f".{module}." for name in names)


def _is_target(module: str, targets: str | Sequence[str]) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _rank_and_scale(settings: dict, module: str) -> tuple[int, float]:
    """Those of one module: patterns are ends of its name, the first that matches decides."""

    def own(field: str, otherwise: str) -> float:
        patterns = settings.get(field) or {}
        found = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
        return next(found, settings[otherwise])

    rank, alpha = own("rank_pattern", "r"), own("alpha_pattern", "lora_alpha")
    return rank, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
