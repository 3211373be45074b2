"""The way back: every file that a conversion read, tensor by tensor and bit for bit, out of the zoo's folder.

While a folder is converted, its record says of every tensor of every file where its numbers went:

    conversion.json        files: path, and for each tensor dtype, shape and pieces [zoo's tensor, first, last + 1]
                           edits: what happened to a zoo's tensor between reading and writing
    dropped.safetensors    what the zoo does not build, and what an edit cannot give back
    upstream/              configs, tokenizers and image processors as they were, byte by byte

Pieces count numbers, not rows: joined, split and reshaped tensors are all runs of numbers of one another. A record is
as little to be trusted as any file from a hub: its paths stay within the folder that is written.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import PreTrainedConfig

from . import edits as edits_module
from . import engine
from .edits import Edit
from .engine import ConversionError, Plan, TensorInfo


UPSTREAM = "upstream"
ORIGINAL = "before its edit: "  # marks what an edit cannot give back
UNREAD = "unread: "  # and what of a file the zoo has no place for
MARKS = (ORIGINAL, UNREAD)
# What stands beside weights and is not weights.
BESIDE = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "*.model",
)
INNER = ("qformer_tokenizer",)


def settings_of(config: PreTrainedConfig) -> dict[str, Any]:
    """The config's content as JSON has it, without what saving and loading add."""
    transient = ("auto_map", "architectures", "transformers_version", "_name_or_path", "dtype")
    content = json.loads(config.to_json_string(use_diff=False))

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(inner) for name, inner in value.items() if name not in transient}
        return [plain(inner) for inner in value] if isinstance(value, list) else value

    return plain(content)


# ---------------------------------------------------------------------------------------------------------------------
# On the way there
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """The numbers from `first` up to `last` of a tensor in a file are those from `start` on of one of the zoo's."""

    first: int
    last: int
    zoo: str
    start: int


@dataclass
class Places:
    """
    Where the files of a source belong in what is written on the way back.

    root: the folder of the source; what lies in it keeps its path.
    apart: folders and files that lie elsewhere, and their paths.
    beside: files beside the weights that are no usual ones.
    home: the path of the folder with its config.
    """

    root: Path
    apart: Mapping[Path, str] = field(default_factory=dict)
    beside: tuple[Path, ...] = ()
    home: str = "."

    def is_own(self, file: Path) -> bool:
        return file.is_relative_to(self.root)

    def label(self, file: Path) -> str:
        if self.is_own(file):
            return file.relative_to(self.root).as_posix()
        for part, label in self.apart.items():
            if file == part:
                return label
            if file.is_relative_to(part):
                return (PurePosixPath(label) / file.relative_to(part).as_posix()).as_posix()
        return f"{file.parent.name}/{file.name}"


def trace(
    tensors: Mapping[str, TensorInfo], plan: Plan, edits: Mapping[str, Edit]
) -> tuple[dict[Path, dict[str, list[Piece]]], dict[str, str], dict[str, TensorInfo]]:
    """
    Where the numbers of every file went.

    Args:
        tensors: what a source holds, after joining and splitting.
        plan: its plan.
        edits: by the zoo's name.

    Returns:
        Pieces by file and name in there; tensors that lie in no file but were computed from several, by their own
        name; and, by their name in the side file, those that an edit cannot give back.
    """
    files, computed, originals = {}, {}, {}
    for name, renamed in plan.names.items():
        zoo, info = plan.tied.get(name, renamed), tensors[name]
        if info.value is not None:
            continue
        if is_computed(info):
            computed[name] = zoo
            continue
        if zoo in edits and not edits[zoo].is_exact:
            originals[f"{ORIGINAL}{zoo}"] = info
        for leaf, start in leaves(info):
            size = math.prod(leaf.shape)
            first = 0 if leaf.rows is None else leaf.rows[0] * math.prod(leaf.shape[1:])
            pieces = files.setdefault(leaf.file, {}).setdefault(leaf.name, [])
            pieces.append(Piece(first, first + size, zoo, start))
    return files, computed, originals


def is_computed(info: TensorInfo) -> bool:
    return info.combine is not None or any(map(is_computed, info.parts))


def leaves(info: TensorInfo, start: int = 0) -> Iterator[tuple[TensorInfo, int]]:
    """What a tensor is made of, and at which of its numbers each begins."""
    if not info.parts:
        yield info, start
        return
    for part in info.parts:
        yield from leaves(part, start)
        start += math.prod(part.shape)


def covering(pieces: list[Piece], size: int) -> list[Piece] | None:
    """Those of the pieces that make a tensor of this size, one after the other; `None` where numbers are missing."""
    chosen, reached = [], 0
    for piece in sorted(pieces, key=lambda piece: (piece.first, -piece.last)):
        if piece.first == reached and piece.last > reached:
            chosen.append(piece)
            reached = piece.last
    return chosen if reached == size else None


def make_record(
    tensors: Mapping[str, TensorInfo], plan: Plan, edits: Mapping[str, Edit], places: Places
) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """
    What the record of a conversion says about the way back, and what goes to the side file for it.

    Tensors of the source's own files that nothing reads go there too, unless they are a second name of one that is
    read; of a file that lies elsewhere (a named backbone's) they do not.
    """
    traced, computed, aside = trace(tensors, plan, edits)
    files = []
    for file, found in traced.items():
        held, label, entries, unread = engine.read_file(file), places.label(file), {}, []
        for name, info in held.items():
            pieces = covering(found.get(name, []), math.prod(info.shape))
            entry = {"dtype": str(info.dtype).removeprefix("torch."), "shape": list(info.shape)}
            if pieces is None:
                if not places.is_own(file):
                    continue
                unread.append(name)
            entries[name] = entry | {"pieces": [[p.zoo, p.start, p.start + p.last - p.first] for p in pieces or ()]}
        twins = twins_of(held, unread)
        for name in unread:
            if name in twins:
                entries[name]["pieces"] = entries[twins[name]]["pieces"]
            else:
                aside[f"{UNREAD}{label}: {name}"] = held[name]
                entries[name]["pieces"] = [[f"{UNREAD}{label}: {name}", 0, math.prod(held[name].shape)]]
        inside = None if file.suffix == ".safetensors" else engine.state_key(file)
        files.append({"path": label, "inside": inside, "tensors": entries})
    before = {plan.tied.get(name, renamed): list(tensors[name].shape) for name, renamed in plan.names.items()}
    record = {
        "files": files,
        "computed": {"path": places.home, "tensors": computed},
        "edits": {zoo: {**edit.record(), "before": before[zoo]} for zoo, edit in edits.items() if zoo in before},
        "new": [plan.names[name] for name in plan.kept() if tensors[name].value is not None],
    }
    return record, aside


def twins_of(held: Mapping[str, TensorInfo], unread: list[str]) -> dict[str, str]:
    """Unread tensors of a file that are, bit by bit, one that is read; those of one value alone are nobody's twin."""
    if not unread:
        return {}
    likely = {(held[name].shape, held[name].dtype) for name in unread}
    compared = {name: info for name, info in held.items() if (info.shape, info.dtype) in likely}
    digests = {
        name: digest(tensor)
        for name, tensor in engine.read_tensors(compared)
        if tensor.numel() and bool((tensor != tensor.reshape(-1)[0]).any())
    }
    read = {key: name for name, key in digests.items() if name not in set(unread)}
    return {name: read[digests[name]] for name in unread if digests.get(name) in read}


def digest(tensor: torch.Tensor) -> tuple:
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return tuple(tensor.shape), tensor.dtype, hashlib.sha256(content).hexdigest()


def copy_beside(tensors: Mapping[str, TensorInfo], folder: Path, homes: list[Path], places: Places) -> list[str]:
    """
    Copies what stands beside the weights, byte by byte, into a converted folder's `UPSTREAM`.

    Args:
        tensors: what the source holds.
        folder: the converted folder.
        homes: folders to look in beside those of the tensors' files.
        places: where files belong.

    Returns:
        Their paths in there.
    """
    files = {leaf.file for info in tensors.values() for leaf, _ in leaves(info) if leaf.file != Path()}
    folders = dict.fromkeys([*homes, *sorted(file.parent for file in files)])
    found = [path for home in folders for pattern in BESIDE for path in sorted(home.glob(pattern))]
    found += [path for home in folders for inner in INNER for path in sorted((home / inner).glob("*"))]
    copied, is_merged = [], any(map(is_computed, tensors.values()))
    for path in dict.fromkeys([*found, *places.beside]):
        label = places.label(path)
        # Weights that were computed are written anew, and so is the index of their shards
        if path.is_file() and label not in copied and not (is_merged and label.endswith(".index.json")):
            target = folder / UPSTREAM / label
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            copied.append(label)
    return copied


# ---------------------------------------------------------------------------------------------------------------------
# On the way back
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Return:
    """
    The way back of a zoo folder.

    home: the folder of the first conversion.
    record: its record.
    tensors: what the zoo's folder holds, and the side file.
    edits: what to undo, by the zoo's name, with the shape before.
    """

    home: Path
    record: dict[str, Any]
    tensors: dict[str, TensorInfo]
    edits: dict[str, tuple[Edit, list[int]]]

    def describe(self) -> str:
        """Which tensors become which, a line each."""
        lines = [
            f"{' + '.join(f'{zoo}[{start}:{stop}]' for zoo, start, stop in entry['pieces'])} -> "
            f"{file['path']}: {name}  {entry['dtype']}{entry['shape']}"
            for file in self.record["files"]
            for name, entry in file["tensors"].items()
        ]
        return "\n".join([*lines, *(f"{zoo} -> {name}" for name, zoo in self.record["computed"]["tensors"].items())])

    def read(self, zoo: str) -> torch.Tensor:
        """A tensor of the zoo's as the source had it, before it was split or joined with others."""
        tensor = engine.read_tensor(self.tensors[zoo])
        if zoo not in self.edits:
            return tensor
        edit, before = self.edits[zoo]
        original = None if edit.is_exact else engine.read_tensor(self.tensors[f"{ORIGINAL}{zoo}"])
        return edit.undo(tensor, before[0], original)


def find(folder: Path, home: Path, script: str, config: PreTrainedConfig) -> Return:
    """
    Finds every tensor of the way back.

    Args:
        folder: the zoo's folder.
        home: the folder of the first conversion, where that is an earlier state of the model.
        script: the conversion's name.
        config: the zoo's config.

    Raises:
        ConversionError: there is no record, it is another script's, the model has changed its shape since, or tensors
            are missing or left over.
    """
    if not (home / engine.RECORD).is_file():
        raise ConversionError(
            f"{home} has no {engine.RECORD}: it was not converted from an upstream checkpoint, or is a later state of "
            "the model; --origin names the folder of the first conversion."
        )
    record = engine.read_json(home / engine.RECORD)
    if "files" not in record or record.get("script") != script:
        raise ConversionError(
            f"{home / engine.RECORD} was written by conversion.{record.get('script', 'an older version')}, this is "
            f"conversion.{script}."
        )
    try:
        return _find(folder, home, record, config)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConversionError(f"{home / engine.RECORD} is damaged ({type(error).__name__}: {error}).") from error


def _find(folder: Path, home: Path, record: dict[str, Any], config: PreTrainedConfig) -> Return:
    settings = settings_of(config)
    changed = sorted(name for name in settings if settings[name] != record["settings"].get(name))
    if changed:
        raise ConversionError(f"The config is no longer that of {record['source']}:", {"changed": changed})
    edits = {
        zoo: (edits_module.from_record(without(edit, "before")), list(edit["before"]))
        for zoo, edit in record["edits"].items()
    }
    entries = [entry for file in record["files"] for entry in file["tensors"].values()]
    wanted = dict.fromkeys(zoo for entry in entries for zoo, _, _ in entry["pieces"])
    wanted |= dict.fromkeys(record["computed"]["tensors"].values())
    wanted |= {f"{ORIGINAL}{zoo}": None for zoo, (edit, _) in edits.items() if not edit.is_exact}
    found, side = engine.read_checkpoint(folder), home / engine.DROPPED
    new = sorted(found.keys() - wanted.keys() - set(record["names"].values()) - set(record["new"]))
    tensors = {**(engine.read_file(side) if side.is_file() else {}), **found}
    missing = [zoo for zoo in wanted if zoo not in tensors]
    if new or missing:
        hint = "" if side.is_file() else f" ({home} has no {side.name}: --origin names the first conversion's folder)"
        raise ConversionError(
            f"{folder}{hint} does not hold what came from {record['source']}:", {"unknown": new, "missing": missing}
        )
    return Return(home, record, tensors, edits)


def without(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != name}


def place_within(folder: Path, label: str) -> Path:
    """A path of a record inside the folder that is written, whose own folder is made."""
    path = engine.path_within(folder, label, engine.RECORD)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write(back: Return, folder: Path, shard_bytes: int = engine.SHARD_BYTES) -> None:
    """Writes every file of the way back; one file's tensors are held in memory at a time."""
    for label in back.record["beside"]:
        source = back.home / UPSTREAM / PurePosixPath(label)
        target = place_within(folder, label)
        if not source.is_file():
            raise ConversionError(f"{back.home} lacks {UPSTREAM}/{label}, which its record names.")
        shutil.copyfile(source, target)
    count = sum(len(file["tensors"]) for file in back.record["files"])
    with tqdm(total=count, desc="writing", unit="tensor", disable=None) as progress:
        for file in back.record["files"]:
            path, state = place_within(folder, file["path"]), {}
            for name, entry in file["tensors"].items():
                state[name] = assembled(name, entry, back.read)
                progress.update()
            if path.suffix == ".safetensors":
                save_file(state, path, metadata={"format": "pt"})
            else:
                torch.save(state if file["inside"] is None else {file["inside"]: state}, path)
    computed = back.record["computed"]["tensors"]
    if computed:
        home = place_within(folder, back.record["computed"]["path"])
        home.mkdir(exist_ok=True)
        infos = {name: back.tensors[zoo] for name, zoo in computed.items()}
        undo = {
            name: lambda tensor, edit=back.edits[zoo]: edit[0].undo(tensor, edit[1][0]).contiguous()
            for name, zoo in computed.items()
            if zoo in back.edits
        }
        engine.write_shards(home, infos, shard_bytes=shard_bytes, edits=undo)


def assembled(name: str, entry: Mapping[str, Any], read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """A tensor of a file out of its pieces."""
    parts = [read(zoo).reshape(-1)[start:stop] for zoo, start, stop in entry["pieces"]]
    tensor = torch.cat(parts) if len(parts) > 1 else parts[0].clone()
    if tensor.numel() != math.prod(entry["shape"]):
        raise ConversionError(f"{name} has {tensor.numel()} numbers, expected a shape of {entry['shape']}.")
    return tensor.reshape(entry["shape"])
