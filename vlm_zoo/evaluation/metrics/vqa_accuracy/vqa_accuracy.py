"""VQA accuracy: agreement with at least three of ten human answers, averaged over leaving each annotator out."""

import re

import datasets
import evaluate


_CITATION = """\
@inproceedings{antol2015vqa,
  title     = {{VQA}: Visual Question Answering},
  author    = {Antol, Stanislaw and Agrawal, Aishwarya and Lu, Jiasen and Mitchell, Margaret and Batra, Dhruv
               and Zitnick, C. Lawrence and Parikh, Devi},
  booktitle = {Proceedings of ICCV},
  year      = {2015},
}
@inproceedings{goyal2017making,
  title     = {Making the {V} in {VQA} Matter: Elevating the Role of Image Understanding in Visual Question Answering},
  author    = {Goyal, Yash and Khot, Tejas and Summers-Stay, Douglas and Batra, Dhruv and Parikh, Devi},
  booktitle = {Proceedings of CVPR},
  year      = {2017},
}
"""

_DESCRIPTION = """\
For each annotator, min(1, number of the OTHER annotators who gave the predicted answer / 3); the mean over annotators,
then over questions. Line breaks and tabs count as spaces and the text is stripped. As in the benchmark's own script,
punctuation, case, number words, articles and missing apostrophes are normalised only where the annotators disagree:
if all gave literally the same answer, the prediction must equal it as it stands.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`): One answer per question.
    references (`list[list[str]]`): The annotators' answers to each question (ten in VQA v1 and v2), at least two. With
        n of them, the best possible score of a question is min(1, (n - 1) / 3).
    normalize (`str`, defaults to `"official"`): `"official"` normalises both sides where the annotators disagree;
        `"always"` normalises both sides of every question.

Returns:
    `dict`: `vqa_accuracy` (`float`, between 0 and 1).

Examples:
    >>> metric.compute(predictions=["Two."], references=[["2"] * 3 + ["3"] * 7])
    {'vqa_accuracy': 0.9}
"""

_PUNCTUATION = ';/[]"{}()=+\\_->@<`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# The benchmark's pattern is `(?!<=\d)(\.)(?!\d)`, where `(?<!\d)` was surely meant. The first group never fails (a
# full stop is no "<"), so the full stop of "3." goes as well; what is left of the pattern is:
_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32  # the benchmark passes re.UNICODE (= 32) in the place of `count`
_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
_NUMBERS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_ARTICLES = {"a", "an", "the"}
# Each form is restored where exactly one of its apostrophes is missing.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    form[:at] + form[at + 1 :]: form for form in _CONTRACTED.split() for at, char in enumerate(form) if char == "'"
}
_CONTRACTIONS["somebody'd"] = "somebodyd"  # the benchmark's table has this one the other way round


def normalize_answer(text: str) -> str:
    """Applies the benchmark's rules for punctuation, then those for words."""
    delete_all = _COMMA_IN_NUMBER.search(text) is not None
    normalized = text
    for mark in _PUNCTUATION:
        at_a_space = f"{mark} " in text or f" {mark}" in text
        normalized = normalized.replace(mark, "" if delete_all or at_a_space else " ")
    normalized = _PERIOD.sub("", normalized, count=_MAX_PERIODS)
    words = (_NUMBERS.get(word, word) for word in normalized.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _question_accuracy(answer: str, references: list[str]) -> float:
    others = (references[:left_out] + references[left_out + 1 :] for left_out in range(len(references)))
    return sum(min(1.0, other.count(answer) / 3) for other in others) / len(references)


class VqaAccuracy(evaluate.Metric):
    """Agreement with the annotators of a question, each left out once."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.Sequence(datasets.Value("string")),
                }
            ),
            reference_urls=[
                "https://huggingface.co/papers/1505.00468",
                "https://huggingface.co/papers/1612.00837",
                "https://github.com/GT-Vision-Lab/VQA",
            ],
        )

    def _compute(
        self, predictions: list[str], references: list[list[str]], normalize: str = "official"
    ) -> dict[str, float]:
        if normalize not in ("official", "always"):
            raise ValueError(f"normalize must be 'official' or 'always', found {normalize!r}.")
        if len(predictions) == 0:
            raise ValueError("vqa_accuracy got 0 predictions and 0 references: the mean of nothing is undefined.")

        accuracies = []
        for row, (answer, answers) in enumerate(zip(predictions, references, strict=True)):
            if len(answers) < 2:
                raise ValueError(
                    f"vqa_accuracy needs at least 2 references a question, found {len(answers)} in row {row}: leaving "
                    "one annotator out leaves none to agree with (for a single reference use exact_match)."
                )
            answer, answers = _one_line(answer), [_one_line(text) for text in answers]
            if normalize == "always" or len(set(answers)) > 1:
                answer, answers = normalize_answer(answer), [normalize_answer(text) for text in answers]
            accuracies.append(_question_accuracy(answer, answers))
        return {"vqa_accuracy": sum(accuracies) / len(accuracies)}
