"""The labels of a classified text: names, numbers, shares."""

from __future__ import annotations

from typing import Any

from tunesmith.data.cells import Cells, found
from tunesmith.data.examples import Labelled
from tunesmith.recipe.data import Source

Label = str | tuple[str, ...] | float | tuple[float, ...] | None

_ROUNDED = 1e-3  # what shares that are written with three digits may lack


def labelled(source: Source, cells: Cells, need_labels: bool, pair: str | None) -> Labelled:
    """With a distribution a row needs no label beside it. Neither that nor a group is read that `columns` does not
    name: the file may call something else so."""
    soft = _shares(cells, need_labels) if "soft_labels" in source.columns else None
    beside = soft is not None and cells.find("label") in (None, "") and "label" not in source.columns
    label = None if beside else _label(source, cells, need_labels)
    # what is to be predicted is scored text by text
    group = str(cells.get("group")) if need_labels and "group" in source.columns else None
    return Labelled(cells.text("text"), label, cells.row.place, pair, soft, group)


def _shares(cells: Cells, need_labels: bool) -> tuple[float, ...] | dict[str, float] | None:
    """A list or an object of numbers, or JSON text of one; None for a row that has none: its label is certain."""
    value = cells.get("soft_labels") if need_labels else cells.find("soft_labels")
    if value in (None, ""):
        return None
    value = cells.parsed("soft_labels", value) if isinstance(value, str) else value
    many = list(value.values()) if isinstance(value, dict) else cells.list_of("soft_labels", value)
    numbers = [cells.number_of("soft_labels", one) for one in many]
    total = sum(numbers)
    if min(numbers, default=0.0) < 0 or abs(total - 1.0) > _ROUNDED:
        raise cells.error(
            "soft_labels",
            f"must be shares of at least 0 that sum to 1; they are {numbers}, {total:.6g} in all",
        )
    shares = [number / total for number in numbers]
    return dict(zip(map(str, value), shares, strict=True)) if isinstance(value, dict) else tuple(shares)


def _label(source: Source, cells: Cells, need_labels: bool) -> Label:
    names = source.columns.get("label")
    if isinstance(names, list):
        return _numbers(Cells(cells.row, {}), names, need_labels)
    value = cells.get("label") if need_labels else cells.find("label")
    if not need_labels and value in (None, ""):
        return None
    match value:
        case bool() | int():
            return str(value)
        case float():
            return cells.number_of("label", value)
        case list() | tuple():
            return _labels(cells, list(value))
        case _:
            return _name(cells, value)


def _name(cells: Cells, value: Any) -> str:
    name = cells.text_of("label", value)
    if not name.strip():
        raise cells.error("label", "the label is empty")
    return name


def _labels(cells: Cells, values: list[Any]) -> tuple[str, ...] | tuple[float, ...]:
    """Several names (none is the answer "none of them"), or several numbers."""
    if all(isinstance(value, str) for value in values):
        return tuple(_name(cells, value) for value in values)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float):
            what = f"a list of labels must be all text or all numbers; it has {found(value)}"
            raise cells.error("label", what)
    return tuple(cells.number_of("label", value) for value in values)


def _numbers(cells: Cells, names: list[str], need_labels: bool) -> tuple[float, ...] | None:
    """Several columns as one tuple; CSV has its numbers as text."""
    numbers: list[float] = []
    for name in names:
        value = cells.get(name) if need_labels else cells.find(name)
        if not need_labels and value in (None, ""):
            return None
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                raise cells.error(name, f"must be a number, not {found(value)}") from None
        numbers.append(cells.number_of(name, value))
    return tuple(numbers)
