"""`tunesmith predict`: what a finished run answers, one object per input row, in the order of the rows."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from tunesmith.commands.finished import FinishedRun
from tunesmith.data.adhoc import Encoding, encode_examples, plain_examples, unlabelled_examples
from tunesmith.data.examples import Example, Labelled, Tokens
from tunesmith.data.table import Table
from tunesmith.errors import UserError
from tunesmith.evaluator import predict_rows
from tunesmith.generation import generate
from tunesmith.objectives import Objective
from tunesmith.objectives.classification import ClassificationObjective
from tunesmith.objectives.question_answering import QuestionAnsweringObjective
from tunesmith.recipe.evaluation import Generate
from tunesmith.tracking.progress import track

Answer = dict[str, Any]
Presentable = Callable[[Table, int, Any], Answer]

_GENERATING = {"sft", "seq2seq", "causal_lm"}
_SILENT = {"masked_lm", "span_corruption"}
_BATCHES = 16  # that are sorted by length together, and answered before the next rows are read


def predict(
    run: FinishedRun, given: Iterable[Example], settings: Generate, *, scores: bool = False
) -> Iterator[tuple[Example, Answer]]:
    """Each example with its answer: {label, score}, {labels, scores}, {value}, {tokens, tags}, {id, answer, score} or
    {generated}, and `truncated: true` where the model did not see all of it; {error} where it could not be read.
    With `scores` {text, label, score, scores}: rows that are trained on with `columns.soft_labels`. `settings` are
    those of objectives that generate. Raises UserError where there is nothing to predict, or nothing like it."""
    objective = run.recipe.objective.type
    if objective in _SILENT:
        raise UserError(
            f"objective {objective} trains a backbone, which answers nothing: use it as model.model_name_or_path "
            f"of another recipe, or export it"
        )
    presentable = with_scores(run.objective) if scores else run.objective.presentable
    remaining = iter(given)
    at_once = _BATCHES * run.recipe.evaluation.per_device_eval_batch_size
    while chunk := list(islice(remaining, at_once)):
        with tempfile.TemporaryDirectory(prefix="tunesmith-") as folder:
            encoding = encode_examples(chunk, run.objective, Path(folder) / "rows", "input", prompts=True)
            answers = _answers(run, encoding, settings, presentable)
        for number, example in enumerate(chunk):
            if not encoding.rows[number]:
                yield example, {"error": encoding.dropped[number]}
                continue
            answer = {"tokens": list(example.tokens)} if isinstance(example, Tokens) else {}
            answer |= (texts_of(example) if scores else {}) | answers[number]
            yield example, answer | ({"truncated": True} if number in encoding.truncated else {})


def with_scores(objective: Objective) -> Presentable:
    """`presentable` with every label's probability. Raises UserError where rows have no distribution over labels."""
    if not isinstance(objective, ClassificationObjective) or objective.problem != "single_label":
        raise UserError(
            "--scores: writes a distribution over the labels, for rows that have one label each; leave it out "
            "(of several labels per row the scores are always written)"
        )

    def presentable(table: Table, row: int, prediction: Any) -> Answer:
        scores = {"scores": objective.soft_labels(prediction)}
        return objective.presentable(table, row, prediction) | scores

    return presentable


def texts_of(example: Example) -> Answer:
    """The texts of a row to classify, by the names of their columns."""
    assert isinstance(example, Labelled)
    pair = {} if example.text_pair is None else {"text_pair": example.text_pair}
    return {"text": example.text} | pair


def _answers(
    run: FinishedRun, encoding: Encoding, settings: Generate, presentable: Presentable
) -> dict[int, Answer]:
    dataset, objective = encoding.dataset, run.objective
    all_rows = range(len(dataset))
    first = {rows[0]: number for number, rows in enumerate(encoding.rows) if rows}
    if not first:
        return {}
    per_device = run.recipe.evaluation.per_device_eval_batch_size
    if run.recipe.objective.type in _GENERATING:
        found = generate(run.engine, objective, dataset, all_rows, settings, per_device)
        return {
            number: {"generated": found.texts[row]} | ({"truncated": True} if row in found.cut else {})
            for row, number in first.items()
        }
    seed = run.recipe.training.seed
    _, _, predictions = predict_rows(run.engine, objective, dataset, all_rows, per_device, seed)
    if isinstance(objective, QuestionAnsweringObjective):
        return {
            number: _span(objective, encoding, encoding.rows[number], predictions)
            for number in first.values()
        }
    return {number: presentable(dataset.table, row, predictions[row]) for row, number in first.items()}


def _span(
    objective: QuestionAnsweringObjective, encoding: Encoding, rows: Sequence[int], predictions: Sequence[Any]
) -> Answer:
    """One answer over all windows of a context."""
    found = objective.answers(encoding.dataset.table, rows, [predictions[row] for row in rows])
    ((name, best),) = found.items()
    return {"id": name, "answer": best.text, "score": round(best.score, 6)}


def generation_settings(run: FinishedRun, max_new_tokens: int | None, num_beams: int | None) -> Generate:
    """The recipe's, or the defaults; what is given wins. Raises UserError for an option without effect."""
    given = {"max_new_tokens": max_new_tokens, "num_beams": num_beams}
    changes = {name: value for name, value in given.items() if value is not None}
    if changes and run.recipe.objective.type not in _GENERATING:
        option = next(iter(changes)).replace("_", "-")
        raise UserError(f"--{option}: objective {run.recipe.objective.type} generates no text")
    return (run.recipe.evaluation.generate or Generate()).model_copy(update=changes)


def predict_file(
    run: FinishedRun, path: str, settings: Generate, out: Path | TextIO, *, scores: bool = False
) -> dict[str, int]:
    """Writes one JSON object per row of `path` to `out`: its `line` (of a folder also its `file`) and its answer.
    Returns the numbers of `rows`, and of `errors` and `truncated` ones."""
    given = unlabelled_examples(run.recipe, path)
    return write_answers(predict(run, given, settings, scores=scores), path, out)


def write_answers(answers: Iterable[tuple[Example, Answer]], path: str, out: Path | TextIO) -> dict[str, int]:
    """As `predict_file`, of answers to the rows of `path` that somebody else gives."""
    folder = Path(path).is_dir()
    if isinstance(out, Path) and out.exists() and Path(path).exists() and out.samefile(path):
        raise UserError(f"--output {out} is the input file: name another one")
    counts = {"rows": 0, "errors": 0, "truncated": 0}
    try:
        with out.open("w", encoding="utf-8") if isinstance(out, Path) else nullcontext(out) as file:
            for example, answer in track(answers, "predicting"):
                place = {"file": example.place.file} if folder else {}
                row = place | {"line": example.place.line} | answer
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                counts["rows"] += 1
                counts["errors"] += "error" in answer
                counts["truncated"] += "truncated" in answer
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from None
    return counts


def predict_texts(
    run: FinishedRun, texts: Sequence[str], settings: Generate, *, scores: bool = False
) -> list[Answer]:
    """Answers to plain texts, each with its `text`."""
    answers = predict(run, plain_examples(run.recipe, texts), settings, scores=scores)
    return [{"text": text} | answer for text, (_, answer) in zip(texts, answers, strict=True)]
