"""Exact match and F1 of extracted answers, in percent, as the evaluation scripts of SQuAD 1.1 (Rajpurkar et
al. 2016), SQuAD 2.0 (Rajpurkar et al. 2018) and, for text without spaces, CMRC 2018 (Cui et al. 2019) define
them."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence

from tunesmith.metrics.text import SPACELESS, TextUnit, text_unit

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# what CMRC's script removes: these and no others, so "," "." "(" and "…" stay
_CMRC_NO_PUNCTUATION = str.maketrans("", "", "-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
_CMRC_TOKENS = re.compile(rf"[{SPACELESS}]|[^\W{SPACELESS}]+(?:[.,'][^\W{SPACELESS}]+)*|[^\w\s]")


def normalize_answer(text: str) -> str:
    """SQuAD's normal form: lower case, without ASCII punctuation and English articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def squad_metrics(
    predictions: Sequence[str], references: Sequence[Sequence[str]], unit: TextUnit | None = None
) -> dict[str, float]:
    """`exact_match` and `f1`, 0 to 100: per question the best over its references, then the mean.

    `references[i]` are the accepted answers of question i. None at all means that the context does not answer
    it: 100 for the empty prediction, else 0. Where there is such a question, SQuAD 2.0's rules hold (answers
    that normalise to nothing are not answers) and the scores of the two kinds are given too: `HasAns_exact`,
    `HasAns_f1`, `NoAns_exact`, `NoAns_f1`; else SQuAD 1.1's, whose F1 of two texts that normalise to nothing
    is 0.

    `unit` None: `text_unit(references)`. For "characters" the rules are CMRC's: lower case, its own
    punctuation set removed; every character of a script without spaces is a token, other runs are split into
    words and marks by a rule of our own (CMRC calls NLTK's word_tokenize); the overlap in F1 is the longest
    common *contiguous* run of tokens, not SQuAD's bag. No questions, or a kind that does not occur: nan."""
    assert len(predictions) == len(references), f"{len(predictions)} predictions, {len(references)} questions"
    assert not any(isinstance(answers, str) for answers in references), "each question has a list of answers"
    unit = unit or text_unit(answer for answers in references for answer in answers)
    with_no_answer = any(not answers for answers in references)
    scores = [
        _score(prediction, answers, unit, with_no_answer)
        for prediction, answers in zip(predictions, references, strict=True)
    ]
    metrics = {"exact_match": _percent([s[1] for s in scores]), "f1": _percent([s[2] for s in scores])}
    if with_no_answer:
        for name, kind in (("HasAns", True), ("NoAns", False)):
            metrics[f"{name}_exact"] = _percent([s[1] for s in scores if s[0] == kind])
            metrics[f"{name}_f1"] = _percent([s[2] for s in scores if s[0] == kind])
    return metrics


def _percent(scores: Sequence[float]) -> float:
    return 100.0 * math.fsum(scores) / len(scores) if scores else math.nan


def _score(
    prediction: str, answers: Sequence[str], unit: TextUnit, with_no_answer: bool
) -> tuple[bool, float, float]:
    """Whether the question has an answer, its exact match and its F1, 0 to 1."""
    clean = normalize_answer if unit == "words" else _cmrc_clean
    predicted = clean(prediction)
    accepted = [clean(answer) for answer in answers]
    if with_no_answer:
        accepted = [answer for answer in accepted if answer] or [""]
    exact = max(float(predicted == answer) for answer in accepted)
    f1 = max(_f1(predicted, answer, unit, float(with_no_answer)) for answer in accepted)
    return bool(answers), exact, f1


def _f1(predicted: str, answer: str, unit: TextUnit, both_empty: float) -> float:
    if unit == "words":
        x, y = predicted.split(), answer.split()
        shared = (Counter(x) & Counter(y)).total()
    else:
        x, y = _CMRC_TOKENS.findall(predicted), _CMRC_TOKENS.findall(answer)
        shared = _longest_common_run(x, y)
    return 2 * shared / (len(x) + len(y)) if x or y else both_empty


def _cmrc_clean(text: str) -> str:
    return text.lower().strip().translate(_CMRC_NO_PUNCTUATION)


def _longest_common_run(x: Sequence[str], y: Sequence[str]) -> int:
    longest = 0
    runs = [0] * (len(y) + 1)  # runs[j + 1]: length of the common run that ends at the current x and y[j]
    for token in x:
        runs = [0, *(runs[j] + 1 if token == other else 0 for j, other in enumerate(y))]
        longest = max(longest, *runs)
    return longest
