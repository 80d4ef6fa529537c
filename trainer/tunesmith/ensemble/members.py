"""The members of an ensemble: what they must have in common, and their answers, one model in memory at a time."""

from __future__ import annotations

import gc
import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from tunesmith.commands.finished import Described, Weights, counting, describe_run, open_run, weights_folder
from tunesmith.data.adhoc import encode_examples
from tunesmith.data.examples import Example
from tunesmith.data.formats import FormatCounts
from tunesmith.data.prepare import has_split, split_examples
from tunesmith.decisions import UNDECIDED
from tunesmith.ensemble.answers import (
    Answers,
    digest_of,
    in_the_order_of,
    load_answers,
    per_example,
    save_answers,
)
from tunesmith.errors import UserError
from tunesmith.evaluator import predict_rows
from tunesmith.objectives.classification import ClassificationObjective
from tunesmith.objectives.question_answering import QuestionAnsweringObjective
from tunesmith.objectives.ranking import RankingObjective
from tunesmith.objectives.token_classification import TokenClassificationObjective

Kind = Literal["single_label", "multi_label", "regression", "tags", "spans"]


def kind_of(described: Described) -> Kind:
    """What the run's answers are. Raises UserError for a run whose answers cannot be combined."""
    objective = described.objective
    match objective:
        case RankingObjective():
            raise UserError(
                f"{described.run_dir}: ranks lists: the scores of two runs have no scale in common, so that neither "
                "votes nor means of them say anything; average the weights with tunesmith average instead"
            )
        case ClassificationObjective():
            assert objective.problem is not None
            return objective.problem
        case TokenClassificationObjective():
            return "tags"
        case QuestionAnsweringObjective():
            return "spans"
        case _:
            raise UserError(
                f"{described.run_dir}: objective {objective_name(described)} cannot be combined: its answers are not "
                "a fixed set of classes or spans but texts of any length, or those of several tasks, over which no "
                "vote or mean is defined; average the weights with tunesmith average instead"
            )


def objective_name(described: Described) -> str:
    """What the recipe calls the objective."""
    return getattr(described.recipe.objective, "type", None) or type(described.objective).__name__


def labels_of(described: Described) -> list[str]:
    """The labels, in the order of the model's outputs; [] where it has none."""
    return list(described.objective.state().get("labels") or [])


def describe_members(members: Sequence[Weights]) -> list[Described]:
    """All of them, which agree on what they answer. Raises UserError naming the one that does not."""
    if len(members) < 2:
        raise UserError(
            "an ensemble has two members or more: name several runs, or one with --checkpoints all"
        )
    for number, member in enumerate(members):
        if member in members[:number]:
            raise UserError(f"{member} is named twice")
    every = [undecided(describe_run(member.run_dir)) for member in members]
    lead, kind = every[0], kind_of(every[0])
    for one in every[1:]:
        if (found := kind_of(one)) != kind:
            raise UserError(
                f"{one.run_dir}: its answers are {_words(found)}, those of {lead.run_dir} {_words(kind)}"
            )
        ours, theirs = labels_of(lead), labels_of(one)
        if set(ours) != set(theirs):
            differ = ", ".join(sorted(set(ours) ^ set(theirs))[:5])
            raise UserError(f"{one.run_dir}: its labels are not those of {lead.run_dir}: {differ}")
        if kind == "regression" and _width(one) != _width(lead):
            raise UserError(f"{one.run_dir}: gives {_width(one)} numbers, {lead.run_dir} {_width(lead)}")
    return every


def undecided(described: Described) -> Described:
    """Without the thresholds that were tuned on one run's probabilities: they are not the ensemble's."""
    if isinstance(described.objective, ClassificationObjective):
        described.objective.decisions = UNDECIDED
    return described


def _words(kind: Kind) -> str:
    return "numbers" if kind == "regression" else kind.replace("_", " ")


def _width(described: Described) -> int:
    return int(described.objective.state().get("width") or 0)


def eval_examples(every: Sequence[Described]) -> tuple[list[Example], dict[str, int]]:
    """The first member's eval rows, and how many the format dropped, by reason. Raises UserError where another member
    has other ones: it may have been trained on the rows on which weights are fitted and members compared."""
    lead = every[0]
    rows, dropped = split_rows(lead, "eval")
    digest = digest_of(rows)
    seen = {lead.run_dir}
    for one in every[1:]:
        if one.run_dir not in seen and digest_of(split_rows(one, "eval")[0]) != digest:
            raise UserError(
                f"{one.run_dir}: its eval rows are not those of {lead.run_dir}, and may be among the training rows of "
                "either: give both the same data.eval, or the same data.train and data.split"
            )
        seen.add(one.run_dir)
    return rows, dropped


def split_rows(described: Described, split: Literal["eval", "test"]) -> tuple[list[Example], dict[str, int]]:
    """The rows of a split of the run's recipe, and how many its format dropped, by reason."""
    if not has_split(described.recipe.data, split):
        raise UserError(f"{described.run_dir}: its recipe has no {split} rows")
    counts = FormatCounts()
    rows = [e for _, e in split_examples(described.recipe.data, described.run_dir, split, counts)]
    return rows, dict(counts.dropped)


def member_digest(member: Weights) -> str:
    """Of the weights and of what shapes the answers (recipe, labels, tokenizer), SHA-256."""
    folder = weights_folder(member.run_dir, member.checkpoint)
    found = hashlib.sha256()
    files = [member.run_dir / "recipe.yaml", member.run_dir / "objective.json"]
    if member.checkpoint is None:
        files += sorted(path for path in folder.rglob("*") if path.is_file())
    else:  # its manifest has the sums of its files, which were compared
        files += sorted(folder.glob("*manifest*"))
    for path in files:
        found.update(f"{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()


def member_answers(
    member: Weights,
    examples: Sequence[Example],
    labels: Sequence[str],
    cache: Path | None = None,
    digest: str = "",
) -> Answers:
    """The answers of one member, its columns in the order of `labels`. With `cache` they are read from there, or left
    there: `digest` is the member's."""
    kept = None if cache is None else cache / f"{_short(digest + digest_of(examples))}"
    if kept is not None and (found := load_answers(kept)) is not None:
        return found
    run = open_run(member.run_dir, member.checkpoint)
    objective = _giving_distributions(run.objective)
    run.engine.train_module.objective = objective
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as folder:
        encoding = encode_examples(examples, objective, Path(folder) / "rows", "ensemble")
        dataset = encoding.dataset
        with counting(str(member), len(dataset)) as progress:
            per_device = run.recipe.evaluation.per_device_eval_batch_size
            _, _, predictions = predict_rows(
                run.engine,
                objective,
                dataset,
                range(len(dataset)),
                per_device,
                run.recipe.training.seed,
                progress,
            )
        found = per_example(objective, encoding, predictions)
    found = in_the_order_of(found, labels_of(describe_run(member.run_dir)), labels)
    del run, objective
    gc.collect()  # the model is held in cycles, and the next one is to take its place in memory
    if kept is not None:
        save_answers(kept, found)
    return found


class _TagDistributions(TokenClassificationObjective):
    """As its parent, but predicts each piece's probabilities [pieces, tags] in place of its best tag."""

    def predict(self, outputs: Any, batch: Any) -> list[Any]:
        return list(outputs["logits"].float().softmax(-1).cpu().numpy())


def _giving_distributions(objective: Any) -> Any:
    if not isinstance(objective, TokenClassificationObjective):
        return objective
    found = _TagDistributions.__new__(_TagDistributions)
    for name, value in vars(objective).items():
        setattr(found, name, value)
    return found


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
