"""Answering in batches, the blind baseline, and scores."""

import pytest
from PIL import Image

from vlm_zoo.evaluation import answering
from vlm_zoo.evaluation.answering import answer, evaluate_rows, permuted_images, prompt_of, sample_rows
from vlm_zoo.testing import tiny_model, tiny_processor


def rows(count: int) -> list[dict]:
    return [
        {
            "id": f"r{index}",
            "images": [Image.new("RGB", (40, 40), (index * 20 % 256, 0, 0))],
            "messages": [
                {"role": "user", "content": f"colour {index}?"},
                {"role": "assistant", "content": f"red {index}"},
            ],
            "answer": f"red {index}",
            "task": "even" if index % 2 == 0 else "odd",
        }
        for index in range(count)
    ]


def test_the_answer_is_no_part_of_the_prompt():
    messages = prompt_of(rows(1)[0])
    assert [message["role"] for message in messages] == ["user"]
    assert [item["type"] for item in messages[0]["content"]] == ["image", "text"]


def test_a_row_that_asks_nothing_is_an_error():
    row = {"id": "x", "images": [], "messages": [{"role": "assistant", "content": "hi"}]}
    with pytest.raises(ValueError, match="Row x asks nothing"):
        prompt_of(row)


def test_batches_are_answered_like_single_rows():
    model, processor = tiny_model("zoo_llava"), tiny_processor("zoo_llava")
    questions = rows(5)
    together = answer(model, processor, questions, batch_size=5, max_new_tokens=4)
    assert together == answer(model, processor, questions, batch_size=1, max_new_tokens=4)
    assert len(together) == 5


def test_every_row_of_the_blind_baseline_sees_another_image():
    questions = rows(9)
    blind = permuted_images(questions, seed=3)
    assert all(one["images"] is not other["images"] for one, other in zip(questions, blind, strict=True))
    assert [row["answer"] for row in blind] == [row["answer"] for row in questions]
    assert {id(row["images"]) for row in blind} == {id(row["images"]) for row in questions}


def test_the_sample_depends_on_the_seed_alone():
    data = list(range(100))
    assert sample_rows(data, 10, seed=1) == sample_rows(data, 10, seed=1) != sample_rows(data, 10, seed=2)
    assert sample_rows(data, 500, seed=1) == data


def test_scores_are_exact_match_overall_and_by_task(monkeypatch):
    questions = rows(4)
    given = iter([["red 0", "red 1 ", "wrong", "Red 3"], ["no", "red 1", "no", "no"]])
    monkeypatch.setattr(answering, "answer", lambda *args, **kwargs: next(given))
    scores = evaluate_rows(None, None, questions)
    assert (scores.rows, scores.accuracy, scores.blind_accuracy) == (4, 0.5, 0.25)
    assert scores.tasks["even"] == {"rows": 2, "accuracy": 0.5, "blind_accuracy": 0.0}
    assert scores.tasks["odd"] == {"rows": 2, "accuracy": 0.5, "blind_accuracy": 0.5}
    assert scores.answers[0].question == "colour 0?"


def test_one_row_has_no_blind_baseline():
    with pytest.raises(ValueError, match="Got 1 row"):
        evaluate_rows(None, None, rows(1))
