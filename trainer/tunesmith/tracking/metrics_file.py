"""metrics.jsonl: one JSON object per logged step and per evaluation, flushed per line."""

from __future__ import annotations

import json
import math
import os
from io import FileIO
from pathlib import Path
from typing import Any

from tunesmith.errors import DataError, MachineError, Place
from tunesmith.tracking.events import Evaluated, Event, RunStarted, StepLogged

NAME = "metrics.jsonl"
Row = dict[str, Any]


class MetricsFile:
    """Writes a run's curve. Every row has `step` and `epoch`; a training row has the fields of `StepLogged` (those of
    its `extra` beside them), an evaluation's row `eval_loss`, `eval_<metric>` and `eval_seconds`, the test's `test_…`.
    JSON has no NaN and no infinity: such a number is null, and its row has `"nonfinite": true`.

    A run that continues from step N first cuts off what a killed run wrote after N: the file holds one curve.
    Raises MachineError where the file cannot be written."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / NAME
        self._file: FileIO | None = None

    def on(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._open(event.resumed_from or 0)
            case StepLogged():
                self._write(training_row(event))
            case Evaluated():
                self._write(evaluation_row(event))
            case _:
                pass

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self, step: int) -> None:
        try:
            cut(self.path, step)
            self._file = FileIO(self.path, "a")  # without a buffer, which a full disk would leave behind
        except OSError as error:
            raise self._unwritable(error) from None

    def _write(self, row: Row) -> None:
        assert self._file is not None, "RunStarted comes first"
        line = json.dumps(finite(row), ensure_ascii=False, allow_nan=False) + "\n"
        left = memoryview(line.encode())
        try:
            while left:  # a disk that fills up takes a part first
                left = left[self._file.write(left) :]
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> MachineError:
        return MachineError(
            f"{self.path}: cannot be written: {error.strerror}; make room, then continue with --resume"
        )


def training_row(event: StepLogged) -> Row:
    fields = {name: getattr(event, name) for name in event.__dataclass_fields__ if name != "extra"}
    clash = fields.keys() & event.extra.keys()
    assert not clash, f"extra must not replace {clash}"
    return fields | event.extra


def evaluation_row(event: Evaluated) -> Row:
    split = event.split
    metrics = {f"{split}_{name}": value for name, value in event.metrics.items() if name != "loss"}
    about = {"step": event.step, "epoch": event.epoch}
    return about | {f"{split}_loss": event.loss} | metrics | {f"{split}_seconds": event.seconds}


def finite(row: Row) -> Row:
    """The row as JSON can hold it: NumPy scalars as Python's, null for NaN and infinity."""
    plain = {key: value.item() if hasattr(value, "item") else value for key, value in row.items()}
    lost = {key for key, value in plain.items() if isinstance(value, float) and not math.isfinite(value)}
    return plain | dict.fromkeys(lost) | ({"nonfinite": True} if lost else {})


def read(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl. A torn last line (the run was killed while it wrote) is left out; any other line
    that is no JSON object is a DataError."""
    return [row for row, _ in _lines(path)]


def cut(path: Path, step: int) -> None:
    """Leaves the rows of steps up to `step`, less those of the test, which a run that continues reads again. The file
    is replaced in one go, or not touched where nothing changes."""
    if not path.exists():
        return
    before = path.read_bytes()
    kept = [
        line
        for row, line in _lines(path)
        if row["step"] <= step and not any(k.startswith("test_") for k in row)
    ]
    after = b"".join(line + b"\n" for line in kept)
    if after == before:
        return
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(after)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _lines(path: Path) -> list[tuple[Row, bytes]]:
    lines = path.read_bytes().split(b"\n")
    found: list[tuple[Row, bytes]] = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            found.append((row, line))
        elif number < len(lines):  # what follows the last line end is the torn line
            raise DataError("is no row of a metrics.jsonl", Place(str(path), number))
    return found
