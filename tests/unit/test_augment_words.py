"""Operations on words: what they change, what they leave, and that random numbers alone decide."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import tiny_recipe
from tunesmith.data.augment import operations
from tunesmith.data.augment.pairs import beta
from tunesmith.data.augment.stored import from_json, to_json
from tunesmith.data.augment.synonyms import of_table, of_wordnet
from tunesmith.data.augment.variants import BackTranslated, _others
from tunesmith.data.augment.words import fields, join, split, with_fields
from tunesmith.data.examples import Answer, Chat, Example, Labelled, Message, Question, SourceTarget, Tokens
from tunesmith.data.order import raw
from tunesmith.data.table import Table, finish_table, write_table
from tunesmith.errors import DataError, MachineError, Place
from tunesmith.recipe import Recipe

NOWHERE = Place("", 0)
TEXT = '  The quick,  "brown" fox\njumps over\tthe lazy dog.'
ENTITY = Tokens(
    ("Ann", "Lee", "saw", "York", "in", "May"), ("B-PER", "I-PER", "O", "B-LOC", "O", "O"), NOWHERE
)
EXAMPLES: list[Example] = [
    Labelled("a b", "x", NOWHERE),
    Labelled("a b", ("x", "y"), NOWHERE, "c d"),
    Labelled("a b", (0.5, 1.0), NOWHERE),
    Labelled("a b", 0.25, NOWHERE),
    ENTITY,
    Question("7", "who?", "Ann saw.", (Answer("Ann", 0),), NOWHERE),
    SourceTarget("a b", ("c", "d"), NOWHERE, {"from": ["en"]}),
    Chat(
        (
            Message("system", "be kind"),
            Message("user", "hi there"),
            Message("user", "learn this", train=True),
            Message("assistant", "yes", tool_calls=({"name": "f", "arguments": {"a": [1]}},)),
        ),
        NOWHERE,
        ({"type": "function"},),
    ),
]


def dice(seed: int) -> operations.Dice:
    return lambda n: raw(n, seed)


def words(text: str) -> Counter[str]:
    return Counter(text.split())


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: type(example).__name__)
def test_an_example_is_kept_whole(example: Example) -> None:
    assert from_json(to_json(replace(example, place=Place("rows.csv", 3)))) == example
    assert with_fields(example, fields(example)) == example


def test_texts_are_split_and_joined_without_loss() -> None:
    assert join(split(TEXT)) == TEXT
    assert [unit[0].core for unit in split(TEXT)][:3] == ["The", "quick", "brown"]
    assert [unit[0].text for unit in split("我爱 red 花")] == ["我", "爱", "red", "花"]
    assert join(split("我爱 red 花")) == "我爱 red 花"


def test_only_the_users_untrained_turns_of_a_chat_are_changed() -> None:
    assert [join(units) for units in fields(EXAMPLES[-1])] == ["hi there"]


def test_masked_words_keep_their_punctuation() -> None:
    masked = join(operations.mask(split(TEXT), dice(0), 1.0, "[MASK]"))
    assert masked == '  [MASK] [MASK],  "[MASK]" [MASK]\n[MASK] [MASK]\t[MASK] [MASK] [MASK].'
    some = [join(operations.mask(split("a b c d e f g h"), dice(seed), 0.25, "#")) for seed in range(400)]
    assert sum(text.count("#") for text in some) / (400 * 8) == pytest.approx(0.25, abs=0.02)


def test_dropping_leaves_some_and_the_order() -> None:
    units = split(TEXT)
    assert operations.drop(units, dice(0), 1.0) == units
    lengths: list[int] = []
    for seed in range(400):
        kept = [unit[0].text for unit in operations.drop(units, dice(seed), 0.3)]
        everything = iter(unit[0].text for unit in units)
        assert all(word in everything for word in kept)
        lengths.append(len(kept))
    assert np.mean(lengths) / len(units) == pytest.approx(0.7, abs=0.02)


def test_swapping_moves_words_alone() -> None:
    for seed in range(50):
        once = join(operations.swap(split(TEXT), dice(seed), None, 1))
        assert sorted(once) == sorted(TEXT)
        assert once != TEXT
        cores = [unit[0].core for unit in split(once)]
        assert sum(a != b for a, b in zip(cores, [u[0].core for u in split(TEXT)], strict=True)) == 2
        assert [unit[0].before for unit in split(once)] == [unit[0].before for unit in split(TEXT)]
    assert operations.swap(split("alone"), dice(0), None, 3) == split("alone")


@pytest.mark.parametrize(("fraction", "added"), [(0.01, 1), (0.25, 2), (1.0, 8)])
def test_inserting_copies_words(fraction: float, added: int) -> None:
    text = "a b c d e f g h"
    places: set[int] = set()
    for seed in range(100):
        longer = join(operations.insert(split(text), dice(seed), fraction, None)).split()
        assert len(longer) == 8 + added
        assert set(longer) == set(text.split())
        places.add(next((i for i, word in enumerate(text.split()) if longer[i] != word), 8))
    assert len(places) > (1 if added == 8 else 5)


def test_synonyms_keep_capitals_and_punctuation() -> None:
    table = {"fox": ("wolf", "red fox"), "the": ("a",)}

    def lookup(word: str) -> tuple[str, ...]:
        return table.get(word, ())

    found = {
        join(operations.replace_synonyms(split("The FOX, the fox."), dice(s), 1.0, lookup)) for s in range(99)
    }
    assert found == {f"A {x.upper()}, a {y}." for x in table["fox"] for y in table["fox"]}
    assert operations.replace_synonyms(split("no one"), dice(0), 1.0, lookup) == split("no one")
    for seed in range(20):
        once = join(operations.replace_synonyms(split("fox fox fox fox"), dice(seed), 0.1, lookup))
        assert once.replace("red fox", "wolf").split().count("wolf") == 1
    inserted = join(operations.insert(split("the fox runs"), dice(3), 0.1, lookup)).split()
    assert len(inserted) in {4, 5}
    assert words("the fox runs") < Counter(inserted)
    assert Counter(inserted) - words("the fox runs") <= Counter(["a", "wolf", "red", "fox"])


@pytest.mark.parametrize("seed", range(40))
def test_tags_move_with_their_words_and_stay_valid(seed: int) -> None:
    tag_of = dict(zip(ENTITY.tokens, ENTITY.tags or (), strict=True))
    for operation in (
        lambda units: operations.drop(units, dice(seed), 0.4),
        lambda units: operations.swap(units, dice(seed), 0.5, None),
        lambda units: operations.insert(units, dice(seed), 0.5, None),
    ):
        changed = with_fields(ENTITY, [operation(fields(ENTITY)[0])])
        assert isinstance(changed, Tokens)
        assert changed.tags is not None
        assert [tag_of[word] for word in changed.tokens] == list(changed.tags)
        for i, tag in enumerate(changed.tags):
            assert tag != "I-PER" or changed.tags[i - 1] == "B-PER"
    masked = with_fields(ENTITY, [operations.mask(fields(ENTITY)[0], dice(seed), 0.5, "#")])
    assert isinstance(masked, Tokens)
    assert masked.tags == ENTITY.tags


def test_tables_of_synonyms(tmp_path: Path) -> None:
    tsv, other = tmp_path / "s.tsv", tmp_path / "s.json"
    tsv.write_text("# words\nRed\tcrimson\tred\tscarlet\n\nred\trosy\nblue\tazure\n", encoding="utf-8")
    other.write_text('{"red": ["crimson"], "odd": []}', encoding="utf-8")
    assert of_table(tsv)("red") == ("crimson", "scarlet", "rosy")
    assert (of_table(tsv)("green"), of_table(other)("red"), of_table(other)("odd")) == ((), ("crimson",), ())
    for name, text, what in (
        ("a.tsv", "red crimson\n", "a.tsv:1: a word, then its synonyms"),
        ("b.json", "{", "b.json:1: not JSON"),
        ("c.json", '{"red": "crimson"}', "not a table of synonyms"),
        ("d.json", "{}", "no word of the table has a synonym"),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=what):
            of_table(tmp_path / name)
    with pytest.raises(DataError, match="No such file"):
        of_table(tmp_path / "none.tsv")


WORDNET = {
    "lexnames": "00\tadj.all\t3\n01\tadj.pert\t3\n02\tadv.all\t4\n03\tnoun.Tops\t1\n",
    "index.noun": "car n 1 0 1 1 00000000\nauto n 1 0 1 1 00000000\nmotor_car n 1 0 1 0 00000000\n",
    "data.noun": "00000000 03 n 03 car 0 auto 0 motor_car 0 000 | a vehicle\n",
    "index.sense": "",
    "cntlist.rev": "",
}


def test_wordnet_is_read_by_nltk_and_never_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nltk = pytest.importorskip("nltk")
    from nltk.corpus import LazyCorpusLoader, WordNetCorpusReader

    def fresh() -> Any:
        return LazyCorpusLoader("wordnet", WordNetCorpusReader, object())

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(nltk.corpus, "wordnet", fresh())
    with pytest.raises(MachineError, match="nltk_data, and set NLTK_DATA"):
        of_wordnet()
    folder = tmp_path / "corpora" / "wordnet"
    folder.mkdir(parents=True)
    for part in ("adj", "adv", "verb", "noun"):
        for name in (f"index.{part}", f"data.{part}", f"{part}.exc"):
            (folder / name).write_text(WORDNET.get(name, ""), encoding="utf-8")
    for name in ("lexnames", "index.sense", "cntlist.rev"):
        (folder / name).write_text(WORDNET[name], encoding="utf-8")
    loaded = fresh()
    monkeypatch.setattr(nltk.corpus, "wordnet", loaded)
    lookup = of_wordnet()
    assert (lookup("car"), lookup("tree")) == (("auto", "motor car"), ())
    for file in loaded._data_file_map.values():  # which NLTK leaves open
        file.close()


def test_variants_are_drawn_by_the_row_and_the_key(tmp_path: Path) -> None:
    rows = [{"variants": '[["one","two"],[]]'}, {"variants": '[["three"],["four"]]'}]
    finish_table(tmp_path / "t", write_table(tmp_path / "t", rows), {})
    change = BackTranslated(Table(tmp_path / "t"))
    texts = [split("a"), split("b")]
    drawn = [[join(units) for units in change(texts, (0, epoch, 0, 8, 0))] for epoch in range(40)]
    assert {tuple(found) for found in drawn} == {("one", "b"), ("two", "b")}
    assert [join(units) for units in change(texts, (0, 0, 1, 8, 0))] == ["three", "four"]
    assert BackTranslated(None)(texts, (0, 0, 0, 8, 0)) is texts
    assert _others("A  b", ["a b", "", "c", "C", "d"]) == ["c", "d"]


@pytest.mark.parametrize("alpha", [0.05, 0.4, 1.0, 1.5, 8.0])
def test_lambda_is_beta_distributed(alpha: float) -> None:
    """Moments of Beta(a, a), and its quartiles, by an independent generator."""
    found = np.array([beta(alpha, (1, n)) for n in range(6000)])
    expected = np.random.default_rng(0).beta(alpha, alpha, 200_000)
    assert ((found >= 0) & (found <= 1)).all()
    assert found.mean() == pytest.approx(0.5, abs=0.02)
    assert found.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.06)
    edges = np.linspace(0, 1, 11)[1:-1]
    assert np.abs([(found < e).mean() - (expected < e).mean() for e in edges]).max() < 0.025
    assert beta(alpha, (1, 7)) == beta(alpha, (1, 7))


def refused(folder: Path, *operations: dict[str, Any], **sections: Any) -> str:
    with pytest.raises(ValueError, match="augment") as caught:
        recipe(folder, *operations, **sections)
    return str(caught.value)


def recipe(folder: Path, *operations: dict[str, Any], **sections: Any) -> Recipe:
    data = {"augment": list(operations), **sections.pop("data", {})}
    kind = sections.pop("objective", {"type": "causal_lm"})
    formats = {"classification": "classification", "sft": "messages", "token_classification": "tokens"}
    source = {"path": "rows.jsonl", "format": formats.get(kind["type"], "text")}
    return tiny_recipe(folder, objective=kind, data={"train": [source], **data}, **sections)


CLASSIFICATION = {"type": "classification"}
MASK, DROP, CUT = {"type": "token_mask"}, {"type": "token_drop"}, {"type": "cutoff"}
MIX = {"type": "mixup"}
BACK = {"type": "back_translation", "model": "m"}


def test_what_does_not_go_together_is_refused_by_name(tmp_path: Path) -> None:
    assert "its labels" not in refused(tmp_path, DROP)
    assert (
        "data.augment.0.type: token_drop is not for causal_lm, where the text is what is learnt"
        in refused(tmp_path, DROP)
    )
    assert "raise objective.mlm_probability" in refused(tmp_path, MASK, objective={"type": "masked_lm"})
    assert "mixup mixes the labels of whole rows" in refused(tmp_path, MIX, objective={"type": "sft"})
    prompts = {"type": "sft", "train_on_prompt": True}
    assert "objective.train_on_prompt makes labels" in refused(tmp_path, DROP, objective=prompts)
    assert "leaves no word to put a tag on" in refused(
        tmp_path, BACK, objective={"type": "token_classification"}
    )
    assert "set data.packing: false" in refused(
        tmp_path, DROP, objective={"type": "sft"}, data={"packing": True}
    )
    assert "set data.packing: false" in refused(tmp_path, CUT, data={"packing": True})
    assert "put it first" in refused(tmp_path, DROP, BACK, objective=CLASSIFICATION)
    assert "put it behind token_drop" in refused(tmp_path, MIX, DROP, objective=CLASSIFICATION)
    assert "stands there twice" in refused(tmp_path, MIX, MIX, objective=CLASSIFICATION)
    assert "cutoff hides what mixup has mixed" in refused(tmp_path, CUT, MIX, objective=CLASSIFICATION)
    cached = {"freeze": ["backbone"], "cache_features": True}
    assert "whose features no cache has" in refused(
        tmp_path, DROP, objective=CLASSIFICATION, trainable=cached
    )
    split_layers = {"strategy": "fsdp2", "tensor_parallel_size": 2}
    assert "set parallel.tensor_parallel_size: 1" in refused(tmp_path, CUT, parallel=split_layers)


@pytest.mark.parametrize(
    ("operation", "what"),
    [
        ({"type": "token_swap"}, "set one of fraction"),
        ({"type": "synonyms"}, "set one of table"),
        ({"type": "synonyms", "table": "t", "source": "wordnet"}, "set one of table"),
        ({"type": "token_insert", "table": "t", "source": "wordnet"}, "exclude each other"),
        ({**BACK, "num_variants": 5}, "at most num_beams"),
        ({"type": "token_drop", "probability": 0.0}, "greater than 0"),
    ],
)
def test_settings_of_one_operation(tmp_path: Path, operation: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        recipe(tmp_path, operation, objective=CLASSIFICATION)


def test_what_makes_sense_is_accepted(tmp_path: Path) -> None:
    recipe(tmp_path, MASK, CUT)
    recipe(tmp_path, MASK, data={"packing": True})
    recipe(tmp_path, BACK, DROP, MIX, CUT, objective=CLASSIFICATION)
