"""report.html: what it shows, what it never does, and the curves' arithmetic."""

from __future__ import annotations

import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tunesmith.errors import UserError
from tunesmith.metrics.labels import single_label_table
from tunesmith.tracking.events import Evaluated, Event, RunEnded, RunStarted, StepLogged
from tunesmith.tracking.metrics_file import MetricsFile
from tunesmith.tracking.report import ReportWriter, plain, write_report
from tunesmith.tracking.report_charts import Axis, Point, Series, downsample, line_chart, short, smooth, ticks

EVIL = "<script>alert(1)</script>\"'&"


class Page(HTMLParser):
    """The elements of a page, its texts, and what it would fetch."""

    VOID = frozenset({"meta", "link", "img", "br", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [
            value or "" for key, value in attrs if key in {"src", "href", "srcset", "action", "data"}
        ]
        assert not any(key.startswith("on") for key, _ in attrs), f"{tag} has a handler"
        if tag not in self.VOID and not (self.get_starttag_text() or "").endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in {"style", "script"}:
            self.text += data + " "


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def step(number: int, loss: float = 1.0) -> StepLogged:
    return StepLogged(number, number / 10, loss, 1e-3, 2.0, 8, 8 * number, 100, 5000.0, number / 2, 2**30, {})


def evaluation(
    number: int, split: Any = "eval", tables: dict[str, Any] | None = None, **metrics: float
) -> Evaluated:
    return Evaluated(number, number / 10, 0.5, metrics, tables or {}, split, 1.0)


def play(folder: Path, *events: Event, name: str = "run", resumed: int | None = None) -> None:
    observers = [MetricsFile(folder), ReportWriter(folder, clock=Clock())]
    for event in (RunStarted(name, 100, {}, {}, resumed), *events):
        for observer in observers:
            observer.on(event)
    for observer in observers:
        observer.close()


def page(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def labels(names: list[str]) -> dict[str, Any]:
    given = np.arange(40) % len(names)
    predicted = np.where(np.arange(40) % 7 == 0, 0, given)
    return {"labels": single_label_table(predicted, given, names)}


def describe(folder: Path) -> None:
    """recipe.yaml and environment.json as a run writes them."""
    (folder / "recipe.yaml").write_text(
        "model:\n  model_name_or_path: tiny\n  hub_token: SEKRIT\nrun_name: run\n"
    )
    train = {"rows": 12345, "dropped": {"empty text": 17}, "truncated": 4}
    facts = {
        "engine": "ddp",
        "world_size": 2,
        "precision": "fp32",
        "notes": ["mind this"],
        "data": {"train": train},
    }
    host = {"command": ["tunesmith", "model.hub_token=SEKRIT"]}
    (folder / "environment.json").write_text(
        json.dumps({"versions": {"torch": "9.8.7"}, "host": host, "facts": facts})
    )


def test_what_was_remembered_is_a_table(tmp_path: Path) -> None:
    probe = {
        "run": f"runs/{EVIL}",
        "split": "test",
        "rows": 1234,
        "before": {"loss": 0.5, "accuracy": 0.8125},
        "after": {"loss": math.inf, "accuracy": 0.75},
    }
    play(tmp_path, step(1), RunEnded("done", "done", 1, {"probes": {"old": probe}}))
    html, shown = (tmp_path / "report.html").read_text(encoding="utf-8"), page(tmp_path)
    assert shown.open == []
    assert "<script>alert" not in html
    table = html[html.index("Remembered") : html.index("1,234 test rows of runs/")]
    cells = [re.findall(r">([^<>]*)</td>", row) for row in re.findall(r"<tr.*?</tr>", table)]
    assert ["old", "accuracy", "0.8125", "0.75", "-0.0625"] in cells
    assert ["old", "loss", "0.5", "–", "–"] in cells


def test_a_run_without_probes_has_no_such_table(tmp_path: Path) -> None:
    play(tmp_path, step(1), RunEnded("done", "done", 1, {}))
    assert "Remembered" not in page(tmp_path).text


def test_the_report_of_a_whole_run(tmp_path: Path) -> None:
    describe(tmp_path)
    baseline = {"eval": {"accuracy": 0.0131}, "test": {"accuracy": 0.0129}}
    play(
        tmp_path,
        *(step(n, 3 / n) for n in range(1, 20)),
        evaluation(10, accuracy=0.8765, macro_f1=0.81, tables=labels(["card", "cash", "loan"])),
        step(20),
        evaluation(20, accuracy=0.8642, macro_f1=0.80, tables=labels(["card", "cash", "loan"])),
        evaluation(20, "test", accuracy=0.8531, tables={"samples": [{"prompt": "p?", "generated": "g!"}]}),
        RunEnded("done", "early stopping", 20, {"baseline": baseline, "best_step": 10}),
    )
    shown = page(tmp_path)
    assert shown.open == []  # every element is closed
    for expected in (
        *("run", "done", "early stopping", "tiny"),
        *("0.8765", "step 10 (best) · baseline 0.0131", "0.8531", "weights of final/ · baseline 0.0129"),
        *(
            "Loss",
            "train, smoothed",
            "Learning rate",
            "Gradient norm",
            "Throughput (tokens/s)",
            "Peak memory (GiB)",
        ),
        *("Evaluations", "Confusion matrix", "Most frequent confusions", "Per class: labels (3)", "loan"),
        *("Samples", "p?", "g!"),
        *("ddp", "fp32", "12,345", "empty text", "17", "mind this", "9.8.7"),
        "model_name_or_path: tiny",
    ):
        assert expected in shown.text, expected
    assert "SEKRIT" not in (tmp_path / "report.html").read_text()
    assert "hub_token: '[redacted]'" in shown.text


def test_the_report_asks_for_nothing_from_anywhere(tmp_path: Path) -> None:
    describe(tmp_path)
    play(tmp_path, *(step(n) for n in range(1, 30)), evaluation(10, accuracy=1.0, tables=labels(["a", "b"])))
    write_report(tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert page(tmp_path).fetched == []
    assert not {"link", "img", "iframe", "object", "base", "form"} & set(page(tmp_path).tags)
    assert "default-src 'none'" in html
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttpRequest", html)


def test_texts_of_the_user_stay_texts(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps({"model": {"model_name_or_path": EVIL}, EVIL: EVIL}))
    facts = {"notes": [EVIL], EVIL: {EVIL: [EVIL]}, "data": {"train": {"dropped": {EVIL: 1}}}}
    (tmp_path / "environment.json").write_text(json.dumps({"facts": facts}))
    tables = labels([EVIL, "b", "c"]) | {"samples": [{EVIL: EVIL, "generated": EVIL}], EVIL: {EVIL: EVIL}}
    play(
        tmp_path,
        StepLogged(1, 0.1, 1.0, 1e-3, 1.0, 1, 1, 1, 1.0, 1.0, 1, {EVIL: 2.0}),
        evaluation(1, tables=tables, **{EVIL: 0.5}),
        evaluation(2, tables=tables, **{EVIL: 0.6}),
        RunEnded("stopped", EVIL, 2, {"baseline": {"eval": {EVIL: 0.1}}}),
        name=EVIL,
    )
    html = (tmp_path / "report.html").read_text()
    assert "<script>alert" not in html
    shown = page(tmp_path)
    assert shown.open == []
    assert shown.text.count("<script>alert(1)</script>") >= 12
    for data in re.findall(r'<script type="application/json">(.*?)</script>', html, re.DOTALL):
        json.loads(data)


def test_labels_and_names_with_dollars_and_unicode_survive(tmp_path: Path) -> None:
    play(
        tmp_path,
        step(1),
        evaluation(1, f1=0.5, tables=labels(["$body", "日本"])),
        RunEnded("done", "", 1),
        name="$x",
    )
    assert "$body" in page(tmp_path).text
    assert "日本" in page(tmp_path).text
    assert "$x" in page(tmp_path).text


@pytest.mark.parametrize("count", [0, 1, 5])
def test_few_points_make_a_report_too(tmp_path: Path, count: int) -> None:
    play(tmp_path, *(step(n) for n in range(1, count + 1)), RunEnded("stopped", "killed early", count))
    shown = page(tmp_path)
    assert shown.open == []
    assert "killed early" in shown.text
    assert ("Loss" in shown.text) == (count > 0)
    assert "train, smoothed" not in shown.text


def test_many_points_make_a_small_report(tmp_path: Path) -> None:
    rows = [
        {**{"step": n, "epoch": 1.0, "loss": math.sin(n), "grad_norm": 1.0, "learning_rate": 1e-3}}
        for n in range(100_000)
    ]
    rest = {"seconds": 1.0, "peak_memory_bytes": 1, "tokens_per_second": 1.0}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row | rest) + "\n" for row in rows))
    assert write_report(tmp_path).stat().st_size < 1_000_000


def test_values_that_are_not_finite_are_gaps_that_are_counted(tmp_path: Path) -> None:
    losses = [1.0, 0.9, math.nan, math.inf, 0.8, 0.7]
    play(tmp_path, *(step(n, loss) for n, loss in enumerate(losses, 1)), RunEnded("done", "", 6))
    html = (tmp_path / "report.html").read_text()
    assert "2 of 6 values are not finite (gaps): step 3, 4" in html
    (path,) = re.findall(
        r'<path class="dots c1" d="([^"]*)"', html.split("<h3>Loss")[1].split("</figure>")[0]
    )
    assert path.count("M") == 2
    assert path.count("L") == 2
    assert "nan" not in path.lower()


def test_a_run_of_nothing_but_nan_still_has_a_report(tmp_path: Path) -> None:
    play(tmp_path, *(step(n, math.nan) for n in range(1, 4)), RunEnded("stopped", "not finite", 3))
    assert "not finite" in page(tmp_path).text


def test_more_than_a_hundred_classes_are_listed_not_drawn(tmp_path: Path) -> None:
    play(
        tmp_path,
        step(1),
        evaluation(1, tables=labels([f"c{i}" for i in range(101)])),
        RunEnded("done", "", 1),
    )
    shown = page(tmp_path)
    assert "Confusion matrix" not in shown.text
    assert "Most frequent confusions" in shown.text
    assert "Per class: labels (101)" in shown.text


def test_entity_tables_have_no_matrix(tmp_path: Path) -> None:
    classes = single_label_table([0, 1], [0, 1], ["PER", "ORG"]).classes
    play(tmp_path, step(1), evaluation(1, tables={"entities": classes}), RunEnded("done", "", 1))
    assert "Per class: entities (2)" in page(tmp_path).text
    assert "Confusion matrix" not in page(tmp_path).text


def test_a_run_that_was_killed_is_told_by_its_exit_file(tmp_path: Path) -> None:
    play(tmp_path, step(1))
    assert "running" in Page(write_report(tmp_path).read_text()).text
    ended = tmp_path / "exit.json"
    ended.write_text(json.dumps({"code": 6, "reason": "rank 1 was lost", "rank": 1, "step": 1}))
    later = (tmp_path / "report.json").stat().st_mtime + 1
    os.utime(ended, (later, later))
    assert "rank 1 was lost" in Page(write_report(tmp_path).read_text()).text
    os.utime(ended, (1, 1))  # of a run before this one
    assert "rank 1 was lost" not in Page(write_report(tmp_path).read_text()).text


def test_a_folder_without_a_run_is_the_users_fault(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run"):
        write_report(tmp_path)


def test_a_folder_of_metrics_alone_is_enough(tmp_path: Path) -> None:
    play(tmp_path, step(1))
    (tmp_path / "report.json").unlink()
    assert tmp_path.name in Page(write_report(tmp_path).read_text()).text


def test_the_report_is_renewed_while_the_run_goes_on_but_not_all_the_time(tmp_path: Path) -> None:
    clock = Clock()
    metrics, writer = MetricsFile(tmp_path), ReportWriter(tmp_path, clock=clock)
    written: list[bool] = []
    for seconds, event in (
        (0, RunStarted("run", 100, {}, {}, None)),
        *((seconds, evaluation(n, f1=n / 10)) for n, seconds in enumerate((1, 30, 62, 63), 1)),
    ):
        clock.now = seconds
        (tmp_path / "report.html").unlink(missing_ok=True)
        metrics.on(event)
        writer.on(event)
        written.append((tmp_path / "report.html").exists())
    metrics.close()
    assert written == [False, True, False, True, False]


def test_a_resumed_run_keeps_the_tables_up_to_its_checkpoint(tmp_path: Path) -> None:
    before = (evaluation(10, tables=labels(["a", "b"])), evaluation(30, "test", tables=labels(["a", "b"])))
    play(tmp_path, *before)
    play(tmp_path, resumed=20)
    assert json.loads((tmp_path / "report.json").read_text())["tables"].keys() == {"eval"}
    play(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["tables"] == {}


def test_a_report_that_cannot_be_written_does_not_stop_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    writer = ReportWriter(tmp_path / "gone")
    writer.on(RunStarted("run", 100, {}, {}, None))
    writer.on(evaluation(1))
    assert capfd.readouterr().err.count("report.html is turned off, the run goes on: FileNotFoundError") == 1


def test_tables_become_plain() -> None:
    table = single_label_table([0, 1], [0, 0], ["a", "b"])
    shown = plain({"t": table, "n": np.float32("nan"), 3: (np.int64(2), Path("x"))})
    assert shown["t"]["confusion"] == [[1, 1], [0, 0]]
    assert shown["t"]["classes"][0]["name"] == "a"
    assert shown["n"] is None
    assert shown["3"] == [2, "x"]
    json.dumps(shown, allow_nan=False)


# the curves


def test_downsampling_keeps_every_spike_and_every_gap() -> None:
    points: list[Point] = [(float(n), math.sin(n / 1000)) for n in range(100_000)]
    points[31_234] = (31_234.0, 50.0)
    points[70_001] = (70_001.0, -50.0)
    points[55_555] = (55_555.0, None)
    kept = downsample(points, 800)
    assert len(kept) <= 3 * 800
    assert {points[31_234], points[70_001]} <= set(kept)
    assert [step for step, value in kept if value is None]
    assert kept == sorted(kept, key=lambda p: p[0])
    assert kept[0][0] < 125
    assert kept[-1][0] > 100_000 - 126


def test_downsampling_leaves_few_points_alone() -> None:
    points: list[Point] = [(float(n), float(n)) for n in range(1600)]
    assert downsample(points, 800) == points


def test_smoothing_is_unbiased_from_the_first_point_and_skips_gaps() -> None:
    flat: list[Point] = [(0.0, 2.0), (1.0, None), (2.0, 2.0), (3.0, 2.0)]
    assert [value for _, value in smooth(flat, 10)] == [2.0, None, pytest.approx(2.0), pytest.approx(2.0)]
    # span 3: α = 1/2, so the second value is (0.25·0 + 0.5·3) / 0.75
    assert smooth([(0.0, 0.0), (1.0, 3.0)], 3)[1][1] == pytest.approx(2.0)


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(-3, 17, 4) == pytest.approx([0, 5, 10, 15])
    assert ticks(1e-5, 9e-5, 4) == pytest.approx([2e-5, 4e-5, 6e-5, 8e-5])


def test_axes_of_awkward_data() -> None:
    for values in ([3.0], [0.0], [0.0, 0.0], [-5.0, -5.0], [1e-9, 1e9], [1e300, 1e308]):
        axis = Axis.of(values, 0, 100, room=0.06, may_log=True)
        for value in values:
            assert -1e-9 <= axis.at(value) <= 100 + 1e-9
        assert all(-1e-9 <= axis.at(tick) <= 100 + 1e-9 for tick in axis.ticks(5))
    assert Axis.of([0.01, 50.0], 0, 1, may_log=True).log
    assert not Axis.of([0.0, 50.0], 0, 1, may_log=True).log


def test_a_value_is_drawn_where_the_axis_says() -> None:
    chart = line_chart(
        [Series("s", [(0.0, 0.0), (10.0, 5.0), (20.0, 10.0)])], width=276, height=138, label="l"
    )
    (path,) = re.findall(r'<path class="line c1" d="([^"]*)"', chart)
    x, y = zip(*(map(float, pair.split()) for pair in re.findall(r"[ML]([^ML]+)", path)), strict=True)
    assert x == (58, 158, 258)
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.11)
    assert y[0] > y[2]  # up is more


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (1500, "1500"), (20000, "20k"), (2.5e6, "2.5M"), (2e-5, "2e-05"), (0.30000001, "0.3")],
)
def test_short_numbers(value: float, shown: str) -> None:
    assert short(value) == shown


def test_memory_is_a_table_with_the_measured_peak_beside_the_predicted_one(tmp_path: Path) -> None:
    groups = [
        {"tag": f"group {EVIL}", "parameters": 2_000, "trained_from": 0, "dtype": "float32"}
        | {"learning_rate": 1e-4, "weight_decay": 0.01}
        | {"weights": 8_000, "gradients": 8_000, "optimizer": 16_000},
        {"tag": "sum", "parameters": 2_000, "weights": 8_000, "gradients": 8_000, "optimizer": 16_000},
    ]
    peak = {"bytes": 3 * 2**20, "moment": "head and loss", "parts": {"weights": 8_000}}
    facts = {"groups": groups, "predicted_peak": peak, "engine": "single"}
    (tmp_path / "environment.json").write_text(json.dumps({"facts": facts}), encoding="utf-8")
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "epoch": 0.1, "loss": 1.0, "peak_memory_bytes": 4 * 2**20, "seconds": 1.0})
        + "\n",
        encoding="utf-8",
    )
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert page.tags.count("table") == 1
    assert f"group {EVIL}" in page.text
    assert "predicted peak 3 MiB, head and loss: weights 7.81 KiB; measured 4 MiB" in page.text
    assert "engine" in page.text  # the other facts stay where they are
    assert "predicted peak" not in page.text.partition("What ran")[2].partition("Recipe")[0]
