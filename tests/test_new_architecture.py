"""The frame carries an architecture that is not LLaVA: other counts, its own fusion, and a carry."""

import pytest
import torch
import toy_architecture

from vlm_zoo import ZOO, AutoModelForVision2Seq, registry
from vlm_zoo.testing import check_vlm, tiny_model, tiny_processor
from vlm_zoo.testing.contract import PROMISES
from vlm_zoo.testing.promises import Subject


@pytest.fixture(scope="module")
def subject():
    entry = registry._entry(toy_architecture)
    if entry.config.model_type not in ZOO:
        registry._register(entry)
    ZOO[entry.config.model_type] = entry
    try:
        model = tiny_model("zoo_toy")
        yield Subject(model, tiny_processor("zoo_toy", model.config), tolerance=1e-4)
    finally:
        del ZOO[entry.config.model_type]


@pytest.mark.parametrize("text", [text for text in PROMISES if "carry their code" not in text])
def test_the_toy_keeps_the_promise(text, subject):
    check_vlm(subject.model, subject.processor, only=text).raise_if_failed()


def test_a_later_token_depends_on_the_image_through_the_carry_alone(subject):
    one, other = (subject.batch([{"text": "see <image> it", "images": [subject.image(seed)]}]) for seed in (1, 2))
    steps = []
    with torch.no_grad():
        for batch in (one, other):
            prefill = subject.model(**batch, use_cache=True)
            assert prefill.carry.shape == (1, 1, 48)
            steps.append(prefill.carry)
    assert (steps[0] - steps[1]).abs().max() > 1e-6


def test_the_toy_saves_and_opens_like_every_other(subject, tmp_path):
    subject.model.save_pretrained(tmp_path)
    assert type(AutoModelForVision2Seq.from_pretrained(tmp_path)) is type(subject.model)
