"""The zoo's metrics against figures worked out by hand from their definitions."""

import os
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest

from vlm_zoo.evaluation import metrics
from vlm_zoo.evaluation.metrics.exact_match.exact_match import ExactMatch
from vlm_zoo.evaluation.metrics.pope.pope import Pope, says_yes
from vlm_zoo.evaluation.metrics.vqa_accuracy.vqa_accuracy import VqaAccuracy, normalize_answer


FOLDER = Path(metrics.__file__).parent


@pytest.fixture(autouse=True)
def own_metrics_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path))


def exact_match(predictions, references, **options):
    return ExactMatch().compute(predictions=predictions, references=references, **options)["exact_match"]


def vqa(prediction, references, **options):
    return VqaAccuracy().compute(predictions=[prediction], references=[references], **options)["vqa_accuracy"]


# Exact match


def test_exact_match_is_the_share_of_equal_answers():
    assert exact_match(["cat", "dog", "red", "blue"], ["cat", "dog", "red", "green"]) == 0.75


def test_exact_match_drops_whitespace_around_an_answer_by_default():
    assert exact_match([" cat\n"], ["cat"]) == 1.0
    assert exact_match([" cat\n"], ["cat"], strip_whitespace=False) == 0.0


def test_exact_match_keeps_case_unless_told_to_ignore_it():
    assert exact_match(["Cat"], ["cAT"]) == 0.0
    assert exact_match(["Cat"], ["cAT"], ignore_case=True) == 1.0


def test_exact_match_keeps_punctuation_unless_told_to_ignore_it():
    assert exact_match(["two cats."], ["two cats"]) == 0.0
    assert exact_match(["two cats ."], ["two cats"], ignore_punctuation=True) == 1.0


def test_exact_match_keeps_whitespace_inside_an_answer():
    assert exact_match(["two  cats"], ["two cats"]) == 0.0


def test_exact_match_of_the_empty_answer_counts():
    assert exact_match(["", " "], ["", "cat"]) == 0.5


# POPE


@pytest.mark.parametrize("answer", ["No", "no", "No, there is not.", "There is not a cat", "I see no cat", "No. Yes."])
def test_pope_reads_a_word_of_negation_as_no(answer):
    assert not says_yes(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "Yes",
        "",
        "I am sure",
        "Yes. There is no dog, though",  # only the first sentence counts
        "Nobody is there",  # words, not prefixes
        "NO",  # the benchmark knows three spellings only
        "no!",
        "There isn't",
        "Is it\nno",  # words are split at spaces
    ],
)
def test_pope_reads_every_other_answer_as_yes(answer):
    assert says_yes(answer)


def test_pope_drops_commas_before_it_looks_for_words():
    assert not says_yes("no,")
    assert says_yes("no,thing")


def test_pope_figures_follow_the_confusion_matrix():
    # 3 true positives, 1 false positive, 2 false negatives, 4 true negatives
    predictions = ["yes"] * 3 + ["yes"] + ["no"] * 2 + ["no"] * 4
    references = ["yes"] * 3 + ["no"] + ["yes"] * 2 + ["no"] * 4
    assert Pope().compute(predictions=predictions, references=references) == pytest.approx(
        {"accuracy": 0.7, "precision": 0.75, "recall": 0.6, "f1": 2 / 3, "yes_ratio": 0.4}
    )


def test_pope_yes_ratio_counts_predictions_and_not_references():
    scores = Pope().compute(predictions=["yes"] * 4, references=["yes", "no", "no", "no"])
    assert scores["yes_ratio"] == 1.0


def test_pope_ratios_of_nothing_are_zero():
    scores = Pope().compute(predictions=["no", "no"], references=["yes", "no"])
    assert scores == {"accuracy": 0.5, "precision": 0.0, "recall": 0.0, "f1": 0.0, "yes_ratio": 0.0}


CATEGORIES = ["random", "random", "popular", "popular", "adversarial", "adversarial"]
CATEGORY_ANSWERS = ["yes", "no", "yes", "yes", "no", "yes"]
CATEGORY_REFERENCES = ["yes", "no", "yes", "no", "yes", "no"]


def assert_figures_per_category(scores):
    assert len(scores) == 20
    assert scores["accuracy"] == 0.5
    assert scores["random_accuracy"] == 1.0
    assert scores["popular_accuracy"] == 0.5
    assert scores["popular_precision"] == 0.5
    assert scores["popular_recall"] == 1.0
    assert scores["popular_f1"] == pytest.approx(2 / 3)
    assert scores["popular_yes_ratio"] == 1.0
    assert scores["adversarial_accuracy"] == 0.0
    assert scores["adversarial_f1"] == 0.0


def test_pope_gives_each_category_its_own_figures():
    scores = Pope().compute(predictions=CATEGORY_ANSWERS, references=CATEGORY_REFERENCES, categories=CATEGORIES)
    assert_figures_per_category(scores)


def test_pope_takes_categories_as_a_column_added_in_batches():
    metric = metrics.load("pope", "by_category")
    for start in (0, 2, 4):
        rows = slice(start, start + 2)
        metric.add_batch(
            predictions=CATEGORY_ANSWERS[rows], references=CATEGORY_REFERENCES[rows], categories=CATEGORIES[rows]
        )
    assert_figures_per_category(metric.compute())


def test_pope_refuses_a_reference_that_is_neither_yes_nor_no():
    with pytest.raises(ValueError, match="'yes' or 'no', found 'maybe' in row 1"):
        Pope().compute(predictions=["yes", "no"], references=["yes", "maybe"])


def test_pope_refuses_categories_of_another_length():
    with pytest.raises(ValueError, match="1 categories for 2 predictions"):
        Pope().compute(predictions=["yes", "no"], references=["yes", "no"], categories=["random"])


def test_pope_refuses_an_unknown_configuration():
    with pytest.raises(ValueError, match="'default' and 'by_category', not 'popular'"):
        Pope("popular")


# VQA accuracy


@pytest.mark.parametrize("agreeing, expected", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_averages_over_leaving_each_of_ten_annotators_out(agreeing, expected):
    # e.g. 3 agree: left out, one of the 3 leaves 2 others (2/3), one of the 7 leaves 3 (1): (3 * 2/3 + 7) / 10 = 0.9
    assert vqa("cat", ["cat"] * agreeing + ["dog"] * (10 - agreeing)) == pytest.approx(expected)


def test_vqa_accuracy_is_the_mean_over_questions():
    references = [["cat"] * 10, ["cat"] * 3 + ["dog"] * 7]
    score = VqaAccuracy().compute(predictions=["cat", "cat"], references=references)
    assert score == {"vqa_accuracy": pytest.approx(0.95)}


def test_vqa_accuracy_takes_questions_of_unequal_numbers_of_annotators():
    references = [["cat"] * 3, ["cat"] * 10]
    score = VqaAccuracy().compute(predictions=["cat", "cat"], references=references)
    assert score == {"vqa_accuracy": pytest.approx((2 / 3 + 1) / 2)}


def test_vqa_accuracy_normalises_where_annotators_disagree():
    assert vqa("The Two Cats!", ["2 cats"] * 9 + ["dogs"]) == 1.0


def test_vqa_accuracy_compares_literally_where_all_annotators_agree():
    assert vqa("Two", ["2"] * 10) == 0.0
    assert vqa("yes.", ["yes"] * 10) == 0.0


def test_vqa_accuracy_always_normalises_when_told_to():
    assert vqa("Two", ["2"] * 10, normalize="always") == 1.0


def test_vqa_accuracy_drops_line_breaks_tabs_and_margins_before_it_asks_for_agreement():
    assert vqa(" yes\n", ["yes", "yes\n", "\tyes"] + ["yes"] * 7) == 1.0
    assert vqa("hot\tdog", ["hot\ndog"] * 10) == 1.0


@pytest.mark.parametrize(
    "text, normalized",
    [
        ("One", "1"),
        ("none", "0"),
        ("ten zero eleven", "10 0 eleven"),
        ("the cat on a mat in an hour", "cat on mat in hour"),
        ("THE", ""),
        ("dont", "don't"),
        ("couldntve", "couldntve"),  # two apostrophes missing: not in the benchmark's table
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),  # sic
        ("Im here", "im here"),  # the table's capital entries never match a lower-cased word
    ],
)
def test_vqa_words_are_normalised_by_the_benchmarks_tables(text, normalized):
    assert normalize_answer(text) == normalized


@pytest.mark.parametrize(
    "text, normalized",
    [
        ("red/blue", "red blue"),  # no space beside it: the mark becomes one
        ("red /blue", "red blue"),
        ("red-and- blue", "redand blue"),  # one of its kind stands at a space: all of its kind vanish
        ("yes!", "yes"),
        ("1,000", "1000"),  # a comma between digits: every mark vanishes
        ("1,000/day", "1000day"),
        ("it's: 5", "it's: 5"),  # apostrophe and colon are kept
    ],
)
def test_vqa_punctuation_follows_the_space_rule(text, normalized):
    assert normalize_answer(text) == normalized


@pytest.mark.parametrize(
    "text, normalized",
    [
        ("yes.", "yes"),
        ("3.5", "3.5"),  # a digit follows: kept
        (".5", ".5"),
        ("v.2", "v.2"),
        ("3.", "3"),  # the pattern's misspelt look-behind does not spare it
        ("3.a", "3a"),
        ("a.b.c", "abc"),
        ("x<=3. y", "x 3 y"),
    ],
)
def test_vqa_full_stops_go_unless_a_digit_follows(text, normalized):
    assert normalize_answer(text) == normalized


def test_vqa_drops_at_most_32_full_stops():
    assert normalize_answer("x" + "." * 40) == "x" + "." * 8


def test_vqa_accuracy_refuses_a_question_without_a_second_annotator():
    with pytest.raises(ValueError, match="at least 2 references a question, found 1 in row 1"):
        VqaAccuracy().compute(predictions=["cat", "cat"], references=[["cat", "cat"], ["cat"]])
    with pytest.raises(ValueError, match="found 0 in row 0"):
        VqaAccuracy().compute(predictions=["cat"], references=[[]])


def test_vqa_accuracy_refuses_an_unknown_normalisation():
    with pytest.raises(ValueError, match="'official' or 'always', found 'never'"):
        vqa("cat", ["cat"] * 10, normalize="never")


# All of them

PREDICTIONS = {"exact_match": ["cat"], "pope": ["yes"], "vqa_accuracy": ["cat"]}
REFERENCES = {"exact_match": ["cat"], "pope": ["yes"], "vqa_accuracy": [["cat"] * 10]}
PERFECT = {"exact_match": "exact_match", "pope": "accuracy", "vqa_accuracy": "vqa_accuracy"}


def test_metrics_lists_every_folder_of_a_metric():
    assert sorted(metrics.METRICS) == sorted(
        path.parent.name for path in FOLDER.glob("*/*.py") if path.stem != "__init__"
    )


@pytest.mark.parametrize("name", metrics.METRICS)
def test_metric_loads_by_name(name):
    metric = metrics.load(name)
    assert metric.name == name
    assert metric.description and metric.citation
    scores = metric.compute(predictions=PREDICTIONS[name], references=REFERENCES[name])
    assert scores[PERFECT[name]] == 1.0


@pytest.mark.parametrize("name", metrics.METRICS)
@pytest.mark.parametrize("path", ["{name}", "{name}/{name}.py"])
def test_evaluate_loads_a_metric_by_path(name, path):
    metric = evaluate.load(str(FOLDER / path.format(name=name)))
    scores = metric.compute(predictions=PREDICTIONS[name], references=REFERENCES[name])
    assert scores[PERFECT[name]] == 1.0


@pytest.mark.parametrize("name", metrics.METRICS)
def test_metric_adds_row_by_row(name):
    metric = metrics.load(name)
    metric.add(prediction=PREDICTIONS[name][0], reference=REFERENCES[name][0])
    metric.add(prediction=PREDICTIONS[name][0], reference=REFERENCES[name][0])
    assert metric.compute()[PERFECT[name]] == 1.0


@pytest.mark.parametrize("name", metrics.METRICS)
def test_metric_of_nothing_raises_a_value_error(name):
    with pytest.raises(ValueError, match=f"{name} got 0 predictions"):
        metrics.load(name).compute(predictions=[], references=[])
    with pytest.raises(ValueError):
        metrics.load(name).compute()


@pytest.mark.parametrize("name", metrics.METRICS)
def test_metric_refuses_columns_of_different_lengths(name):
    with pytest.raises(ValueError, match="Mismatch in the number of predictions"):
        metrics.load(name).compute(predictions=PREDICTIONS[name] * 2, references=REFERENCES[name])


def test_unknown_metric_is_refused_by_name():
    with pytest.raises(ValueError, match="'bleu': the zoo ships exact_match, pope, vqa_accuracy"):
        metrics.load("bleu")


def test_metrics_combine():
    both = evaluate.combine([metrics.load("exact_match"), metrics.load("pope")])
    scores = both.compute(predictions=["yes", "no"], references=["yes", "yes"])
    assert scores["exact_match"] == 0.5
    assert scores["recall"] == 0.5


def test_metrics_load_by_path_in_an_offline_process_without_the_package(tmp_path):
    script = (
        "import sys, evaluate\n"
        "sys.modules['vlm_zoo'] = None\n"
        "for name in ('exact_match', 'pope', 'vqa_accuracy'):\n"
        f"    evaluate.load({str(FOLDER)!r} + '/' + name)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
