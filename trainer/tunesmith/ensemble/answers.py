"""What one member answers to each example, in a form in which members can be compared whatever their tokenizers: per
example, per word, or per text of an answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.adhoc import Encoding
from tunesmith.data.examples import Example
from tunesmith.data.table import Table
from tunesmith.errors import Place
from tunesmith.objectives.classification import ClassificationObjective
from tunesmith.objectives.question_answering import QuestionAnsweringObjective
from tunesmith.objectives.token_classification import TokenClassificationObjective

_NOWHERE = Place("", 0)

Floats = NDArray[np.float64]
Spans = dict[str, float]  # the text of an answer, "" for none → its probability

Answer = Floats | Spans
"""[classes]: the probabilities of a text's labels, or its numbers. [words, classes]: of each word's tags, NaN where the
model saw no piece of the word. Spans: of a question's answers."""


@dataclass(frozen=True, slots=True)
class Answers:
    """One answer per example, None where the member could read none; `dropped` says why, by the example's number."""

    values: tuple[Answer | None, ...]
    dropped: dict[int, str]
    truncated: frozenset[int] = frozenset()


def digest_of(examples: Iterable[Example]) -> str:
    """Of what the examples say, in their order, wherever they stand: SHA-256."""
    found = hashlib.sha256()
    for example in examples:
        found.update(repr(replace(example, place=_NOWHERE)).encode())
    return found.hexdigest()


def word_probabilities(table: Table, row: int, pieces: Floats) -> Floats:
    """[words, classes] of the words' first pieces; a word without one is NaN."""
    positions = np.asarray(table.value("first_pieces", row), dtype=np.int64)
    found = np.full((len(positions), pieces.shape[1]), np.nan)
    found[positions >= 0] = pieces[positions[positions >= 0]]
    return found


def span_probabilities(
    objective: QuestionAnsweringObjective, table: Table, rows: Sequence[int], predictions: Sequence[Any]
) -> Spans:
    """The softmax of start + end logits over the best `n_best_size` answers in all windows of a question, and over no
    answer where the training data had questions without one (Devlin et al. 2019, §4.3). Of equal texts the best."""
    count, longest = objective.settings.n_best_size, objective.settings.max_answer_length
    scores: Spans = {}
    null = np.inf
    for row, logits in zip(rows, predictions, strict=True):
        ids = [int(i) for i in table.value("input_ids", row)]
        offsets = table.value("offsets", row).reshape(-1, 2)
        context = json.loads(table.value("meta", row))["context"]
        cls = objective.tokenizer.cls_token_id
        first = ids.index(cls) if cls is not None and cls in ids else 0
        null = min(null, float(logits[0, first] + logits[1, first]))
        start, end = (np.where(offsets[:, 0] >= 0, side[: len(ids)], -np.inf) for side in logits)
        starts, ends = np.argsort(-start)[:count], np.argsort(-end)[:count]
        length = ends[None, :] - starts[:, None] + 1
        sums = start[starts][:, None] + end[ends][None, :]
        sums = np.where((length >= 1) & (length <= longest), sums, -np.inf)
        for flat in np.argsort(-sums, axis=None, kind="stable")[:count]:
            i, j = np.unravel_index(int(flat), sums.shape)
            if np.isfinite(sums[i, j]):
                text = context[offsets[starts[i], 0] : offsets[ends[j], 1]]
                scores[text] = max(scores.get(text, -np.inf), float(sums[i, j]))
    best = dict(sorted(scores.items(), key=lambda item: -item[1])[:count])
    if objective.unanswerable or not best:
        best[""] = null
    top = max(best.values())
    powers = {text: float(np.exp(score - top)) for text, score in best.items()}
    total = sum(powers.values())
    return {text: power / total for text, power in powers.items()}


def per_example(objective: Any, encoding: Encoding, predictions: Sequence[Any]) -> Answers:
    """A prediction per row of the table as an answer per example."""
    table = encoding.dataset.table
    values: list[Answer | None] = []
    for rows in encoding.rows:
        if not rows:
            values.append(None)
        elif isinstance(objective, QuestionAnsweringObjective):
            values.append(span_probabilities(objective, table, rows, [predictions[row] for row in rows]))
        elif isinstance(objective, TokenClassificationObjective):
            values.append(word_probabilities(table, rows[0], np.asarray(predictions[rows[0]], np.float64)))
        else:
            values.append(_calibrated(objective, np.asarray(predictions[rows[0]], np.float64)))
    return Answers(tuple(values), encoding.dropped, encoding.truncated)


def _calibrated(objective: Any, probabilities: Floats) -> Floats:
    """At the temperature that the run found on its eval rows; numbers, and where there is none, as they are."""
    if not isinstance(objective, ClassificationObjective) or objective.problem == "regression":
        return probabilities
    exclusive = objective.problem == "single_label"
    return objective.decisions.calibrated(probabilities[None], exclusive=exclusive)[0]


def in_the_order_of(answers: Answers, own: Sequence[str], wanted: Sequence[str]) -> Answers:
    """The columns of a member whose labels are `own`, in the order of `wanted`, the same labels."""
    if list(own) == list(wanted):
        return answers
    places = [list(own).index(label) for label in wanted]
    values = tuple(v[..., places] if isinstance(v, np.ndarray) else v for v in answers.values)
    return Answers(values, answers.dropped, answers.truncated)


def save_answers(path: Path, answers: Answers) -> None:
    """Numbers as safetensors beside a JSON of the rest; spans are JSON alone."""
    from safetensors.numpy import save_file

    about: dict[str, Any] = {
        "dropped": {str(number): reason for number, reason in answers.dropped.items()},
        "truncated": sorted(answers.truncated),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = [value for value in answers.values if isinstance(value, np.ndarray)]
    if arrays:
        shapes = [None if v is None else list(np.shape(np.asarray(v))) for v in answers.values]
        save_file({"values": np.concatenate([v.ravel() for v in arrays])}, path.with_suffix(".safetensors"))
        about["shapes"] = shapes
    else:
        about["spans"] = answers.values
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")
    partial.rename(path.with_suffix(".json"))  # last: its being there says that all is


def load_answers(path: Path) -> Answers | None:
    """What `save_answers` wrote; None where there is nothing."""
    from safetensors.numpy import load_file

    try:
        about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    dropped = {int(number): reason for number, reason in about["dropped"].items()}
    truncated = frozenset[int](about["truncated"])
    if "spans" in about:
        return Answers(tuple(about["spans"]), dropped, truncated)
    flat = load_file(path.with_suffix(".safetensors"))["values"]
    values: list[Answer | None] = []
    at = 0
    for shape in about["shapes"]:
        if shape is None:
            values.append(None)
            continue
        size = int(np.prod(shape))
        values.append(flat[at : at + size].reshape(shape))
        at += size
    return Answers(tuple(values), dropped, truncated)
