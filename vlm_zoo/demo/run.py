"""The demo's main line: parts, build, stages, scores from a fresh process, report."""

import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from ..building import build
from ..registry import ZOO
from ..version import __version__
from .parts import enlarge, write_parts
from .recipe import FAST, FULL, Recipe, Stage
from .report import write_report
from .train import LOG


logger = logging.getLogger(__name__)
SPLITS = ("validation", "validation_new_artist")


def run(out: str | os.PathLike, arch: str = "llava", *, fast: bool = False, recipe: Recipe | None = None) -> dict:
    """
    Builds, trains, saves, reloads, questions, and reports.

    Args:
        out: folder of the run. A run that died goes on from there.
        arch: an architecture of the zoo.
        fast: tiles alone, in under three minutes.
        recipe: instead of the embedded one.

    Returns:
        What is written to `out/report.json`.

    Raises:
        ValueError: for an unknown architecture, or when `out` holds a run with other settings.
    """
    if f"zoo_{arch}" not in ZOO:
        raise ValueError(f"Unknown architecture '{arch}'; the zoo has {', '.join(e.name for e in ZOO.values())}.")
    out, recipe = Path(out), recipe or (FAST if fast else FULL)
    claim(out, {"arch": arch, "recipe": recipe.to_dict()})
    start = time.perf_counter()
    vision, language = write_parts(recipe, out / "parts")
    current = out / "built"
    if not current.exists():
        logger.info("Building a %s from %s and %s", arch, vision, language)
        small = ZOO[f"zoo_{arch}"].config.small_fields(recipe.vision["hidden_size"], from_scratch=True)
        build(arch, vision, language, current, vision_feature_layer=-1, **small)  # the tower keeps its one layer
    stages = []
    for stage in recipe.stages:
        began = time.perf_counter()
        source = enlarge(current, stage.image_size, out / f"{stage.name}.start")
        current = out / stage.name
        logger.info("Stage %s on %s", stage.name, stage.dataset)
        if not current.exists():
            paths = {"source": str(source), "target": str(current)}
            in_a_fresh_process("train", json.dumps({"stage": asdict(stage), "seed": recipe.seed, **paths}))
        trained = time.perf_counter()
        scores = scores_of(current, stage, recipe, out / f"{stage.name}.scores.json")
        stages.append(
            {
                "name": stage.name,
                "dataset": stage.dataset,
                "trained": ", ".join(stage.train),
                "training_seconds": round(trained - began, 1),
                "evaluation_seconds": round(time.perf_counter() - trained, 1),
                "losses": json.loads((current / LOG).read_text(encoding="utf-8")),
                **scores,
            }
        )
        logger.info(
            "Stage %s: accuracy %.3f, blind %.3f",
            stage.name,
            scores["validation"]["accuracy"],
            scores["validation"]["blind_accuracy"],
        )
    last = stages[-1]["validation"]
    report = {
        "arch": arch,
        "model": str(current),
        "accuracy": last["accuracy"],
        "blind_accuracy": last["blind_accuracy"],
        "accuracy_by_task": {task: score["accuracy"] for task, score in last["tasks"].items()},
        "blind_accuracy_by_task": {task: score["blind_accuracy"] for task, score in last["tasks"].items()},
        "sample_rows": last["rows"],
        "sample_seed": recipe.seed,
        "new_artist_accuracy": stages[-1]["validation_new_artist"]["accuracy"],
        "new_artist_blind_accuracy": stages[-1]["validation_new_artist"]["blind_accuracy"],
        "seconds": round(time.perf_counter() - start, 1),
        "versions": {"vlm-zoo": __version__, **{name: version(name) for name in ("torch", "transformers", "trl")}},
        "recipe": recipe.to_dict(),
        "stages": stages,
    }
    write_report(report, out)
    return report


def claim(out: Path, settings: dict) -> None:
    """Makes `out` the folder of a run with these settings, or goes on with the run that it holds."""
    file = out / "settings.json"
    settings = json.loads(json.dumps(settings))
    if file.exists():
        held = json.loads(file.read_text(encoding="utf-8"))
        if held != settings:
            raise ValueError(
                f"{out} holds a run of '{held.get('arch')}' with other settings than this of '{settings['arch']}': "
                "name another --out, or delete this one."
            )
        logger.info("Going on with the run in %s", out)
        return
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and holds no run of the demo: name another --out.")
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def scores_of(folder: Path, stage: Stage, recipe: Recipe, result: Path) -> dict:
    """Scores a saved folder in a fresh process, unless `result` holds its scores already."""
    if not result.exists():
        fields = {"model": str(folder), "dataset": stage.dataset, "splits": SPLITS}
        request = json.dumps({**fields, "sample": recipe.sample, "seed": recipe.seed})
        in_a_fresh_process("reload", request, str(result))
    return json.loads(result.read_text(encoding="utf-8"))


def in_a_fresh_process(module: str, *arguments: str) -> None:
    """
    Runs a module of the demo; its progress goes to this process's standard error.

    Its threads sleep while they wait: threads that spin starve the process that reads rows, and each other, as soon as
    the machine has fewer free cores than threads.
    """
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    command = [sys.executable, "-m", f"vlm_zoo.demo.{module}", *arguments]
    subprocess.run(command, check=True, env=environment)
