"""Texts that say nearly the same, found exactly: no hashing, no chance.

Two texts are near-duplicates when the Jaccard similarity |A ∩ B| / |A ∪ B| of their shingle sets (the words
and pairs of neighbouring words, in lower case, without punctuation) reaches a threshold.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise


def shingles(text: str) -> frozenset[str]:
    """The words of `text` and its pairs of neighbouring words. Empty for a text without a letter or digit."""
    words = re.findall(r"\w+", text.casefold())
    return frozenset(words).union(f"{first} {second}" for first, second in pairwise(words))


def representatives(texts: Sequence[str], threshold: float) -> list[int]:
    """For each text, the index of the text that stands for it: the earliest standing text that is at least
    `threshold` (in (0, 1]) similar, or itself, which then stands. No two standing texts are near-duplicates.

    Prefix filtering (Bayardo, Ma & Srikant 2007, "Scaling up all pairs similarity search"): with all sets in
    one order, rarest shingle first, two sets of similarity ≥ t share one of their first |A| − ⌈t|A|⌉ + 1
    shingles, so only sets that meet there are compared.
    """
    assert 0.0 < threshold <= 1.0, threshold
    sets = [shingles(text) for text in texts]
    frequency = Counter(shingle for members in sets for shingle in members)
    order = sorted(frequency, key=lambda shingle: (frequency[shingle], shingle))
    rank = {shingle: position for position, shingle in enumerate(order)}
    standing: defaultdict[int, list[int]] = defaultdict(list)  # rank of a prefix shingle -> texts that stand
    chosen: list[int] = []
    for index, members in enumerate(sets):
        # a rounding error of the product must lengthen the prefix, never shorten it
        prefix_length = len(members) - math.ceil(threshold * len(members) - 1e-9) + 1
        prefix = sorted(rank[shingle] for shingle in members)[:prefix_length]
        candidates = sorted({other for shingle in prefix for other in standing[shingle]})
        similar = (other for other in candidates if _jaccard(members, sets[other]) >= threshold)
        representative = next(similar, index)
        chosen.append(representative)
        if representative == index:
            for shingle in prefix:
                standing[shingle].append(index)
    return chosen


def _jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)
