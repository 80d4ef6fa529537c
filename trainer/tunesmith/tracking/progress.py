"""What a person sees while a run goes on: a bar on a terminal, lines elsewhere (stderr); the results at the end
(stdout)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn
from rich.table import Column, Table
from rich.text import Text

from tunesmith.tracking.events import (
    Evaluated,
    Event,
    Message,
    RunEnded,
    RunStarted,
    Saved,
    StepLogged,
    Stepped,
)
from tunesmith.tracking.probes import probe_rows
from tunesmith.tracking.text import duration, number, startup_lines

T = TypeVar("T")
Clock = Callable[[], float]  # seconds
Scores = Mapping[str, Mapping[str, float]]  # split: metric: value
QUIET_SECONDS = 2.0  # `track` says nothing of work that is done sooner
LINE_SECONDS = 10.0  # between two lines of `track`


class ProgressDisplay:
    """`mode`: auto (a bar on a terminal, else lines), bar, lines, or off (warnings only)."""

    def __init__(
        self,
        mode: Literal["auto", "bar", "lines", "off"] = "auto",
        *,
        console: Console | None = None,
        out: Console | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        # a bar that the recipe asks for is drawn wherever stderr goes
        force = True if mode == "bar" else None
        self._console = console or Console(stderr=True, highlight=False, force_terminal=force)
        self._out = out or Console(highlight=False)
        self._mode = ("bar" if self._console.is_terminal else "lines") if mode == "auto" else mode
        self._clock = clock
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._total = self._first = 0
        self._started = 0.0
        self._evaluated: dict[str, dict[str, float]] = {}

    def on(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._start(event)
            case Stepped():
                if self._bar is not None:
                    self._bar.update(self._task, completed=event.step, eta=self._eta(event.step))
            case StepLogged():
                self._logged(event)
            case Evaluated():
                scores = " ".join(f"{k} {number(v)}" for k, v in event.metrics.items() if k != "loss")
                self._evaluated[event.split] = {"loss": event.loss} | event.metrics
                self._say(
                    f"{event.split} at step {event.step}: loss {number(event.loss)} {scores}".rstrip()
                    + f" ({duration(event.seconds)})"
                )
            case Saved():
                self._say(f"saved {event.path}")
            case Message():
                self._say(("warning: " if event.level == "warning" else "") + event.text, event.level)
            case RunEnded():
                self._end(event)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @contextmanager
    def counting(self, what: str, total: int) -> Generator[Callable[[int], None]]:
        """A bar of its own, gone when done, for work between steps; what it yields takes the number of rows done."""
        if self._bar is None:
            yield lambda _: None
            return
        bar = self._bar
        task = bar.add_task(what, total=total, eta="", numbers="")
        try:
            yield lambda rows: bar.advance(task, rows)
        finally:
            bar.remove_task(task)

    def _start(self, event: RunStarted) -> None:
        self._total, self._first, self._started = event.total_steps, event.resumed_from or 0, self._clock()
        for line in startup_lines(event.run_name, event.total_steps, event.facts, event.resumed_from):
            self._say(line)
        if self._mode == "bar":
            self._bar = _bar(self._console, number_column=True)
            self._task = self._bar.add_task(
                event.run_name, total=event.total_steps, completed=self._first, eta="?", numbers=""
            )
            self._bar.start()

    def _logged(self, event: StepLogged) -> None:
        rate = f"{event.tokens_per_second:,.0f} tokens/s" if math.isfinite(event.tokens_per_second) else ""
        shown = [f"epoch {event.epoch:.3g}", f"loss {number(event.loss)}", f"lr {event.learning_rate:.1e}"]
        eta = self._eta(event.step)
        if self._bar is not None:
            numbers = " ".join([*shown, rate])
            self._bar.update(self._task, completed=event.step, numbers=numbers, eta=eta)
        elif self._mode == "lines":
            gradient = f"grad_norm {number(event.grad_norm)}"
            self._say(" ".join([f"step {event.step}/{self._total}", *shown, gradient, rate, f"eta {eta}"]))

    def _eta(self, step: int) -> str:
        """From this session's steps, evaluations and saves included."""
        done = step - self._first
        if done <= 0:
            return "?"
        return duration((self._clock() - self._started) / done * (self._total - step))

    def _end(self, event: RunEnded) -> None:
        self.close()
        if event.status != "done":
            self._say(f"{event.status} at step {event.step}")  # the rank says why, last of all
            return
        reason = "" if event.reason == "done" else f" ({event.reason})"
        took = duration(self._clock() - self._started)
        self._say(f"done{reason}: step {event.step}/{self._total} in {took}")
        if self._mode == "off":
            return
        if rows := _results(self._evaluated, event.summary.get("baseline", {})):
            end_table(rows, "Results", console=self._out)
        if rows := probe_rows(event.summary.get("probes", {})):
            end_table(rows, "Remembered", console=self._out)
        for name, value in event.summary.get("next", {}).items():
            self._out.print(Text(f"  {name:<9}{value}"), soft_wrap=True)

    def _say(self, line: str, level: str = "info") -> None:
        if self._mode != "off" or level == "warning":
            style = "yellow" if level == "warning" else ""
            self._console.print(Text(line, style=style), soft_wrap=True)


def _results(found: Scores, baseline: Scores) -> list[dict[str, object]]:
    """One row per metric: each split's last evaluation, and what needs no model where that is known."""
    rows: dict[str, dict[str, object]] = {}
    for split, metrics in found.items():
        for name, value in metrics.items():
            row = rows.setdefault(name, {"metric": name})
            row[split] = value
            if name in baseline.get(split, {}):
                row[f"{split} baseline"] = baseline[split][name]
    return list(rows.values())


class _Numbers(ProgressColumn):
    def render(self, task: Any) -> Text:
        count = f"{int(task.completed):,}/{int(task.total):,}" if task.total else f"{int(task.completed):,}"
        parts = [count, task.fields.get("numbers", ""), duration(task.elapsed or 0.0)]
        if eta := task.fields.get("eta"):
            parts.append(f"eta {eta}")
        return Text(" · ".join(part for part in parts if part), no_wrap=True, overflow="ellipsis")


def _bar(console: Console, *, number_column: bool, transient: bool = False) -> Progress:
    text = TextColumn(
        "{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")
    )
    columns: list[ProgressColumn] = [text, BarColumn(bar_width=20)]
    if number_column:
        columns.append(_Numbers(table_column=Column(no_wrap=True, overflow="ellipsis")))
    return Progress(*columns, console=console, refresh_per_second=4, transient=transient)


def track(
    items: Iterable[T],
    description: str,
    total: int | None = None,
    *,
    console: Console | None = None,
    clock: Clock = time.perf_counter,
) -> Iterator[T]:
    """The items, with a bar on a terminal and a line every ten seconds elsewhere (stderr); work of under two seconds
    is done without a word."""
    console = console or Console(stderr=True, highlight=False)
    started = clock()
    spoke, count = started + QUIET_SECONDS - LINE_SECONDS, 0
    bar: Progress | None = None
    try:
        for count, item in enumerate(items, start=1):
            yield item
            now = clock()
            if bar is not None:
                bar.update(TaskID(0), completed=count)
            elif now - started < QUIET_SECONDS:
                pass
            elif console.is_terminal:
                bar = _bar(console, number_column=True, transient=True)
                bar.add_task(description, total=total, completed=count)
                bar.start()
            elif now - spoke >= LINE_SECONDS:
                spoke = now
                of = "" if total is None else f"/{total:,}"
                console.print(
                    Text(f"{description}: {count:,}{of} ({duration(now - started)})"), soft_wrap=True
                )
    finally:
        if bar is not None:
            bar.stop()
    if (took := clock() - started) >= QUIET_SECONDS:
        console.print(Text(f"{description}: {count:,} in {duration(took)}"), soft_wrap=True)


def end_table(rows: Sequence[Mapping[str, object]], title: str, *, console: Console | None = None) -> None:
    """Rows as a table on stdout; the columns are the keys in the order of their first appearance."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(title=Text(title), box=box.SIMPLE, title_justify="left")
    for i, key in enumerate(keys):
        table.add_column(Text(key), justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*(Text(_cell(row.get(key))) for key in keys))
    (console or Console(highlight=False)).print(table)


def _cell(value: object) -> str:
    match value:
        case None:
            return ""
        case float():
            return number(value)
        case int() if not isinstance(value, bool):
            return f"{value:,}"
        case _:
            return str(value)
