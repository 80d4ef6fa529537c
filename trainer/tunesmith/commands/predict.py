"""`tunesmith predict`: what a finished run answers, one object per input row, in the order of the rows."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from tunesmith.commands.finished import FinishedRun
from tunesmith.data.adhoc import Encoding, encode_examples, plain_examples, unlabelled_examples
from tunesmith.data.examples import Example, Tokens
from tunesmith.errors import UserError
from tunesmith.evaluator import predict_rows
from tunesmith.generation import generate
from tunesmith.objectives.question_answering import QuestionAnsweringObjective
from tunesmith.recipe.evaluation import Generate
from tunesmith.tracking.progress import track

Answer = dict[str, Any]

_GENERATING = {"sft", "seq2seq", "causal_lm"}
_SILENT = {"masked_lm", "span_corruption"}
_BATCHES = 16  # that are sorted by length together, and answered before the next rows are read


def predict(
    run: FinishedRun, given: Iterable[Example], settings: Generate
) -> Iterator[tuple[Example, Answer]]:
    """Each example with its answer: {label, score}, {labels, scores}, {value}, {tokens, tags}, {id, answer, score} or
    {generated}, and `truncated: true` where the model did not see all of it; {error} where it could not be read.
    `settings` are those of objectives that generate. Raises UserError where there is nothing to predict."""
    objective = run.recipe.objective.type
    if objective in _SILENT:
        raise UserError(
            f"objective {objective} trains a backbone, which answers nothing: use it as model.model_name_or_path "
            f"of another recipe, or export it"
        )
    remaining = iter(given)
    at_once = _BATCHES * run.recipe.evaluation.per_device_eval_batch_size
    while chunk := list(islice(remaining, at_once)):
        with tempfile.TemporaryDirectory(prefix="tunesmith-") as folder:
            encoding = encode_examples(chunk, run.objective, Path(folder) / "rows", "input", prompts=True)
            answers = _answers(run, encoding, settings)
        for number, example in enumerate(chunk):
            if not encoding.rows[number]:
                yield example, {"error": encoding.dropped[number]}
                continue
            answer = {"tokens": list(example.tokens)} if isinstance(example, Tokens) else {}
            answer |= answers[number]
            yield example, answer | ({"truncated": True} if number in encoding.truncated else {})


def _answers(run: FinishedRun, encoding: Encoding, settings: Generate) -> dict[int, Answer]:
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
    return {
        number: objective.presentable(dataset.table, row, predictions[row]) for row, number in first.items()
    }


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


def predict_file(run: FinishedRun, path: str, settings: Generate, out: Path | TextIO) -> dict[str, int]:
    """Writes one JSON object per row of `path` to `out`: its `line` (of a folder also its `file`) and its answer.
    Returns the numbers of `rows`, and of `errors` and `truncated` ones."""
    return write_answers(predict(run, unlabelled_examples(run.recipe, path), settings), path, out)


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


def predict_texts(run: FinishedRun, texts: Sequence[str], settings: Generate) -> list[Answer]:
    """Answers to plain texts, each with its `text`."""
    answers = predict(run, plain_examples(run.recipe, texts), settings)
    return [{"text": text} | answer for text, (_, answer) in zip(texts, answers, strict=True)]
