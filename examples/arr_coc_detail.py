"""ARR-COC's experiments on small details: accuracy against the budget of tokens, pointing, and ablations.

    python examples/arr_coc_detail.py runs/detail                     # three seeds, hours on two CPU cores
    python examples/arr_coc_detail.py runs/detail --seeds 0 --policies relevance uniform --steps 150

A run that died goes on from there. `runs/detail/results.md` holds the tables of everything that is finished.

Pages. Every row of `emoji_detail` asks about one small coloured box, or about the large drawing, of its page. At the
size of these models 26 pixels of drawing at any place of a patch are not learned in minutes, so the drawings are
larger and the page is small: the boxes of a row (48 x 40 pixels, here 64 x 64) and its large drawing (here 112 x 112)
are laid out anew on 256 x 256 pixels, at multiples of 16. A page has 256 native tokens; a box covers 16 of them. A
box is ruled in its colour, two pixels at the upper and left edge of every patch: without that no token in its middle
knows the colour by which questions name it, and which box is meant is not learned.

Base. All tokens, the `mrope` architecture, several questions a page. Curriculum: one box; one or two; the same, often
with nothing of a box but its middle; a few; whole pages.

Policies. Each starts from the base, keeps tower and merger as they are, and trains the language model and what it
has of its own for the same number of steps, every batch under another budget; each is asked at every budget.

    relevance        ARR-COC
    taught           ARR-COC whose scorers first learn where the base looks when it answers
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
from functools import cache
from pathlib import Path

import torch
from datasets import load_dataset
from PIL import Image, ImageDraw
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
from vlm_zoo.demo.train import FROM_SCRATCH
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
from vlm_zoo.training import LeanSFTTrainer


CELL, SIDE, BOX, LARGE = 16, 16, 4, 7  # pixels of a cell; cells of a page, a box and the large drawing, a side
RULE = 2  # pixels of the lines in a box
SIDE_SHARE = 0.3  # of boxes of training that are asked for their side
NATIVE = SIDE * SIDE
BUDGETS = (16, 32, 64, 144, 200)
SCORERS_AND_BALANCER = ("model.fusion.scorers.", "model.fusion.balancer.")
SCORER_RATE = 10  # times the learning rate of the rest
TEACHING_STEPS, TEACHING_BATCH, TEACHING_RATE = 300, 8, 5e-3
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
    "taught": {},
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
                "boxes": [ruled(box.resize((BOX * CELL, BOX * CELL), Image.BICUBIC)) for box in boxes],
                "large": page.crop(meta["large"]["bbox"]).resize((LARGE * CELL, LARGE * CELL), Image.BICUBIC),
                "background": page.getpixel((2, 2)),
            }
    return pages


def ruled(box: Image.Image) -> Image.Image:
    """A box with lines in the colour of its frame at the upper and left edges of its cells."""
    box, colour = box.copy(), box.getpixel((RULE + 1, box.height // 2))
    draw = ImageDraw.Draw(box)
    for start in range(0, BOX * CELL, CELL):
        draw.rectangle((start, 0, start + RULE - 1, BOX * CELL - 1), fill=colour)
        draw.rectangle((0, start, BOX * CELL - 1, start + RULE - 1), fill=colour)
    return box


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


def places_of(sizes: list[int], side: int, randomness: random.Random) -> list[tuple[int, int]]:
    """Upper and left cell of squares of these sizes on a page of this side, none on top of another."""
    while True:
        used = [[False] * side for _ in range(side)]
        places = [free_place(used, size, randomness) for size in sizes]
        if None not in places:
            return places


def laid_out(row: dict, pages: dict[str, dict], randomness: random.Random) -> dict:
    """A row with its drawings on a page of its own; `pages` are those of `cut_pages`."""
    pieces, about_large = pages[row["id"].rpartition("-")[0]], row["task"] == "coarse_what"
    asked = 0 if about_large else 1 + asked_box(row)
    drawings = [pieces["large"], *pieces["boxes"]]
    sizes = [LARGE, *[BOX] * len(pieces["boxes"])]
    places = places_of(sizes, SIDE, randomness)
    while row["task"] == "coarse_side" and 2 * places[asked][1] + BOX == SIDE:  # neither left nor right
        places = places_of(sizes, SIDE, randomness)
    page = Image.new("RGB", (SIDE * CELL, SIDE * CELL), pieces["background"])
    for drawing, (top, left) in zip(drawings, places, strict=True):
        page.paste(drawing, (left * CELL, top * CELL))
    top, left = places[asked]
    page.info["asked"] = (top, left, top + sizes[asked], left + sizes[asked])  # in cells
    answer = row["answer"]
    if row["task"] == "coarse_side":
        answer = "left" if 2 * left + BOX < SIDE else "right"
    question, _ = row["messages"]
    messages = [question, {"role": "assistant", "content": answer}]
    return {**row, "images": [page], "answer": answer, "messages": messages}


@cache
def split_of(split: str) -> tuple:
    """The rows of `emoji_detail` without their images, and its pages."""
    rows = load_dataset(str(data.path("emoji_detail")), split=split)
    return rows.remove_columns("images"), cut_pages(rows)


def rows_of(split: str, tasks: tuple[str, ...]):
    """Rows with these tasks."""
    return split_of(split)[0].filter(lambda task: task in tasks, input_columns="task")


@dataclass
class Layout:
    """
    What a page of training looks like.

    side: of the page, in cells.
    boxes: how many it has, one of these numbers.
    with_large, with_numbers: whether the large drawing, and boxes with numbers, are there.
    questions: about a page, at most.
    cropped: share of boxes of which only the middle is there.
    """

    side: int = SIDE
    boxes: tuple[int, ...] = (3, 4, 5, 6)
    with_large: bool = True
    with_numbers: bool = True
    questions: int = 1
    cropped: float = 0.0


@dataclass
class Page:
    """
    A page of training.

    patches: `float[side * side, 3 * 16 * 16]`.
    turns: questions and answers.
    asked: upper, left, lower and right cell of what the first question is about.
    """

    patches: torch.Tensor
    turns: list[tuple[str, str]]
    side: int
    asked: tuple[int, int, int, int]


class PageBank:
    """
    Pages of training, put together from drawings that were cut into patches once, and from the questions of the data.

    A page that is drawn, cut into patches and rendered as a conversation anew costs as much as the model's step.
    """

    def __init__(self, processor, split: str = "train"):
        self.processor = processor
        rows, pages = split_of(split)
        self.boxes, self.large, self.questions = {}, [], {}
        for number, row_id in enumerate(rows["id"]):
            row, page = rows[number], pages[row_id.rpartition("-")[0]]
            meta = json.loads(row["meta"])
            if row_id.endswith("-0"):
                self.large.append((meta["large"]["name"], self.cut(page["large"]), self.background(page)))
                for box, drawing in zip(meta["boxes"], page["boxes"], strict=True):
                    self.boxes.setdefault(box["color"], []).append((box["kind"], box["value"], self.cut(drawing)))
            question = row["question"]
            if row["task"] != "coarse_what":
                box = meta["boxes"][asked_box(row)]
                question = question.replace(box["value" if row["task"] == "search_color" else "color"], "{}")
            self.questions.setdefault(row["task"], set()).add(question)
        self.questions = {task: sorted(questions) for task, questions in self.questions.items()}

    def cut(self, drawing: Image.Image) -> torch.Tensor:
        """A drawing as `float[rows, columns, 3 * 16 * 16]`."""
        pixels = self.processor.image_processor([drawing], return_tensors="pt")
        return pixels["pixel_values"].unflatten(0, (drawing.height // CELL, drawing.width // CELL))

    def background(self, page: dict) -> torch.Tensor:
        return self.cut(Image.new("RGB", (BOX * CELL, BOX * CELL), page["background"]))[0, 0]

    def page(self, layout: Layout, randomness: random.Random) -> Page:
        """A random page."""
        boxes, known = [], set()
        for colour in randomness.sample(COLOURS, randomness.choice(layout.boxes)):
            kind, value, patches = randomness.choice(self.boxes[colour])
            while value in known or (kind == "number" and not layout.with_numbers):
                kind, value, patches = randomness.choice(self.boxes[colour])
            known.add(value)
            boxes.append((colour, kind, value, patches))
        name, large, background = randomness.choice(self.large)
        sizes = [*[BOX] * len(boxes), *([LARGE] if layout.with_large else [])]
        places = places_of(sizes[::-1], layout.side, randomness)[::-1]
        cells, turns = background.expand(layout.side, layout.side, -1).clone(), []
        for (colour, kind, value, patches), (top, left) in zip(boxes, places[: len(boxes)], strict=True):
            edge = 1 if randomness.random() < layout.cropped else 0
            inner = slice(edge, BOX - edge)
            cells[top : top + BOX, left : left + BOX][inner, inner] = patches[inner, inner]
            place = (top, left, top + BOX, left + BOX)
            asked = [("detail_number", colour, value)]
            if kind == "object":
                asked = [("detail_what", colour, value), ("search_color", value, colour)]
            if 2 * left + BOX != layout.side and randomness.random() < SIDE_SHARE:
                asked.append(("coarse_side", colour, "left" if 2 * left + BOX < layout.side else "right"))
            turns += [(self.ask(task, about, randomness), says, place) for task, about, says in asked]
        if layout.with_large:
            top, left = places[-1]
            cells[top : top + LARGE, left : left + LARGE] = large
            place = (top, left, top + LARGE, left + LARGE)
            turns.append((self.ask("coarse_what", "", randomness), name, place))
        randomness.shuffle(turns)
        turns = turns[: layout.questions]
        return Page(cells.flatten(0, 1), [turn[:2] for turn in turns], layout.side, turns[0][2])

    def ask(self, task: str, about: str, randomness: random.Random) -> str:
        return randomness.choice(self.questions[task]).format(about)

    @cache  # noqa: B019
    def turn(self, question: str, answer: str, is_first: bool) -> tuple[list[int], list[int], int]:
        """Ids and labels of a turn, and the place of its image, which is left out."""
        image = Image.new("RGB", (2 * CELL, 2 * CELL))
        opening = [
            {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "!"}]},
        ]
        asked = [{"role": "user", "content": [{"type": "text", "text": question}]}]
        answered = [*asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        if is_first:
            answered[0]["content"].insert(0, opening[0]["content"][0])
            ids, labels = self.render(answered)
            place = ids.index(self.processor.image_token_id)
            keep = [number for number, token in enumerate(ids) if token != self.processor.image_token_id]
            return [ids[number] for number in keep], [labels[number] for number in keep], place
        (ids, labels), before = self.render([*opening, *answered]), len(self.render(opening)[0])
        return ids[before:], labels[before:], 0

    def render(self, messages: list[dict]) -> tuple[list[int], list[int]]:
        """Ids of a conversation, and labels, which only answers have."""
        batch = self.processor.apply_chat_template(
            [messages],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            processor_kwargs={"add_special_tokens": False},
        )
        (ids,), (is_answer,) = batch["input_ids"], batch["assistant_masks"]
        return list(ids), [token if own else -100 for token, own in zip(ids, is_answer, strict=True)]

    def batch(self, pages: list[Page], tokens: int | None = None) -> dict[str, torch.Tensor]:
        """
        Pages as a model takes them.

        Args:
            pages: of a batch.
            tokens: of a page; by default all.
        """
        rows = []
        for page in pages:
            ids, labels = [], []
            for number, (question, says) in enumerate(page.turns):
                own_ids, own_labels, place = self.turn(question, says, number == 0)
                count = 0 if number else tokens or page.side**2
                ids += own_ids[:place] + [self.processor.image_token_id] * count + own_ids[place:]
                labels += own_labels[:place] + [-100] * count + own_labels[place:]
            rows.append((ids, labels))
        longest, padding = max(len(ids) for ids, _ in rows), self.processor.tokenizer.pad_token_id
        return {
            "input_ids": torch.tensor([ids + [padding] * (longest - len(ids)) for ids, _ in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]),
            "labels": torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows]),
            "pixel_values": torch.cat([page.patches for page in pages]),
            "image_grid_thw": torch.tensor([[1, page.side, page.side] for page in pages]),
        }


@dataclass
class PageCollator:
    """Draws pages: as many as the batch has rows, whatever they say; under another budget each batch."""

    bank: PageBank
    layout: Layout = field(default_factory=Layout)
    budgets: tuple[int, ...] = ()
    tells_asked: bool = False
    randomness: random.Random = field(default_factory=random.Random)

    def __call__(self, rows: list) -> dict[str, torch.Tensor]:
        pages = [self.bank.page(self.layout, self.randomness) for _ in rows]
        batch = self.bank.batch(pages, self.randomness.choice(self.budgets) if self.budgets else None)
        if self.tells_asked:
            batch["image_position_ids"] = torch.tensor([page.asked for page in pages])
        return batch


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


class PupilModel(ZooArrCocModel):
    """ARR-COC that keeps the balance of its last forward."""

    balance: Balance | None = None

    def look(self, tokens, texture, table, size, question):
        maps, self.balance = super().look(tokens, texture, table, size, question)
        return maps, self.balance


class Pupil(ZooArrCocForConditionalGeneration):
    base_model_class = PupilModel


@torch.no_grad()
def attention_of(teacher, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Where the last two layers of the base look when it begins to answer, `float[B, N]`; the sum of a row is 1."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    layers = torch.stack(teacher(**inputs, output_attentions=True).attentions[-2:])  # float[2, B, heads, T, T]
    before = (batch["labels"] != -100).int().argmax(dim=1) - 1
    looks = layers.mean(dim=(0, 2))[torch.arange(len(before)), before]  # float[B, T]
    images = batch["input_ids"] == teacher.config.image_token_id
    looks = looks[images].view(len(before), -1)
    return looks / looks.sum(dim=1, keepdim=True)


def teach(model, base: Path, bank: PageBank, scorers: list[torch.nn.Parameter], seed: int) -> None:
    """Scorers and balancer learn to activate the cells that the base looks at; nothing else changes."""
    teacher = AutoModelForImageTextToText.from_pretrained(base, attn_implementation="eager").eval()
    optimizer = torch.optim.AdamW(scorers, lr=TEACHING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, TEACHING_RATE, total_steps=TEACHING_STEPS)
    randomness = random.Random(seed)
    model.train()
    for _ in range(TEACHING_STEPS):
        pages = [bank.page(Layout(), randomness) for _ in range(TEACHING_BATCH)]
        target = attention_of(teacher, bank.batch(pages))
        budget = randomness.choice(BUDGETS)
        model.config.token_budget = budget
        batch = bank.batch(pages, budget)
        del batch["labels"]
        model.model(**batch)
        activation = model.model.balance.activation.log_softmax(dim=1)
        loss = torch.nn.functional.kl_div(activation, target, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.model.fusion.forwards.zero_()


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
        save_strategy="no",
        logging_steps=max(1, steps // 10),
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        seed=seed,
        **FROM_SCRATCH,
    )


def write_language(out: Path) -> Path:
    """The demo's untrained language model with three layers, smaller initial weights, and a token of its own for each
    colour: its tokenizer spells them, which few layers do not put together and compare with a picture in minutes."""
    _, language = write_parts(FAST, out / "parts")
    tokenizer = AutoTokenizer.from_pretrained(language)
    tokenizer.add_tokens([AddedToken(colour, single_word=True, normalized=False) for colour in COLOURS])
    config = AutoConfig.from_pretrained(
        language, vocab_size=len(tokenizer), num_hidden_layers=3, initializer_range=0.05
    )
    torch.manual_seed(FAST.seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(out / "language")
    tokenizer.save_pretrained(out / "language")
    return out / "language"


@dataclass
class Stage:
    """A stage of the base's training."""

    name: str
    layout: Layout
    steps: int
    batch_size: int
    schedule: str = "constant_with_warmup"


FEW = {"with_large": False, "with_numbers": False}
STAGES = (
    Stage("one", Layout(side=BOX, boxes=(1,), questions=2, **FEW), 500, 32),
    Stage("two", Layout(side=8, boxes=(1, 2, 2), questions=3, **FEW), 1750, 16),
    # Only what the middle of a box knows of its colour lets a question find it
    Stage("middles", Layout(side=8, boxes=(1, 2, 2), questions=3, cropped=0.6, **FEW), 1250, 16),
    Stage("few", Layout(side=10, boxes=(2, 3, 4), with_large=False, questions=3, cropped=0.3), 900, 16),
    Stage("base", Layout(questions=4), 1000, 12, "linear"),
)


def train_base(out: Path, seed: int = 0) -> Path:
    """The all-token model from which every policy starts; stages that are finished are kept."""
    torch.manual_seed(seed)
    if not (out / "built").exists():
        language = write_language(out)
        AutoModel.from_config(AutoConfig.for_model(**TOWER)).save_pretrained(out / "tower")
        SiglipImageProcessorPil().save_pretrained(out / "tower")
        build("mrope", out / "tower", language, out / "built", spatial_merge_size=1, min_image_tokens=1)
    source = out / "built"
    for stage in STAGES:
        target = out / stage.name
        if not target.exists():
            processor = AutoProcessor.from_pretrained(source)
            trainer = LeanSFTTrainer(
                model=AutoModelForImageTextToText.from_pretrained(source),
                args=settings_of(
                    out / f"{stage.name}.training", stage.steps, stage.batch_size, 1e-3, stage.schedule, seed
                ),
                train_dataset=rows_of("train", DETAIL + COARSE),
                processing_class=processor,
                data_collator=PageCollator(PageBank(processor), stage.layout, randomness=random.Random(seed)),
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
    head = {"oracle": Oracle, "taught": Pupil}.get(name, ZooArrCocForConditionalGeneration)
    own_processor = OracleProcessor if name == "oracle" else ZooArrCocProcessor
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
    bank, scorers, others = PageBank(source), [], []
    for parameter_name, parameter in model.named_parameters():
        (scorers if parameter_name.startswith(SCORERS_AND_BALANCER) else others).append(parameter)
    if name == "taught":
        teach(model, base, bank, [parameter for parameter in scorers if parameter.requires_grad], seed)
    args = settings_of(out / f"{name}.training", steps, 16, 5e-4, "linear", seed)
    groups = [{"params": others}, {"params": scorers, "lr": SCORER_RATE * args.learning_rate}]
    optimizer = torch.optim.AdamW(
        [
            {**group, "params": [parameter for parameter in group["params"] if parameter.requires_grad]}
            for group in groups
        ],
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.weight_decay,
    )
    trainer = BudgetTrainer(
        model=model,
        args=args,
        optimizers=(optimizer, None),
        train_dataset=rows_of("train", DETAIL + COARSE),
        processing_class=processor,
        data_collator=PageCollator(
            bank, budgets=budgets, tells_asked=name == "oracle", randomness=random.Random(seed)
        ),
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
    parser.add_argument("--steps", type=int, default=400, help="of training, for every policy (default: %(default)s)")
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
