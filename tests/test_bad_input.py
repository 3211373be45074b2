"""Malformed input: a typed error that says what is wrong, never a crash somewhere inside."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_zoo.testing import tiny_config, tiny_model, tiny_processor
from vlm_zoo.testing.promises import Subject


CASES = 400  # for each of two models, of which five in eight are malformed or more
TYPED = (ValueError, TypeError)  # ImageError and BuildError are ValueErrors
PINPOINTS = [[32, 64], [64, 32], [64, 64]]


@pytest.fixture(scope="module", params=[None, PINPOINTS], ids=["fixed", "anyres"])
def subject(request) -> Subject:
    model = tiny_model("zoo_llava", image_grid_pinpoints=request.param)
    return Subject(model, tiny_processor("zoo_llava", model.config), tolerance=1e-5)


def broken_image(randomness: random.Random):
    """Something that is no image, or a strange one."""
    generator = np.random.RandomState(randomness.randrange(1 << 30))
    return randomness.choice(
        [
            None,
            5,
            "no/such/file.png",
            b"not a picture",
            {"path": "x"},
            np.zeros((0, 4, 3), np.uint8),
            np.zeros((4,), np.uint8),
            np.zeros((2, 3, 4, 5, 6), np.float32),
            np.full((8, 8, 3), np.nan, np.float32),
            np.full((8, 8, 3), np.inf, np.float32),
            np.array([["a", "b"]]),
            generator.rand(8, 8, 7),
            torch.zeros(3, 0, 5),
            torch.zeros(5, 9, 9, dtype=torch.complex64),
            Image.new(randomness.choice(["1", "L", "P", "RGBA", "CMYK", "I;16", "F"]), (randomness.randint(1, 9), 3)),
            Image.fromarray(generator.randint(0, 256, (1, 300, 3), dtype=np.uint8)),
        ]
    )


def wrong_call(randomness: random.Random, subject: Subject):
    """One malformed call of the processor or the model, ready to be made."""
    token, kind = subject.image_token, randomness.randrange(8)
    good = subject.image(randomness.randrange(9), randomness.randint(1, 90), randomness.randint(1, 90))
    if kind == 0:  # image tokens and images differ in number
        text = " ".join(randomness.choices(["word", token, "", "🙂"], k=randomness.randint(0, 6)))
        return lambda: subject.processor(text=[text], images=[[good] * randomness.randint(0, 4)], return_tensors="pt")
    if kind == 1:  # what is no image
        return lambda: subject.processor(text=[token], images=[broken_image(randomness)], return_tensors="pt")
    if kind == 2:  # what is no text
        text = randomness.choice([None, 3, [4, 5], [None], [["a"], ["b"]], [], {"a": 1}, b"bytes"])
        return lambda: subject.processor(text=text, images=randomness.choice([None, [good], []]), return_tensors="pt")
    if kind == 3:  # lengths that cut
        length = randomness.randint(0, 60)
        return lambda: subject.processor(
            text=[f"a {token} {'b ' * randomness.randint(0, 30)}"],
            images=[good],
            truncation=True,
            max_length=length,
            padding=randomness.choice([True, False, "max_length"]),
            return_tensors="pt",
        )
    batch = dict(subject.batch([{"text": f"see {token} now", "images": [good]}]))
    if kind == 4:  # placeholders come or go
        ids = batch["input_ids"].clone()
        for _ in range(randomness.randint(1, 5)):
            ids[0, randomness.randrange(ids.shape[1])] = randomness.choice([subject.image_token_id, 70, 1])
        batch["input_ids"] = ids
    elif kind == 5:  # pixels of another shape
        shape = [randomness.choice([0, 1, 2, 3, 16, 32]) for _ in range(randomness.randint(1, 6))]
        batch["pixel_values"] = torch.rand(shape)
    elif kind == 6:  # an input is missing, doubled, or another model's
        name = randomness.choice([*batch, "inputs_embeds", "image_grid_thw", "spatial_shapes", "mm_encoder_outputs"])
        if name in batch:
            del batch[name]
        else:
            batch[name] = {"image": None} if name == "mm_encoder_outputs" else torch.zeros(1, 3, 48)
    else:  # sizes that are not the images'
        batch["image_sizes"] = torch.tensor([[randomness.randint(1, 300), randomness.randint(1, 300)]])
    return lambda: subject.model(**batch)


def test_hundreds_of_malformed_inputs_work_or_raise_typed_errors(subject):
    randomness = random.Random(0)
    refused, crashed = 0, []
    with torch.no_grad():
        for case in range(CASES):
            call = wrong_call(randomness, subject)
            try:
                call()
            except TYPED as error:
                refused += 1
                assert str(error), f"case {case} raised {type(error).__name__} without a word"
            except Exception as error:
                crashed.append(f"case {case}: {type(error).__name__}: {error}")
    assert not crashed, "\n".join(crashed[:10])
    assert refused >= 250


def test_an_image_too_many_is_counted_on_both_sides(subject):
    with pytest.raises(ValueError, match=r"Found total 1 <image> tokens and 2 images"):
        subject.processor(text=["<image>"], images=[[subject.image(), subject.image()]])


def test_a_missing_chat_template_is_named(subject):
    processor = tiny_processor("zoo_llava", subject.model.config)
    processor.chat_template = None
    with pytest.raises(ValueError, match="chat template"):
        processor.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=True)


def test_a_tokenizer_without_an_image_token_is_refused(subject):
    from vlm_zoo.testing import tiny_tokenizer

    processor = subject.processor
    with pytest.raises(ValueError, match="no named image token"):
        type(processor)(processor.image_processor, tiny_tokenizer(image_token=None))


def test_an_unknown_architecture_lists_the_known_ones():
    with pytest.raises(ValueError, match="Unknown architecture 'zoo_nope'; the zoo has zoo_llava"):
        tiny_config("zoo_nope")
