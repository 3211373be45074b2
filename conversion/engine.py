"""The conversion engine: a checkpoint is a table of names, and a conversion is a plan checked before the first byte.

    read    safetensors or .bin shards, by their headers alone         -> {source name: TensorInfo}
    plan    renames, held against the names of the zoo's own model     -> Plan: each tensor has one place, or an error
    write   shard by shard into a temporary sibling of the target      -> renamed to its name when it is whole

Nothing is silent: unknown, missing, duplicated and wrongly shaped tensors are one `ConversionError` that lists them.
The dtype of every tensor is kept. Tensors that the zoo does not build (a tower's unused layers) and buffers that old
files carry wait in `dropped.safetensors` beside the weights, and `conversion.json` keeps every source name: the way
back is exact.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from pickle import UnpicklingError

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightRenaming

from vlm_zoo.saving import writing_folder


RECORD = "conversion.json"
DROPPED = "dropped.safetensors"
SHARD_BYTES = 5 * 10**9

_WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
# Where training saves keep the weights, beside the optimiser and its schedule.
_STATES = ("model_state_dict", "model")
_HUB_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja", "checkpoint*.pt")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

# Renames: (pattern, replacement) of `re.sub`; the first pattern that matches a name decides.
Table = Sequence[tuple[str, str]]


class ConversionError(ValueError):
    """
    A conversion that cannot be done, or not proven.

    problems: for tensors, the kind of problem ("unknown", "missing", "duplicated", "wrong shape") and what it met.
    """

    def __init__(self, message: str, problems: dict[str, list[str]] | None = None):
        self.problems = {kind: found for kind, found in (problems or {}).items() if found}
        lines = [f"  {kind} ({len(found)}): {', '.join(found)}" for kind, found in self.problems.items()]
        super().__init__("\n".join([message, *lines]))


# ---------------------------------------------------------------------------------------------------------------------
# Read
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorInfo:
    """
    A tensor that was not read yet: its file, its name in there, its shape and its dtype.

    rows: the first of its rows in the file and the one after its last, where it is a piece of what lies there.
    parts: the tensors it is made of, one below the other; file and name are then those of the first.
    value: the tensor itself, which lies in no file.
    combine: what makes it of its parts, where they do not simply lie below each other.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: tuple[int, int] | None = None
    parts: tuple["TensorInfo", ...] = ()
    value: torch.Tensor | None = field(default=None, compare=False, repr=False)
    combine: Callable[[list[torch.Tensor]], torch.Tensor] | None = None

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def read_json(path: Path) -> dict:
    """Reads a JSON object; anything else is a `ConversionError`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, expected a JSON object.")
    return content


def local_folder(source: str | os.PathLike) -> Path:
    """A folder as it is, a hub id as the folder it was downloaded to."""
    return Path(source).absolute() if Path(source).exists() else hub_folder(str(source))


def hub_folder(name: str) -> Path:
    """The folder that a hub id was downloaded to."""
    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConversionError(
            f"'{name}' is neither a folder nor a hub id that can be reached ({type(error).__name__})."
        ) from error


def checkpoint_folder(folder: Path, model_types: Iterable[str], files: Sequence[str] = ()) -> Path:
    """
    The folder itself when it has a config, else its one subfolder with a config of these model types.

    Args:
        folder: a folder, or the file that a folder's weights are, beside its config.
        model_types: those that the config of a subfolder may say.
        files: names of other files that stand for a folder without whole weights.
    """
    if folder.is_file():
        return _folder_of(folder, files)
    if (folder / "config.json").is_file():
        return folder
    known = set(model_types)
    found = [
        path.parent for path in sorted(folder.glob("*/config.json")) if read_json(path).get("model_type") in known
    ]
    if len(found) == 1:
        return found[0]
    raise ConversionError(
        f"{folder} has no config.json, and {len(found)} of its subfolders hold a checkpoint of the model types "
        f"{', '.join(sorted(known))}; expected one."
    )


def _folder_of(file: Path, files: Sequence[str]) -> Path:
    if not (file.parent / "config.json").is_file():
        raise ConversionError(f"{file} has no config.json beside it, which says what model it is.")
    whole = weights_file(file.parent)
    if file.name != whole.name if whole else file.name not in files:
        held = f"are {whole.name}" if whole else "are nowhere"
        raise ConversionError(f"{file} is not what {file.parent} holds: the weights of that folder {held}.")
    return file.parent


def weights_file(folder: Path) -> Path | None:
    """The file that a folder's weights are, the index where there are several; `None` where there are none."""
    return next((folder / name for pair in _WEIGHTS for name in pair if (folder / name).is_file()), None)


def shard_path(folder: Path, name: str, index: str) -> Path:
    """A shard that an index names; names that lead out of the folder are refused."""
    path = path_within(folder, name, folder / index)
    if not path.is_file():
        raise ConversionError(f"{folder / index} names the file '{name}', which does not exist.")
    return path


def path_within(folder: Path, name: str, where: str | Path) -> Path:
    """The file of a folder that is named somewhere; a name that leads out of the folder is a `ConversionError`."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if not name or posix.is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        raise ConversionError(f"{where} names the file '{name}', which lies outside {folder}: refused.")
    return folder / posix


def read_checkpoint(folder: Path) -> dict[str, TensorInfo]:
    """
    Lists the tensors of a folder, from `model.safetensors` or `pytorch_model.bin`, whole or sharded, and reads none.

    Raises:
        ConversionError: no weights, an index that leads out of the folder or disagrees with its files, a name that two
            files hold, a file that cannot be read, or a pickle that holds more than tensors.
    """
    path = weights_file(folder)
    if path is None:
        raise ConversionError(
            f"{folder} has no weights: expected {' or '.join(name for pair in _WEIGHTS for name in pair)}."
        )
    return _read_index(folder, path.name) if path.suffix == ".json" else read_file(path)


def _read_index(folder: Path, index: str) -> dict[str, TensorInfo]:
    weight_map = read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ConversionError(f"{folder / index} has no weight_map from tensors to files.")
    files = {name: shard_path(folder, name, index) for name in dict.fromkeys(weight_map.values())}
    tensors, duplicated, unlisted = {}, [], []
    for shard, path in files.items():
        for name, info in read_file(path).items():
            if name in tensors:
                duplicated.append(f"{name} in {tensors[name].file.name} and {shard}")
            elif weight_map.get(name) != shard:
                unlisted.append(f"{name} in {shard}")
            tensors[name] = info
    missing = [f"{name} in {shard}" for name, shard in weight_map.items() if name not in tensors]
    if duplicated or unlisted or missing:
        raise ConversionError(
            f"{folder / index} disagrees with its files:",
            {"duplicated": duplicated, "not in the index": unlisted, "missing": missing},
        )
    return tensors


def read_file(path: Path) -> dict[str, TensorInfo]:
    """Lists the tensors of one file without reading them."""
    if path.suffix == ".safetensors":
        with _opened(path) as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            unknown = [
                f"{name} ({part.get_dtype()})" for name, part in slices.items() if part.get_dtype() not in _DTYPES
            ]
            if unknown:
                raise ConversionError(f"{path} holds tensors of an unknown dtype:", {"unknown dtype": unknown})
            return {
                name: TensorInfo(path, name, tuple(part.get_shape()), _DTYPES[part.get_dtype()])
                for name, part in slices.items()
            }
    content = _load_pickle(path, map_location="meta")
    return {name: TensorInfo(path, name, tuple(tensor.shape), tensor.dtype) for name, tensor in content.items()}


def _opened(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path} cannot be read, the file may be truncated: {error}") from error


def _load_pickle(path: Path, **kwargs) -> dict[str, torch.Tensor]:
    try:
        content = torch.load(path, weights_only=True, **kwargs)
    except UnpicklingError as error:
        raise ConversionError(
            f"{path} is refused: it holds more than tensors, and opening it could run code. "
            f"({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError) as error:
        raise ConversionError(f"{path} cannot be read, the file may be truncated: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, expected a dictionary of tensors.")
    content = content.get(_inner_key(content), content)
    others = [f"{name} ({type(value).__name__})" for name, value in content.items() if not torch.is_tensor(value)]
    if others:
        raise ConversionError(f"{path} is not a dictionary of tensors:", {"no tensor": others})
    return content


def _inner_key(content: dict) -> str | None:
    return next((key for key in _STATES if isinstance(content.get(key), dict)), None)


def state_key(path: Path) -> str | None:
    """Under which key a pickle that can be read keeps its tensors; `None` where they are all it holds."""
    return _inner_key(torch.load(path, weights_only=True, map_location="meta"))


def read_tensor(info: TensorInfo) -> torch.Tensor:
    """Reads one tensor."""
    return next(read_tensors({info.name: info}))[1]


def read_tensors(tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields tensors in the given order, keeping open the files that one tensor is made of."""
    opened = {}

    def read(info: TensorInfo) -> torch.Tensor:
        file = info.file
        if file not in opened and file.suffix == ".safetensors":
            opened[file] = _opened(file)
        elif file not in opened:
            opened[file] = _load_pickle(file, map_location="cpu", mmap=zipfile.is_zipfile(file))
        if file.suffix == ".safetensors":
            held = opened[file]
            return held.get_tensor(info.name) if info.rows is None else held.get_slice(info.name)[slice(*info.rows)]
        tensor = opened[file][info.name] if info.rows is None else opened[file][info.name][slice(*info.rows)]
        return tensor.clone(memory_format=torch.contiguous_format)  # a view would drag its whole storage along

    for name, info in tensors.items():
        files = files_of(info)
        if not files <= opened.keys():
            for file in opened.keys() - files:
                del opened[file]  # lets go of the last files before the next is mapped
        yield name, assemble(info, read)


def files_of(info: TensorInfo) -> set[Path]:
    """The files that a tensor is read from."""
    if info.value is not None:
        return set()
    return set().union(*map(files_of, info.parts)) if info.parts else {info.file}


def assemble(info: TensorInfo, read: Callable[[TensorInfo], torch.Tensor]) -> torch.Tensor:
    """The tensor that is meant, in its own shape; `read` returns what lies in one place."""
    if info.value is not None:
        return info.value
    if info.parts:
        parts = [assemble(part, read) for part in info.parts]
        return torch.cat(parts) if info.combine is None else info.combine(parts)
    return read(info).reshape(info.shape)


def split_rows(info: TensorInfo, sizes: Sequence[int]) -> list[TensorInfo]:
    """The pieces of a tensor that has several others, one below the other, of so many rows each."""
    start, pieces = info.rows[0] if info.rows else 0, []
    for size in sizes:
        pieces.append(replace(info, shape=(size, *info.shape[1:]), rows=(start, start + size)))
        start += size
    return pieces


def join_rows(parts: Sequence[TensorInfo]) -> TensorInfo:
    """One tensor of several, one below the other."""
    rows = sum(part.shape[0] for part in parts)
    return replace(parts[0], shape=(rows, *parts[0].shape[1:]), rows=None, parts=tuple(parts))


# ---------------------------------------------------------------------------------------------------------------------
# Plan
# ---------------------------------------------------------------------------------------------------------------------


def rename(name: str, table: Table) -> str | None:
    """The name after the first rename that matches, `None` if there is none."""
    for pattern, replacement in table:
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return None


@dataclass
class Target:
    """
    What a model asks for.

    wanted: name and shape of every tensor that it builds.
    unused: name and shape of tensors that the source has and the model does not build.
    tied: names that the model reads under another name: `{name: the name it is stored under}`.
    ignored: patterns of (renamed) buffers that files carry and no model reads.
    renamings: by prefix of a part, what transformers renamed inside it since older files were written.
    """

    wanted: dict[str, tuple[int, ...]]
    unused: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    ignored: Sequence[str] = ()
    renamings: dict[str, list[WeightRenaming]] = field(default_factory=dict)

    def current(self, name: str) -> str:
        """The name in today's transformers of a tensor that an older file names `name`."""
        if name in self.wanted or name in self.unused:
            return name
        return self._translated(name, self.renamings)

    def former(self, name: str) -> str:
        """The name that files on the Hub have for a tensor that is `name` today."""
        reversed_renamings = {
            prefix: [
                renaming.reverse_transform() for renaming in renamings[::-1] if not isinstance(renaming, PrefixChange)
            ]
            for prefix, renamings in self.renamings.items()
        }
        return self._translated(name, reversed_renamings)

    @staticmethod
    def _translated(name: str, by_prefix: dict[str, list[WeightRenaming]]) -> str:
        for prefix, renamings in by_prefix.items():
            if name.startswith(prefix):
                rest = name.removeprefix(prefix)
                for renaming in renamings:
                    rest = renaming.rename_source_key(rest)[0]
                return prefix + rest
        return name


def renamings_of(part: PreTrainedModel) -> list[WeightRenaming]:
    """What transformers itself renames when it loads files of this part."""
    conversions = get_model_conversion_mapping(part, add_legacy=False)
    return [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]


@dataclass
class Plan:
    """
    Where every tensor goes.

    names: source name to target name, in the order of the files.
    dropped: those source names whose tensors go to the side file.
    tied: those source names whose tensors the target stores under another name, and that name.
    """

    names: dict[str, str]
    dropped: set[str]
    tied: dict[str, str]

    def kept(self) -> list[str]:
        return [name for name in self.names if name not in self.dropped and name not in self.tied]


def plan_tensors(
    source: Mapping[str, TensorInfo],
    table: Table,
    target: Target,
    what: str,
    shapes: Mapping[str, tuple] | None = None,
) -> Plan:
    """
    Gives every tensor of the source its place.

    Args:
        source: what the source holds.
        table: the renames.
        target: what the model asks for.
        what: the source, for messages.
        shapes: shapes that the source has for these target names, where an edit follows.

    Raises:
        ConversionError: tensors that are unknown, missing, duplicated or wrongly shaped, all of them listed.
    """
    expected = {**target.unused, **target.wanted}
    names, dropped, tied, origins = {}, set(), {}, {}
    unknown, wrong = [], []
    for name, info in source.items():
        renamed = rename(name, table)
        if renamed is None:
            unknown.append(name)
            continue
        renamed = target.current(renamed)
        if renamed in expected:
            shape = tuple((shapes or {}).get(renamed, expected[renamed]))
            if info.shape != shape:
                wrong.append(f"{name} is {list(info.shape)}, expected {list(shape)}")
            if renamed in target.tied:
                tied[name] = target.tied[renamed]
            elif renamed not in target.wanted:
                dropped.add(name)
        elif any(re.search(pattern, renamed) for pattern in target.ignored):
            dropped.add(name)
        else:
            unknown.append(name)
            continue
        names[name] = renamed
        origins.setdefault(renamed, []).append(name)
    duplicated = [f"{renamed} from {' and '.join(found)}" for renamed, found in origins.items() if len(found) > 1]
    missing = [name for name in expected if name not in origins and name not in target.tied]
    problems = {"unknown": unknown, "missing": missing, "duplicated": duplicated, "wrong shape": wrong}
    if any(problems.values()):
        raise ConversionError(f"{what} does not hold the tensors that its config asks for:", problems)
    plan = Plan(names, dropped, tied)
    _check_tied(source, plan, target)
    return plan


def _check_tied(source: Mapping[str, TensorInfo], plan: Plan, target: Target) -> None:
    """A file may hold a tied tensor under both names; if they differ, the config or the file is wrong."""
    by_target = {renamed: name for name, renamed in plan.names.items()}
    for name in plan.tied:
        twin = by_target[target.tied[plan.names[name]]]
        pair = [dict(read_tensors({key: source[key]}))[key] for key in (name, twin)]
        if not torch.equal(*pair):
            raise ConversionError(
                f"The config ties '{name}' to '{twin}', but the file holds two different tensors: set "
                "tie_word_embeddings to false in the source's config.json if the model is not tied."
            )


# ---------------------------------------------------------------------------------------------------------------------
# Write
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def staged(destination: str | os.PathLike) -> Iterator[Path]:
    """A temporary sibling of `destination` that takes its name when the block ends well, and goes when it does not."""
    try:
        with writing_folder(Path(destination).absolute()) as folder:
            yield folder
    except FileExistsError as error:
        raise ConversionError(str(error)) from error


def write_shards(
    folder: Path,
    tensors: Mapping[str, TensorInfo],
    *,
    shard_bytes: int = SHARD_BYTES,
    edits: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] | None = None,
    label: str = "writing",
) -> None:
    """
    Streams tensors into `model.safetensors`, or into shards and their index, holding one shard in memory at a time.

    Args:
        folder: where to write.
        tensors: new name to what is read for it, in the order of the source files.
        shard_bytes: a shard ends before it grows beyond this; a tensor is never split.
        edits: by new name, what happens to a tensor between reading and writing.
    """
    shards, size = [[]], 0
    for name, info in tensors.items():
        if shards[-1] and size + info.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += info.nbytes
    count = len(shards)
    files = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        files = ["model.safetensors"]
    read, total, weight_map = set(), 0, {}
    stream = iter(tqdm(read_tensors(tensors), total=len(tensors), desc=label, unit="tensor", disable=None))
    for file, names in zip(files, shards, strict=True):
        shard = {}
        for _ in names:
            name, tensor = next(stream)
            if tensors[name] in read:
                tensor = tensor.clone()  # a tied tensor under its second name; files may not share memory
            read.add(tensors[name])
            shard[name] = (edits or {}).get(name, torch.Tensor.contiguous)(tensor)
            total += shard[name].nbytes
            weight_map[name] = file
        save_file(shard, folder / file, metadata={"format": "pt"})
    if count > 1:
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_converted(
    folder: Path,
    source: Mapping[str, TensorInfo],
    plan: Plan,
    *,
    shard_bytes: int = SHARD_BYTES,
    edits: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] | None = None,
    aside: Mapping[str, TensorInfo] | None = None,
) -> None:
    """Writes the weights of a plan, and the side file of what it drops and of what else is to be kept `aside`."""
    write_shards(
        folder, {plan.names[name]: source[name] for name in plan.kept()}, shard_bytes=shard_bytes, edits=edits
    )
    side = {plan.names[name]: source[name] for name in plan.names if name in plan.dropped} | dict(aside or {})
    if side:
        save_file(dict(read_tensors(side)), folder / DROPPED, metadata={"format": "pt"})


def describe_plan(source: Mapping[str, TensorInfo], plan: Plan) -> str:
    """The key map as text, one line a tensor."""
    notes = {name: "  (new)" for name in plan.names if source[name].value is not None}
    notes |= {name: "  (merged)" for name in plan.names if source[name].combine is not None}
    notes |= {**dict.fromkeys(plan.dropped, "  (kept aside)"), **dict.fromkeys(plan.tied, "  (tied)")}
    return "\n".join(
        f"{name} -> {renamed}  {str(source[name].dtype).removeprefix('torch.')}{list(source[name].shape)}"
        f"{notes.get(name, '')}"
        for name, renamed in plan.names.items()
    )


# ---------------------------------------------------------------------------------------------------------------------
# What stands beside the weights
# ---------------------------------------------------------------------------------------------------------------------


def has_tokenizer(folder: Path) -> bool:
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    return any((folder / name).is_file() for name in names)


def has_image_processor(folder: Path) -> bool:
    """In a file of its own, as version 4 wrote it, or inside the processor's, as version 5 does."""
    path = folder / "processor_config.json"
    return (folder / "preprocessor_config.json").is_file() or (path.is_file() and "image_processor" in read_json(path))


def missing_parts(tokenizer: Path, image_processor: Path) -> list[str]:
    """Which of the two a processor would lack."""
    there = {"tokenizer": has_tokenizer(tokenizer), "image processor": has_image_processor(image_processor)}
    return [part for part, found in there.items() if not found]


def name_image_token(tokenizer: PreTrainedTokenizerBase, image_token: str, **others: str) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer whose `image_token` has that name, and others likewise; it is added where the vocabulary
    lacks it."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder, image_token=image_token, **others)


def write_hub_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes a tokenizer in files that transformers 4 and 5 read, without a word of the zoo."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    content = read_json(path)
    for name in ("auto_map", "processor_class", "backend", "is_local", "local_files_only"):
        content.pop(name, None)
    if content.get("tokenizer_class") == "TokenizersBackend":
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
    # Version 4 has the named tokens where version 5 has the others.
    others = content.pop("extra_special_tokens", None)
    content["extra_special_tokens"] = content.pop("model_specific_special_tokens", {})
    if others:
        content["additional_special_tokens"] = others
    write_json(path, content)


def suppress_image_token(path: Path, written: Path, image_token_id: int) -> None:
    """Copies a generation config and suppresses the image token: a sampled placeholder would ask for an image."""
    content = read_json(path)
    content["suppress_tokens"] = sorted({*(content.get("suppress_tokens") or []), image_token_id})
    write_json(written, content)


def allow_image_token(path: Path, written: Path, image_token_id: int) -> None:
    """The inverse of `suppress_image_token`."""
    content = read_json(path)
    kept = [token for token in content.pop("suppress_tokens", None) or [] if token != image_token_id]
    write_json(written, {**content, **({"suppress_tokens": kept} if kept else {})})


def model_card(name: str, kind: str, model_type: str, script: str, proof: str) -> str:
    """A card that says where the weights came from and what was proven."""
    local = Path(name).exists()
    origin = Path(name).resolve().name if local else name
    head = ["library_name: transformers", "pipeline_tag: image-text-to-text"]
    head += [] if local else [f"base_model: {name}"]
    head += ["tags:", "- vlm-zoo", f"- {model_type}"]
    return "\n".join(
        [
            "---",
            *head,
            "---",
            "",
            f"# {origin.rsplit('/', 1)[-1]} for vlm-zoo",
            "",
            f"Converted from `{origin}` (`{kind}`) by `python -m conversion.{script}`. The weights are the source's, "
            "tensor by tensor, and so is their licence.",
            "",
            proof,
            "",
        ]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def command_line(module: str, description: str, reverse: bool = True) -> argparse.ArgumentParser:
    """The options that every conversion script has; those of the way back only where there is one."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SRC", help="folder, weight file or hub id")
    parser.add_argument("destination", metavar="DST", nargs="?", help="folder to write; not needed with --dry-run")
    parser.add_argument("--dry-run", action="store_true", help="show the key map and write nothing")
    check = parser.add_mutually_exclusive_group()
    check.add_argument("--verify", action="store_true", help="if DST exists, prove it instead of converting")
    check.add_argument("--no-verify", action="store_true", help="convert without running the two models")
    parser.add_argument("--tokenizer", help="folder or hub id of a tokenizer, where SRC has none")
    parser.add_argument("--image-processor", help="folder or hub id of an image processor, where SRC has none")
    parser.add_argument("--shard-size", type=float, default=SHARD_BYTES / 1e9, metavar="GB", help="default: 5")
    if reverse:
        parser.add_argument("--reverse", action="store_true", help="SRC is a zoo folder: go back, file by file")
        parser.add_argument("--origin", help="with --reverse: folder of the first conversion, if SRC is a later state")
    return parser


def run(parser: argparse.ArgumentParser, job: Callable[[argparse.Namespace], str], arguments: list[str] | None) -> int:
    """Runs a script's job and shows what it returns; the exit status is 0 only when it ends without an error."""
    options = parser.parse_args(arguments)
    if options.destination is None and not options.dry_run:
        parser.error("DST is required")
    return show(job, options)


def show(job: Callable[[argparse.Namespace], str], options: argparse.Namespace) -> int:
    """Shows what a job returns, or its error; returns the exit status."""
    try:
        print(job(options))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
