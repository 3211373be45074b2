"""ARR-COC's experiments on small details: accuracy against the budget of tokens, pointing, and ablations.

    python examples/arr_coc_detail.py runs/detail                     # three seeds, hours on two CPU cores
    python examples/arr_coc_detail.py runs/detail --seeds 0 --policies relevance uniform --steps 150

A run that died goes on from there. `runs/detail/results.md` holds the tables of everything that is finished.

Pages. Every row of `emoji_detail` asks about one small coloured box, or about the large drawing, of its page. At the
size of these models 26 pixels of drawing at any place of a patch are not learned in minutes, so the drawings are
larger and the page is small: the boxes of a row (48 x 40 pixels, here 64 x 64) and its large drawing (here 112 x 112)
are laid out anew on 256 x 256 pixels, at multiples of 16. A page has 256 native tokens; a box covers 16 of them.

Base. All tokens, the `mrope` architecture: tiles, then a box alone, then a few boxes, then whole pages.

Policies. Each starts from the base, keeps tower and merger as they are, and trains the language model and what it
has of its own for the same number of steps, every batch under another budget; each is asked at every budget.

    relevance        ARR-COC
    uniform          the same detail everywhere: pooled to the same number of tokens
    random           detail in random regions
    salience         query-blind: information and salience alone, with fixed tensions
    oracle           the asked box is known
    all              all tokens, trained with all tokens

Ablations: one scorer at a time (`propositional`, `perspectival`, `participatory`), `fixed` in place of learned
tensions, and `selection`, which keeps or drops single cells, in place of levels.
"""

import argparse
import json
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from datasets import load_dataset
from PIL import Image
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    SiglipImageProcessorPil,
)
from trl import SFTConfig

from vlm_zoo import build, data
from vlm_zoo.demo.parts import write_parts
from vlm_zoo.demo.recipe import FAST
from vlm_zoo.evaluation.answering import answer, permuted_images, prompt_of
from vlm_zoo.models.arr_coc import (
    Balance,
    ZooArrCocConfig,
    ZooArrCocForConditionalGeneration,
    ZooArrCocModel,
    ZooArrCocProcessor,
)
from vlm_zoo.models.relevance_vlm import SCORERS
from vlm_zoo.saving import writing_folder
from vlm_zoo.training import LeanSFTTrainer, ZooDataCollator


CELL, SIDE, BOX, LARGE = 16, 16, 4, 7  # pixels of a cell; cells of a page, a box and the large drawing, a side
NATIVE = SIDE * SIDE
BUDGETS = (16, 32, 64, 144, 200)
COLOURS = ("red", "green", "blue", "yellow", "purple", "black")
DETAIL = ("detail_what", "detail_number", "search_color")
COARSE = ("coarse_what", "coarse_side")

TOWER = {
    "model_type": "qwen3_vl_vision",
    "hidden_size": 128,
    "intermediate_size": 512,
    "depth": 1,
    "num_heads": 4,
    "patch_size": CELL,
    "temporal_patch_size": 1,
    "spatial_merge_size": 1,
    "num_position_embeddings": 9,
    "deepstack_visual_indexes": [],
    "initializer_range": 0.12,
}

# Fields of each policy beside the budget and the ladder.
LADDER = [1, 2, 4]
POLICIES = {
    "relevance": {},
    "uniform": {"allocation": "uniform"},
    "random": {"allocation": "random"},
    "salience": {"scorers": ["propositional", "perspectival"], "fixed_tensions": [1.0, 1.0, 0.5]},
    "oracle": {"gate": "none", "exploration": 0.0},
    "all": {},
}
ABLATIONS = {
    "propositional": {"scorers": ["propositional"], "fixed_tensions": [1.0, 0.5, 0.5]},
    "perspectival": {"scorers": ["perspectival"], "fixed_tensions": [0.5, 1.0, 0.5]},
    "participatory": {"scorers": ["participatory"], "fixed_tensions": [0.0, 0.5, 0.5]},
    "fixed": {"fixed_tensions": [0.5, 0.5, 0.5]},
    "selection": {"ladder": [0, 1]},
}

# --- pages -----------------------------------------------------------------------------------------------------------


def cut_pages(rows) -> dict[str, dict]:
    """The drawings of every page at their new sizes, by the number of the page: boxes, the large one, background."""
    pages = {}
    for number, row_id in enumerate(rows["id"]):
        page_id = row_id.rpartition("-")[0]
        if page_id not in pages:
            row = rows[number]
            meta, page = json.loads(row["meta"]), row["images"][0].convert("RGB")
            boxes = [page.crop(box["bbox"]) for box in meta["boxes"]]
            pages[page_id] = {
                "boxes": [box.resize((BOX * CELL, BOX * CELL), Image.BICUBIC) for box in boxes],
                "large": page.crop(meta["large"]["bbox"]).resize((LARGE * CELL, LARGE * CELL), Image.BICUBIC),
                "background": page.getpixel((2, 2)),
            }
    return pages


def asked_box(row: dict) -> int:
    """The number of the box that a row asks about."""
    meta = json.loads(row["meta"])
    left, top, right, bottom = meta["target_bbox"]
    inside = [
        number
        for number, box in enumerate(meta["boxes"])
        if left <= box["bbox"][0] <= right and top <= box["bbox"][1] <= bottom
    ]
    if len(inside) != 1:
        raise ValueError(f"Row {row['id']} asks about {len(inside)} of its boxes, expected one.")
    return inside[0]


def free_place(used: list[list[bool]], size: int, randomness: random.Random) -> tuple[int, int] | None:
    """Takes a free square of so many cells; `None` where none was found."""
    for _ in range(200):
        top, left = randomness.randrange(len(used) - size + 1), randomness.randrange(len(used) - size + 1)
        if not any(used[y][x] for y in range(top, top + size) for x in range(left, left + size)):
            for y in range(top, top + size):
                used[y][left : left + size] = [True] * size
            return top, left
    return None


def laid_out(
    row: dict,
    pages: dict[str, dict],
    randomness: random.Random,
    side: int = SIDE,
    most_boxes: int = 6,
    with_large: bool = True,
) -> dict:
    """
    A row with its drawings on a page of its own.

    Args:
        pages: of `cut_pages`.
        side: of the page, in cells.
        most_boxes: of those of the row, the asked one among them.
        with_large: whether the large drawing is there.
    """
    pieces, about_large = pages[row["id"].rpartition("-")[0]], row["task"] == "coarse_what"
    others = list(range(len(pieces["boxes"])))
    randomness.shuffle(others)
    asked = None if about_large else asked_box(row)
    order = [*([] if asked is None else [asked]), *(number for number in others if number != asked)][:most_boxes]
    sizes = [*([(None, LARGE)] if with_large or about_large else []), *((number, BOX) for number in order)]
    places = None
    while places is None:
        used = [[False] * side for _ in range(side)]
        places = {}
        for number, size in sizes:
            place = free_place(used, size, randomness)
            middle = place is not None and 2 * place[1] + BOX == side
            if place is None or (row["task"] == "coarse_side" and number == asked and middle):
                places = None
                break
            places[number] = place
    page = Image.new("RGB", (side * CELL, side * CELL), pieces["background"])
    for number, (top, left) in places.items():
        page.paste(pieces["large"] if number is None else pieces["boxes"][number], (left * CELL, top * CELL))
    top, left = places[asked]
    size = LARGE if asked is None else BOX
    page.info["asked"] = (top, left, top + size, left + size)  # in cells
    answer = row["answer"]
    if row["task"] == "coarse_side":
        answer = "left" if 2 * left + BOX < side else "right"
    question, _ = row["messages"]
    messages = [question, {"role": "assistant", "content": answer}]
    return {**row, "images": [page], "answer": answer, "messages": messages}


@lru_cache
def split_of(split: str) -> tuple:
    """The rows of `emoji_detail` without their images, and its pages."""
    rows = load_dataset(str(data.path("emoji_detail")), split=split)
    return rows.remove_columns("images"), cut_pages(rows)


def rows_of(split: str, tasks: tuple[str, ...]):
    """Rows with these tasks."""
    return split_of(split)[0].filter(lambda task: task in tasks, input_columns="task")


@dataclass
class PageCollator(ZooDataCollator):
    """The zoo's collator over pages that are laid out anew each time, under another budget each batch."""

    layouts: list[dict] = field(default_factory=lambda: [{}])
    budgets: tuple[int, ...] = ()
    pages: dict[str, dict] = field(default_factory=lambda: split_of("train")[1])
    randomness: random.Random = field(default_factory=random.Random)

    def torch_call(self, examples: list[dict]) -> dict:
        if self.budgets:
            self.processor.token_budget = self.randomness.choice(self.budgets)
        layout = self.randomness.choice(self.layouts)
        pages = [laid_out(row, self.pages, self.randomness, **layout) for row in examples]
        return super().torch_call([{name: page[name] for name in ("images", "messages")} for page in pages])


# --- models ----------------------------------------------------------------------------------------------------------


class OracleModel(ZooArrCocModel):
    """ARR-COC that is told where to look: `image_position_ids` int[I, 4] is the asked box in cells."""

    def get_image_features(self, pixel_values, image_grid_thw=None, image_position_ids=None, **kwargs):
        outputs = super().get_image_features(pixel_values, image_grid_thw, **kwargs)
        for feature, (top, left, bottom, right) in zip(
            outputs.pooler_output, image_position_ids.tolist(), strict=True
        ):
            inside = feature.new_zeros(SIDE, SIDE)
            inside[top:bottom, left:right] = 1
            feature[:, -1] = inside.flatten()  # behind the token, in place of a statistic
        return outputs

    def look(self, tokens, texture, table, size, question):
        activation = texture[..., -1].float() * 8 - 4
        inside = activation.new_zeros(len(activation), len(table.whole))
        relevance = inside.index_add(1, table.region_of_cell, activation) / table.whole
        balance = Balance(activation, activation.new_full((len(activation), 3), 0.5), relevance)
        return activation[:, None].expand(-1, len(SCORERS), -1), balance


class Oracle(ZooArrCocForConditionalGeneration):
    base_model_class = OracleModel


class OracleProcessor(ZooArrCocProcessor):
    """Hands the asked box of each page on."""

    def _process_images(self, images, **kwargs):
        processed, replacements = super()._process_images(images, **kwargs)
        processed["image_position_ids"] = torch.tensor([page.info["asked"] for row in images for page in row])
        return processed, replacements


class BudgetTrainer(LeanSFTTrainer):
    """The model's budget is that of the batch."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        placeholders = (inputs["input_ids"] == model.config.image_token_id).sum(dim=1)
        model.config.token_budget = int(placeholders.max())
        return super().compute_loss(model, inputs, *args, **kwargs)


def settings_of(
    folder: Path, steps: int, batch_size: int, learning_rate: float, schedule: str, seed: int
) -> SFTConfig:
    return SFTConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=0.05,
        weight_decay=0.1,
        adam_beta2=0.98,
        assistant_only_loss=True,
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
        save_strategy="no",
        logging_steps=max(1, steps // 10),
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        seed=seed,
        report_to=[],
    )


def write_language(out: Path) -> Path:
    """The demo's untrained language model, with a token of its own for each colour: its tokenizer spells them, which
    two layers do not put together and compare with a picture in minutes."""
    _, language = write_parts(FAST, out / "parts")
    tokenizer = AutoTokenizer.from_pretrained(language)
    tokenizer.add_tokens([AddedToken(colour, single_word=True, normalized=False) for colour in COLOURS])
    torch.manual_seed(FAST.seed)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(language, vocab_size=len(tokenizer)),
    )
    model.save_pretrained(out / "language")
    tokenizer.save_pretrained(out / "language")
    return out / "language"


def train_base(out: Path, seed: int = 0) -> Path:
    """The all-token model from which every policy starts; stages that are finished are kept."""
    torch.manual_seed(seed)
    if not (out / "built").exists():
        language = write_language(out)
        AutoModel.from_config(AutoConfig.for_model(**TOWER)).save_pretrained(out / "tower")
        SiglipImageProcessorPil().save_pretrained(out / "tower")
        build("mrope", out / "tower", language, out / "built", spatial_merge_size=1, min_image_tokens=1)
    tiles = load_dataset(str(data.path("emoji_tiles")), split="train")
    alone = [{"side": BOX, "most_boxes": 1, "with_large": False}]
    few = [{"side": 10, "most_boxes": count, "with_large": False} for count in (2, 3, 4)]
    named = ("detail_what", "search_color")
    stages = (
        ("tiles", tiles, None, 500, "linear"),
        ("one", rows_of("train", ("detail_what",)), alone, 600, "constant_with_warmup"),
        ("few", rows_of("train", named), few, 1200, "constant_with_warmup"),
        ("base", rows_of("train", DETAIL + COARSE), [{}], 400, "linear"),
    )
    source = out / "built"
    for name, rows, layouts, steps, schedule in stages:
        target = out / name
        if not target.exists():
            processor = AutoProcessor.from_pretrained(source)
            collator = (
                ZooDataCollator(processor)
                if layouts is None
                else PageCollator(processor, layouts=layouts, randomness=random.Random(seed))
            )
            trainer = LeanSFTTrainer(
                model=AutoModelForImageTextToText.from_pretrained(source),
                args=settings_of(out / f"{name}.training", steps, 32, 1e-3, schedule, seed),
                train_dataset=rows,
                processing_class=processor,
                data_collator=collator,
            )
            trainer.train()
            with writing_folder(target) as folder:
                trainer.model.save_pretrained(folder)
                processor.save_pretrained(folder)
        source = target
    return source


def train_policy(base: Path, out: Path, name: str, seed: int, steps: int):
    """A policy that starts from the base, and its processor."""
    fields = {"ladder": LADDER, "exploration_steps": round(0.7 * steps), **{**POLICIES, **ABLATIONS}[name]}
    known = AutoConfig.from_pretrained(base).to_dict()
    known.pop("model_type")
    config = ZooArrCocConfig(**{**known, "token_budget": NATIVE, **fields})
    head, own_processor = (
        (Oracle, OracleProcessor) if name == "oracle" else (ZooArrCocForConditionalGeneration, ZooArrCocProcessor)
    )
    torch.manual_seed(seed)
    model = head.from_pretrained(base, config=config)
    source = AutoProcessor.from_pretrained(base)
    processor = own_processor(
        source.image_processor,
        source.tokenizer,
        chat_template=source.chat_template,
        **own_processor.fields_from(config),
    )
    model.set_trainable_parts(["fusion", "language", "embeddings", "head"])
    budgets = (NATIVE,) if name == "all" else BUDGETS
    trainer = BudgetTrainer(
        model=model,
        args=settings_of(out / f"{name}.training", steps, 32, 5e-4, "linear", seed),
        train_dataset=rows_of("train", DETAIL + COARSE),
        processing_class=processor,
        data_collator=PageCollator(processor, budgets=budgets, randomness=random.Random(seed)),
    )
    trainer.train()
    return trainer.model.eval(), processor


# --- measuring -------------------------------------------------------------------------------------------------------


def pages_of(split: str, limit: int | None) -> list[dict]:
    """The same pages for every policy and seed."""
    rows = rows_of(split, DETAIL + COARSE).shuffle(seed=0)
    pages, randomness = split_of(split)[1], random.Random(0)
    return [laid_out(row, pages, randomness) for row in rows.select(range(min(limit or len(rows), len(rows))))]


def scores_of(model, processor, pages: list[dict]) -> dict[str, float]:
    """Exact match of every task, and of the detail and the coarse tasks together."""
    answers = answer(model, processor, pages, batch_size=64, max_new_tokens=8)
    right = [(page["task"], found == page["answer"]) for page, found in zip(pages, answers, strict=True)]
    groups = {task: (task,) for task in DETAIL + COARSE} | {"detail": DETAIL, "coarse": COARSE}
    return {name: statistics.mean(hit for task, hit in right if task in tasks) for name, tasks in groups.items()}


@torch.no_grad()
def pointing(model, processor, pages: list[dict], budget: int = 64) -> dict[str, float]:
    """
    Where the budget goes on pages with a question about a box.

    Returns:
        `share` of the tokens whose middle lies in the asked box and `hit`, how often the maximum of the relevance map
        does; the same with the question of another page (`other share`, `other hit`); `area` of the box in the page.
    """
    set_budget(model, processor, budget)
    pages = [page for page in pages if page["task"] in DETAIL]
    strangers = [
        {**page, "messages": other["messages"]} for page, other in zip(pages, pages[1:] + pages[:1], strict=True)
    ]
    found = {"area": BOX * BOX / NATIVE}
    for prefix, rows in (("", pages), ("other ", strangers)):
        shares, hits = [], []
        for start in range(0, len(rows), 64):
            batch = processor.apply_chat_template(
                [prompt_of(row) for row in rows[start : start + 64]],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True, "padding_side": "left", "add_special_tokens": False},
            )
            reports = model.model(**batch).fusion_outputs.images
            for row, report in zip(rows[start : start + 64], reports, strict=True):
                top, left, bottom, right = row["images"][0].info["asked"]
                y, x = report.positions.unbind(dim=1)
                inside = (y >= top - 0.5) & (y < bottom - 0.5) & (x >= left - 0.5) & (x < right - 0.5)
                shares.append(inside.float().mean().item())
                if report.relevance_map is not None:
                    row_of_peak, column_of_peak = divmod(int(report.relevance_map.argmax()), SIDE)
                    hits.append(top <= row_of_peak < bottom and left <= column_of_peak < right)
        found[f"{prefix}share"] = statistics.mean(shares)
        if hits:
            found[f"{prefix}hit"] = statistics.mean(hits)
    return found


def set_budget(model, processor, budget: int) -> None:
    model.config.token_budget = processor.token_budget = budget


def run_policy(out: Path, base: Path, name: str, seed: int, steps: int, rows: int | None) -> None:
    """Trains and measures one policy, and writes what it reached."""
    result = out / f"seed-{seed}" / f"{name}.json"
    if result.exists():
        return
    start = time.perf_counter()
    model, processor = train_policy(base, result.parent, name, seed, steps)
    trained = time.perf_counter() - start
    pages, accuracy = pages_of("validation", rows), {}
    for budget in (NATIVE,) if name == "all" else (*BUDGETS, NATIVE):
        set_budget(model, processor, budget)
        accuracy[str(budget)] = scores_of(model, processor, pages)
    report = {"policy": name, "seed": seed, "steps": steps, "seconds": trained, "accuracy": accuracy}
    if name == "all":
        report["blind"] = scores_of(model, processor, permuted_images(pages))
    elif name not in ("uniform", "oracle"):
        report["pointing"] = pointing(model, processor, pages)
    unfinished = result.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(report, indent=1), encoding="utf-8")
    unfinished.rename(result)


def spread_of(values: list[float]) -> str:
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def tables(out: Path) -> str:
    """Everything that is finished, as Markdown: means and standard deviations over the seeds."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("seed-*/*.json"))]
    names = [name for name in (*POLICIES, *ABLATIONS) if any(result["policy"] == name for result in results)]
    lines = []
    for group in ("detail", "coarse", *DETAIL, *COARSE):
        budgets = [str(budget) for budget in (*BUDGETS, NATIVE)]
        lines += [f"### {group}", "", f"| policy | seeds | {' | '.join(budgets)} |", "|---" * (len(budgets) + 2) + "|"]
        for name in names:
            own = [result for result in results if result["policy"] == name]
            cells = [
                spread_of([result["accuracy"][budget][group] for result in own if budget in result["accuracy"]])
                for budget in budgets
            ]
            lines.append(f"| {name} | {len(own)} | {' | '.join(cells)} |")
        blind = [result["blind"][group] for result in results if "blind" in result]
        lines += [
            f"| blind, all tokens | {len(blind)} | {' | '.join(['-'] * len(BUDGETS))} | {spread_of(blind)} |",
            "",
        ]
    kinds = ("share", "other share", "hit", "other hit", "area")
    lines += ["### pointing, 64 tokens", "", f"| policy | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    for name in names:
        own = [result["pointing"] for result in results if result["policy"] == name and "pointing" in result]
        if own:
            cells = [spread_of([found[kind] for found in own if kind in found]) for kind in kinds]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--policies", nargs="+", choices=[*POLICIES, *ABLATIONS], default=[*POLICIES, *ABLATIONS])
    parser.add_argument("--steps", type=int, default=300, help="of training, for every policy (default: %(default)s)")
    parser.add_argument("--rows", type=int, help="of the validation split that are asked (default: all)")
    options = parser.parse_args()
    base = train_base(options.out / "base")
    for seed in options.seeds:
        for name in options.policies:
            run_policy(options.out, base, name, seed, options.steps, options.rows)
    found = tables(options.out)
    (options.out / "results.md").write_text(found, encoding="utf-8")
    sys.stdout.write(found)


if __name__ == "__main__":
    main()
