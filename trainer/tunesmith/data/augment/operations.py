"""Operations on the words of a text. Each takes the units of a text and a way to random numbers, and returns units:
the same list where nothing is to be changed.

Dropping, swapping and inserting are those of Wei & Zou (2019), "EDA"; a number of changes is fraction × words, rounded,
and at least one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.augment.words import Unit

Dice = Callable[[int], NDArray[np.uint64]]
"""n → n random 64-bit numbers; called once by an operation."""

Synonyms = Callable[[str], Sequence[str]]
"""A word in lower case → its synonyms, none of them the word itself."""

Operation = Callable[[list[Unit], Dice], list[Unit]]


def mask(units: list[Unit], dice: Dice, fraction: float, token: str) -> list[Unit]:
    """Each word becomes `token` with probability `fraction`; its punctuation and its tag stay."""
    chances = iter(_chances(dice(sum(len(unit) for unit in units))) < fraction)
    return [
        tuple(word.with_core(token) if next(chances) and word.core else word for word in unit)
        for unit in units
    ]


def drop(units: list[Unit], dice: Dice, fraction: float) -> list[Unit]:
    """Each unit is left out with probability `fraction`, never all of them."""
    kept = _chances(dice(len(units))) >= fraction
    if not kept.any():
        return units
    return [unit for unit, keep in zip(units, kept, strict=True) if keep]


def swap(units: list[Unit], dice: Dice, fraction: float | None, swaps: int | None) -> list[Unit]:
    """Two units change places, again and again; the blanks and the punctuation between words stay."""
    n = len(units)
    if n < 2:
        return units
    times = swaps if swaps is not None else _times(fraction, n)
    order = list(range(n))
    for first, second in dice(2 * times).reshape(times, 2):
        i = _below(first, n)
        j = (i + 1 + _below(second, n - 1)) % n
        order[i], order[j] = order[j], order[i]
    return [_moved(units[i], place) for i, place in zip(order, units, strict=True)]


def _moved(unit: Unit, place: Unit) -> Unit:
    """A unit as it stands in the place of another."""
    first, there = unit[0], place[0]
    if len(unit) == len(place) == 1 and first.core and there.core:
        return (replace(there.with_core(first.core), tag=first.tag),)
    return (replace(first, before=there.before), *unit[1:])


def insert(units: list[Unit], dice: Dice, fraction: float, synonyms: Synonyms | None) -> list[Unit]:
    """Copies of units of the text, or synonyms of its words outside of entities, at random places; never inside an
    entity."""
    sources = list(units)
    if synonyms is not None:
        sources = [unit for unit in units if len(unit) == 1 and synonyms(unit[0].core.lower())]
        sources = [unit for unit in sources if unit[0].tag in (None, "O")]
    if not sources:
        return units
    times, out = _times(fraction, len(units)), list(units)
    for which, choice, place in dice(3 * times).reshape(times, 3):
        unit = sources[_below(which, len(sources))]
        if synonyms is not None:
            unit = (unit[0].with_core(_chosen(unit[0].core, synonyms, choice)),)
        at = _below(place, len(out) + 1)
        before = out[at][0].before if 0 < at < len(out) else " "
        unit = (replace(unit[0], before=before if at else ""), *unit[1:])
        if at == 0:
            out[0] = (replace(out[0][0], before=" "), *out[0][1:])
        out.insert(at, unit)
    return out


def replace_synonyms(units: list[Unit], dice: Dice, fraction: float, synonyms: Synonyms) -> list[Unit]:
    """Words that have synonyms become one of them, with their capitals; tags stay."""
    places = [
        (i, j)
        for i, unit in enumerate(units)
        for j, word in enumerate(unit)
        if word.core and synonyms(word.core.lower())
    ]
    if not places:
        return units
    words = sum(len(unit) for unit in units)
    drawn = dice(2 * len(places)).reshape(2, -1)
    out = list(units)
    for which in np.argsort(drawn[0], kind="stable")[: _times(fraction, words)]:
        i, j = places[int(which)]
        word = out[i][j]
        new = word.with_core(_chosen(word.core, synonyms, drawn[1][which]))
        out[i] = (*out[i][:j], new, *out[i][j + 1 :])
    return out


def _chosen(core: str, synonyms: Synonyms, number: np.uint64) -> str:
    found = synonyms(core.lower())
    word = found[_below(number, len(found))]
    if len(core) > 1 and core.isupper():
        return word.upper()
    return word[:1].upper() + word[1:] if core[:1].isupper() else word


def _times(fraction: float | None, words: int) -> int:
    assert fraction is not None
    return max(1, round(fraction * words))


def _below(number: np.uint64, n: int) -> int:
    # of 2^64 numbers the remainder is uniform to n / 2^64
    return int(number % np.uint64(n))


def _chances(numbers: NDArray[np.uint64]) -> NDArray[np.float64]:
    return numbers / 2.0**64
