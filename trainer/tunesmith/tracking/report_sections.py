"""The parts of report.html. Every text that is not ours goes through `escape`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from tunesmith.tracking.probes import probe_section
from tunesmith.tracking.report_charts import Point, Series, line_chart, smooth
from tunesmith.tracking.report_facts import memory, what_ran
from tunesmith.tracking.report_html import html_table, panel, score
from tunesmith.tracking.report_scores import decisions, split_tables
from tunesmith.tracking.text import duration, number, size

MAX_ROWS = 200  # of the evaluation table
WIDE, NARROW = 1080, 520  # px
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    """What a run's folder says. `tables`: split → (step, tables of the last evaluation); `decided`: decisions.json."""

    name: str
    status: str
    reason: str
    rows: Sequence[Row]
    summary: Mapping[str, Any]
    tables: Mapping[str, tuple[int, Mapping[str, Any]]]
    total_steps: int | None
    recipe: Mapping[str, Any]
    recipe_text: str
    environment: Mapping[str, Any]
    decided: Mapping[str, Any] = field(default_factory=dict[str, Any])
    beside: Run | None = None  # the run that the recipe wants this one compared with

    @property
    def training(self) -> list[Row]:
        return [row for row in self.rows if "loss" in row]

    def evaluations(self, split: str) -> list[Row]:
        return [row for row in self.rows if f"{split}_loss" in row]

    @property
    def best(self) -> Row | None:
        """The evaluation whose weights are in final/, where the run says which that is."""
        step = self.summary.get("best_step")
        return next((row for row in self.evaluations("eval") if row["step"] == step), None)


def body(run: Run) -> str:
    """All sections; one without content is left out."""
    sections = [_header(run), _cards(run), _results(run), probe_section(run.summary.get("probes", {}))]
    sections += [_curves(run), _evaluations(run)]
    other = run.beside
    their_name, theirs = ("", {}) if other is None else (other.name, other.decided)
    sections.append(decisions(run.decided, theirs, their_name))
    for split, (step, tables) in run.tables.items():
        beside = {} if other is None else other.tables.get(split, (0, {}))[1]
        sections.append(split_tables(split, step, tables, beside, their_name))
    sections += [
        memory(run.environment, run.training),
        what_ran(run.environment),
        _recipe(run),
        "<footer>Made by tunesmith from this run's folder.</footer>",
    ]
    return "\n".join(section for section in sections if section)


def _header(run: Run) -> str:
    about = [
        run.recipe.get("model", {}).get("model_name_or_path"),
        run.recipe.get("objective", {}).get("type"),
        run.recipe.get("optim", {}).get("name"),
    ]
    known = run.status if run.status in {"done", "stopped"} else ""
    reason = "" if run.reason in {"", "done"} else f"<p>{escape(run.reason)}</p>"
    return (
        f'<header><h1>{escape(run.name)}</h1> <span class="pill {known}">{escape(run.status)}</span>'
        f"<p>{escape(' · '.join(str(part) for part in about if part))}</p>{reason}</header>"
    )


def _cards(run: Run) -> str:
    cards: list[tuple[str, str, str]] = []
    training, evaluations, tests = run.training, run.evaluations("eval"), run.evaluations("test")
    baseline = run.summary.get("baseline", {})
    chosen = run.best or (evaluations[-1] if evaluations else None)
    for split, row in (("test", tests[-1] if tests else None), ("eval", chosen)):
        if row is None:
            continue
        metric = _main_metric(run, row, split)
        at = f"step {row['step']:,}" + (" (best)" if run.best else "")
        where = "weights of final/" if split == "test" else at
        given = baseline.get(split, {}).get(metric)
        where += "" if given is None else f" · baseline {number(given)}"
        cards.append((f"{split} {metric}", score(row[f"{split}_{metric}"]), where))
    if training:
        last = training[-1]
        cards.append(("train loss", score(last["loss"]), f"mean up to step {last['step']:,}"))
        total = "" if run.total_steps is None else f" of {run.total_steps:,}"
        cards.append(("steps", f"{last['step']:,}", f"{total} · epoch {number(last['epoch'])}".lstrip(" ·")))
        seconds = last["seconds"] or 0.0
        tokens = sum(row.get("tokens", 0) for row in training)
        rate = f"{tokens / seconds:,.0f} tokens/s" if tokens and seconds else ""
        cards.append(("training time", duration(seconds), rate))
        peak = max(row["peak_memory_bytes"] or 0 for row in training)
        cards.append(("peak memory", size(peak), "of rank 0"))
    shown = [
        f'<div class="panel card"><span class="label">{escape(label)}</span><b>{escape(value)}</b>'
        f"<span>{escape(about)}</span></div>"
        for label, value, about in cards
    ]
    return f'<div class="cards">{"".join(shown)}</div>'


def _main_metric(run: Run, row: Row, split: str) -> str:
    names = _metrics([row], split)
    asked = str(run.recipe.get("evaluation", {}).get("metric_for_best") or "").removeprefix("eval_")
    return asked if asked in names else next((name for name in names if name != "loss"), "loss")


def _metrics(rows: Sequence[Row], split: str) -> list[str]:
    """Names of a split's metrics in the order of their appearance, the loss last."""
    prefix = f"{split}_"
    names = dict.fromkeys(k.removeprefix(prefix) for row in rows for k in row if k.startswith(prefix))
    return [name for name in names if name not in {"seconds", "loss"}] + (["loss"] if "loss" in names else [])


def _results(run: Run) -> str:
    evaluations, tests = run.evaluations("eval"), run.evaluations("test")
    columns: list[tuple[str, Mapping[str, Any]]] = []
    for split, rows in (("eval", evaluations), ("test", tests)):
        if not rows:
            continue
        names = _metrics(rows, split)
        if given := run.summary.get("baseline", {}).get(split):
            columns.append((f"{split}, baseline", given))
        if split == "eval" and run.best is not None and run.best is not rows[-1]:
            best = {name: run.best.get(f"eval_{name}") for name in names}
            columns.append((f"eval, best (step {run.best['step']:,})", best))
        last = {name: rows[-1].get(f"{split}_{name}") for name in names}
        columns.append((f"{split}, step {rows[-1]['step']:,}" if split == "eval" else "test", last))
        if run.beside is not None and (theirs := _last(run.beside, split)) is not None:
            values = {name: theirs.get(f"{split}_{name}") for name in names}
            columns.append((f"{split}, {run.beside.name}", values))
    names = list(dict.fromkeys([*_metrics(tests, "test"), *_metrics(evaluations, "eval")]))
    if not names:
        return ""
    rows = [[name, *(column.get(name) for _, column in columns)] for name in names]
    return panel("Results", html_table(["metric", *(title for title, _ in columns)], rows))


def _last(run: Run, split: str) -> Row | None:
    """The evaluation of the weights of final/, where the run says which that is, else the last."""
    rows = run.evaluations(split)
    best = run.best if split == "eval" else None
    return best or (rows[-1] if rows else None)


def _curves(run: Run) -> str:
    training, evaluations = run.training, run.evaluations("eval")
    if not training and not evaluations:
        return ""
    loss = _points(training, "loss")
    series = [Series("train, raw", loss, "faint")]
    if len(loss) >= 10:
        series.append(Series("train, smoothed", _smoothed(loss)))
    else:
        series = [Series("train", loss, "dots")]
    if evaluations:
        series.append(Series("eval", _points(evaluations, "eval_loss"), "dots", 2))
    legend = "".join(
        f'<span><i class="{"faint " if s.style == "faint" else ""}c{s.color}"></i>{s.name}</span>'
        for s in series
    )
    chart = line_chart(series, width=WIDE, height=340, label="loss", may_log=True)
    about = f'<h3>Loss</h3><div class="legend">{legend}</div>'
    wide = f'<div class="panel wide">{about}{chart}{_gaps(training, "loss")}</div>'
    small = [
        _small(name.replace("_", " "), evaluations, f"eval_{name}", color=2) for name in _shown(evaluations)
    ]
    small += [
        _small("Learning rate", training, "learning_rate"),
        _small("Gradient norm", training, "grad_norm", noisy=True),
        _small("Throughput (tokens/s)", training, "tokens_per_second", color=3, noisy=True),
        _small("Peak memory (GiB)", training, "peak_memory_bytes", color=4, scale=2**-30),
    ]
    known = {"learning_rate", "grad_norm", "tokens_per_second", "peak_memory_bytes", "loss"} | _COUNTS
    extra = dict.fromkeys(key for row in training for key in row if key not in known)
    small += [_small(key, training, key) for key in list(extra)[:12]]
    return f'<h2>Curves</h2>{wide}<div class="grid2">{"".join(small)}</div>'


_COUNTS = {"step", "epoch", "units", "samples", "tokens", "seconds", "nonfinite"}


def _shown(evaluations: Sequence[Row]) -> list[str]:
    """The first four metrics that differ (with one label per row micro F1 is accuracy)."""
    curves: dict[tuple[Any, ...], str] = {}
    for name in _metrics(evaluations, "eval"):
        if name != "loss":
            curves.setdefault(tuple(row.get(f"eval_{name}") for row in evaluations), name)
    return list(curves.values())[:4]


def _small(
    title: str, rows: Sequence[Row], key: str, *, color: int = 1, scale: float = 1.0, noisy: bool = False
) -> str:
    """A small chart of one key; of a `noisy` one with its average over it, and logarithmic where it spans decades."""
    points = [(step, None if value is None else value * scale) for step, value in _points(rows, key)]
    series = [Series(title, points, "dots" if len(points) <= 60 else "line", color)]
    if noisy and len(points) > 60:
        series = [Series(title, points, "faint", color), Series(title, _smoothed(points), "line", color)]
    chart = line_chart(series, width=NARROW, height=210, label=title, may_log=noisy)
    return f'<div class="panel"><h3>{escape(title)}</h3>{chart}{_gaps(rows, key)}</div>' if chart else ""


def _smoothed(points: Sequence[Point]) -> list[Point]:
    return smooth(points, max(5, len(points) // 50))


def _points(rows: Sequence[Row], key: str) -> list[Point]:
    return [(row["step"], row[key]) for row in rows if key in row]


def _gaps(rows: Sequence[Row], key: str) -> str:
    steps = [row["step"] for row in rows if key in row and row[key] is None]
    if not steps:
        return ""
    more = ", …" if len(steps) > 5 else ""
    listed = ", ".join(f"{step:,}" for step in steps[:5])
    return f'<p class="note">{len(steps):,} of {len(rows):,} values are not finite (gaps): step {listed}{more}</p>'


def _evaluations(run: Run) -> str:
    rows = run.evaluations("eval")
    if len(rows) < 2:
        return ""
    names = _metrics(rows, "eval")
    cells = [
        [row["step"], row["epoch"], *(row.get(f"eval_{name}") for name in names)] for row in rows[-MAX_ROWS:]
    ]
    best = {i for i, row in enumerate(rows[-MAX_ROWS:]) if row is run.best}
    left = len(rows) - len(cells)
    note = f'<p class="note">The {left:,} evaluations before these are in metrics.jsonl.</p>' if left else ""
    return panel(
        "Evaluations", f'<div class="scroll">{html_table(["step", "epoch", *names], cells, best)}</div>{note}'
    )


def _recipe(run: Run) -> str:
    return panel("Recipe", f"<pre>{escape(run.recipe_text)}</pre>") if run.recipe_text else ""
