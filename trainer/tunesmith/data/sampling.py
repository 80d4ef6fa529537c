"""How often the rows of each label are drawn in an epoch: the recipe's `data.sampling` as groups of an `Order`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.order import Group, Segment
from tunesmith.data.table import Table
from tunesmith.errors import UserError
from tunesmith.objectives import Objective
from tunesmith.objectives.classification import ClassificationObjective
from tunesmith.objectives.token_classification import TokenClassificationObjective
from tunesmith.recipe.sampling import Balanced, Oversample, Sampling, SquareRoot, Temperature, Undersample

Counts = NDArray[np.int64]
NO_LABEL = "(none)"


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """One label for each row: `ids` int64 [rows], an index into `names`."""

    ids: Counts
    names: tuple[str, ...]


def row_labels(objective: Objective, table: Table) -> Labels:
    """The label by which a row is sampled. Of several labels, or entity types in a sentence, it is the rarest, counted
    over rows (of equally rare ones the first); rows without any form a label of their own. Raises UserError where
    the rows have numbers."""
    match objective:
        case ClassificationObjective() if objective.problem == "regression":
            raise UserError("data.sampling: draws rows by their label; these rows have numbers")
        case ClassificationObjective():
            return _rarest(table.column("labels"), objective.labels)
        case TokenClassificationObjective():
            types = sorted({tag[2:] for tag in objective.labels if tag != "O"})
            of_tag = [types.index(tag[2:]) if tag != "O" else -1 for tag in objective.labels]
            rows = [{of_tag[tag] for tag in tags} - {-1} for tags in table.column("tags")]
            return _rarest([sorted(row) for row in rows], types)
        case _:  # ranking, which is a loss of classification
            raise UserError("data.sampling: draws rows by their label; these rows have none")


def _rarest(rows: Sequence[Sequence[Any]], names: Sequence[str]) -> Labels:
    counts = np.zeros(len(names), dtype=np.int64)
    for row in rows:
        for label in row:
            counts[label] += 1
    ids = [min(row, key=lambda label: (counts[label], label), default=len(names)) for row in rows]
    return Labels(np.asarray(ids, dtype=np.int64), (*names, NO_LABEL))


def targets(sampling: Sampling, counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows per epoch for each label, from the `counts` > 0 of rows that it has: [labels] → [labels]."""
    match sampling:
        case Balanced():
            return np.full_like(counts, counts.sum() / len(counts))
        case SquareRoot() | Temperature():
            # p_c ∝ n_c^(1/T): Devlin et al. (multilingual BERT); Arivazhagan et al. 2019
            temperature = sampling.temperature if isinstance(sampling, Temperature) else 2.0
            powers = counts ** (1.0 / temperature)
            return counts.sum() * powers / powers.sum()
        case Oversample():
            return np.maximum(counts, np.round(sampling.ratio * counts.max()))
        case Undersample():
            return np.minimum(counts, np.ceil(sampling.ratio * counts.min()))


def apportion(shares: NDArray[np.float64], total: int) -> Counts:
    """`total` rows in proportion to `shares`, each within one of its quota and all of them together (largest
    remainders; of equal ones the first)."""
    quotas = shares * (total / shares.sum())
    counts = np.floor(quotas + 1e-9).astype(np.int64)
    order = np.argsort(-(quotas - counts), kind="stable")
    counts[order[: total - int(counts.sum())]] += 1
    return counts


def sampled(
    sampling: Sampling, segments: Sequence[Segment], labels: Labels
) -> tuple[tuple[Group, ...], dict[str, Any]]:
    """The groups that an epoch is drawn from, and for each label (its rows times the weights of their sources, rows
    drawn per epoch). A source's weight counts as copies of its rows do: it shifts the shares within a label, and a
    label's count. Raises UserError where rows would never be drawn."""
    weights = np.zeros(len(labels.ids))
    for segment in segments:
        weights[segment.start : segment.stop] = segment.weight
    kinds, group_of = np.unique(np.stack([labels.ids, weights]), axis=1, return_inverse=True)
    of_label, weight = kinds[0].astype(np.int64), kinds[1]
    members = [np.flatnonzero(group_of == i) for i in range(len(weight))]
    mass = weight * np.array([len(rows) for rows in members])
    counts = np.bincount(of_label, mass, minlength=len(labels.names)).astype(np.float64)
    there = np.flatnonzero(counts)
    if len(there) < 2:
        raise UserError(f"data.sampling: all training rows have the label {labels.names[there[0]]}")
    wanted = np.zeros(len(labels.names))
    wanted[there] = targets(sampling, counts[there])
    drawn = apportion(mass * wanted[of_label] / counts[of_label], round(wanted.sum()))
    if len(never := np.flatnonzero(drawn == 0)):
        name, rows = labels.names[of_label[never[0]]], len(members[never[0]])
        raise UserError(
            f"data.sampling: the {rows} rows of label {name} with weight {weight[never[0]]:g} would never be drawn: "
            "raise the weight of their source, or the ratio"
        )
    groups = tuple(Group(rows, int(count)) for rows, count in zip(members, drawn, strict=True))
    per_label = np.bincount(of_label, drawn, minlength=len(labels.names))
    facts = {labels.names[i]: {"rows": counts[i].item(), "drawn": int(per_label[i])} for i in there}
    return groups, facts
