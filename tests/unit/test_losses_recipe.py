"""`objective.loss` as a recipe has it: what is accepted, what is refused with which words, and the tiny runs that a
chosen loss makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.unit.conftest import MakeRecipe
from tunesmith.commands.evaluate import evaluate_run
from tunesmith.commands.finished import open_run
from tunesmith.commands.predict import generation_settings, predict_file
from tunesmith.data.examples import Labelled
from tunesmith.data.formats import examples
from tunesmith.errors import DataError, Place, UserError
from tunesmith.losses.choose import own_loss, planned_term, terms_of, vocabulary_term
from tunesmith.losses.weights import Labels
from tunesmith.objectives.label_values import label_of, shares
from tunesmith.recipe import losses as settings
from tunesmith.recipe.data import Source
from tunesmith.recipe.load import RecipeError, dump_recipe, load_recipe
from tunesmith.recipe.paths import resolve_paths
from tunesmith.run import Resume, run
from tunesmith.terms import RowCrossEntropy, TokenCrossEntropy

FORMATS = {
    "classification": "classification", "token_classification": "tokens", "causal_lm": "text", "sft": "messages",
    "question_answering": "squad",
}  # fmt: skip


def load(folder: Path, objective: str, source: str = "", rest: str = "") -> Any:
    kind = objective.split(",")[0].removeprefix("type: ")
    path = folder / "r.yaml"
    path.write_text(
        f"model: {{model_name_or_path: m}}\n"
        f"data: {{train: {{path: a.jsonl, format: {FORMATS[kind]}{source}}}}}\n"
        f"objective: {{{objective}}}\n{rest}"
    )
    return load_recipe(path).recipe


def test_a_word_is_a_loss_with_its_defaults(tmp_path: Path) -> None:
    loss = load(tmp_path, "type: classification, loss: focal").objective.loss
    assert loss == settings.Focal(type="focal", gamma=2.0)
    assert load(tmp_path, "type: classification").objective.loss is None


@pytest.mark.parametrize(
    "objective",
    [
        "type: classification, loss: {type: class_balanced, base: focal}",
        "type: classification, loss: {type: ldam, reweight_from: 2 epochs}",
        "type: classification, loss: {type: focal, alpha: {a: 1, b: 2.5}}",
        "type: classification, problem: multi_label, loss: {type: binary_cross_entropy, pos_weight: auto}",
        "type: token_classification, loss: dice",
        "type: causal_lm, loss: {type: function, function: 'a.py:b', options: {c: [1, x]}}",
    ],
)
def test_a_resolved_recipe_loads_back(tmp_path: Path, objective: str) -> None:
    made = load(tmp_path, objective)
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(made))
    assert load_recipe(again).recipe.objective == made.objective


REFUSED = {
    "type: token_classification, loss: ordinal": (
        "objective.loss: ordinal is no loss for token classification; it takes binary_cross_entropy,"
    ),
    "type: sft, loss: ldam": "objective.loss: ldam is no loss for sft; it takes cross_entropy, focal, function",
    "type: classification, loss: dice": "objective.loss: dice is no loss for classification; it takes",
    "type: classification, problem: regression, loss: focal": "focal is no loss for regression; it takes function,",
    "type: classification, problem: multi_label, loss: class_balanced": (
        "its base cross_entropy wants one label per row: set base: binary_cross_entropy"
    ),
    "type: classification, loss: huber, label_smoothing_factor: 0.1": (
        "objective.label_smoothing_factor: has no effect with loss: huber; it smooths binary_cross_entropy and"
    ),
    "type: causal_lm, loss: {type: cross_entropy, class_weights: auto}": (
        "objective.loss.class_weights: weigh labels; those of causal_lm are the tokens of the vocabulary"
    ),
    "type: question_answering, loss: {type: focal, alpha: auto}": "objective.loss.alpha: weighs labels; those of",
    "type: classification, loss: {type: class_balanced, gamma: 1}": (
        "objective.loss.gamma: has no effect with base: cross_entropy"
    ),
    "type: classification, loss: {type: ldam, beta: 0.9}": "objective.loss.beta: has no effect without reweight_from",
    "type: classification, loss: {type: ranking, margin: 1}": "margin: has no effect with method: ranknet",
    "type: classification, loss: ranking": "ranking needs the column that says which rows are one list: group: …",
    "type: classification, loss: focal_loss": "here 'focal_loss' is focal",
    "type: classification, loss: {type: coral}": "objective.loss.type: here 'coral' is ordinal",
    "type: classification, class_weights: auto": "does not belong here; it is objective.loss.class_weights",
    "type: classification, focal_gamma: 2": "here it is objective.loss: {type: focal, gamma: 2.0}",
    "type: classification, loss: {type: focal, gamma: -1}": "objective.loss.gamma: must be",
}  # fmt: skip


@pytest.mark.parametrize("objective", REFUSED)
def test_what_makes_no_sense_is_refused_by_name(tmp_path: Path, objective: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, objective)
    assert REFUSED[objective] in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2


def test_columns_and_losses_that_do_not_go_together(tmp_path: Path) -> None:
    def told(objective: str, column: str, rest: str = "") -> str:
        with pytest.raises(RecipeError) as caught:
            load(tmp_path, objective, f", columns: {{{column}}}", rest)
        return str(caught.value)

    soft, group = "soft_labels: votes", "group: query"
    assert "have no effect with loss: focal" in told("type: classification, loss: focal", soft)
    regression = told("type: classification, problem: regression", soft)
    assert "shares of one label; the problem is regression" in regression
    assert "has no effect without objective.loss: ranking" in told("type: classification", group)
    with pytest.raises(RecipeError, match=r"data.split: would part the rows of a list: set its group"):
        load(tmp_path, "type: classification, loss: ranking", f", columns: {{{group}}}}}, split: {{eval: 0.1")
    with pytest.raises(RecipeError, match=r"trainable.cache_features: keeps features row by row"):
        load(
            tmp_path, "type: classification, loss: ranking", f", columns: {{{group}}}",
            "trainable: {freeze: [backbone], cache_features: true}\n",
        )  # fmt: skip
    with pytest.raises(RecipeError, match=r"step 8 is not before the last of training.max_steps: 8"):
        load(
            tmp_path,
            "type: classification, loss: {type: ldam, reweight_from: 8}",
            "",
            "training: {max_steps: 8}\n",
        )


LABELS = Labels("single_label", ("a", "b", "c"), (6, 3, 1), 10)


@pytest.mark.parametrize(
    ("loss", "labels", "said"),
    [
        (settings.CrossEntropy(type="cross_entropy", class_weights=[1.0]), LABELS, "1 weights for 3 labels (a, b, c)"),
        (settings.CrossEntropy(type="cross_entropy", class_weights={"a": 1.0}), LABELS, "no weight for b, c"),
        (settings.CrossEntropy(type="cross_entropy", class_weights={"x": 1.0}), LABELS, "x is no label; they are a, b"),
        (settings.Focal(type="focal", alpha=0.25), LABELS, "one number would weigh all labels alike"),
        (
            settings.Focal(type="focal", alpha=[0.5, 2.0]), Labels("multi_label", ("a", "b"), (1, 1), 2),
            "a no counts 1 − alpha",
        ),
        (
            settings.LDAM(type="ldam"), Labels("single_label", ("a", "b"), (3, 0), 3),
            "no training row has the label b: give weights, or leave it out of objective.labels",
        ),
        (settings.Huber(type="huber"), LABELS, "huber is no loss for single label"),
    ],
)  # fmt: skip
def test_what_the_labels_do_not_allow(loss: Any, labels: Labels, said: str) -> None:
    with pytest.raises(UserError) as caught:
        own_loss(loss, labels, 0.0)
    assert said in str(caught.value)
    assert str(caught.value).startswith("objective.loss")


def test_what_the_kernels_compute_stays_theirs() -> None:
    plain = settings.CrossEntropy(type="cross_entropy")
    assert terms_of(plain, LABELS, 0.1) == (RowCrossEntropy(label_smoothing=0.1),)
    tags = Labels("token_classification", ("a",), (1,), 1)
    assert terms_of(plain, tags, 0.1) == (TokenCrossEntropy(label_smoothing=0.1),)


# functions

FUNCTIONS = """
import torch
def good(logits, labels, scale=1.0): return scale * -torch.log_softmax(logits, -1).gather(-1, labels[:, None])[:, 0]
def mean(logits, labels): return good(logits, labels).mean()
def coupled(logits, labels): return good(logits - logits.mean(0), labels)
def dead(logits, labels): return good(logits.detach(), labels)
def crossed(logits, labels, mask): return (logits * mask).sum(-1)
def other(logits, weights): return logits
name = "no function"
"""


@pytest.fixture
def functions(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FUNCTIONS)
    return path


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("gone", {}, "has no gone"),
        ("name", {}, "is no function but str"),
        ("other", {}, "cannot be called with logits, labels and the options (none)"),
        ("good", {"scale": 1, "size": 2}, "cannot be called with logits, labels and the options scale, size"),
        ("mean", {}, "it must return [4], a loss for each, not []; do not sum or average"),
        ("coupled", {}, "a loss changes with the rows beside it"),
        ("dead", {}, "what it returns has no gradient"),
        # units times outputs, which only as many of both would hide
        (
            "crossed",
            {},
            "fails on logits [4, 3] and labels [4]: RuntimeError: The size of tensor a (3) must match",
        ),
    ],
)
def test_a_function_that_is_no_loss(functions: Path, name: str, options: dict[str, Any], said: str) -> None:
    loss = settings.Function(type="function", function=f"{functions}:{name}", options=options)
    with pytest.raises(UserError) as caught:
        own_loss(loss, LABELS, 0.0)
    assert said in str(caught.value)


def test_a_function_is_known_by_its_file(functions: Path, make_recipe: MakeRecipe) -> None:
    loss: dict[str, Any] = {
        "type": "function",
        "function": f"{functions.name}:good",
        "options": {"scale": 2.0},
    }
    made = make_recipe("single_label", objective={"loss": loss})
    resolved = resolve_paths(made, functions.parent).objective.loss
    assert isinstance(resolved, settings.Function)
    assert resolved.function == f"{functions}:good"
    assert resolved.sha256 is not None
    found = own_loss(resolved, LABELS, 0.0)
    assert found is not None
    z, y = torch.randn(3, 3), torch.tensor([0, 1, 2])
    expected = 2 * torch.nn.functional.cross_entropy(z, y, reduction="none")
    torch.testing.assert_close(found(z, y, y >= 0), expected)
    functions.write_text(FUNCTIONS + "# another\n")
    with pytest.raises(UserError, match="is not what it was when the run started"):
        own_loss(resolved, LABELS, 0.0)
    with pytest.raises(UserError, match="there is no module nowhere_at_all"):
        resolve_paths(
            make_recipe("single_label", objective={"loss": {**loss, "function": "nowhere_at_all:good"}}),
            Path(),
        )


# soft labels

PLACE = Place("votes.csv", 2)


def labelled(soft: Any, label: Any = None) -> Labelled:
    return Labelled("text", label, PLACE, soft_labels=soft)


def test_the_label_is_the_rows_own_or_the_likeliest() -> None:
    assert label_of(labelled((0.2, 0.5, 0.3)), ["a", "b", "c"]) == "b"
    assert label_of(labelled({"c": 0.6, "a": 0.4}), ["a", "b", "c"]) == "c"
    assert label_of(labelled((0.2, 0.5, 0.3), "a"), ["a", "b", "c"]) == "a"
    assert shares(labelled({"c": 0.6, "a": 0.4}), ["a", "b", "c"]) == [0.4, 0.0, 0.6]
    assert shares(labelled(None, "b"), ["a", "b", "c"]) == [0.0, 1.0, 0.0]
    with pytest.raises(
        DataError, match=r"a list of 2 shares, but objective.labels, whose order it is in, is not set"
    ):
        shares(labelled((0.5, 0.5)), [])
    with pytest.raises(DataError, match="label 'x' is not among the training labels"):
        shares(labelled({"x": 1.0}), ["a", "b"])


def test_shares_are_read_from_csv_and_jsonl(tmp_path: Path) -> None:
    csv, jsonl = tmp_path / "votes.csv", tmp_path / "votes.jsonl"
    csv.write_text('text,votes\none,"[0.25, 0.75]"\ntwo,"{""a"": 1}"\n')
    jsonl.write_text(
        '{"text": "one", "votes": [0.25, 0.75], "label": "a"}\n{"text": "two", "votes": {"a": 1}}\n'
    )
    for path in (csv, jsonl):
        source = Source(path=str(path), format="classification", columns={"soft_labels": "votes"})
        one, two = examples(source, tmp_path)
        assert isinstance(one, Labelled)
        assert isinstance(two, Labelled)
        assert (one.soft_labels, two.soft_labels) == ((0.25, 0.75), {"a": 1.0})
        assert one.label == ("a" if path is jsonl else None)
    for bad in ("[0.5, 0.6]", "[1.5, -0.5]", "[]"):
        csv.write_text(f'text,votes\none,"{bad}"\n')
        with pytest.raises(DataError, match="must be shares of at least 0 that sum to 1"):
            list(
                examples(
                    Source(path=str(csv), format="classification", columns={"soft_labels": "votes"}), tmp_path
                )
            )


# runs


def trained(workshop: Path, make_recipe: MakeRecipe, name: str, case: str, **sections: Any) -> Path:
    made = make_recipe(case, **sections, run_name=f"loss-{name}")
    run(made, workshop, Resume())
    return workshop / "runs" / made.run_name


def test_a_corn_run_predicts_labels_and_is_exported_with_its_questions(
    workshop: Path, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    folder = trained(
        workshop, make_recipe, "corn", "single_label",
        objective={"loss": {"type": "ordinal", "method": "corn"}},
        model={"model_name_or_path": str(workshop / "models" / "bert_mlm")},
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_pretrained(folder / "final")
    assert model.config.num_labels == 3
    assert model.config.id2label[0] == "beyond a, at least b"
    opened = open_run(folder)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "amber river"}\n')
    out = tmp_path / "out.jsonl"
    predict_file(opened, str(rows), generation_settings(opened, None, None), out)
    assert json.loads(out.read_text())["label"] in "abcd"
    found = evaluate_run(opened, "test")
    assert found.found.metrics["loss"] == pytest.approx(found.in_the_run["loss"], rel=1e-6)


def test_an_evaluations_loss_is_the_trained_one(workshop: Path, make_recipe: MakeRecipe) -> None:
    """Weights from the training rows, and no later ones."""
    losses = {
        "plain": {"type": "cross_entropy"},
        "weighted": {"type": "cross_entropy", "class_weights": {"a": 3, "b": 3, "c": 3, "d": 3}},
        "later": {"type": "ldam", "max_margin": 1e-9, "reweight_from": 1},
    }
    still = {"optim": {"learning_rate": 1e-12}}
    found = {
        name: json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["test_loss"]
        for name, loss in losses.items()
        if (folder := trained(workshop, make_recipe, name, "single_label", objective={"loss": loss}, **still))
    }
    assert found["weighted"] == pytest.approx(3 * found["plain"], rel=1e-5)
    assert found["later"] == pytest.approx(found["plain"], rel=1e-5)


def test_lists_are_evaluated_as_lists_and_predicted_text_by_text(
    workshop: Path, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    path = workshop / "data" / "ranked.jsonl"
    rows = [
        {"text": f"amber {'river ' * (i % 4)}", "label": float(i % 3), "query": i // 4} for i in range(60)
    ]
    rows += [{"text": "stone", "label": 1.0, "query": 99}] * 2
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = trained(
        workshop, make_recipe, "lists", "regression", objective={"loss": "ranking"},
        data={
            "train": [{"path": str(path), "format": "classification", "columns": {"group": "query"}}],
            "split": {"eval": 0.2, "test": 0.2, "group": "query"},
        },
    )  # fmt: skip
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < last["test_ndcg"] <= 1
    assert {"test_ndcg_at_10", "test_pair_accuracy", "test_mrr"} <= last.keys()
    facts = json.loads((folder / "environment.json").read_text())["facts"]
    assert sum(split["rows"] for split in facts["data"].values()) == 15
    dropped = [reason for split in facts["data"].values() for reason in split["dropped"]]
    assert dropped == ["a list whose rows are all equally relevant"]
    opened, out = open_run(folder), tmp_path / "out.jsonl"
    predict_file(opened, str(path), generation_settings(opened, None, None), out)
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(answers) == len(rows)
    assert answers[1]["score"] == answers[5]["score"]  # the same text


def test_the_report_says_what_is_computed(workshop: Path, make_recipe: MakeRecipe) -> None:
    folder = trained(
        workshop,
        make_recipe,
        "noted",
        "single_label",
        objective={"loss": {"type": "class_balanced", "beta": 0.9}},
    )
    notes = notes_of(folder)["notes"]
    assert any(
        note.startswith("loss: class_balanced (beta: 0.9, base: cross_entropy), divided by") for note in notes
    )
    assert any(note.startswith("weights of loss: a 0.") for note in notes)
    hinge = {"type": "function", "function": f"{Path(__file__).parents[2]}/configs/losses.py:hinge"}
    facts = notes_of(trained(workshop, make_recipe, "whole", "sft", objective={"loss": hinge}))
    assert any("the logits of the whole vocabulary are held" in note for note in facts["notes"])
    assert facts["kernels"]["linear_cross_entropy"].startswith("reference")
    facts = notes_of(trained(workshop, make_recipe, "focal", "sft", objective={"loss": "focal"}))
    assert not any("the logits of the whole vocabulary are held" in note for note in facts["notes"])
    assert facts["kernels"]["linear_cross_entropy"].startswith("cpu")


def test_a_language_models_focal_loss_reaches_the_term_that_the_kernel_computes(tmp_path: Path) -> None:
    loss = load(tmp_path, "type: sft, loss: {type: focal, gamma: 0.5}").objective.loss
    expected = TokenCrossEntropy(focal_gamma=0.5, shift=True)
    assert vocabulary_term(loss, "sft", shift=True) == expected
    assert planned_term(loss, shift=True) == expected


def notes_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "environment.json").read_text(encoding="utf-8"))["facts"]
