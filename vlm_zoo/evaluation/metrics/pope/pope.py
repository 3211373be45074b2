"""POPE: object hallucination measured by yes/no questions about what is in the image."""

import datasets
import evaluate


_CITATION = """\
@inproceedings{li2023evaluating,
  title     = {Evaluating Object Hallucination in Large Vision-Language Models},
  author    = {Li, Yifan and Du, Yifan and Zhou, Kun and Wang, Jinpeng and Zhao, Wayne Xin and Wen, Ji-Rong},
  booktitle = {Proceedings of EMNLP},
  year      = {2023},
}
"""

_DESCRIPTION = """\
Accuracy, precision, recall, F1 (yes is the positive class) and the share of predictions read as yes, over questions of
the form "Is there a <object> in the image?". An answer is read as the benchmark reads it: of the text before the first
full stop, without commas, split at spaces, the words "No", "no" and "not" make it a no; every other answer is a yes.
The yes ratio counts predictions, not references: a model that always agrees has 1.0.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`): One free-form answer per question.
    references (`list[str]`): "yes" or "no", one per question.
    categories (`list[str]`, *optional*): How the asked object was sampled, one per question (POPE: "random",
        "popular", "adversarial"). Each gets its own five figures. Under the configuration "by_category" it is a column
        like the other two, so that `add` and `add_batch` take it; otherwise it is an option of `compute`.

Returns:
    `dict`: `accuracy`, `precision`, `recall`, `f1`, `yes_ratio` (`float`) over all questions pooled and, with
    categories, the same five as `<category>_accuracy` and so on. A ratio of nothing (precision without a yes among
    the predictions, recall without one among the references, F1 without a true positive) is 0.

Examples:
    >>> metric.compute(
    ...     predictions=["Yes, a cat.", "no", "There is not.", "Sure"], references=["yes", "yes", "no", "no"]
    ... )
    {'accuracy': 0.5, 'precision': 0.5, 'recall': 0.5, 'f1': 0.5, 'yes_ratio': 0.5}
"""

_NO_WORDS = {"No", "no", "not"}


def says_yes(answer: str) -> bool:
    """Reads a free-form answer: a no if its first sentence holds a word of negation, else a yes."""
    first_sentence = answer.split(".", 1)[0]
    return _NO_WORDS.isdisjoint(first_sentence.replace(",", "").split(" "))


def _scores(predicted: list[bool], actual: list[bool]) -> dict[str, float]:
    positives = sum(p and a for p, a in zip(predicted, actual, strict=True))
    precision = _ratio(positives, sum(predicted))
    recall = _ratio(positives, sum(actual))
    return {
        "accuracy": sum(p == a for p, a in zip(predicted, actual, strict=True)) / len(actual),
        "precision": precision,
        "recall": recall,
        "f1": _ratio(2 * precision * recall, precision + recall),
        "yes_ratio": sum(predicted) / len(predicted),
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


class Pope(evaluate.Metric):
    """Yes/no accuracy, precision, recall, F1 and yes ratio, overall and per category."""

    def _info(self) -> evaluate.MetricInfo:
        columns = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        if self.config_name == "by_category":
            columns["categories"] = datasets.Value("string")
        elif self.config_name != "default":
            raise ValueError(f"pope has the configurations 'default' and 'by_category', not {self.config_name!r}.")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(columns),
            reference_urls=["https://huggingface.co/papers/2305.10355"],
        )

    def _compute(
        self, predictions: list[str], references: list[str], categories: list[str] | None = None
    ) -> dict[str, float]:
        if len(predictions) == 0:
            raise ValueError("pope got 0 predictions and 0 references: its ratios are undefined.")
        if categories is not None and len(categories) != len(predictions):
            raise ValueError(f"pope got {len(categories)} categories for {len(predictions)} predictions.")
        for row, reference in enumerate(references):
            if reference not in ("yes", "no"):
                raise ValueError(f"pope expects the references 'yes' or 'no', found {reference!r} in row {row}.")

        predicted = [says_yes(answer) for answer in predictions]
        actual = [reference == "yes" for reference in references]
        results = _scores(predicted, actual)
        for category in dict.fromkeys(categories or ()):
            rows = [row for row, name in enumerate(categories) if name == category]
            scores = _scores([predicted[row] for row in rows], [actual[row] for row in rows])
            results |= {f"{category}_{name}": score for name, score in scores.items()}
        return results
