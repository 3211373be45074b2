"""The pages of ARR-COC's experiments: what training puts together is what the processor would make."""

import random

import pytest
import torch
from PIL import Image

from vlm_zoo.training import ZooDataCollator


pytestmark = pytest.mark.slow  # the data is read and its drawings are resized


@pytest.fixture(scope="module")
def detail(example):
    return example("arr_coc_detail")


@pytest.fixture(scope="module")
def bank(detail, tmp_path_factory):
    home = tmp_path_factory.mktemp("detail")
    language = detail.write_language(home)
    detail.AutoModel.from_config(detail.AutoConfig.for_model(**detail.TOWER)).save_pretrained(home / "tower")
    detail.SiglipImageProcessorPil().save_pretrained(home / "tower")
    detail.build("mrope", home / "tower", language, home / "built", spatial_merge_size=1, min_image_tokens=1)
    return detail.PageBank(detail.AutoProcessor.from_pretrained(home / "built"))


def picture(detail, page):
    """A page of training as a picture."""
    patches = page.patches.view(page.side, page.side, 3, detail.CELL, detail.CELL)
    pixels = patches.permute(0, 3, 1, 4, 2).reshape(page.side * detail.CELL, page.side * detail.CELL, 3)
    return Image.fromarray(((pixels * 0.5 + 0.5) * 255).round().to(torch.uint8).numpy())


@pytest.mark.parametrize("questions", [1, 4])
def test_a_batch_of_the_bank_is_what_the_collator_makes_of_the_same_pages(detail, bank, questions):
    pages = [bank.page(detail.Layout(questions=questions), random.Random(number)) for number in range(6)]
    rows = [
        {
            "images": [picture(detail, page)],
            "messages": [
                {"role": role, "content": text}
                for turn in page.turns
                for role, text in zip(("user", "assistant"), turn, strict=True)
            ],
        }
        for page in pages
    ]
    expected, found = ZooDataCollator(bank.processor)(rows), bank.batch(pages)
    assert all(torch.equal(expected[name], found[name]) for name in ("input_ids", "attention_mask", "image_grid_thw"))
    assert torch.equal(expected["labels"], found["labels"])
    assert (expected["pixel_values"] - found["pixel_values"]).abs().max() < 1e-5


def test_a_question_is_about_what_lies_where_the_page_says(detail, bank):
    randomness = random.Random(0)
    for _ in range(30):
        page = bank.page(detail.Layout(), randomness)
        top, left, bottom, right = page.asked
        assert bottom - top == right - left and bottom - top in (detail.BOX, detail.LARGE)
        (question, answer), side = page.turns[0], "left" if left + right < page.side else "right"
        assert answer == side or "left or on the right" not in question


def test_every_cell_of_a_box_shows_its_colour(detail):
    (_, pages) = detail.split_of("train")
    for page in list(pages.values())[:20]:
        for box in page["boxes"]:
            corners = {box.getpixel((x, y)) for x in range(0, 64, detail.CELL) for y in range(0, 64, detail.CELL)}
            assert len(corners) == 1


def test_the_same_pages_are_asked_of_every_policy(detail):
    one, other = (detail.pages_of("validation", 5) for _ in range(2))
    assert [page["answer"] for page in one] == [page["answer"] for page in other]
    assert all(a["images"][0].tobytes() == b["images"][0].tobytes() for a, b in zip(one, other, strict=True))
