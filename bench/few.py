"""Keeps a few rows of every label for training, and of the others as many as are asked for as test rows.

    python bench/few.py train.csv --label category --rows 5 --train few.csv --test rest.csv --limit 1500 --seed 0

Which rows stay is a pure function of the file's rows and --seed; both files keep the header and the order."""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from pathlib import Path

import numpy as np

from tunesmith.data.order import Salt, shuffled


def few(labels: list[str], rows: int, limit: int | None, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the training and of the test rows, ascending: the first `rows` of each label in an order that `seed`
    gives, then at most `limit` of the others. Raises ValueError where a label has fewer rows."""
    seen: Counter[str] = Counter()
    train: list[int] = []
    others: list[int] = []
    for i in shuffled(np.arange(len(labels)), seed, Salt.SPLIT).tolist():
        seen[labels[i]] += 1
        (train if seen[labels[i]] <= rows else others).append(i)
    short = [label for label, count in seen.items() if count < rows]
    if short:
        raise ValueError(f"fewer than {rows} rows of {', '.join(sorted(short))}")
    return sorted(train), sorted(others[:limit])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("--label", required=True, help="name of the label's column")
    parser.add_argument("--rows", type=int, required=True, help="training rows of each label")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--limit", type=int, help="test rows, at most")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with given.source.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        found = list(reader)
        names = list(reader.fieldnames or ())
    if given.label not in names:
        parser.error(f"{given.source} has no column {given.label!r}: it has {', '.join(names)}")
    chosen = few([row[given.label] for row in found], given.rows, given.limit, given.seed)
    for path, numbers in zip((given.train, given.test), chosen, strict=True):
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(found[i] for i in numbers)
        print(f"{path}: {len(numbers)} rows")


if __name__ == "__main__":
    main()
