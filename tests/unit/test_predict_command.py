"""`tunesmith predict`: one answer per row, in the order of the rows, as the exported model gives it alone."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from tunesmith.commands.finished import FinishedRun, open_run
from tunesmith.commands.predict import generation_settings, predict_file, predict_texts
from tunesmith.data.adhoc import encode_examples, unlabelled_examples
from tunesmith.errors import UserError
from tunesmith.generation import answer_text
from tunesmith.objectives import build_objective
from tunesmith.objectives.question_answering import QuestionAnsweringObjective
from tunesmith.objectives.sft import SFTObjective
from tunesmith.recipe import Recipe
from tunesmith.recipe.evaluation import Generate
from tunesmith.run import Resume
from tunesmith.run import run as train
from tunesmith.tokenizer import tokenizer_for

Trained = Callable[[str], Path]
TINY_LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
}
TEXTS = ["velvet water.", "river stone garden lamp winter bridge copper field. " * 2, "x"]


def answers(run: FinishedRun, path: Path, **settings: Any) -> list[dict[str, Any]]:
    out = io.StringIO()
    predict_file(run, str(path), Generate(**settings), out)
    return [json.loads(line) for line in out.getvalue().splitlines()]


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def final(run_dir: Path, auto_class: Any) -> tuple[Any, Any]:
    model = auto_class.from_pretrained(run_dir / "final")
    return model.eval(), AutoTokenizer.from_pretrained(run_dir / "final")


def test_labels_are_those_of_the_exported_model(trained: Trained, tmp_path: Path) -> None:
    run_dir = trained("single_label")
    model, tokenizer = final(run_dir, AutoModelForSequenceClassification)
    texts = [f"{text} {i}" for i, text in enumerate(TEXTS * 40)]  # more than are answered at once
    found = answers(open_run(run_dir), lines(tmp_path / "a.jsonl", [{"text": text} for text in texts]))
    assert [row["line"] for row in found] == list(range(1, len(texts) + 1))
    with torch.inference_mode():
        for text, row in zip(texts, found, strict=True):
            scores = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1)
            assert row["label"] == model.config.id2label[int(scores.argmax())]
            assert row["score"] == pytest.approx(float(scores.max()), abs=2e-6)


def test_a_row_without_an_answer_keeps_its_place(trained: Trained, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("label,text\n,red\nb,\n,blue\n", encoding="utf-8")
    found = answers(open_run(trained("single_label")), path)
    assert [("label" in row, row.get("error")) for row in found] == [
        (True, None),
        (False, "empty text"),
        (True, None),
    ]
    assert [row["line"] for row in found] == [2, 3, 4]


def test_nothing_but_errors(trained: Trained, tmp_path: Path) -> None:
    found = answers(open_run(trained("single_label")), lines(tmp_path / "a.jsonl", [{"text": " "}]))
    assert found == [{"line": 1, "error": "empty text"}]


def test_plain_lines_and_texts_give_the_same(trained: Trained, tmp_path: Path) -> None:
    run = open_run(trained("single_label"))
    (tmp_path / "a.txt").write_text("velvet water.\n\nred river\n", encoding="utf-8")
    found = answers(run, tmp_path / "a.txt")
    said = predict_texts(run, ["velvet water.", "", "red river"], Generate())
    assert [row["line"] for row in found] == [1, 2, 3]
    for row, text in zip(found, said, strict=True):
        assert {k: v for k, v in row.items() if k != "line"} == {k: v for k, v in text.items() if k != "text"}
    assert said[1] == {"text": "", "error": "empty text"}


def test_what_the_model_did_not_see_is_said(trained: Trained, tmp_path: Path) -> None:
    rows = [{"text": "river " * 200}, {"text": "river"}]
    found = answers(open_run(trained("single_label")), lines(tmp_path / "a.jsonl", rows))
    assert [row.get("truncated") for row in found] == [True, None]


def test_several_labels_and_numbers(trained: Trained) -> None:
    (many,) = predict_texts(open_run(trained("multi_label")), ["red river"], Generate())
    assert list(many["scores"]) == ["x", "y", "z"]
    assert many["labels"] == [name for name, score in many["scores"].items() if score > 0.5]
    (one,) = predict_texts(open_run(trained("regression")), ["red river"], Generate())
    assert isinstance(one["value"], float)


def test_scores_of_all_labels_are_soft_labels_of_another_run(
    trained: Trained, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """A teacher's answers to rows without labels, as a student is trained on them."""
    teacher = open_run(trained("single_label"))
    given = lines(tmp_path / "a.jsonl", [{"text": f"{text} {i}"} for i, text in enumerate(TEXTS * 4)])
    found = io.StringIO()
    predict_file(teacher, str(given), Generate(), found, scores=True)
    rows = [json.loads(line) for line in found.getvalue().splitlines()]
    for number, row in enumerate(rows):
        assert row["text"] == f"{(TEXTS * 4)[number]} {number}"
        assert sum(row["scores"].values()) == pytest.approx(1, abs=1e-6)
        best = max(row["scores"], key=row["scores"].__getitem__)
        assert (best, row["scores"][best]) == (row["label"], pytest.approx(row["score"], abs=1e-6))
    (said,) = predict_texts(teacher, [rows[0]["text"]], Generate(), scores=True)
    assert said["scores"] == pytest.approx(rows[0]["scores"], abs=1e-6)

    answered = lines(tmp_path / "answered.jsonl", rows)
    source = {"path": str(answered), "format": "classification", "columns": {"soft_labels": "scores"}}
    objective = {"type": "classification", "labels": sorted(rows[0]["scores"])}
    student = make_recipe("single_label").model_dump(mode="json", exclude_defaults=True)
    student["data"] = {"train": [source], "max_length": 32, "cache_dir": str(tmp_path / "cache")}
    student |= {"objective": objective, "run_name": "student-of-scores"}
    student |= {"evaluation": {}, "checkpoint": {}, "output_dir": str(tmp_path)}
    train(Recipe.model_validate(student), tmp_path, Resume())
    assert (tmp_path / "student-of-scores" / "final" / "config.json").is_file()


@pytest.mark.parametrize("case", ["multi_label", "regression", "token_classification"])
def test_scores_of_what_has_no_distribution(trained: Trained, case: str) -> None:
    with pytest.raises(UserError, match=r"--scores: writes a distribution over the labels"):
        predict_texts(open_run(trained(case)), ["red river"], Generate(), scores=True)


def test_tags_are_one_per_word(trained: Trained, tmp_path: Path) -> None:
    run_dir = trained("token_classification")
    model, tokenizer = final(run_dir, AutoModelForTokenClassification)
    words = ["velvet", "water", "under", "zzz"]
    (found,) = answers(open_run(run_dir), lines(tmp_path / "a.jsonl", [{"tokens": words}]))
    given = tokenizer(words, is_split_into_words=True, return_tensors="pt")
    with torch.inference_mode():
        best = model(**given).logits[0].argmax(-1).tolist()
    firsts = [given.word_ids().index(i) for i in range(len(words))]
    assert found["tokens"] == words
    assert found["tags"] == [model.config.id2label[best[i]] for i in firsts]
    (said,) = predict_texts(open_run(run_dir), ["velvet water under zzz"], Generate())
    assert said["tags"] == found["tags"]


def test_one_answer_over_all_windows(trained: Trained, tmp_path: Path) -> None:
    """The training rows have questions without an answer: the empty text is an answer, too."""
    run_dir = trained("question_answering")
    context = " ".join(f"{a} {b}" for a in ("amber", "river", "stone") for b in ("lamp", "winter", "x") * 9)
    rows = [{"id": name, "question": name, "context": context} for name in ("same", "water", "same")]
    run = open_run(run_dir)
    assert run.objective.state() == {"unanswerable": True}
    found = answers(run, lines(tmp_path / "a.jsonl", rows))
    assert [row["id"] for row in found] == ["same", "water", "same"]
    run.objective.load_state({"unanswerable": False})
    spans = answers(run, tmp_path / "a.jsonl")
    assert all(row["answer"] and row["answer"] in context for row in spans)
    assert spans[0] == {**spans[2], "line": 1}
    model, tokenizer = final(run_dir, AutoModelForQuestionAnswering)
    assert spans[1]["score"] == pytest.approx(best_span(model, tokenizer, "water", context), abs=1e-4)


def best_span(model: Any, tokenizer: Any, question: str, context: str) -> float:
    """The highest start + end logit of a span of at most 30 context tokens over windows of 48 tokens."""
    windows = tokenizer(
        question, context, truncation="only_second", max_length=48, stride=8,
        return_overflowing_tokens=True, return_tensors="pt", padding=True,
    )  # fmt: skip
    windows.pop("overflow_to_sample_mapping")
    best = -float("inf")
    with torch.inference_mode():
        out = model(**windows)
    for i in range(len(windows["input_ids"])):
        inside = [k for k, part in enumerate(windows.sequence_ids(i)) if part == 1]
        for a in inside:
            for b in (b for b in inside if a <= b < a + 30):
                best = max(best, float(out.start_logits[i, a] + out.end_logits[i, b]))
    return best


def test_no_answer_is_an_answer_only_where_the_training_had_it(trained: Trained, tmp_path: Path) -> None:
    run = open_run(trained("question_answering"))
    objective = run.objective
    assert isinstance(objective, QuestionAnsweringObjective)
    rows = lines(tmp_path / "a.jsonl", [{"id": "1", "question": "who", "context": "red river"}])
    given = unlabelled_examples(run.recipe, str(rows))
    table = encode_examples(given, objective, tmp_path / "rows", "input").dataset.table
    logits = np.zeros((2, len(table.value("input_ids", 0))))
    logits[:, 0] = 9.0  # [CLS]: there is no answer
    assert objective.answers(table, [0], [logits])["1"].text == ""
    objective.load_state({"unanswerable": False})
    assert objective.answers(table, [0], [logits])["1"].text != ""


def alone(model: Any, ids: list[int], stops: list[int], new: int) -> list[int]:
    """Greedy generation of one row, without padding, one forward a token."""
    ids, made = list(ids), []
    with torch.inference_mode():
        while len(made) < new:
            made.append(int(model(torch.tensor([ids + made])).logits[0, -1].argmax()))
            if made[-1] in stops:
                break
    return made


@pytest.mark.parametrize("case", ["sft", "causal_lm", "causal_lm_gpt2"])
def test_generation_in_batches_is_generation_alone(trained: Trained, case: str) -> None:
    run_dir = trained(case)
    model, tokenizer = final(run_dir, AutoModelForCausalLM)
    run = open_run(run_dir)
    found = predict_texts(run, TEXTS, Generate(max_new_tokens=8))
    for text, row in zip(TEXTS, found, strict=True):
        turns = [{"role": "user", "content": text}]
        ids = (
            tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
            if case == "sft"
            else tokenizer(text)["input_ids"]
        )
        made = alone(model, ids, run.objective.stop_token_ids(), 8)
        assert row["generated"] == answer_text(run.objective, made)


def test_an_encoder_decoder_generates(trained: Trained, tmp_path: Path) -> None:
    run_dir = trained("seq2seq_t5")
    model, tokenizer = final(run_dir, AutoModelForSeq2SeqLM)
    found = answers(
        open_run(run_dir), lines(tmp_path / "a.jsonl", [{"source": t} for t in TEXTS]), max_new_tokens=5
    )
    for text, row in zip(TEXTS, found, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        made = model.generate(ids, max_new_tokens=5, do_sample=False)[0]
        assert row["generated"] == tokenizer.decode(made, skip_special_tokens=True)


def test_the_last_turn_of_a_chat_is_what_is_answered(trained: Trained, tmp_path: Path) -> None:
    """A chat that ends with an answer gives the same as without it; earlier answers stay."""
    asked = [("user", "red"), ("assistant", "stone"), ("user", "blue")]
    chats = [asked, [*asked, ("assistant", "left out")], [asked[2]]]
    rows = [{"messages": [{"role": r, "content": c} for r, c in chat]} for chat in chats]
    run = open_run(trained("sft"))
    found = answers(run, lines(tmp_path / "a.jsonl", rows), max_new_tokens=12)
    assert found[0]["generated"] == found[1]["generated"]
    row = run.objective.prompt_row  # pyright: ignore[reportAttributeAccessIssue]
    prompts = [
        row(example)["input_ids"] for example in unlabelled_examples(run.recipe, str(tmp_path / "a.jsonl"))
    ]
    assert prompts[0] == prompts[1]
    assert "stone" in run.tokenizer.decode(prompts[0])
    assert "left out" not in run.tokenizer.decode(prompts[1])


def test_a_prompt_longer_than_the_model_loses_its_beginning(trained: Trained) -> None:
    run = open_run(trained("causal_lm_gpt2"))
    long = "water " * 300
    (found,) = predict_texts(run, [long], Generate(max_new_tokens=8))
    assert found["truncated"] is True
    kept = run.tokenizer(long)["input_ids"][-(160 - 8) :]
    made = alone(run.model, kept, run.objective.stop_token_ids(), 8)
    assert found["generated"] == answer_text(run.objective, made)
    with pytest.raises(UserError, match="the model has 160 positions"):
        predict_texts(run, ["a"], Generate(max_new_tokens=160))


def test_text_behind_an_end_marker_is_cut(trained: Trained) -> None:
    run = open_run(trained("sft"))
    ids = run.tokenizer("red<|im_end|>blue")["input_ids"]
    assert answer_text(run.objective, ids) == "red"
    plain = open_run(trained("causal_lm"))
    colour = plain.tokenizer("red")["input_ids"]
    plain.objective.stop_token_ids = lambda: colour[-1:]  # an ordinary token, which decoding does not skip
    assert answer_text(plain.objective, [*colour[:-1], colour[-1], *colour]) == plain.tokenizer.decode(
        colour[:-1]
    )
    plain = open_run(trained("causal_lm"))
    assert answer_text(plain.objective, plain.tokenizer("red<|endoftext|>blue")["input_ids"]) == "red"


def test_settings_come_from_the_recipe_and_options_win(trained: Trained) -> None:
    run = open_run(trained("sft"))
    assert generation_settings(run, None, None).max_new_tokens == 6
    assert generation_settings(run, 3, 2).num_beams == 2
    with pytest.raises(UserError, match="--max-new-tokens: objective classification generates no text"):
        generation_settings(open_run(trained("single_label")), 3, None)


@pytest.mark.parametrize("case", ["masked_lm", "span_corruption"])
def test_a_backbone_answers_nothing(trained: Trained, case: str) -> None:
    with pytest.raises(UserError, match="trains a backbone"):
        predict_texts(open_run(trained(case)), ["red"], Generate())


def test_two_texts_are_no_plain_text(trained: Trained) -> None:
    for case in ("pairs", "question_answering"):
        with pytest.raises(UserError, match="a row has two texts"):
            predict_texts(open_run(trained(case)), ["red"], Generate())


def test_the_input_is_not_overwritten(trained: Trained, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"text": "red"}])
    with pytest.raises(UserError, match="is the input file"):
        predict_file(open_run(trained("single_label")), str(path), Generate(), path)
    assert path.read_text(encoding="utf-8") == '{"text": "red"}\n'


@pytest.mark.parametrize("template", ["chatml", "none"])
def test_a_saved_template_is_the_one_of_the_training(
    make_recipe: Callable[..., Recipe], workshop: Path, tmp_path: Path, template: str
) -> None:
    """On a tokenizer that does not have ChatML's tokens its markers are ordinary text, which ends an answer, too."""
    recipe = make_recipe(
        "sft",
        model={
            "init": "from_config",
            "model_name_or_path": None,
            "config": TINY_LLAMA,
            "tokenizer": str(workshop / "models" / "t5"),
            "chat_template": template,
        },
        data={"max_length": 160},
        output_dir=str(tmp_path),
    )
    train(recipe, workshop, Resume())
    tokenizer, _ = tokenizer_for(recipe, workshop)
    before = build_objective(recipe, tokenizer)
    done = open_run(tmp_path / "sft")
    after = done.objective
    assert isinstance(before, SFTObjective)
    assert isinstance(after, SFTObjective)
    assert (after.template.source, after.stop_token_ids(), after.stop_strings()) == (
        before.template.source,
        before.stop_token_ids(),
        before.stop_strings(),
    )
    assert before.stop_strings() == (["<|im_end|>"] if template == "chatml" else [])
    (found,) = predict_texts(done, ["red"], Generate(max_new_tokens=3))
    assert "generated" in found
    if template == "chatml":
        assert answer_text(after, tokenizer("red<|im_end|>blue")["input_ids"]) == "red"
