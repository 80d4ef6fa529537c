"""`tunesmith ensemble`: several finished runs that answer together, and what they reach, measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tunesmith.commands.finished import Weights, checkpoint_numbers, read_recipe
from tunesmith.commands.predict import texts_of, with_scores
from tunesmith.data.adhoc import plain_examples, source_like, unlabelled_examples
from tunesmith.data.examples import Example, Question, Tokens
from tunesmith.data.formats import FormatCounts, examples
from tunesmith.data.prepare import has_split
from tunesmith.ensemble.answers import Answer, Answers
from tunesmith.ensemble.combine import Combiner, Method, best_span, refuse
from tunesmith.ensemble.learn import learn, out_of_fold
from tunesmith.ensemble.members import (
    describe_members,
    eval_examples,
    kind_of,
    labels_of,
    member_answers,
    member_digest,
    split_rows,
)
from tunesmith.ensemble.record import FILE, Ensemble, is_ensemble, write_ensemble
from tunesmith.ensemble.truth import Truth, truth_of
from tunesmith.environment import versions
from tunesmith.errors import UserError
from tunesmith.run import best_metric
from tunesmith.tracking.metrics_file import finite
from tunesmith.tracking.progress import track
from tunesmith.tracking.report import plain

Row = dict[str, Any]
_SHOWN = 5  # metrics in a table


@dataclass(frozen=True, slots=True)
class Measured:
    """`table`: a row per member, their mean, the best of them and the ensemble. `metrics` and `tables` are the
    ensemble's. `path` is the file that holds it."""

    on: str
    rows: int
    dropped: dict[str, int]
    truncated: int
    table: list[Row]
    metrics: dict[str, float]
    tables: dict[str, Any]
    path: Path


def checkpoints_of(run_dir: Path, which: str) -> list[Weights]:
    """The members that `--checkpoints all` or `--checkpoints N,M` makes of one run. Raises UserError."""
    read_recipe(run_dir)
    there = checkpoint_numbers(run_dir)
    if which == "all":
        numbers = there
    else:
        if not all(part.strip().isdecimal() for part in which.split(",")):
            raise UserError(f"--checkpoints {which}: write all, or steps as 100,200")
        numbers = [int(part) for part in which.split(",")]
    if missing := [number for number in numbers if number not in there]:
        have = ", ".join(map(str, there)) or "none"
        raise UserError(f"--checkpoints {which}: {run_dir} has no checkpoint-{missing[0]}; it has {have}")
    if len(numbers) < 2:
        raise UserError(
            f"--checkpoints {which}: {run_dir} has {len(numbers)} of them, an ensemble takes two or more: train with "
            "checkpoint.save_steps, and checkpoint.save_total_limit: null, which keeps them all"
        )
    return [Weights(run_dir, number) for number in numbers]


def make_ensemble(
    members: Sequence[Weights],
    method: Method,
    out: Path,
    folds: int | None = None,
    *,
    overwrite: bool = False,
) -> Measured:
    """Combines the members into the new folder `out`, and measures them and it on the eval rows, on which weights and
    stacking models are fitted. With `folds` the figure is found on rows that were not fitted on. The members' answers
    are kept in the folder; `overwrite` replaces an ensemble there and uses those again. Raises UserError."""
    _check_folder(out, overwrite=overwrite)
    if folds is not None and method in ("vote", "mean"):
        raise UserError(f"--out-of-fold: --method {method} fits nothing on the rows: leave it out")
    if folds is not None and folds < 2:
        raise UserError(f"--out-of-fold {folds}: give 2 folds or more")
    every = describe_members(members)
    lead, kind = every[0], kind_of(every[0])
    refuse(kind, method)
    given, dropped = eval_examples(every)
    digests = tuple(member_digest(member) for member in members)
    found = Ensemble(out, tuple(members), digests, lead, labels_of(lead), Combiner(kind, method), folds)
    answers = _answers(found, given, keep=True)
    with truth_of(lead, given) as truth:
        common = _common(answers)
        seed = lead.recipe.training.seed
        combiner = learn(truth, method, common, seed)
        combined = (
            out_of_fold(truth, method, common, folds, seed)
            if folds is not None
            else [combiner(one) for one in common.values()]
        )
        name = "ensemble"
        if combiner.weights or combiner.stack is not None:
            name += " (fitted on these rows)" if folds is None else f" ({folds} folds, out of fold)"
        measured = _measure(found, truth, common, combined, answers, dropped, "eval", name, out / FILE)
    ensemble = Ensemble(out, found.members, digests, lead, found.labels, combiner, folds)
    write_ensemble(ensemble, [finite(row) for row in measured.table])
    return measured


def _check_folder(out: Path, *, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir() or (any(out.iterdir()) and not is_ensemble(out)):
        raise UserError(f"{out} is in use: name a new folder with --out")
    if is_ensemble(out) and not overwrite:
        raise UserError(
            f"{out} holds an ensemble: replace it with --overwrite, or name a new folder with --out"
        )


def evaluate_ensemble(
    ensemble: Ensemble, split: Literal["eval", "test"] | None = None, data: Sequence[str] = ()
) -> Measured:
    """The members and the ensemble on a split of the first member's recipe (default: eval, else test), or on the files
    `data`. Writes `evaluation-….json` into the ensemble's folder. Raises UserError."""
    if data and split is not None:
        raise UserError("--split and --data exclude each other: keep one")
    lead = ensemble.lead
    if data:
        counts = FormatCounts()
        given = [e for p in data for e in examples(source_like(lead.recipe, p), Path(), counts=counts)]
        dropped, on = dict(counts.dropped), ", ".join(Path(p).name for p in data)
        name = "-".join(Path(p).stem.replace(":", "-") for p in data)
    else:
        chosen = split or ("eval" if has_split(lead.recipe.data, "eval") else "test")
        given, dropped = split_rows(lead, chosen)
        on = name = chosen
    answers = _answers(ensemble, given, keep=on == "eval" and not data)
    with truth_of(lead, given) as truth:
        common = _common(answers)
        combined = [ensemble.combiner(one) for one in common.values()]
        fitted = on == "eval" and (ensemble.combiner.weights or ensemble.combiner.stack is not None)
        title = "ensemble (fitted on these rows)" if fitted else "ensemble"
        path = ensemble.folder / f"evaluation-{name}.json"
        measured = _measure(ensemble, truth, common, combined, answers, dropped, on, title, path)
    about = {
        "split": None if data else on,
        "data": list(data),
        "rows": measured.rows,
        "dropped": measured.dropped,
        "truncated": measured.truncated,
        "metrics": finite(measured.metrics),
        "members": [finite(row) for row in measured.table],
        "tables": plain(measured.tables),
        "versions": versions(),
    }
    try:
        measured.path.write_text(
            json.dumps(about, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
        )
    except OSError as error:
        raise UserError(f"{measured.path}: cannot be written: {error.strerror}") from None
    return measured


def predict_ensemble(
    ensemble: Ensemble, given: Iterable[Example], *, scores: bool = False
) -> Iterator[tuple[Example, Row]]:
    """Each example with the ensemble's answer, in the form of one run's."""
    objective: Any = ensemble.lead.objective
    presentable = with_scores(objective) if scores else objective.presentable
    every = list(given)
    answers = _answers(ensemble, every)
    kind = ensemble.combiner.kind
    for number, example in enumerate(every):
        own = [one.values[number] for one in answers]
        if any(value is None for value in own):
            yield example, {"error": next(a.dropped[number] for a in answers if number in a.dropped)}
            continue
        found = ensemble.combiner([value for value in own if value is not None])
        answer = _presentable(ensemble, kind, example, found, presentable)
        answer = (texts_of(example) if scores else {}) | answer
        cut = any(number in one.truncated for one in answers)
        yield example, answer | ({"truncated": True} if cut else {})


def ensemble_rows(ensemble: Ensemble, path: str | None, texts: Sequence[str]) -> Iterator[Example]:
    """The rows of a file to predict, or plain texts, as the first member's recipe reads them."""
    recipe = ensemble.lead.recipe
    return plain_examples(recipe, texts) if path is None else unlabelled_examples(recipe, path)


def _presentable(ensemble: Ensemble, kind: str, example: Example, found: Answer, presentable: Any) -> Row:
    if isinstance(found, dict):
        assert isinstance(example, Question)
        best = best_span(found)
        return {"id": example.id, "answer": best, "score": round(found[best], 6)}
    if kind == "tags":
        assert isinstance(example, Tokens)
        tags = ["O" if np.isnan(word[0]) else ensemble.labels[int(word.argmax())] for word in found]
        return {"tokens": list(example.tokens), "tags": tags}
    return presentable(None, 0, found)


def _answers(ensemble: Ensemble, given: Sequence[Example], *, keep: bool = False) -> list[Answers]:
    cache = ensemble.cache if keep else None
    pairs = list(zip(ensemble.members, ensemble.digests, strict=True))
    return [
        member_answers(member, given, ensemble.labels, cache, digest)
        for member, digest in track(pairs, "members", len(pairs))
    ]


def _common(answers: Sequence[Answers]) -> dict[int, list[Answer]]:
    """The answers to the examples that every member could read, by the examples' numbers."""
    found: dict[int, list[Answer]] = {}
    for number, values in enumerate(zip(*(one.values for one in answers), strict=True)):
        kept = [value for value in values if value is not None]
        if len(kept) == len(answers):
            found[number] = kept
    if not found:
        raise UserError("no row can be read by every member")
    return found


def _measure(
    ensemble: Ensemble, truth: Truth, common: dict[int, list[Answer]], combined: list[Answer],
    answers: Sequence[Answers], dropped: dict[str, int], on: str, title: str, path: Path,
) -> Measured:  # fmt: skip
    numbers = list(common)
    main, greater = best_metric(ensemble.lead.recipe, ensemble.lead.objective)
    scores = [
        _scored(truth, numbers, [own[m] for own in common.values()]) for m in range(len(ensemble.members))
    ]
    own, tables = _scored(truth, numbers, combined)
    if ensemble.combiner.method == "vote":  # shares of votes are no probabilities
        del own["loss"]
    shown = list(dict.fromkeys([main, "loss", *own]))[:_SHOWN]
    every = [metrics for metrics, _ in scores]
    best = (max if greater else min)(range(len(every)), key=lambda m: every[m][main])
    weights = ensemble.combiner.weights
    table: list[Row] = []
    for m, (member, metrics) in enumerate(zip(ensemble.members, every, strict=True)):
        weight = {"weight": weights[m]} if weights else {}
        table.append({"on " + on: str(member)} | {key: metrics[key] for key in shown} | weight)
    mean = {key: float(np.mean([metrics[key] for metrics in every])) for key in shown}
    table.append({"on " + on: "mean of members"} | mean)
    table.append({"on " + on: f"best member ({main})"} | {key: every[best][key] for key in shown})
    table.append({"on " + on: title} | {key: own.get(key) for key in shown})
    lost = {number for one in answers for number in one.dropped}
    for number in lost:
        reason = next(one.dropped[number] for one in answers if number in one.dropped)
        dropped = dropped | {reason: dropped.get(reason, 0) + 1}
    cut = len(set[int]().union(*(one.truncated for one in answers)))
    return Measured(on, len(numbers), dropped, cut, table, own, tables, path)


def _scored(
    truth: Truth, numbers: list[int], answers: list[Answer]
) -> tuple[dict[str, float], dict[str, Any]]:
    scores = truth.score(numbers, answers)
    return {"loss": truth.loss(numbers, answers)} | scores.metrics, scores.tables
