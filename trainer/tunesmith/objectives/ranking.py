"""Learning to rank: texts of a group by their relevance. A row is a whole group, so that a list never lies in two
micro-batches, and the batch sizes count lists; the unit is a list."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from tunesmith.batch import Batch
from tunesmith.data.encoded import Dropped
from tunesmith.data.examples import Example, Labelled
from tunesmith.data.table import Encoded, Kind, Table
from tunesmith.errors import DataError, UserError
from tunesmith.losses.ranking import list_losses
from tunesmith.losses.weights import Labels
from tunesmith.metrics.lists import list_metrics
from tunesmith.objectives.base import Scores
from tunesmith.objectives.classification import ClassificationObjective
from tunesmith.recipe.losses import Ranking
from tunesmith.terms import Term


@dataclass(frozen=True, slots=True, kw_only=True)
class ListLoss:
    """Σ over lists of their loss. `outputs[logits]` [lists × longest, 1]; `targets[relevance]`, `targets[there]`
    [lists, longest]."""

    settings: Ranking
    name: str = "loss"
    weight: float = 1.0

    def units(self, batch: Batch) -> int:
        return int((batch.targets["there"].sum(dim=-1) > 0).sum())

    def __call__(self, outputs: Any, batch: Batch, normalizer: Tensor) -> Tensor:
        there, relevance = batch.targets["there"] > 0, batch.targets["relevance"]
        scores = outputs["logits"].float().view(relevance.shape)
        return list_losses(self.settings, scores, relevance, there).sum() / normalizer


class RankingObjective(ClassificationObjective):
    kinds: ClassVar[dict[str, Kind]] = {
        **ClassificationObjective.kinds, "lengths": "ints", "relevance": "floats",
    }  # fmt: skip

    def _terms(self, labels: Labels) -> tuple[Term, ...]:
        assert isinstance(self.settings.loss, Ranking)
        if self.problem != "regression" or self.width != 1:
            raise UserError(
                "objective.loss: ranking needs one number per row, its relevance, as the label; where the numbers are "
                "text (in a CSV file), set objective.problem: regression"
            )
        return (ListLoss(settings=self.settings.loss),)

    def encode_all(self, examples: Iterator[Example]) -> Iterator[tuple[Example, Encoded | Dropped]]:
        """Groups in the order of their first rows; a row without a group is a list by itself, to be predicted. A list
        whose rows are all equally relevant has no order to learn."""
        groups: dict[object, list[Labelled]] = {}
        for number, example in enumerate(examples):
            assert isinstance(example, Labelled)
            groups.setdefault(number if example.group is None else example.group, []).append(example)
        for members in groups.values():
            kept: list[tuple[Labelled, Encoded]] = []
            for example in members:
                for row in self.encode(example):
                    if isinstance(row, Dropped):
                        yield example, row
                    else:
                        kept.append((example, row))
            if not kept:
                continue
            relevance = [float(n) for _, row in kept for n in row["numbers"]]
            if relevance and len(relevance) < len(kept):
                raise DataError("a list with and without numbers", kept[0][0].place, "label")
            ordered = kept[0][0].group is not None  # not a text to be predicted
            if ordered and relevance and min(relevance) == max(relevance):
                yield kept[0][0], Dropped("a list whose rows are all equally relevant")
                continue
            yield kept[0][0], _joined([row for _, row in kept], relevance)

    def collate(self, rows: Sequence[Encoded], places: Sequence[int]) -> Batch:
        """Every list as long as the longest, filled up with copies of its first text that do not count."""
        longest = max(len(row["lengths"]) for row in rows)
        texts: list[Encoded] = []
        there, relevance = torch.zeros(len(rows), longest), torch.zeros(len(rows), longest)
        for i, row in enumerate(rows):
            parts = _parted(row)
            texts += parts + [parts[0]] * (longest - len(parts))
            there[i, : len(parts)] = 1.0
            if len(row["relevance"]):
                relevance[i, : len(parts)] = torch.from_numpy(np.array(row["relevance"], dtype=np.float32))
        inner = super().collate(texts, range(len(texts)))
        tokens = sum(len(row["input_ids"]) for row in rows)
        return Batch(inner.inputs, {"there": there, "relevance": relevance}, tuple(places), tokens)

    def _labels(self, rows: Sequence[Encoded]) -> Tensor:
        return torch.zeros(len(rows), 1)  # of the texts, which have none by themselves

    def predict(self, outputs: Mapping[str, Any], batch: Batch) -> list[Any]:
        """The scores of each list's texts, in the order of the file."""
        there = batch.targets["there"]
        scores = outputs["logits"].float().view(there.shape).cpu().numpy()
        return [row[: int(n)] for row, n in zip(scores, there.sum(dim=-1).tolist(), strict=True)]

    def score(self, table: Table, rows: Sequence[int], predictions: Sequence[Any]) -> Scores:
        return Scores(list_metrics(predictions, [table.value("relevance", row) for row in rows]))

    def baseline(self, tables: Mapping[str, Table]) -> dict[str, dict[str, float]]:
        """The order of the file."""
        return {
            name: list_metrics([-np.arange(len(r), dtype=np.float64) for r in lists], lists)
            for name, table in tables.items()
            if name != "train" and (lists := table.column("relevance"))
        }

    def presentable(self, table: Table, row: int, prediction: Any) -> dict[str, Any]:
        scores = [float(score) for score in prediction]
        return {"score": scores[0]} if len(scores) == 1 else {"scores": scores}

    @property
    def default_metric(self) -> tuple[str, bool]:
        return "ndcg", True


def _joined(rows: Sequence[Encoded], relevance: Sequence[float]) -> Encoded:
    joined: Encoded = {
        name: [int(token) for row in rows for token in row[name]]
        for name in ("input_ids", "token_type_ids")
        if name in rows[0]
    }
    return joined | {
        "lengths": [len(row["input_ids"]) for row in rows],
        "relevance": list(relevance),
        "truncated": int(any(row["truncated"] for row in rows)),
    }


def _parted(row: Encoded) -> list[Encoded]:
    edges = np.cumsum(np.asarray(row["lengths"]))[:-1]
    names = [name for name in ("input_ids", "token_type_ids") if name in row]
    parted = [np.split(np.asarray(row[name]), edges) for name in names]
    return [dict(zip(names, part, strict=True)) for part in zip(*parted, strict=True)]
