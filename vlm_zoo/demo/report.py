"""The demo's report: `report.json` for programs, `report.html` (pictures inside, nothing loaded from elsewhere) for
people."""

import base64
import io
import json
from importlib.resources import files
from pathlib import Path

import jinja2
import matplotlib
from datasets import load_dataset
from matplotlib.figure import Figure

from .. import data


CARDS_PER_TASK = 4


def write_report(report: dict, out: Path) -> None:
    """Writes `report.json` (without the single answers, which `answers.json` keeps) and `report.html` to `out`."""
    answers = {
        stage["name"]: {split: stage[split].pop("answers") for split in ("validation", "validation_new_artist")}
        for stage in report["stages"]
    }
    (out / "answers.json").write_text(json.dumps(answers, indent=1), encoding="utf-8")
    (out / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    template = jinja2.Template(
        (files(__package__) / "report.html.jinja").read_text(encoding="utf-8"), autoescape=True, trim_blocks=True
    )
    last = report["stages"][-1]
    page = template.render(
        report=report,
        curve=loss_curve(report["stages"]),
        cards=cards(answers[last["name"]]["validation"], last["dataset"]),
        last=last,
        per_task=CARDS_PER_TASK,
    )
    (out / "report.html").write_text(page, encoding="utf-8")


def cards(answers: list[dict], dataset: str) -> list[dict]:
    """The first answers of each task, with their pictures, in the order of the sample."""
    chosen, count = {}, {}
    for item in answers:
        if count.setdefault(item["task"], 0) < CARDS_PER_TASK:
            count[item["task"]] += 1
            chosen[item["id"]] = item
    rows = load_dataset(str(data.path(dataset)), split="validation")
    images = {row["id"]: row["images"] for row in rows if row["id"] in chosen}
    cards = [
        {
            **item,
            "images": [picture(image) for image in images[item["id"]]],
            "right": item["answer"] == item["reference"],
        }
        for item in chosen.values()
    ]
    return sorted(cards, key=lambda card: card["task"])


def picture(image) -> str:
    """An image as a PNG data address."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def loss_curve(stages: list[dict]) -> str:
    """The training loss of all stages, one after the other, as a PNG data address."""
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7, 2.6), layout="constrained")
        axes = figure.add_subplot()
        first = 0
        for stage in stages:
            steps = [first + entry["step"] for entry in stage["losses"]]
            axes.plot(
                steps, [entry["loss"] for entry in stage["losses"]], label=f"{stage['name']} ({stage['dataset']})"
            )
            first = steps[-1] if steps else first
        axes.set(xlabel="optimiser step", ylabel="loss of the answers", ylim=(0, None))
        axes.legend(frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=144)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
