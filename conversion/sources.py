"""The table of sources: checkpoints that are converted, proven and taken back, and what was measured.

    python -m conversion.sources tests/oracles             a row for each checkpoint in there, as Markdown
    python -m conversion.sources FOLDER --out runs/zoo     the converted folders are kept

Every checkpoint goes to the zoo, is compared with its source on the same inputs, and goes back; then every tensor of
every file that was read is compared with what went back, bit by bit.
"""

import argparse
import importlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch

from . import blip2, engine, lavis, llava, llava_original, mrope, openflamingo, ovis, ovis2_5, parity
from .engine import ConversionError


SCRIPTS = {
    "blip2": tuple(blip2.FORMATS),
    "flamingo": ("idefics",),
    "llava": (*llava.FORMATS, *llava_original.TEXT_TYPES),
    "mrope": tuple(mrope.FORMATS),
    "vet": ("ovis2", ovis.MODEL_TYPE, *ovis2_5.MODEL_TYPES),
}
HEAD = ("source", "script", "compared with", "logits, largest difference", "greedy text", "way back")


def script_of(folder: Path) -> ModuleType:
    """The conversion that reads a checkpoint; one that none reads is a `ConversionError`."""
    if lavis.is_lavis(folder):
        return blip2
    if openflamingo.is_openflamingo(folder):
        return importlib.import_module("conversion.flamingo")
    known = [kind for kinds in SCRIPTS.values() for kind in kinds]
    found = engine.read_json(engine.checkpoint_folder(folder, known) / "config.json").get("model_type")
    for name, kinds in SCRIPTS.items():
        if found in kinds:
            return importlib.import_module(f"conversion.{name}")
    raise ConversionError(f"{folder} is of model type '{found}'; known are {', '.join(known)}.")


def differing(source: Path, back: Path) -> Iterator[str]:
    """The tensors in the files that went back which are not, bit by bit, those of the source."""
    for path in sorted(back.rglob("*")):
        if path.suffix not in (".safetensors", ".bin", ".pth", ".pt"):
            continue
        place = path.relative_to(back)
        before, after = engine.read_file(source / place), engine.read_file(path)
        yield from (f"{place}: {name}" for name in before.keys() ^ after.keys())
        same = {name: info for name, info in before.items() if name in after}
        read = zip(engine.read_tensors(same), engine.read_tensors({name: after[name] for name in same}), strict=True)
        for (name, one), (_, other) in read:
            if one.dtype != other.dtype or not torch.equal(one, other):
                yield f"{place}: {name}"


def row(source: Path, out: Path) -> tuple[str, ...]:
    """Converts a checkpoint there and back, and says what was measured."""
    script = script_of(source)
    zoo, back = out / source.name, out / f"{source.name}-back"
    report = script.convert(source, zoo)
    script.reverse(zoo, back, verify=False)
    wrong = list(differing(source, back))
    stages = {stage["stage"]: stage for stage in report["stages"]}
    logits = stages["logits"]
    return (
        source.name,
        script.__name__.removeprefix("conversion."),
        report["compared_with"].partition(", float32")[0],
        f"{logits['max_abs_diff']:.1e} of {logits['max_abs_value']:.2g}",
        f"equal, {stages['greedy_text']['tokens']} tokens" if stages["greedy_text"]["equal"] else "differs",
        "bit for bit" if not wrong else f"{len(wrong)} tensors differ",
    )


def job(arguments: argparse.Namespace) -> str:
    """The table, which is also shown row by row."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(arguments.out or temporary)
        rows = [row(source, out) for source in sorted(arguments.folder.absolute().iterdir()) if source.is_dir()]
    lines = [HEAD, ("---",) * len(HEAD), *rows]
    versions = ", ".join(f"{name} {version}" for name, version in parity.versions().items())
    return "\n".join([*(f"| {' | '.join(cells)} |" for cells in lines), "", f"float32, eager attention; {versions}"])


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 0 only when every checkpoint went there and back."""
    parser = argparse.ArgumentParser(
        prog="python -m conversion.sources",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of checkpoints, a folder each")
    parser.add_argument("--out", type=Path, help="where the converted folders are kept; by default nowhere")
    return engine.show(job, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
