"""Metrics of generated text: BLEU, chrF, ROUGE, and exact match of the answer in the text."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from tunesmith.errors import UserError

TextUnit = Literal["words", "characters"]
BleuTokenizer = Literal["13a", "intl", "zh", "char", "none"]
RougeTokenizer = Literal["ascii", "words", "characters"]

_HAN = "\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_KANA = "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f"
_THAI_LAO_MYANMAR_KHMER = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
# the inside of a regular expression's character class: the scripts that write no spaces between words
SPACELESS = _HAN + _KANA + _THAI_LAO_MYANMAR_KHMER
_SPACELESS = re.compile(f"[{SPACELESS}]")
_OTHER_WORD = re.compile(rf"[^\W\d_{SPACELESS}]+")
_HAN_LETTER = re.compile(f"[{_HAN}]")
_KANA_LETTER = re.compile(f"[{_KANA}]")


@dataclass(frozen=True, slots=True)
class Signed:
    """Metrics with the signature of the library that computed them: the settings and the version without
    which the number cannot be compared with another."""

    metrics: dict[str, float]
    signature: str


def text_unit(texts: Iterable[str]) -> TextUnit:
    """What a token is in these texts: "characters" where most words are of a script without spaces between
    words (Chinese, Japanese, Thai, Lao, Burmese, Khmer), two such characters counted as a word; else "words",
    also where there are no letters."""
    spaceless = others = 0
    for text in texts:
        spaceless += len(_SPACELESS.findall(text))
        others += len(_OTHER_WORD.findall(text))
    return "characters" if spaceless > 2 * others else "words"


def bleu_tokenizer(references: Sequence[Sequence[str]]) -> BleuTokenizer:
    """sacrebleu's tokenizer for the script of the references: 13a; zh for Chinese; char for Japanese and the
    other scripts without spaces (sacrebleu's ja-mecab needs a dictionary that is not among our packages)."""
    texts = [reference for row in references for reference in row]
    if text_unit(texts) == "words":
        return "13a"
    spaceless, han, kana = (
        sum(len(script.findall(text)) for text in texts) for script in (_SPACELESS, _HAN_LETTER, _KANA_LETTER)
    )
    # Japanese prose has more kana than kanji; a Chinese text may quote a Japanese name
    return "zh" if 2 * han > spaceless and 10 * kana < han else "char"


def bleu(
    predictions: Sequence[str], references: Sequence[Sequence[str]], tokenize: BleuTokenizer | None = None
) -> Signed:
    """`bleu`, 0 to 100: corpus BLEU (Papineni et al. 2002) by sacrebleu (Post 2018), cased, exponential
    smoothing.

    `references[i]` are the references of row i, whose number may differ from row to row. `tokenize` None:
    `bleu_tokenizer(references)`; the signature names it. No rows, or a row without references: nan, with an
    empty signature."""
    from sacrebleu.metrics.bleu import BLEU

    streams = _streams(predictions, references)
    if streams is None:
        return Signed({"bleu": math.nan}, "")
    # force silences the guess that the text is tokenised, which changes no number
    metric = BLEU(tokenize=tokenize or bleu_tokenizer(references), force=True)
    score = metric.corpus_score(predictions, streams).score
    return Signed({"bleu": float(score)}, str(metric.get_signature()))


def chrf(predictions: Sequence[str], references: Sequence[Sequence[str]], word_order: int = 0) -> Signed:
    """`chrf`, 0 to 100: corpus chrF2 (Popović 2015) by sacrebleu: the F2 of character 1- to 6-grams, spaces
    left out, so it needs no tokenizer. `word_order=2` gives chrF++ (Popović 2017). References and undefined
    cases as in `bleu`."""
    from sacrebleu.metrics.chrf import CHRF

    streams = _streams(predictions, references)
    if streams is None:
        return Signed({"chrf": math.nan}, "")
    metric = CHRF(word_order=word_order)
    score = metric.corpus_score(predictions, streams).score
    return Signed({"chrf": float(score)}, str(metric.get_signature()))


def _streams(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[list[str]] | None:
    """sacrebleu's transposed view: the k-th reference of every row, None where a row has fewer."""
    if not _scorable(predictions, references):
        return None
    most = max(len(row) for row in references)
    streams = [[row[k] if k < len(row) else None for row in references] for k in range(most)]
    return cast("list[list[str]]", streams)  # sacrebleu documents the None, its annotations forget it


def _scorable(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> bool:
    assert len(predictions) == len(references), f"{len(predictions)} predictions, {len(references)} rows"
    assert not any(isinstance(row, str) for row in references), "each row has a list of references"
    return len(references) > 0 and all(len(row) > 0 for row in references)


def rouge_tokenizer(references: Sequence[Sequence[str]]) -> RougeTokenizer:
    """The tokenizer for the script of the references: "characters" where there are no spaces (`text_unit`);
    else ROUGE's own, "ascii", where at least half of the letters are a to z, and "words" for the rest, of
    which ROUGE's own would delete most letters."""
    texts = [reference for row in references for reference in row]
    if text_unit(texts) == "characters":
        return "characters"
    letters = "".join(letter for text in texts for letter in filter(str.isalpha, text))
    return "ascii" if 2 * sum(map(str.isascii, letters)) >= len(letters) else "words"


def rouge(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    tokenize: RougeTokenizer | None = None,
    use_stemmer: bool = False,
) -> dict[str, float]:
    """`rouge1`, `rouge2`, `rougeL`, `rougeLsum`, 0 to 1: per row the F1 of the reference with the best F1 of
    that measure, then the mean over rows (Lin 2004, by rouge-score).

    `rougeLsum` takes lines as sentences. `tokenize` None: `rouge_tokenizer(references)`; "ascii" are
    lower-case runs of a-z and 0-9, "words" lower-case runs of Unicode letters, marks and digits, "characters"
    the same with each character of a script without spaces on its own. `use_stemmer` (Porter's, English)
    belongs to "ascii" alone. No rows, or a row without references: all nan."""
    from rouge_score.rouge_scorer import RougeScorer

    names = ("rouge1", "rouge2", "rougeL", "rougeLsum")
    if not _scorable(predictions, references):
        return dict.fromkeys(names, math.nan)
    tokenize = tokenize or rouge_tokenizer(references)
    assert tokenize == "ascii" or not use_stemmer, "the stemmer is the ascii tokenizer's"
    tokenizer = None if tokenize == "ascii" else _UnicodeTokenizer(tokenize)
    scorer = RougeScorer(list(names), use_stemmer=use_stemmer, tokenizer=tokenizer)
    rows = [scorer.score_multi(row, text) for text, row in zip(predictions, references, strict=True)]
    return {name: math.fsum(row[name].fmeasure for row in rows) / len(rows) for name in names}


@dataclass(frozen=True, slots=True)
class _UnicodeTokenizer:
    unit: TextUnit

    def tokenize(self, text: str) -> list[str]:
        # categories rather than \w, which leaves out the vowel signs that Indic and Thai words contain
        text = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text.lower())
        return (_SPACELESS.sub(r" \g<0> ", text) if self.unit == "characters" else text).split()


# a minus after a letter, a digit or a bracket is a hyphen, a range or an operator
_NUMBER = r"((?:(?<![A-Za-z0-9)\]])[-−])?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+))"
_LAST_NUMBER = re.compile(_NUMBER)
_MARKED_NUMBER = re.compile(r"####\s*" + _NUMBER)
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9])")


def extract_answer(text: str, rule: str | None) -> str | None:
    """The answer in a generated text (or a reference), None where there is none.

    `rule` None: the text, stripped. "gsm8k": the number behind the first `####`, else the last number of the
    text (Cobbe et al. 2021), without `$` and thousands commas and in one spelling (`5.0`, `05` and `$5` are
    "5"). Otherwise a regular expression: the first group of its first match, stripped; one that does not
    compile or has no group is a UserError."""
    match rule:
        case None:
            return text.strip()
        case "gsm8k":
            text = _THOUSANDS.sub("", text.replace("$", ""))
            marked = _MARKED_NUMBER.search(text)
            numbers = [marked[1]] if marked else _LAST_NUMBER.findall(text)
            return _one_spelling(numbers[-1]) if numbers else None
        case _:
            found = _pattern(rule).search(text)
            return found[1].strip() if found and found[1] is not None else None


def _one_spelling(number: str) -> str:
    whole, _, fraction = number.lstrip("-−").partition(".")
    value = f"{whole.lstrip('0') or '0'}.{fraction.rstrip('0')}".rstrip(".")
    return f"-{value}" if number[0] in "-−" and value != "0" else value


def _pattern(rule: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(rule)
    except re.error as error:
        raise UserError(f"evaluation.generate.answer: {rule!r} is no regular expression: {error}") from None
    if pattern.groups == 0:
        raise UserError(f"evaluation.generate.answer: {rule!r} has no group: put the answer's part in ( )")
    return pattern


def exact_match(
    predictions: Sequence[str], references: Sequence[Sequence[str]], rule: str | None = None
) -> dict[str, float]:
    """`exact_match`: share of rows (0 to 1) whose answer equals that of one of its references;
    `answer_found`: share of rows in whose prediction `rule` finds an answer at all.

    Both sides go through `extract_answer`; a reference in which the rule finds nothing is itself the answer
    (stripped), a prediction in which it finds nothing is wrong. No rows, or a row without references: nan."""
    if not _scorable(predictions, references):
        return {"exact_match": math.nan, "answer_found": math.nan}
    found = [extract_answer(text, rule) for text in predictions]
    right = [
        answer in {_accepted(text, rule) for text in row}
        for answer, row in zip(found, references, strict=True)
    ]
    answered = sum(answer is not None for answer in found)
    return {"exact_match": sum(right) / len(right), "answer_found": answered / len(right)}


def _accepted(reference: str, rule: str | None) -> str:
    answer = extract_answer(reference, rule)
    return reference.strip() if answer is None else answer
