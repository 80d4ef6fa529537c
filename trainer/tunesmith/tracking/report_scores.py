"""What report.html shows of answers and scores: tables by label, confusions, precision-recall curves, reliability
diagrams, and what was decided on the evaluation rows. Of another run that the recipe names, the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from tunesmith.tracking.report_charts import confusion_chart
from tunesmith.tracking.report_html import fact, html_table, panel, samples
from tunesmith.tracking.text import number

MAX_CLASSES = 100  # of a confusion matrix that is drawn; beyond, its most frequent confusions are listed
SIZE, EDGE = 340, 44  # px of a square plot, and of the room for its numbers
_PLOT = SIZE - 2 * EDGE
Table = Any
Places = Sequence[tuple[float, float]]


def split_tables(
    split: str, step: int, tables: Mapping[str, Any], others: Mapping[str, Any], other_name: str
) -> str:
    """The tables of an evaluation as a section. `others`: those of the run called `other_name` on the same split."""
    parts: list[str] = []
    for name, table in tables.items():
        theirs = others.get(name)
        match table:
            case _ if name in {"precision_recall", "reliability"}:
                pass
            case {"classes": list() as classes, "confusion": list() as counts}:
                parts += [*_confusion([c["name"] for c in classes], counts)]
                parts.append(_classes(name, classes, (theirs or {}).get("classes", []), other_name))
            case [{"precision": _, "recall": _}, *_]:
                parts.append(_classes(name, table, theirs or [], other_name))
            case [{"generated": _}, *_]:
                parts.append(samples(table))
            case _:
                parts.append(f"<details><summary>{escape(name)}</summary>{fact(table)}</details>")
    panels = "".join(f'<div class="panel">{part}</div>' for part in parts if part)
    scores = "".join(f'<div class="panel">{part}</div>' for part in score_panels(tables, others, other_name))
    panels += f'<div class="grid2">{scores}</div>' if scores else ""
    return (
        f'<h2>{escape(split)} at step {step:,}, in detail</h2><div class="stack">{panels}</div>'
        if panels
        else ""
    )


def _confusion(names: Sequence[str], counts: Sequence[Sequence[int]]) -> Iterator[str]:
    if len(names) <= MAX_CLASSES and any(map(any, counts)):
        note = '<p class="note">Rows: the reference; columns: the prediction; the shade is the share of the row.</p>'
        yield f"<h3>Confusion matrix</h3>{note}{confusion_chart(names, counts)}"
    wrong = [
        (count, names[i], names[j], sum(row))
        for i, row in enumerate(counts)
        for j, count in enumerate(row)
        if i != j and count
    ]
    top = sorted(wrong, key=lambda item: -item[0])[:10]
    if top and len(names) > 2:
        rows = [[given, predicted, count, count / total] for count, given, predicted, total in top]
        head = ["reference", "predicted as", "rows", "share of the reference"]
        yield f"<h3>Most frequent confusions</h3>{html_table(head, rows)}"


def _classes(
    name: str, classes: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], other: str
) -> str:
    head = list(classes[0])
    rows = [[c.get(key) for key in head] for c in classes]
    if theirs and "f1" in head:
        f1 = {c["name"]: c["f1"] for c in theirs}
        rows = [[*row, f1.get(c["name"])] for row, c in zip(rows, classes, strict=True)]
        head.append(f"f1, {other}")
    table = (
        f'<div class="scroll">{html_table(head, rows, bar=head.index("f1") if "f1" in head else None)}</div>'
    )
    opened = " open" if len(classes) <= 30 else ""
    return f"<details{opened}><summary>Per class: {escape(name)} ({len(classes)})</summary>{table}</details>"


def score_panels(tables: Mapping[str, Table], other: Mapping[str, Table], name: str) -> list[str]:
    """HTML of the two pictures, where the tables have them. `other`: the tables of the run called `name`."""
    parts: list[str] = []
    if curves := tables.get("precision_recall"):
        parts.append(_precision_recall(curves, other.get("precision_recall") or [], name))
    if found := tables.get("reliability"):
        parts.append(_reliability(found, (other.get("reliability") or {}).get("bins") or [], name))
    return parts


def _precision_recall(
    curves: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]], name: str
) -> str:
    drawn, legend = [], []
    beside = {curve["name"]: curve for curve in other}
    for i, curve in enumerate(curves[:4]):
        color = f"c{i + 1}"
        drawn.append(_line(list(zip(curve["recall"], curve["precision"], strict=True)), color))
        told = f"{curve['name']}: area {number(curve['area'])}"
        if (same := beside.get(curve["name"])) is not None:
            drawn.append(_line(list(zip(same["recall"], same["precision"], strict=True)), f"{color} dash"))
            told += f" ({name}, dashed: {number(same['area'])})"
        legend.append(_key(color, told))
    shares = "; ".join(f"{curve['name']} {curve['share']:.2%}" for curve in curves[:4])
    note = f"Chance is a line at the label's share of the rows: {shares}."
    if len(curves) > 4:
        rest = [[curve["name"], curve["area"], curve["share"]] for curve in curves]
        note_table = html_table(["label", "area", "share of the rows"], rest)
    else:
        note_table = ""
    about = f'<p class="note">{escape(note)}</p>{note_table}'
    return f"<h3>Precision and recall</h3>{_legend(legend)}{_plot(drawn, 'recall', 'precision')}{about}"


def _reliability(found: Mapping[str, Any], other: Sequence[Mapping[str, Any]], name: str) -> str:
    runs = [("c1", "these scores", found["bins"])]
    if found.get("before"):
        runs.append(("c2", "before the temperature", found["before"]))
    if other:
        runs.append(("c3", name, other))
    drawn = [_line([(0.0, 0.0), (1.0, 1.0)], "c4 faint")]
    for color, _, bins in runs:
        drawn.append(_line([(one["confidence"], one["accuracy"]) for one in bins], color))
        rows = sum(one["count"] for one in bins)
        for one in bins:
            title = f"{one['count']:,} rows: confidence {one['confidence']:.3f}, right {one['accuracy']:.3f}"
            x, y = _at(one["confidence"], one["accuracy"])
            radius = round(2 + 8 * (one["count"] / rows) ** 0.5, 1)
            drawn.append(
                f'<circle class="{color}" cx="{x}" cy="{y}" r="{radius}"><title>{title}</title></circle>'
            )
    legend = [_key(color, f"{told}: ECE {number(_ece(bins))}") for color, told, bins in runs]
    note = "On the thin line a score is the share of right answers; circles grow with their rows."
    plot = _plot(drawn, "score", "share that is right")
    return f'<h3>Reliability</h3>{_legend(legend)}{plot}<p class="note">{note}</p>'


def _ece(bins: Sequence[Mapping[str, Any]]) -> float:
    rows = sum(one["count"] for one in bins)
    return sum(one["count"] * abs(one["accuracy"] - one["confidence"]) for one in bins) / rows


def decisions(found: Mapping[str, Any], other: Mapping[str, Any], name: str) -> str:
    """What decisions.json says: the decisions, and the metrics of the rows that they were fitted on."""
    if not found:
        return ""
    metrics: Mapping[str, Any] = found["eval"]
    rows = [
        [key, metrics[f"{key}_untuned"], value]
        for key, value in metrics.items()
        if f"{key}_untuned" in metrics and metrics[f"{key}_untuned"] != value
    ]
    told = "".join(f"<li>{escape(line)}</li>" for line in found["told"])
    note = (
        '<p class="note">On the evaluation rows, which the decisions were fitted on: the test rows say what they are '
        "worth.</p>"
    )
    table = html_table(["metric", "without", "with"], rows) + note if rows else ""
    pictures = "".join(
        f'<div class="panel">{part}</div>'
        for part in score_panels(found.get("tables", {}), other.get("tables", {}), name)
    )
    return panel("Decided after training", f"<ul>{told}</ul>{table}") + f'<div class="grid2">{pictures}</div>'


def _legend(parts: Sequence[str]) -> str:
    return f'<div class="legend">{"".join(parts)}</div>'


def _key(color: str, text: str) -> str:
    return f'<span><i class="{color}"></i>{escape(text)}</span>'


def _at(x: float, y: float) -> tuple[float, float]:
    return round(EDGE + x * _PLOT, 1), round(SIZE - EDGE - y * _PLOT, 1)


def _line(places: Places, style: str) -> str:
    steps = " L".join("{} {}".format(*_at(x, y)) for x, y in places)
    return f'<path class="{style}" d="M{steps}"/>' if steps else ""


def _plot(drawn: Sequence[str], across: str, up: str) -> str:
    """A square from 0 to 1 both ways."""
    grid: list[str] = []
    for i in range(6):
        value = i / 5
        x, y = _at(value, value)
        left, bottom = EDGE, SIZE - EDGE
        grid.append(f'<line class="grid" x1="{left}" x2="{SIZE - EDGE}" y1="{y}" y2="{y}"/>')
        grid.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{EDGE}" y2="{bottom}"/>')
        grid.append(f'<text class="y" x="{left - 8}" y="{y}">{value:g}</text>')
        grid.append(f'<text class="x" x="{x}" y="{bottom + 18}">{value:g}</text>')
    middle = SIZE / 2
    names = (
        f'<text class="x" x="{middle}" y="{SIZE - 6}">{across}</text>'
        f'<text class="x" transform="translate(12 {middle}) rotate(-90)">{up}</text>'
    )
    label = f"{up} over {across}"
    return (
        f'<svg class="square" viewBox="0 0 {SIZE} {SIZE}" width="{SIZE}" role="img" aria-label="{label}">'
        f"{''.join(grid)}{names}{''.join(drawn)}</svg>"
    )
