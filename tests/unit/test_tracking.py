"""Events to metrics.jsonl, to the progress display, and what they must not give away."""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tunesmith.errors import DataError, MachineError
from tunesmith.tracking.events import (
    DispensableObserver,
    Evaluated,
    Event,
    Message,
    RunEnded,
    RunStarted,
    Saved,
    StepLogged,
    Stepped,
)
from tunesmith.tracking.metrics_file import MetricsFile, read
from tunesmith.tracking.progress import ProgressDisplay, end_table, track
from tunesmith.tracking.text import REDACTED, duration, memory_lines, number, redacted, size

KEYS = {
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "units",
    "samples",
    "tokens_per_second",
    "seconds",
    "peak_memory_bytes",
}


def started(resumed: int | None = None, total: int = 300, **facts: Any) -> RunStarted:
    return RunStarted("run", total, {}, facts, resumed)


def logged(step: int, loss: float = 1.234, **extra: float) -> StepLogged:
    return StepLogged(
        step, step / 50, loss, 2.9e-4, 1.2, 64, 32 * step, 5000, 5210.0, step / 10, 2**30, extra
    )


def evaluated(step: int, split: Any = "eval", **metrics: float) -> Evaluated:
    return Evaluated(step, step / 50, 0.5, {"loss": 0.5} | metrics, {}, split, 2.0)


def write(folder: Path, *events: Event) -> Path:
    file = MetricsFile(folder)
    for event in events:
        file.on(event)
    file.close()
    return file.path


# metrics.jsonl


def test_rows_have_the_documented_keys(tmp_path: Path) -> None:
    path = write(
        tmp_path, started(), logged(10, loss_scale=8.0), evaluated(10, accuracy=0.75), evaluated(10, "test")
    )
    assert path == tmp_path / "metrics.jsonl"
    train, evaluation, test = read(path)
    assert train.keys() >= KEYS
    assert train["loss"] == 1.234
    assert train["loss_scale"] == 8.0
    assert evaluation == {
        "step": 10,
        "epoch": 0.2,
        "eval_loss": 0.5,
        "eval_accuracy": 0.75,
        "eval_seconds": 2.0,
    }
    assert test["test_loss"] == 0.5
    assert not any(key.startswith("eval_") for key in test)


def test_every_row_is_on_disk_before_the_next_event(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    file.on(started())
    for step in (1, 2, 3):
        file.on(logged(step))
        assert [row["step"] for row in read(file.path)] == list(range(1, step + 1))
    file.close()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_numbers_are_null_and_marked(tmp_path: Path, bad: float) -> None:
    path = write(tmp_path, started(), logged(1, loss=bad), logged(2), evaluated(2, f1=bad))
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    first, second, third = read(path)
    assert first["loss"] is None
    assert first["nonfinite"] is True
    assert "nonfinite" not in second
    assert third["eval_f1"] is None
    assert third["nonfinite"] is True


def test_numpy_numbers_are_written_as_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, started(), evaluated(1, f1=np.float32(0.5), bad=np.float32("nan"), n=np.int64(3)))  # pyright: ignore[reportArgumentType]
    (row,) = read(path)
    assert (row["eval_f1"], row["eval_bad"], row["eval_n"]) == (0.5, None, 3)


def test_a_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    write(tmp_path, started(), logged(10))
    path = write(tmp_path, started(), logged(5))
    assert [row["step"] for row in read(path)] == [5]


def test_a_resumed_run_cuts_off_what_the_killed_one_wrote_later(tmp_path: Path) -> None:
    path = write(
        tmp_path, started(), *(logged(s) for s in (10, 20)), evaluated(20), logged(30), evaluated(30)
    )
    with path.open("ab") as file:
        file.write('{"step": 40, "loss": "é'.encode()[:-1])  # killed while it wrote
    assert [row["step"] for row in read(path)] == [10, 20, 20, 30, 30]
    write(tmp_path, started(resumed=20), logged(30, loss=7.0))
    assert [row["step"] for row in read(path)] == [10, 20, 20, 30]
    assert read(path)[-1]["loss"] == 7.0
    assert list(tmp_path.iterdir()) == [path]  # no temporary file is left


def test_a_resumed_run_that_was_done_reads_the_test_again(tmp_path: Path) -> None:
    path = write(tmp_path, started(), logged(10), evaluated(10, "test"))
    write(tmp_path, started(resumed=10), evaluated(10, "test"))
    assert ["test_loss" in row for row in read(path)] == [False, True]


def test_a_torn_line_is_cut_even_where_no_row_is(tmp_path: Path) -> None:
    path = write(tmp_path, started(), logged(10))
    with path.open("a") as file:
        file.write('{"step": 1')
    write(tmp_path, started(resumed=10), logged(20))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [10, 20]


def test_the_cut_happens_in_one_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, started(), logged(10), logged(20))
    before = path.read_bytes()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricsFile(tmp_path).on(started(resumed=10))
    assert path.read_bytes() == before


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = write(tmp_path, started(), logged(10))
    path.write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        read(path)


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may grow beyond 500 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_is_a_fault_of_the_machine(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path)
    file.on(started())
    file.on(logged(1))
    file.on(logged(2))
    with pytest.raises(MachineError, match=r"metrics\.jsonl: cannot be written"):
        file.on(logged(3, **{f"extra_{i}": 1.0 for i in range(20)}))
    file.close()
    assert [row["step"] for row in read(file.path)] == [1, 2]  # and a torn line


# an observer that a run can do without


class Broken(DispensableObserver):
    name = "broken"

    def __init__(self) -> None:
        self.calls = 0

    def observe(self, event: Event) -> None:
        self.calls += 1
        raise RuntimeError("no luck\nat all")

    def release(self) -> None:
        self.calls += 1


def test_a_dispensable_observer_is_turned_off_with_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    observer = Broken()
    for step in range(3):
        observer.on(Stepped(step))
    observer.close()
    assert observer.calls == 1
    captured = capfd.readouterr()
    assert captured.err == "warning: broken is turned off, the run goes on: RuntimeError: no luck\n"
    assert captured.out == ""


# what a person sees


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def console(*, terminal: bool = False, width: int = 140) -> Console:
    return Console(file=StringIO(), force_terminal=terminal, width=width, highlight=False, color_system=None)


def text(of: Console) -> str:
    assert isinstance(of.file, StringIO)
    return of.file.getvalue()


def test_lines_where_there_is_no_terminal() -> None:
    err, out, clock = console(), console(), Clock()
    display = ProgressDisplay("auto", console=err, out=out, clock=clock)
    display.on(started())
    clock.now += 10
    display.on(Stepped(20))
    display.on(logged(20))
    line = "step 20/300 epoch 0.4 loss 1.234 lr 2.9e-04 grad_norm 1.2 5,210 tokens/s eta 2:20\n"
    assert text(err).endswith(line)
    assert text(out) == ""


def test_the_eta_of_a_resumed_run_counts_its_own_steps() -> None:
    err, clock = console(), Clock()
    display = ProgressDisplay("lines", console=err, clock=clock)
    display.on(started(resumed=200))
    clock.now += 10
    display.on(logged(250))
    assert text(err).endswith("eta 0:10\n")


def test_numbers_that_are_not_finite_are_shown_as_such() -> None:
    err = console()
    display = ProgressDisplay("lines", console=err)
    display.on(started())
    display.on(StepLogged(1, 0.1, math.nan, 0.0, math.inf, 0, 0, 0, math.nan, 0.0, 0, {}))
    display.on(evaluated(1, f1=math.nan))
    assert "loss nan" in text(err)
    assert "grad_norm inf" in text(err)
    assert "f1 nan" in text(err)


def test_the_bar_shows_the_numbers_and_messages_stand_above_it() -> None:
    err = console(terminal=True)
    display = ProgressDisplay("auto", console=err, clock=Clock())
    display.on(started())
    display.on(logged(20))
    display.on(Message("[bold]look[/bold]", "warning"))
    with display.counting("eval at step 20", 50) as count:
        count(50)
        display.close()  # draws the bars a last time
    display.close()
    assert "warning: [bold]look[/bold]" in text(err)
    last = text(err)
    for shown in ("run", "20/300", "epoch 0.4", "loss 1.234", "lr 2.9e-04", "5,210 tokens/s", "eta 0:00"):
        assert shown in last
    assert "eval at step 20" in last
    assert "50/50" in last


def test_a_narrow_terminal_keeps_the_bar_on_one_line() -> None:
    err = console(terminal=True, width=50)
    display = ProgressDisplay("bar", console=err, clock=Clock())
    display.on(started())
    before = len(text(err))
    display.on(logged(20))
    display.close()
    drawn = [line for line in text(err)[before:].split("\n") if "20/300" in line]
    assert drawn
    assert not any("tokens/s" in line and "20/300" not in line for line in text(err).split("\n"))


def test_off_is_silent_but_for_warnings() -> None:
    err, out = console(), console()
    display = ProgressDisplay("off", console=err, out=out)
    for event in (started(notes=["n"]), logged(1), evaluated(1, f1=0.5), Saved(1, "x"), Message("info")):
        display.on(event)
    display.on(RunEnded("done", "done", 1, {}))
    assert text(err) == text(out) == ""
    display.on(Message("watch out", "warning"))
    assert text(err) == "warning: watch out\n"


def test_the_start_says_what_was_dropped_and_noted() -> None:
    err = console()
    data = {"train": {"rows": 90, "truncated": 2, "dropped": {"empty text": 8}}}
    kernels = {"linear_cross_entropy": "reference: no head", "sgd": "torch sgd"}
    facts = {
        "engine": "ddp",
        "world_size": 2,
        "data": data,
        "notes": ["new weights: head"],
        "kernels": kernels,
    }
    ProgressDisplay("lines", console=err).on(started(resumed=7, **facts))
    shown = text(err)
    assert "kernels linear_cross_entropy reference (no head), sgd torch sgd" in shown
    assert "resumed from step 7" in shown
    assert "ddp, world size 2" in shown
    assert "90 rows, 2 truncated, dropped: empty text 8" in shown
    assert "new weights: head" in shown


def memory_row(tag: str, **settings: Any) -> dict[str, Any]:
    amounts = {"parameters": 1_000, "weights": 4_000, "gradients": 4_000, "optimizer": 8_004}
    group = {"trained_from": 0, "dtype": "float32", "learning_rate": 3e-4, "weight_decay": 0.01}
    return {"tag": tag} | amounts | group | settings


def test_the_start_says_what_each_group_takes_in_columns() -> None:
    frozen = {"trained_from": None, "dtype": "nf4", "learning_rate": None, "weight_decay": None}
    groups = [
        memory_row("decay"),
        memory_row("layers 2-5", trained_from=120, learning_rate=1e-4),
        memory_row("quantised", parameters=2_000_000, weights=1_000_000, gradients=0, optimizer=0, **frozen),
        {
            "tag": "sum",
            "parameters": 2_002_000,
            "weights": 1_008_000,
            "gradients": 8_000,
            "optimizer": 16_008,
        },
    ]
    peak = {"bytes": 2**21, "moment": "backward of layer 3", "parts": {"weights": 1_008_000, "logits": 0}}
    lines = list(memory_lines({"groups": groups, "predicted_peak": peak}))
    assert [" ".join(line.split()) for line in lines[1:5]] == [
        "decay 1,000 yes float32 0.0003 0.01 3.91 KiB 3.91 KiB 7.82 KiB",
        "layers 2-5 1,000 from step 120 float32 0.0001 0.01 3.91 KiB 3.91 KiB 7.82 KiB",
        "quantised 2,000,000 no nf4 977 KiB – –",
        "sum 2,002,000 984 KiB 7.81 KiB 15.6 KiB",
    ]
    for heading, cell in (("trained", "from"), ("dtype", "float32"), ("weights", "3.91 KiB")):
        at, of = lines[0].index(heading), lines[2].index(cell)
        end = 0 if heading != "weights" else len(heading) - len(cell)  # numbers end where their heading does
        assert at + end == of
    assert lines[5] == "predicted peak 2 MiB, backward of layer 3: weights 984 KiB"
    assert list(memory_lines({})) == []


def test_many_groups_are_summed_up_into_a_dozen_lines() -> None:
    groups = [memory_row(f"layer {i}") for i in range(20)]
    total = {name: sum(row[name] for row in groups) for name in ("parameters", "weights", "gradients")}
    shown = list(memory_lines({"groups": [*groups, {"tag": "sum", "optimizer": 160_080} | total]}))
    assert len(shown) == 10
    assert shown[8].split()[:3] == ["13", "more", "13,000"]
    assert shown[9].split()[:2] == ["sum", "20,000"]


def test_the_results_go_to_stdout_beside_the_baseline() -> None:
    err, out = console(), console()
    display = ProgressDisplay("lines", console=err, out=out)
    display.on(started())
    display.on(evaluated(300, accuracy=0.91))
    display.on(evaluated(300, "test", accuracy=0.89))
    display.on(RunEnded("done", "done", 300, {"baseline": {"test": {"accuracy": 0.0125}}}))
    row = next(line for line in text(out).splitlines() if "accuracy" in line)
    assert row.split() == ["accuracy", "0.91", "0.89", "0.0125"]
    assert "test baseline" in text(out)
    assert "Results" not in text(err)


def test_a_run_that_stopped_says_why_and_shows_no_results() -> None:
    err, out = console(), console()
    display = ProgressDisplay("lines", console=err, out=out)
    display.on(started())
    display.on(evaluated(5, accuracy=0.9))
    display.on(RunEnded("stopped", "the loss is not finite", 7, {}))
    assert "stopped at step 7" in text(err)
    assert text(out) == ""


def test_tables_show_texts_as_they_are() -> None:
    out = console()
    end_table([{"name": "[red]x[/red]", "n": 12345}, {"name": "y", "f": 0.12345678}], "[b]T", console=out)
    assert "[red]x[/red]" in text(out)
    assert "12,345" in text(out)
    assert "0.1235" in text(out)
    assert "[b]T" in text(out)


def ticking(clock: Clock, count: int, seconds: float) -> Iterator[int]:
    for i in range(count):
        clock.now += seconds
        yield i


def test_short_work_is_done_without_a_word() -> None:
    for terminal in (False, True):
        err, clock = console(terminal=terminal), Clock()
        assert list(track(ticking(clock, 10, 0.1), "encoding", console=err, clock=clock)) == list(range(10))
        assert text(err) == ""


def test_long_work_says_a_line_every_ten_seconds() -> None:
    err, clock = console(), Clock()
    assert len(list(track(ticking(clock, 50, 0.5), "encoding", 50, console=err, clock=clock))) == 50
    assert text(err).splitlines() == [
        "encoding: 4/50 (0:02)",
        "encoding: 24/50 (0:12)",
        "encoding: 44/50 (0:22)",
        "encoding: 50 in 0:25",
    ]


def test_long_work_on_a_terminal_has_a_bar_that_goes_away_on_errors_too() -> None:
    err, clock = console(terminal=True), Clock()
    items = track(ticking(clock, 50, 0.5), "[encoding]", 50, console=err, clock=clock)
    for item in items:
        if item == 20:
            break
    assert "\x1b[?25l" in text(err)  # the cursor is hidden while the bar lives
    items.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert text(err).rindex("\x1b[?25h") > text(err).rindex("\x1b[?25l")
    assert "[encoding]" in text(err)


# texts


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0:00"), (0.4, "0.4s"), (83, "1:23"), (3723, "1:02:03"), (183845, "2d 03:04:05"), (math.nan, "?")],
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (1.23456, "1.235"),
        (2e-5, "2.00e-05"),
        (123456.0, "123,456"),
        (3e9, "3.00e+09"),
        (math.inf, "inf"),
    ],
)
def test_numbers(value: float, shown: str) -> None:
    assert number(value) == shown


def test_sizes() -> None:
    assert [size(n) for n in (512, 1012, 1536, 3 * 2**30)] == ["512 B", "1012 B", "1.5 KiB", "3 GiB"]


def test_secrets_are_redacted_wherever_they_stand() -> None:
    given = {
        "model": {"tokenizer": "bert", "hub_token": "s1", "max_new_tokens": 128},
        "list": [{"api_key": "s2", "Password": "s3"}, {"client_secret": ["s4"]}],
        "command": ["train", "model.hub_token=s5", "https://me:s6@host/x?sig_key=s7&a=1"],
        "hub_token": None,
    }
    shown = redacted(given)
    assert shown["model"] == {"tokenizer": "bert", "hub_token": REDACTED, "max_new_tokens": 128}
    assert not any(f"s{i}" in json.dumps(shown).replace("https", "") for i in range(1, 8))
    assert shown["command"][0] == "train"
    assert shown["command"][2].endswith("&a=1")
    assert given["model"]["hub_token"] == "s1"  # pyright: ignore[reportArgumentType]
