"""What stands in a row as its label: names, numbers, or a distribution over the labels, from annotators who disagree or
from a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tunesmith.data.examples import Labelled
from tunesmith.errors import DataError

Label = str | tuple[str, ...] | float | tuple[float, ...] | None


def soft_names(example: Labelled) -> list[str]:
    """The labels that a distribution by name has."""
    return list(example.soft_labels) if isinstance(example.soft_labels, dict) else []


def label_of(example: Labelled, labels: Sequence[str]) -> Label:
    """The row's own label, else the likeliest, the first of those that are. `labels`: of the recipe, or known."""
    soft = example.soft_labels
    if example.label is not None or soft is None:
        return example.label
    if isinstance(soft, dict):
        return max(soft, key=lambda name: soft[name])
    return labels[max(range(len(soft)), key=lambda i: soft[i])] if _listed(example, labels) else None


def shares(example: Labelled, labels: Sequence[str]) -> list[float]:
    """In the order of the labels; all of it on the label of a row without a distribution, [] where it has none
    either. Raises DataError for one that does not go with the labels."""
    soft = example.soft_labels
    if soft is None:
        return [] if example.label is None else [float(name == example.label) for name in labels]
    if not isinstance(soft, dict):
        _listed(example, labels)
        return list(soft)
    if unknown := sorted(soft.keys() - set(labels)):
        raise DataError(
            f"label {unknown[0]!r} is not among the training labels ({', '.join(labels[:8])})",
            example.place,
            "soft_labels",
        )
    return [soft.get(name, 0.0) for name in labels]


def _listed(example: Labelled, labels: Sequence[str]) -> bool:
    soft = example.soft_labels
    assert isinstance(soft, tuple)
    if len(soft) != len(labels):
        known = (
            f"there are {len(labels)} labels"
            if labels
            else "objective.labels, whose order it is in, is not set"
        )
        raise DataError(f"a list of {len(soft)} shares, but {known}", example.place, "soft_labels")
    return True


def are_numbers(label: tuple[Any, ...]) -> bool:
    return bool(label) and all(isinstance(item, float) for item in label)


def as_numbers(example: Labelled) -> list[float]:
    items = example.label if isinstance(example.label, tuple) else (example.label,)
    try:
        numbers = [float(item) for item in items]  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        raise DataError(f"{example.label!r} is not a number", example.place, "label") from None
    if not all(np.isfinite(numbers)):
        raise DataError(f"{example.label!r} is not a finite number", example.place, "label")
    return numbers


def natural(name: str) -> tuple[int, float, str]:
    """Numbers in the order of numbers, before names in theirs: labels "2" and "10" keep their ranks."""
    try:
        return (0, float(name), name)
    except ValueError:
        return (1, 0.0, name)
