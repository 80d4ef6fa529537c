"""SQuAD's exact match and F1, by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tunesmith.metrics import normalize_answer, squad_metrics


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Eiffel Tower!", "eiffel tower"),
        ("an apple a day", "apple day"),
        ("Anthem, the theater", "anthem theater"),
        ("U.S.", "us"),
        ("state-of-the-art", "stateoftheart"),
        ("\t$5,000\n", "5000"),
        ("the", ""),
        ("“the” café", "“ ” café"),
    ],
)
def test_normal_form(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal


def test_case_articles_and_punctuation_do_not_count() -> None:
    assert squad_metrics(["the Denver Broncos."], [["denver broncos"]]) == {"exact_match": 100.0, "f1": 100.0}


def test_best_reference_and_mean_over_questions() -> None:
    metrics = squad_metrics(
        ["Denver Broncos team", "in 1066", "London"],
        [["Broncos", "Denver Broncos"], ["1066", "in the year 1066"], ["Paris"]],
    )
    # 2 of 3 words against 2: F1 4/5; 1 of 2 against 1: 2/3, 2 of 2 against 3: 4/5; nothing
    assert metrics["f1"] == pytest.approx(100 * (4 / 5 + 4 / 5 + 0) / 3)
    assert metrics["exact_match"] == 0.0


def test_repeated_words_count_as_often_as_both_have_them() -> None:
    assert squad_metrics(["x x x y"], [["x x z"]])["f1"] == pytest.approx(100 * 2 * 2 / 7)


def test_exact_match_between_0_and_100() -> None:
    metrics = squad_metrics(["Paris", "Rome", "Bern"], [["paris"], ["Oslo"], ["Bonn", "Bern"]])
    assert metrics == pytest.approx({"exact_match": 200 / 3, "f1": 200 / 3})


def test_questions_without_an_answer() -> None:
    metrics = squad_metrics(["", "Paris", "", "big Paris"], [[], [], ["Rome"], ["Paris"]])
    assert metrics == pytest.approx(
        {
            "exact_match": 100 / 4,
            "f1": 100 * (1 + 0 + 0 + 2 / 3) / 4,
            "HasAns_exact": 0.0,
            "HasAns_f1": 100 * (2 / 3) / 2,
            "NoAns_exact": 50.0,
            "NoAns_f1": 50.0,
        }
    )


def test_answers_that_normalise_to_nothing() -> None:
    # SQuAD 1.1's script compares the words of "" and "": none shared, F1 0
    assert squad_metrics(["the"], [["a"]]) == {"exact_match": 100.0, "f1": 0.0}
    # SQuAD 2.0's takes such an answer out, and two empty texts agree
    metrics = squad_metrics(["the", "", "a"], [[], ["the"], ["the", "Rome"]])
    assert (metrics["NoAns_exact"], metrics["NoAns_f1"]) == (100.0, 100.0)
    assert (metrics["HasAns_exact"], metrics["HasAns_f1"]) == (50.0, 50.0)


def test_no_questions_and_missing_kinds_have_no_score() -> None:
    assert all(math.isnan(value) for value in squad_metrics([], []).values())
    only_unanswerable = squad_metrics(["", "x"], [[], []])
    assert only_unanswerable["NoAns_f1"] == only_unanswerable["f1"] == 50.0
    assert math.isnan(only_unanswerable["HasAns_f1"])


def test_chinese_is_compared_by_characters() -> None:
    predictions, references = (
        ["北京天安门", "《红楼梦》。", "2008年"],
        [["天安门广场"], ["红楼梦"], ["2008年8月"]],
    )
    # a run of 3 among 5 and 5; equal without punctuation; "2008", "年" of "2008", "年", "8", "月"
    expected = {"exact_match": 100 / 3, "f1": 100 * (3 / 5 + 1 + 2 * 2 / 6) / 3}
    assert squad_metrics(predictions, references) == pytest.approx(expected)
    assert squad_metrics(predictions, references, unit="characters") == pytest.approx(expected)
    assert squad_metrics(predictions, references, unit="words") == {"exact_match": 0.0, "f1": 0.0}


def test_cmrc_counts_contiguous_characters() -> None:
    # the shared characters are 天 and 门, but no run is longer than one
    assert squad_metrics(["天大门"], [["天安门"]])["f1"] == pytest.approx(100 * 2 * 1 / 6)
    assert squad_metrics(["x天安门"], [["天安门"]])["f1"] == pytest.approx(100 * 2 * 3 / 7)


def test_cmrc_keeps_words_of_other_scripts_whole() -> None:
    metrics = squad_metrics(["windows 3.1"], [["Windows 3.1版"]], unit="characters")
    assert metrics["f1"] == pytest.approx(100 * 2 * 2 / 5)
    # tokens: "windows", "3.1", "版" and "windows", "3.2", "版"
    metrics = squad_metrics(["windows 3.1版"], [["Windows 3.2版"]], unit="characters")
    assert metrics["f1"] == pytest.approx(100 * 2 * 1 / 6)
    # tokens: "50", "%", "人" and "50", "人"
    metrics = squad_metrics(["50%人"], [["50人"]], unit="characters")
    assert metrics["f1"] == pytest.approx(100 * 2 * 1 / 5)


def test_cmrc_without_an_answer() -> None:
    metrics = squad_metrics(["", "有", "天安门"], [[], [], ["天安"]])
    assert metrics["NoAns_exact"] == 50.0
    assert metrics["HasAns_f1"] == pytest.approx(100 * 2 * 2 / 5)


def test_a_bare_string_is_no_list_of_answers() -> None:
    with pytest.raises(AssertionError, match="list of answers"):
        squad_metrics(["Paris"], ["Paris"])
    with pytest.raises(AssertionError, match="1 predictions, 2 questions"):
        squad_metrics(["Paris"], [["Paris"], ["Rome"]])


@pytest.mark.data
@pytest.mark.parametrize("language", ["en", "de", "zh"])
def test_first_half_of_each_xquad_answer(data_dir: Path, language: str) -> None:
    text = (data_dir / "xquad" / f"xquad.{language}.json").read_text(encoding="utf-8")
    questions = [
        question
        for article in json.loads(text)["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]
    references = [[answer["text"] for answer in question["answers"]] for question in questions]
    assert squad_metrics([row[0] for row in references], references)["exact_match"] == 100.0
    halves = squad_metrics([row[0][: (len(row[0]) + 1) // 2] for row in references], references)
    by_words = squad_metrics([row[0][: (len(row[0]) + 1) // 2] for row in references], references, "words")
    assert 20 < halves["f1"] < 80
    assert (halves != by_words) == (language == "zh")
