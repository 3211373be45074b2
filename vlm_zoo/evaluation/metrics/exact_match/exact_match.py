"""Exact match: the share of predictions that equal their reference."""

import string

import datasets
import evaluate


_CITATION = """\
@inproceedings{rajpurkar2016squad,
  title     = {{SQuAD}: 100,000+ Questions for Machine Comprehension of Text},
  author    = {Rajpurkar, Pranav and Zhang, Jian and Lopyrev, Konstantin and Liang, Percy},
  booktitle = {Proceedings of EMNLP},
  year      = {2016},
}
"""

_DESCRIPTION = """\
The share of predictions equal to their reference, between 0 and 1. Whitespace around the text is no part of an answer;
case and ASCII punctuation are, unless an option ignores them.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`): One answer per question.
    references (`list[str]`): One reference per question.
    ignore_case (`bool`, defaults to `False`): Compare in lower case.
    ignore_punctuation (`bool`, defaults to `False`): Drop ASCII punctuation before comparing.
    strip_whitespace (`bool`, defaults to `True`): Drop whitespace around the text before comparing.

Returns:
    `dict`: `exact_match` (`float`).

Examples:
    >>> metric.compute(predictions=["Two cats.", "a dog"], references=["two cats", "a dog"])
    {'exact_match': 0.5}
    >>> metric.compute(
    ...     predictions=["Two cats."], references=["two cats"], ignore_case=True, ignore_punctuation=True
    ... )
    {'exact_match': 1.0}
"""

_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)


class ExactMatch(evaluate.Metric):
    """Share of predictions equal to their reference."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
            reference_urls=["https://huggingface.co/papers/1606.05250"],
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[str],
        ignore_case: bool = False,
        ignore_punctuation: bool = False,
        strip_whitespace: bool = True,
    ) -> dict[str, float]:
        if len(predictions) == 0:
            raise ValueError("exact_match got 0 predictions and 0 references: the mean of nothing is undefined.")

        def canonical(text: str) -> str:
            if ignore_punctuation:
                text = text.translate(_DROP_PUNCTUATION)
            if ignore_case:
                text = text.lower()
            return text.strip() if strip_whitespace else text

        hits = sum(canonical(p) == canonical(r) for p, r in zip(predictions, references, strict=True))
        return {"exact_match": hits / len(predictions)}
