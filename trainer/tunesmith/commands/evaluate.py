"""`tunesmith evaluate`: the metrics of a finished run on a split of its recipe, or on other files."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tunesmith.checkpoint.run_state import RunState
from tunesmith.checkpoint.state import Progress
from tunesmith.commands.finished import FinishedRun, counting
from tunesmith.data.adhoc import Encoding, encode_examples, source_like
from tunesmith.data.examples import Example
from tunesmith.data.formats import FormatCounts, examples
from tunesmith.data.prepare import has_split, split_examples
from tunesmith.environment import versions
from tunesmith.errors import UserError
from tunesmith.evaluator import Evaluation
from tunesmith.loss_scale import LossScale
from tunesmith.session import Session
from tunesmith.signals import StopRequest
from tunesmith.tracking.metrics_file import finite, read
from tunesmith.tracking.report import plain
from tunesmith.tracking.tracker import Tracker

Split = Literal["eval", "test"]


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What was found, and what the run itself said of the same weights and rows (empty where it said nothing).
    `path` is the JSON file that holds it."""

    on: str
    rows: int
    dropped: dict[str, int]
    truncated: int
    found: Evaluation
    in_the_run: dict[str, float]
    path: Path

    def table(self) -> list[dict[str, object]]:
        """A row per metric, for `end_table`."""
        rows: list[dict[str, object]] = []
        for name, value in self.found.metrics.items():
            row: dict[str, object] = {"metric": name, self.on: value}
            if self.in_the_run:
                row["in the run"] = self.in_the_run.get(name)
            rows.append(row)
        return rows


def evaluate_run(run: FinishedRun, split: Split | None = None, data: Sequence[str] = ()) -> Evaluated:
    """Evaluates as the run did: on a split of its recipe (default: eval, else test), or on the files `data`, of the
    same format and columns as its training data. Writes `evaluation-….json` into the run's folder."""
    if data and split is not None:
        raise UserError("--split and --data exclude each other: keep one")
    chosen = None if data else _split(run, split)
    counts = FormatCounts()
    given = _files(run, data, counts) if chosen is None else _rows(run, chosen, counts)
    name = chosen or "data"
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as folder:
        encoding = encode_examples(given, run.objective, Path(folder) / "rows", name)
        dropped = encoding.reasons | counts.dropped
        if not len(encoding.dataset):
            reasons = ", ".join(f"{count} × {reason}" for reason, count in dropped.items())
            raise UserError(f"none of the {len(encoding.rows)} rows can be evaluated: {reasons}")
        found = _evaluate(run, encoding)
    result = Evaluated(
        on=chosen or ", ".join(Path(path).name for path in data),
        rows=len(encoding.dataset),
        dropped=dropped,
        truncated=len(encoding.truncated),
        found=found,
        in_the_run=_in_the_run(run, chosen),
        path=run.run_dir / f"evaluation-{_name(run, chosen, data)}.json",
    )
    _write(run, result, data)
    return result


def measure(run: FinishedRun, split: Split) -> dict[str, float]:
    """The metrics of a run on a split of its recipe, the loss among them; nothing is written."""
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as folder:
        given = _rows(run, _split(run, split), FormatCounts())
        encoding = encode_examples(given, run.objective, Path(folder) / "rows", split)
        if not len(encoding.dataset):
            raise UserError(f"none of the {len(encoding.rows)} {split} rows can be evaluated")
        return _evaluate(run, encoding).metrics


def _split(run: FinishedRun, split: Split | None) -> Split:
    there: list[Split] = [name for name in ("eval", "test") if has_split(run.recipe.data, name)]
    if split is not None and split not in there:
        have = f"it has {there[0]}" if there else "it has neither eval nor test"
        raise UserError(f"--split {split}: the run's recipe has no such rows; {have}. Give files with --data")
    if not there:
        raise UserError("the run's recipe has neither eval nor test rows: give files with --data")
    return split or there[0]


def _rows(run: FinishedRun, split: Split, counts: FormatCounts) -> Iterator[Example]:
    return (example for _, example in split_examples(run.recipe.data, run.run_dir, split, counts))


def _files(run: FinishedRun, data: Sequence[str], counts: FormatCounts) -> Iterator[Example]:
    for path in data:
        yield from examples(source_like(run.recipe, path), Path(), counts=counts)


class _Bars(Tracker):
    """No observers, but bars."""

    @contextmanager
    def counting(self, what: str, total: int) -> Generator[Callable[[int], None]]:
        with counting(what, total) as advance:
            yield advance


def _evaluate(run: FinishedRun, encoding: Encoding) -> Evaluation:
    """By the session of a run, so that the numbers are the same by construction."""
    engine, dataset = run.engine, encoding.dataset
    state = RunState(engine, Progress(), LossScale(False, engine.device), None, {})
    session = Session(
        engine,
        run.recipe,
        run.run_dir,
        run.objective,
        {dataset.name: dataset},
        state,
        _Bars([]),
        StopRequest(),
    )
    return session.evaluate(0, 0.0, dataset.name)


def _in_the_run(run: FinishedRun, split: Split | None) -> dict[str, float]:
    """The run's own numbers for these weights: the test's are those of final/; an evaluation is known by its step."""
    path = run.run_dir / "metrics.jsonl"
    if split is None or not path.is_file():
        return {}
    prefix = f"{split}_{run.task}_" if run.task else f"{split}_"
    for row in reversed(read(path)):
        of_final = split == "test" and run.weights == "final"
        of_step = split == "eval" and run.weights == f"checkpoint-{row['step']}"
        if f"{prefix}loss" in row and (of_final or of_step):
            return {key.removeprefix(prefix): v for key, v in row.items() if key.startswith(prefix)}
    return {}


def _name(run: FinishedRun, split: str | None, data: Sequence[str]) -> str:
    on = split or "-".join(Path(path).stem.replace(":", "-") for path in data)
    on = f"{run.task}-{on}" if run.task else on
    return on if run.weights == "final" else f"{on}-{run.weights}"


def _write(run: FinishedRun, result: Evaluated, data: Sequence[str]) -> None:
    about: dict[str, Any] = {
        "weights": run.weights,
        "split": None if data else result.on,
        "data": list(data),
        "rows": result.rows,
        "dropped": result.dropped,
        "truncated": result.truncated,
        "metrics": finite(result.found.metrics),
        "tables": plain(result.found.tables),
        "versions": versions(),
    }
    text = json.dumps(about, indent=1, ensure_ascii=False, allow_nan=False)
    try:
        result.path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{result.path}: cannot be written: {error.strerror}") from None
