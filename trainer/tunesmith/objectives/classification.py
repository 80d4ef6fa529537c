"""Sequence classification of a text or a pair of texts: one label, several labels, or numbers (regression).

The unit is a row; several labels or numbers are averaged within it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from tunesmith.batch import Batch
from tunesmith.data.encoded import Dropped
from tunesmith.data.examples import Example, Labelled
from tunesmith.data.table import Encoded, Kind, Table
from tunesmith.decisions import UNDECIDED, Decisions
from tunesmith.decisions.scores import multi_label_scores, single_label_scores
from tunesmith.errors import DataError, UserError
from tunesmith.losses.choose import loss_notes, probabilities, reweighted, terms_of
from tunesmith.losses.weights import Labels
from tunesmith.metrics import labels as label_metrics
from tunesmith.metrics.regression import regression_metrics
from tunesmith.objectives import label_values
from tunesmith.objectives.base import Objective, Scores, Truncation, text_inputs
from tunesmith.recipe.losses import Ordinal
from tunesmith.recipe.objective import Classification
from tunesmith.terms import Term

Problem = Literal["single_label", "multi_label", "regression"]

_HF_PROBLEM: dict[Problem, str] = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}


class ClassificationObjective(Objective):
    accepts = (Labelled,)
    kinds: ClassVar[dict[str, Kind]] = {
        "numbers": "floats",
        "labels": "ints",
        "soft_labels": "floats",
        "token_type_ids": "ints",
    }

    def __init__(
        self, settings: Classification, tokenizer: Any, max_length: int, truncation: Truncation
    ) -> None:
        super().__init__(tokenizer, max_length, truncation)
        self.settings = settings
        self.problem: Problem | None = None if settings.problem == "auto" else settings.problem
        self.labels: list[str] = list(settings.labels or [])
        self.width = len(self.labels)
        self.train_counts: dict[str, int] = {}
        self.decisions = UNDECIDED
        self.train_rows = 0
        self.soft = False  # rows have a distribution over the labels

    # labels

    def fit(self, examples: Iterable[Example]) -> None:
        names: dict[str, int] = {}
        for example in examples:
            assert isinstance(example, Labelled)
            self.train_rows += 1
            if example.soft_labels is not None:
                self.soft = True
                names = dict.fromkeys(label_values.soft_names(example), 0) | names
            label = label_values.label_of(example, self.labels)
            found: Problem = (
                "multi_label" if isinstance(label, tuple) and not label_values.are_numbers(label)
                else "single_label" if isinstance(label, str)
                else "regression"
            )  # fmt: skip
            if self.problem is None:
                self.problem = found
            if self.problem == "regression":
                self.width = max(self.width, len(label_values.as_numbers(example)))
                continue
            if found != self.problem and not (self.problem == "multi_label" and found == "single_label"):
                raise DataError(
                    f"a {found.replace('_', ' ')} among {self.problem.replace('_', ' ')}s",
                    example.place,
                    "label",
                )
            for name in label if isinstance(label, tuple) else (label,):
                names[str(name)] = names.get(str(name), 0) + 1
        if self.soft and self.problem != "single_label":
            raise UserError(f"columns.soft_labels: are shares of one label; the problem is {self.problem}")
        if self.problem != "regression":
            self.labels = self.labels or sorted(names, key=label_values.natural)
            self.width = len(self.labels)
            self.train_counts = {name: names.get(name, 0) for name in self.labels}
            if self.problem == "single_label" and self.width < 2:
                raise UserError(
                    f"the training rows have one label only ({', '.join(self.labels)}): nothing to tell apart"
                )
        self._complete()

    def state(self) -> dict[str, Any]:
        return {
            "problem": self.problem,
            "labels": self.labels,
            "width": self.width,
            "counts": self.train_counts,
            "rows": self.train_rows,
            "soft": self.soft,
        } | ({"decisions": self.decisions.state()} if self.decisions != UNDECIDED else {})

    def load_state(self, state: dict[str, Any]) -> None:
        self.problem, self.labels, self.width = state["problem"], state["labels"], state["width"]
        self.train_counts = state["counts"]
        self.train_rows, self.soft = state.get("rows", 0), state.get("soft", False)  # older runs have none
        self.decisions = Decisions.of(state.get("decisions", {}))
        self._complete()

    def _complete(self) -> None:
        self._ids = {name: i for i, name in enumerate(self.labels)}
        assert self.problem is not None
        loss, counts = self.settings.loss, tuple(self.train_counts.get(name, 0) for name in self.labels)
        labels = Labels(self.problem, tuple(self.labels), counts, self.train_rows, self.width)
        self.terms = self._terms(labels)
        self.reweighted = reweighted(loss, labels)
        self.loss_notes = tuple(loss_notes(loss, labels, (*self.terms, self.reweighted)))

    def _terms(self, labels: Labels) -> tuple[Term, ...]:
        return terms_of(self.settings.loss, labels, self.settings.label_smoothing_factor)

    @property
    def fingerprint(self) -> dict[str, Any]:
        return super().fingerprint | self.settings.model_dump(exclude={"label_smoothing_factor", "loss"})

    # rows

    def encode(self, example: Example) -> Iterator[Encoded | Dropped]:
        assert isinstance(example, Labelled)
        if not example.text.strip():
            yield Dropped("empty text")
            return
        ids = self.tokenizer(example.text, example.text_pair)
        truncated = len(ids["input_ids"]) > self.max_length
        if truncated:
            if self.truncation == "drop":
                yield Dropped("longer than max_length")
                return
            ids = self.tokenizer(example.text, example.text_pair, truncation=True, max_length=self.max_length)
        row: Encoded = {"input_ids": ids["input_ids"], "truncated": int(truncated)}
        if "token_type_ids" in ids:
            row["token_type_ids"] = ids["token_type_ids"]
        yield row | self._target(example)

    def _target(self, example: Labelled) -> Encoded:
        if self.problem == "regression":
            numbers = [] if example.label is None else label_values.as_numbers(example)
            if example.label is not None and len(numbers) != self.width:
                raise DataError(
                    f"{len(numbers)} numbers where other rows have {self.width}", example.place, "label"
                )
            return {"numbers": numbers}
        soft: Encoded = {"soft_labels": label_values.shares(example, self.labels)} if self.soft else {}
        label = label_values.label_of(example, self.labels)
        if label is None:
            return {"labels": [], **soft}
        names = label if isinstance(label, tuple) else (label,)
        for name in names:
            if str(name) not in self._ids:
                known = ", ".join(self.labels[:8]) + (", …" if len(self.labels) > 8 else "")
                raise DataError(
                    f"label {name!r} is not among the training labels ({known})", example.place, "label"
                )
        return {"labels": [self._ids[str(name)] for name in names], **soft}

    # model

    @property
    def auto_class(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def config_overrides(self) -> dict[str, Any]:
        assert self.problem is not None
        overrides: dict[str, Any] = {"problem_type": _HF_PROBLEM[self.problem]}
        if self.problem == "regression":
            return overrides | {"num_labels": self.width}
        if isinstance(self.settings.loss, Ordinal) and self.settings.loss.method == "corn":
            questions = [f"beyond {low}, at least {high}" for low, high in pairwise(self.labels)]
            return overrides | {
                "id2label": dict(enumerate(questions)),
                "label2id": {name: i for i, name in enumerate(questions)},
            }
        return overrides | {"id2label": dict(enumerate(self.labels)), "label2id": dict(self._ids)}

    def collate(self, rows: Sequence[Encoded], places: Sequence[int]) -> Batch:
        inputs, tokens = text_inputs(self.tokenizer, rows)
        return Batch(
            inputs, {"labels": self._labels(rows), "row_mask": torch.ones(len(rows))}, tuple(places), tokens
        )

    def _labels(self, rows: Sequence[Encoded]) -> Tensor:
        match self.problem:
            case "single_label" if self.soft:
                unlabelled = np.zeros(self.width, np.float32)
                shares = [row["soft_labels"] if len(row["soft_labels"]) else unlabelled for row in rows]
                return torch.from_numpy(np.stack(shares).astype(np.float32))
            case "single_label":
                return torch.tensor([int(row["labels"][0]) if len(row["labels"]) else -100 for row in rows])
            case "multi_label":
                out = torch.zeros(len(rows), self.width)
                for i, row in enumerate(rows):
                    out[i, [int(label) for label in row["labels"]]] = 1.0
                return out
            case _:
                numbers = [
                    row["numbers"] if len(row["numbers"]) else np.zeros(self.width, np.float32)
                    for row in rows
                ]
                return torch.from_numpy(np.stack(numbers).astype(np.float32))

    # evaluation

    def predict(self, outputs: Mapping[str, Any], batch: Batch) -> list[Any]:
        logits: Tensor = outputs["logits"].float()
        match self.problem:
            case "single_label":
                values = probabilities(self.settings.loss, logits)
            case "multi_label":
                values = logits.sigmoid()
            case _:
                values = logits
        return list(values.cpu().numpy())

    def score(self, table: Table, rows: Sequence[int], predictions: Sequence[Any]) -> Scores:
        values = np.stack(predictions)
        if self.problem == "regression":
            truth = np.stack([table.value("numbers", row) for row in rows])
            return Scores(regression_metrics(values, truth))
        if self.problem == "multi_label":
            many = np.zeros((len(rows), self.width), dtype=np.int64)
            for i, row in enumerate(rows):
                many[i, table.value("labels", row)] = 1
            return Scores(*multi_label_scores(values, many, self.labels, self.decisions))
        one = np.array([table.value("labels", row)[0] for row in rows], dtype=np.int64)
        return Scores(*single_label_scores(values, one, self.labels, self.train_counts, self.decisions))

    def baseline(self, tables: Mapping[str, Table]) -> dict[str, dict[str, float]]:
        """Always answering the most frequent training label."""
        if self.problem != "single_label":
            return {}
        labels = {name: np.array([v[0] for v in table.column("labels")]) for name, table in tables.items()}
        values, counts = np.unique(labels["train"], return_counts=True)
        majority = values[counts.argmax()]
        found: dict[str, dict[str, float]] = {}
        for name, given in labels.items():
            if name != "train":
                found[name] = label_metrics.single_label_metrics(np.full_like(given, majority), given)
        return found

    def presentable(self, table: Table, row: int, prediction: Any) -> dict[str, Any]:
        if self.problem == "regression":
            numbers = [float(value) for value in prediction]
            return {"value": numbers[0] if len(numbers) == 1 else numbers}
        exclusive = self.problem == "single_label"
        values = self.decisions.calibrated(prediction[None], exclusive=exclusive)
        if exclusive:
            best = int(self.decisions.one_label(values)[0])
            return {"label": self.labels[best], "score": round(float(values[0, best]), 6)}
        chosen = self.decisions.many_labels(values)[0]
        return {
            "labels": [name for name, has in zip(self.labels, chosen, strict=True) if has],
            "scores": {name: round(float(p), 6) for name, p in zip(self.labels, values[0], strict=True)},
        }

    def soft_labels(self, prediction: Any) -> dict[str, float]:
        """Every label's probability, of a row that has one label: what `columns.soft_labels` reads."""
        assert self.problem == "single_label"
        values = self.decisions.calibrated(prediction[None], exclusive=True)[0]
        return {name: round(float(p), 8) for name, p in zip(self.labels, values, strict=True)}

    @property
    def default_metric(self) -> tuple[str, bool]:
        match self.problem:
            case "single_label":
                return "accuracy", True
            case "multi_label":
                return "micro_f1", True
            case _:
                return "loss", False
