"""Packing: several rows in one sequence, without attention across them."""

from __future__ import annotations

from collections.abc import Sequence


def first_fit(rows: Sequence[tuple[int, int]], length: int) -> list[list[int]]:
    """Rows (number, tokens) into bins of at most `length` tokens, each into the first bin with room (first-fit;
    decreasing, if the rows come longest first: at most 11/9 of the fewest bins + 6/9, Dósa 2007)."""
    bins: list[list[int]] = []
    room: list[int] = []
    for row, tokens in rows:
        assert tokens <= length, "a row longer than the bin was not truncated"
        for i, left in enumerate(room):
            if tokens <= left:
                bins[i].append(row)
                room[i] -= tokens
                break
        else:
            bins.append([row])
            room.append(length - tokens)
    return bins
