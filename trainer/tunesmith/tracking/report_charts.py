"""Curves and a confusion matrix as inline SVG. The classes' colours are in report_template.html, so that they follow
the reader's light or dark scheme."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from tunesmith.tracking.text import number

Point = tuple[float, float | None]  # step, value; None is a gap
LEFT, RIGHT, TOP, BOTTOM = 58, 18, 12, 26  # px around the plot


@dataclass(frozen=True, slots=True)
class Series:
    """One curve. `style`: faint (raw values), line, or dots (few points, each marked). `color`: 1 to 4."""

    name: str
    points: Sequence[Point]
    style: Literal["faint", "line", "dots"] = "line"
    color: int = 1


def smooth(points: Sequence[Point], span: int) -> list[Point]:
    """The exponential moving average with α = 2 / (span + 1), without the bias of its start (Kingma & Ba 2015, §3);
    gaps stay gaps and do not enter it."""
    keep, total, weight = 1 - 2 / (span + 1), 0.0, 0.0
    out: list[Point] = []
    for x, value in points:
        if value is None:
            out.append((x, None))
            continue
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        out.append((x, total / weight))
    return out


def downsample(points: Sequence[Point], buckets: int) -> list[Point]:
    """At most 3 points per bucket (a pixel column): its minimum and maximum in their order, and one gap if it has any,
    so that no spike is lost. Points are sorted by step."""
    if len(points) <= 2 * buckets:
        return list(points)
    first, last = points[0][0], points[-1][0]
    width = (last - first) / buckets or 1.0
    out: list[Point] = []
    start = 0
    for bucket in range(buckets):
        end = start
        edge = first + (bucket + 1) * width
        while end < len(points) and (points[end][0] < edge or bucket == buckets - 1):
            end += 1
        cell, start = points[start:end], end
        values = [(value, i) for i, (_, value) in enumerate(cell) if value is not None]
        if values:
            out += [cell[i] for i in sorted({min(values)[1], max(values, key=lambda v: v[0])[1]})]
        if len(values) < len(cell):
            out.append((cell[-1][0], None))
    return out


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers between low and high, 1, 2 or 5 times a power of ten apart, as near to `count` as that goes."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    # the borders are the geometric means of neighbours: √2, √10, √50
    step = power * next((m for m, border in ((1, 2), (2, 10), (5, 50)) if (raw / power) ** 2 < border), 10)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True, slots=True)
class Axis:
    """From data to pixels; logarithmic where positive values span more than two decades."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @staticmethod
    def of(
        values: Sequence[float], start: float, end: float, *, room: float = 0.0, may_log: bool = False
    ) -> Axis:
        low, high = min(values), max(values)
        if may_log and low > 0 and high / low > 100:
            return Axis(math.log10(low) - 0.05, math.log10(high) + 0.05, start, end, log=True)
        if low == high:
            pad = abs(low) * 0.1 or 1.0
            # a constant is drawn in the middle, steps of a single point at the left
            return Axis(low - pad, high + pad, start, end) if room else Axis(low, low + 1, start, end)
        pad = (high - low) * room
        floor = low - pad if low < 0 or low - pad > 0 else 0.0  # nothing positive gets an axis below zero
        return Axis(floor, high + pad, start, end)

    def at(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int) -> list[float]:
        if not self.log:
            return ticks(self.low, self.high, count)
        decades = [10.0**i for i in range(math.ceil(self.low), math.floor(self.high) + 1)]
        return decades[:: max(1, math.ceil(len(decades) / count))]


def line_chart(
    series: Sequence[Series], *, width: int, height: int, label: str, may_log: bool = False
) -> str:
    """A chart of curves over the step; "" where none has a value. The numbers that its tooltip shows go with it."""
    drawn = [Series(s.name, downsample(s.points, width - LEFT - RIGHT), s.style, s.color) for s in series]
    drawn = [s for s in drawn if any(v is not None for _, v in s.points)]
    if not drawn:
        return ""
    xs = [x for s in drawn for x, _ in s.points]
    ys = [v for s in drawn for _, v in s.points if v is not None]
    x = Axis.of(xs, LEFT, width - RIGHT)
    y = Axis.of(ys, height - BOTTOM, TOP, room=0.06, may_log=may_log)
    parts = [*_grid(x, y, width, height)]
    parts += [_curve(s, x, y) for s in drawn]
    log = " (logarithmic scale)" if y.log else ""
    raw_only = all(s.style == "faint" for s in drawn)
    hover = [
        {"name": s.name, "color": s.color, "points": [[step, _px(x.at(step)), v] for step, v in s.points]}
        for s in drawn
        if s.style != "faint" or raw_only
    ]
    data = json.dumps(hover, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<figure class="chart"><svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}{log}">'
        f'{"".join(parts)}<line class="cross" y1="{TOP}" y2="{height - BOTTOM}"/></svg>'
        f'<script type="application/json">{data}</script><div class="tip" hidden></div></figure>'
    )


def _grid(x: Axis, y: Axis, width: int, height: int) -> list[str]:
    parts: list[str] = []
    for tick in y.ticks(5):
        at = _px(y.at(tick))
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at}" class="y">{short(tick)}</text>')
    parts += [
        f'<text x="{_px(x.at(tick))}" y="{height - 8}" class="x">{short(tick)}</text>'
        for tick in x.ticks(6)
        if tick == int(tick)
    ]
    base = height - BOTTOM
    parts.append(f'<text x="{LEFT - 8}" y="{height - 8}" class="y name">step</text>')
    return [*parts, f'<line class="axis" x1="{LEFT}" x2="{width - RIGHT}" y1="{base}" y2="{base}"/>']


def _curve(series: Series, x: Axis, y: Axis) -> str:
    path, dots, pen = [], [], "M"
    points = series.points
    for i, (step, value) in enumerate(points):
        if value is None:
            pen = "M"
            continue
        px, py = _px(x.at(step)), _px(y.at(value))
        path.append(f"{pen}{px} {py}")
        lonely = pen == "M" and (i + 1 == len(points) or points[i + 1][1] is None)
        if lonely or (series.style == "dots" and len(points) <= 60):
            dots.append(
                f'<circle class="c{series.color}" cx="{px}" cy="{py}" r="{3 if series.style == "dots" else 2}"/>'
            )
        pen = "L"
    return f'<path class="{series.style} c{series.color}" d="{"".join(path)}"/>{"".join(dots)}'


def confusion_chart(names: Sequence[str], counts: Sequence[Sequence[int]]) -> str:
    """A heat map of a confusion matrix: rows are references, columns predictions; the shade is the share of the row."""
    size = min(46.0, max(8.0, 760 / len(names)))
    font = min(12.0, size * 0.9)
    longest = min(24, max(len(name) for name in names))
    margin = 14 + longest * font * 0.6
    parts: list[str] = []
    for i, row in enumerate(counts):
        total = sum(row)
        for j, count in enumerate(row):
            if not count:
                continue
            share = count / total
            at = f'x="{_px(margin + j * size)}" y="{_px(margin + i * size)}"'
            title = f"{names[i]} → {names[j]}: {count:,} ({share:.0%} of {total:,})"
            kind = "hit" if i == j else "miss"
            parts.append(
                f'<rect class="{kind}" {at} width="{_px(size)}" height="{_px(size)}" '
                f'fill-opacity="{0.08 + 0.92 * share:.2f}"><title>{escape(title)}</title></rect>'
            )
            if size >= 24:
                x, y = _px(margin + (j + 0.5) * size), _px(margin + (i + 0.5) * size)
                dark = " strong" if share > 0.5 else ""
                parts.append(f'<text class="count{dark}" x="{x}" y="{y}">{short(count)}</text>')
    for i, name in enumerate(names):
        text = escape(name if len(name) <= 24 else name[:23] + "…")
        at, edge = _px(margin + (i + 0.5) * size), _px(margin - 6)
        parts.append(f'<text class="row" x="{edge}" y="{at}">{text}</text>')
        parts.append(f'<text class="col" transform="translate({at} {edge}) rotate(-90)">{text}</text>')
    extent = _px(margin + len(names) * size + 4)
    frame = _px(len(names) * size)
    return (
        f'<div class="scroll"><svg class="confusion" viewBox="0 0 {extent} {extent}" width="{extent}" '
        f'style="font-size:{font:.1f}px" role="img" aria-label="confusion matrix">'
        f'<rect class="frame" x="{_px(margin)}" y="{_px(margin)}" width="{frame}" height="{frame}"/>'
        f"{''.join(parts)}</svg></div>"
    )


def short(value: float) -> str:
    """A number for an axis: 1.5k, 20M, 2e-05."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            scaled = value / (1e3 if unit == "k" else limit)
            return f"{scaled:.4g}{unit}" if scaled < 1e4 else f"{value:.1e}"
    if value and abs(value) < 1e-3:
        return f"{value:.3g}"
    return number(float(f"{value:.6g}"))


def _px(value: float) -> float:
    rounded = round(value, 1)
    return int(rounded) if rounded == int(rounded) else rounded
