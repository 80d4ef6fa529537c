"""What the pages of both matrices share: a table of records by row and column, the reasons below it, the files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"


def reason(record: Any) -> str:
    return record.refused or record.failed


@dataclass(frozen=True)
class Sheet:
    """`row`: the field of cells and records that names their row (`method`, `strategy`), beside `column`; `rows`: all
    of them in order; `cells`: all that are run, in order; `record`: a record of its values; `shown`: what a cell that
    works says behind its ✓; `name`: of both files."""

    row: str
    rows: Sequence[str]
    cells: Sequence[Any]
    record: Callable[..., Any]
    shown: Callable[[Any], str]
    name: str

    @property
    def results(self) -> Path:
        return DOCS / f"{self.name}.json"

    @property
    def page(self) -> Path:
        return DOCS / f"{self.name}.md"

    def key(self, cell: Any) -> tuple[str, str]:
        """Of a cell, or of a record."""
        return getattr(cell, self.row), cell.column

    def records(self, results: dict[str, Any]) -> list[Any]:
        return [self.record(**values) for values in results["cells"]]

    def table(self, head: str, columns: Iterable[str], records: Sequence[Any]) -> str:
        columns, found, reasons = list(columns), {self.key(one): one for one in records}, reasons_of(records)
        lines = [f"| {head} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for row in self.rows:
            cells = [self._cell(found.get((row, column)), reasons) for column in columns]
            lines.append(f"| {row} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def _cell(self, record: Any, reasons: list[str]) -> str:
        if record is None:
            return "not run"
        if told := reason(record):
            return f"{'refused' if record.refused else 'FAILS'} ({reasons.index(told) + 1})"
        return f"✓ {self.shown(record)}"

    def read(self) -> dict[str, Any]:
        """The committed results: `{"versions": {…}, "cells": [records]}`."""
        return json.loads(self.results.read_text(encoding="utf-8"))

    def committed(self, cell: Any) -> Any:
        """The record of a cell in the committed results."""
        (found,) = (one for one in self.records(self.read()) if self.key(one) == self.key(cell))
        return found

    def write(
        self,
        records: Iterable[Any],
        versions: dict[str, str],
        page: Callable[[dict[str, Any]], str],
    ) -> None:
        """Both files; of two records of a cell the later counts, and cells stand in the order of `cells`."""
        found = {self.key(record): record for record in records}
        cells = [found[self.key(cell)].as_json() for cell in self.cells if self.key(cell) in found]
        lines = ",\n  ".join(json.dumps(values, ensure_ascii=False) for values in cells)
        self.results.write_text(
            f'{{"versions": {json.dumps(versions)},\n "cells": [\n  {lines}\n ]}}\n', encoding="utf-8"
        )
        self.page.write_text(page({"versions": versions, "cells": cells}), encoding="utf-8")


def reasons_of(records: Sequence[Any]) -> list[str]:
    """Each once, in the order of the records."""
    return list(dict.fromkeys(told for record in records if (told := reason(record))))


def joined(parts: Iterable[str], records: Sequence[Any], versions: dict[str, str], *after: str) -> str:
    """The page: `parts`, the reasons, what comes `after` them, the versions."""
    reasons = reasons_of(records)
    numbered = "\n".join(f"{number}. {told}" for number, told in enumerate(reasons, start=1))
    names = ", ".join(f"{name} {version}" for name, version in versions.items())
    every = [*parts, *(["## Reasons", numbered] if reasons else []), *after, f"Versions: {names}."]
    return "\n\n".join(part.strip("\n") for part in every) + "\n"
