"""BLEU, chrF and ROUGE against numbers worked out by hand; answers taken out of text."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tunesmith.errors import UserError
from tunesmith.metrics import (
    bleu,
    bleu_tokenizer,
    chrf,
    exact_match,
    extract_answer,
    rouge,
    rouge_tokenizer,
    text_unit,
)

FOX = "the quick brown fox jumped over a dog"
FOX_1 = "the quick brown fox jumps over the lazy dog"
FOX_2 = "a fox jumped over a dog"


def _geometric_mean(*ratios: float) -> float:
    return math.prod(ratios) ** (1 / len(ratios))


@pytest.mark.parametrize(
    ("text", "unit", "bleu_name", "rouge_name"),
    [
        ("The cat sat.", "words", "13a", "ascii"),
        ("Über größere Öfen", "words", "13a", "ascii"),
        ("Съешь ещё этих булок", "words", "13a", "words"),
        ("고양이가 앉았다", "words", "13a", "words"),
        ("שלום עולם", "words", "13a", "words"),
        ("用 PyTorch 训练 BERT 模型", "characters", "zh", "characters"),
        (
            "《となりのトトロ》是宫崎骏执导的动画电影，于一九八八年四月十六日在日本上映，讲述了一对姐妹搬到乡下之后"
            "在森林里遇见精灵的故事，广受好评，并且获得了当年的多个奖项，影响了几代人，至今仍然是吉卜力工作室的象征",
            "characters",
            "zh",
            "characters",
        ),
        ("我爱北京天安门。", "characters", "zh", "characters"),
        ("I love 北京天安门广场 very much", "words", "13a", "ascii"),
        ("猫がマットの上に座った", "characters", "char", "characters"),
        ("แมวนั่งบนเสื่อ", "characters", "char", "characters"),
        ("12 + 3 = 15", "words", "13a", "ascii"),
        ("", "words", "13a", "ascii"),
    ],
)
def test_units_follow_the_script(text: str, unit: str, bleu_name: str, rouge_name: str) -> None:
    assert text_unit([text]) == unit
    assert bleu_tokenizer([[text]]) == bleu_name
    assert rouge_tokenizer([[text]]) == rouge_name


def test_the_script_is_that_of_most_words_of_all_references() -> None:
    assert text_unit(["OK", "我爱北京"]) == "characters"
    assert text_unit(["我爱北京", "an English sentence"]) == "words"
    assert bleu_tokenizer([["我爱"], ["北京", "OK"]]) == "zh"
    assert rouge_tokenizer([["мама"], ["окно", "OK"]]) == "words"
    assert text_unit([]) == "words"


def test_bleu_by_hand() -> None:
    score = bleu([FOX], [[FOX_1]])
    # 6 of 8 words, 3 of 7 pairs, 2 of 6 triples, 1 of 5 quadruples; 8 words for 9
    expected = 100 * math.exp(1 - 9 / 8) * _geometric_mean(6 / 8, 3 / 7, 2 / 6, 1 / 5)
    assert score.metrics == pytest.approx({"bleu": expected})
    assert score.signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")


def test_bleu_adds_counts_over_rows() -> None:
    score = bleu([FOX, "a b c d"], [[FOX_1], ["a b c d"]])
    expected = 100 * math.exp(1 - 13 / 12) * _geometric_mean(10 / 12, 6 / 10, 4 / 8, 2 / 6)
    assert score.metrics["bleu"] == pytest.approx(expected)


def test_bleu_of_several_references() -> None:
    # with both: all words and pairs, 5 of 6 triples, 3 of 5 quadruples; the closer length is 9
    expected = 100 * math.exp(1 - 9 / 8) * _geometric_mean(1, 1, 5 / 6, 3 / 5)
    score = bleu([FOX], [[FOX_2, FOX_1]])
    assert score.metrics["bleu"] == pytest.approx(expected)
    assert score.signature.startswith("nrefs:2|")


def test_bleu_of_rows_with_different_numbers_of_references() -> None:
    score = bleu((FOX, "a b c d"), ((FOX_1, FOX_2), ("a b c d",)))
    expected = 100 * math.exp(1 - 13 / 12) * _geometric_mean(1, 1, 7 / 8, 4 / 6)
    assert score.metrics["bleu"] == pytest.approx(expected)
    assert score.signature.startswith("nrefs:var|")


def test_bleu_is_cased_and_splits_punctuation() -> None:
    assert bleu(["a b c d."], [["a b c d ."]]).metrics["bleu"] == pytest.approx(100)
    assert bleu(["A b c d e"], [["a b c d e"]]).metrics["bleu"] == pytest.approx(
        100 * _geometric_mean(4 / 5, 3 / 4, 2 / 3, 1 / 2)
    )


def test_bleu_of_chinese_counts_characters() -> None:
    expected = 100 * _geometric_mean(5 / 7, 3 / 6, 2 / 5, 1 / 4)
    score = bleu(["我爱北京天安门"], [["我爱北京故宫门"]])
    assert score.metrics["bleu"] == pytest.approx(expected)
    assert "|tok:zh|" in score.signature
    by_words = bleu(["我爱北京天安门"], [["我爱北京故宫门"]], tokenize="13a")
    assert by_words.metrics["bleu"] < expected
    assert "|tok:13a|" in by_words.signature


def test_tokenised_text_is_no_reason_to_warn(caplog: pytest.LogCaptureFixture) -> None:
    assert bleu(["a b c d ."] * 100, [["a b c d ."]] * 100).metrics["bleu"] == pytest.approx(100)
    assert not caplog.records


def test_chrf_by_hand() -> None:
    # orders 1 to 3 share 2 of 3, 1 of 2, 0 of 1, longer ones do not exist
    score = chrf(["abd"], [["abc"]])
    assert score.metrics == pytest.approx({"chrf": 100 * (2 / 3 + 1 / 2 + 0) / 3})
    assert score.signature.startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")
    assert "|nw:2|" in chrf(["abd"], [["abc"]], word_order=2).signature


def test_chrf_weighs_recall_twice() -> None:
    # "abcdef" of "abcdefghi": every n-gram is there, and the reference has three more of each order
    precision, recall = 1.0, (6 / 9 + 5 / 8 + 4 / 7 + 3 / 6 + 2 / 5 + 1 / 4) / 6
    f2 = 5 * precision * recall / (4 * precision + recall)
    assert chrf(["abc def"], [["abc defghi"]]).metrics["chrf"] == pytest.approx(100 * f2)


def test_chrf_takes_the_best_reference() -> None:
    # of "abc", and the counts of both rows together: 3 of 4, 1 of 2, 0 of 1
    score = chrf(["abd", "x"], [["q", "abc"], ["x"]])
    assert score.metrics["chrf"] == pytest.approx(100 * (3 / 4 + 1 / 2 + 0) / 3)


def test_chrf_plus_plus_adds_words() -> None:
    # "abcd" and "abce" share 3 of 4, 2 of 3, 1 of 2 and 0 of 1; of the words 1 of 2, of their pairs 0 of 1
    score = chrf(["ab cd"], [["ab ce"]], word_order=2).metrics["chrf"]
    assert score == pytest.approx(100 * (3 / 4 + 2 / 3 + 1 / 2 + 0 + 1 / 2 + 0) / 6)


def test_rouge_by_hand() -> None:
    scores = rouge(["The cat sat on a mat."], [["the cat lay on the mat"]])
    # the, cat, on, mat of 6 and 6; "the cat" of 5 and 5; the longest subsequence is the four words
    assert scores == pytest.approx({"rouge1": 4 / 6, "rouge2": 1 / 5, "rougeL": 4 / 6, "rougeLsum": 4 / 6})


def test_rouge_is_the_mean_of_f1() -> None:
    scores = rouge(["a b c", "x"], [["a b d e f"], ["y"]])
    assert scores["rouge1"] == pytest.approx((2 * 2 / 8 + 0) / 2)
    assert scores["rouge2"] == pytest.approx((2 * 1 / 6 + 0) / 2)


def test_rouge_lsum_reads_lines_as_sentences() -> None:
    scores = rouge(["d e x\na b c"], [["a b c\nd e f"]])
    assert scores["rougeL"] == pytest.approx(3 / 6)
    assert scores["rougeLsum"] == pytest.approx(5 / 6)


def test_rouge_takes_the_best_reference_of_each_measure() -> None:
    scores = rouge(["a b c d"], [["d c b a x x", "a b y y y y"]])
    assert scores["rouge1"] == pytest.approx(2 * 4 / 10)  # of the first
    assert scores["rouge2"] == pytest.approx(2 * 1 / 8)  # of the second
    assert scores["rougeL"] == pytest.approx(2 * 2 / 10)


def test_rouge_stems_only_when_asked() -> None:
    assert rouge(["running dogs"], [["run dog"]])["rouge1"] == 0.0
    assert rouge(["running dogs"], [["runs dog"]], use_stemmer=True)["rouge1"] == 1.0
    with pytest.raises(AssertionError, match="stemmer"):
        rouge(["беги"], [["беги"]], use_stemmer=True)


def test_rouge_of_other_scripts() -> None:
    chinese = rouge(["我爱北京。"], [["我爱南京"]])
    assert chinese == pytest.approx({"rouge1": 3 / 4, "rouge2": 1 / 3, "rougeL": 3 / 4, "rougeLsum": 3 / 4})
    russian = rouge(["Мама мыла окно!"], [["мама мыла раму"]])
    assert russian == pytest.approx({"rouge1": 2 / 3, "rouge2": 1 / 2, "rougeL": 2 / 3, "rougeLsum": 2 / 3})
    # a vowel sign belongs to its word
    assert rouge(["पानी ठंडा"], [["पाना ठंडा"]])["rouge1"] == pytest.approx(1 / 2)
    assert rouge(["我爱北京"], [["我爱南京"]], tokenize="words")["rouge1"] == 0.0
    assert rouge(["我爱 B5"], [["我爱 b6"]], tokenize="characters")["rouge1"] == pytest.approx(2 / 3)


def test_nothing_generated_scores_zero() -> None:
    assert bleu([""], [["a b c d"]]).metrics["bleu"] == 0.0
    assert chrf([""], [["abc"]]).metrics["chrf"] == 0.0
    assert set(rouge([""], [["a"]]).values()) == {0.0}
    assert exact_match([""], [["a"]]) == {"exact_match": 0.0, "answer_found": 1.0}


@pytest.mark.parametrize(("predictions", "references"), [([], []), (["a", "b"], [["a"], []])])
def test_without_rows_or_references_there_is_no_score(
    predictions: list[str], references: list[list[str]]
) -> None:
    for score in (bleu(predictions, references), chrf(predictions, references)):
        assert score.signature == ""
        assert all(math.isnan(value) for value in score.metrics.values())
    for scores in (rouge(predictions, references), exact_match(predictions, references)):
        assert all(math.isnan(value) for value in scores.values())


def test_a_bare_string_is_no_list_of_references() -> None:
    for function in (bleu, chrf, rouge, exact_match):
        with pytest.raises(AssertionError, match="list of references"):
            function(["a b"], ["a b"])
        with pytest.raises(AssertionError, match="1 predictions, 2 rows"):
            function(["a"], [["a"], ["b"]])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 3 + 4 = 7\n#### 7", "7"),
        ("#### 5.0", "5"),
        ("####$1,234,567.50", "1234567.5"),
        ("#### -3 and 4", "-3"),
        ("#### 007\n\nQuestion: 8\n#### 9", "7"),
        ("#### unknown, maybe 12", "12"),
        ("It costs $1,000.", "1000"),
        ("He has 3, 4 or 5. So 5", "5"),
        ("between 3-4", "4"),
        ("10 - 4 = x", "4"),
        ("x=-4", "-4"),
        ("x = −4", "-4"),
        ("a loss of -$12.30", "-12.3"),
        ("the point (3,-5)", "-5"),
        ("是-5", "-5"),
        ("f(x)-2", "2"),
        ("about .50", "0.5"),
        ("-0.0", "0"),
        ("100", "100"),
        ("12345678901234567890123456789012345", "12345678901234567890123456789012345"),
        ("no number", None),
        ("", None),
    ],
)
def test_gsm8k_answers(text: str, answer: str | None) -> None:
    assert extract_answer(text, "gsm8k") == answer


def test_other_rules() -> None:
    assert extract_answer("  as it is \n", None) == "as it is"
    assert extract_answer("Answer: B \nAnswer: C", r"Answer:\s*(.*)") == "B"
    assert extract_answer("no such thing", r"Answer:\s*(.*)") is None
    assert extract_answer("yes", r"no(.)|yes") is None


@pytest.mark.parametrize(("rule", "what"), [("(", "no regular expression"), ("Answer: .*", "no group")])
def test_unusable_rules_are_the_users_to_mend(rule: str, what: str) -> None:
    with pytest.raises(UserError, match=rf"evaluation\.generate\.answer: .*{what}"):
        extract_answer("", rule)


def test_exact_match() -> None:
    predictions = ["#### 5", "it is 6.00", "maybe 7", "none"]
    references = [["… #### 5.0"], ["#### 1", "#### 6"], ["#### 8"], ["#### 9"]]
    assert exact_match(predictions, references, "gsm8k") == {"exact_match": 2 / 4, "answer_found": 3 / 4}
    assert exact_match([" Paris\n", "Rome"], [["Paris"], ["rome"]]) == {
        "exact_match": 0.5,
        "answer_found": 1.0,
    }


def test_a_reference_may_be_the_bare_answer() -> None:
    rule = r"Answer: (\w+)"
    assert exact_match(["Answer: B", "B", "Answer: C"], [["B"], ["B"], ["Answer: C"]], rule) == {
        "exact_match": 2 / 3,
        "answer_found": 2 / 3,
    }
    # an empty answer is an answer
    assert exact_match(["A:", "A: b"], [["A:"], ["A:"]], r"A:(.*)") == {
        "exact_match": 0.5,
        "answer_found": 1.0,
    }


@pytest.mark.data
def test_gsm8k_references_have_their_numbers(data_dir: Path) -> None:
    lines = (data_dir / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    finals = [answer.rpartition("#### ")[2] for answer in answers]
    assert [float(extract_answer(answer, "gsm8k") or "nan") for answer in answers] == [
        float(final.replace(",", "")) for final in finals
    ]
    # the last line restated in words, with a decimal point, is the same answer
    restated = [f"In total that is ${final}.00." for final in finals]
    assert exact_match(restated, [[answer] for answer in answers], "gsm8k")["exact_match"] == 1.0
