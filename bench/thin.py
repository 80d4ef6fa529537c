"""Makes rows of one label rare: copies a file with a row per line, without so many rows of the label that it has the
given share of those that are left.

    python bench/thin.py sms.tsv thin.tsv --column 0 --label spam --share 0.02

Which rows stay is a pure function of the file's rows and --seed, and smaller shares keep a part of what larger ones
keep. The other rows all stay, in their order."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from tunesmith.data.order import Salt, shuffled


def kept(labels: list[str], label: str, share: float, seed: int) -> list[int]:
    """Numbers of the rows that stay, ascending: all others, and round(others · share / (1 − share)) of the label's."""
    rare = np.flatnonzero(np.array(labels) == label)
    others = len(labels) - len(rare)
    stay = min(len(rare), round(others * share / (1.0 - share)))
    chosen = set(shuffled(rare, seed, Salt.SPLIT)[:stay].tolist())
    return [i for i, one in enumerate(labels) if one != label or i in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--column", type=int, required=True, help="number of the label's column, from 0")
    parser.add_argument("--label", required=True)
    parser.add_argument("--share", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--delimiter", default="\t")
    given = parser.parse_args()
    lines = given.source.read_text(encoding="utf-8").splitlines(keepends=True)
    labels = [line.rstrip("\r\n").split(given.delimiter)[given.column] for line in lines]
    if given.label not in labels:
        parser.error(f"no row of {given.source} has the label {given.label!r}")
    stay = kept(labels, given.label, given.share, given.seed)
    given.target.write_text("".join(lines[i] for i in stay), encoding="utf-8")
    rare = sum(labels[i] == given.label for i in stay)
    print(f"{given.target}: {len(stay)} rows, {rare} of {given.label} ({rare / len(stay):.2%})")


if __name__ == "__main__":
    main()
