"""W&B with the real client: offline, with a dead or hung server, one that dies in the middle, without a key."""

from __future__ import annotations

import gzip
import json
import os
import re
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import pytest

from tunesmith.errors import MissingExtra
from tunesmith.recipe.tracking import Wandb
from tunesmith.tracking.events import RunStarted
from tunesmith.tracking.wandb import WandbRun

pytest.importorskip("wandb")

INIT, FINISH = 3.0, 3.0  # seconds
# what the client needs beside its waits: import, its service's start (twice), teardown
OVERHEAD = 60.0

SCRIPT = """
import json, os, sys, warnings
warnings.simplefilter("error")
from pathlib import Path
from tunesmith.recipe.tracking import Wandb
from tunesmith.tracking.events import *
from tunesmith.tracking.wandb import WandbRun

def begin(mode, resumed=None, state=None):
    run = WandbRun(Wandb(mode=mode, project="p", tags=["t"]), Path.cwd(), init_seconds={init}, finish_seconds={finish})
    if state: run.load_state_dict(state)
    recipe = {{"model": {{"model_name_or_path": "m", "hub_token": "SEKRIT"}}}}
    run.on(RunStarted("name", 10, recipe, {{"engine": "single"}}, resumed))
    return run

def step(run, n, loss=1.0):
    run.on(StepLogged(n, n / 10, loss, 1e-3, 1.0, 3, 3, 3, 1.0, 1.0, 100, {{"loss_scale": 8.0}}))

def evaluate(run, n):
    run.on(Evaluated(n, n / 10, 2.0, {{"accuracy": 0.5}}, {{}}, "eval", 1.0))

def end(run, status="done"):
    run.on(RunEnded(status, status, 3, {{}}))
    run.close()
"""


def execute(
    folder: Path, body: str, server: str | None = None, key: bool = True
) -> subprocess.CompletedProcess[str]:
    """Runs the script in a process of its own, without this machine's W&B settings."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    env |= {
        "HOME": str(folder),
        "NETRC": str(folder / "netrc"),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    env |= {"WANDB_BASE_URL": server or "http://127.0.0.1:9"}
    if key:
        env["WANDB_API_KEY"] = "x" * 40
    script = SCRIPT.format(init=INIT, finish=FINISH) + textwrap.dedent(body)
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=INIT + FINISH + OVERHEAD,  # the run must not take longer than this
        check=False,
    )


def records(file: Path) -> list[Any]:
    """The records of a .wandb file: LevelDB's log format behind a header of 7 bytes, blocks of 32 KiB, chunks of
    (CRC 4 bytes, length 2 bytes, type 1 byte, data)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, found, part = file.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in {1, 4}:  # whole, or last
            record = Record()
            record.ParseFromString(part)
            found.append(record)
            part = b""
    return found


def history(file: Path) -> list[dict[str, Any]]:
    rows = [record.history for record in records(file) if record.HasField("history")]
    return [{(i.key or ".".join(i.nested_key)): json.loads(i.value_json) for i in row.item} for row in rows]


def runs(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))


def warnings_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("warning:")]


@pytest.fixture
def dead() -> str:
    """A server's address where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture
def hung() -> Iterator[str]:
    """A server that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_an_offline_run_is_all_there(tmp_path: Path) -> None:
    body = """
    run = begin("offline")
    step(run, 1); step(run, 2, float("nan")); evaluate(run, 2)
    end(run)
    print(json.dumps(run.state_dict()))
    """
    done = execute(tmp_path, body)
    assert done.returncode == 0, done.stderr
    assert warnings_of(done) == []
    (file,) = runs(tmp_path)
    assert file.stem == f"run-{json.loads(done.stdout)['id']}"
    rows = history(file)
    assert [row["global_step"] for row in rows] == [1, 2, 2]
    assert rows[0]["train/loss"] == 1.0
    assert rows[0]["train/loss_scale"] == 8.0
    assert rows[2]["eval/accuracy"] == 0.5
    assert rows[2]["eval/loss"] == 2.0
    text = file.read_bytes()
    assert b"model_name_or_path" in text
    assert b"SEKRIT" not in text
    metrics = {r.metric.name or r.metric.glob_name: r.metric for r in records(file) if r.HasField("metric")}
    assert metrics["*"].step_metric == "global_step"
    (exit_record,) = [r.exit for r in records(file) if r.HasField("exit")]
    assert exit_record.exit_code == 0


def test_a_resumed_run_goes_on_under_its_id(tmp_path: Path) -> None:
    body = """
    first = begin("offline"); step(first, 1); end(first, "stopped")
    second = begin("offline", resumed=1, state=first.state_dict()); step(second, 2); end(second)
    """
    done = execute(tmp_path, body)
    assert done.returncode == 0, done.stderr
    assert warnings_of(done) == []
    files = runs(tmp_path)
    assert len({file.name for file in files}) == 1
    exits = [r.exit.exit_code for file in files for r in records(file) if r.HasField("exit")]
    assert 0 in exits


@pytest.mark.parametrize("server", ["dead", "hung"])
def test_without_an_answer_the_run_is_kept_offline_under_the_same_id(
    tmp_path: Path, server: str, request: pytest.FixtureRequest
) -> None:
    body = """
    run = begin("online")
    assert not run.off
    step(run, 1); evaluate(run, 1)
    end(run)
    print(json.dumps(run.state_dict()))
    """
    done = execute(tmp_path, body, request.getfixturevalue(server))
    assert done.returncode == 0, done.stderr
    (line,) = warnings_of(done)
    assert "kept offline" in line
    (file,) = runs(tmp_path)
    assert file.stem == f"run-{json.loads(done.stdout)['id']}"
    assert len(history(file)) == 2
    log = next(tmp_path.glob("wandb/run-*/logs/debug.log")).read_text()
    assert f"with {INIT} second timeout" in log  # the bound arrived at the client


def test_without_a_key_the_run_is_kept_offline_and_nobody_is_asked(tmp_path: Path, dead: str) -> None:
    done = execute(tmp_path, 'run = begin("online"); step(run, 1); end(run)', dead, key=False)
    assert done.returncode == 0, done.stderr
    (line,) = warnings_of(done)
    assert "no API key" in line
    assert len(history(runs(tmp_path)[0])) == 1


class Answers(BaseHTTPRequestHandler):
    """As much of a W&B server as a run's start needs."""

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("content-length", 0)))
        raw = gzip.decompress(raw) if self.headers.get("content-encoding") == "gzip" else raw
        data: dict[str, Any] = {}
        if self.path == "/die":
            self.server.shutdown()
            self.server.socket.close()
        elif self.path.endswith("/graphql"):
            asked = json.loads(raw)
            if "upsertBucket" in asked["query"]:
                project = {"name": "p", "entity": {"name": "e"}}
                bucket = {
                    "id": "QQ==",
                    "name": asked["variables"]["name"],
                    "displayName": "d",
                    "project": project,
                }
                data = {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
            elif "RunResumeStatus" in asked["query"]:
                data = {"data": {"model": {"name": "p", "entity": {"name": "e"}, "bucket": None}}}
        out = json.dumps(data or {"data": {}}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(out)))
        self.end_headers()
        self.wfile.write(out)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    """A server that starts a run; it is dead once /die has been asked for."""
    found = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = Thread(target=found.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{found.server_port}"
    found.shutdown()
    thread.join()
    found.server_close()


def test_a_server_that_dies_in_the_middle_holds_the_end_up_for_the_stated_bound_only(
    tmp_path: Path, server: str
) -> None:
    body = """
    import urllib.request
    run = begin("online")
    step(run, 1)
    urllib.request.urlopen(os.environ["WANDB_BASE_URL"] + "/die", data=b"").close()
    for n in range(2, 50): step(run, n)
    assert not run.off
    end(run)
    """
    done = execute(tmp_path, body, server)
    assert done.returncode == 0, done.stderr
    assert re.search(rf"^wandb: {server}/e/p/runs/\w+$", done.stderr, re.MULTILINE)
    (line,) = warnings_of(done)
    assert "not all was sent in 3 s; `wandb sync" in line
    (file,) = tmp_path.glob("wandb/run-*/run-*.wandb")
    assert str(file.parent) in line
    assert len(history(file)) == 49


def test_a_client_that_dies_is_turned_off_with_one_line(tmp_path: Path) -> None:
    body = """
    import psutil
    run = begin("offline")
    step(run, 1)
    for child in psutil.Process().children(recursive=True): child.kill(); child.wait()
    for n in range(2, 2000): step(run, n)
    assert run.off
    end(run)
    os._exit(0)  # past wandb's own farewell, which prints a traceback
    """
    done = execute(tmp_path, body)
    assert done.returncode == 0, done.stderr
    (line,) = warnings_of(done)
    assert line.startswith("warning: wandb is turned off, the run goes on: ")


@pytest.mark.parametrize("found", [None, ModuleType("wandb")], ids=["missing", "a folder of that name"])
def test_a_missing_package_is_named_before_the_run_starts(
    tmp_path: Path, found: ModuleType | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setitem(sys.modules, "wandb", found)
    for mode in ("online", "offline"):
        with pytest.raises(
            MissingExtra, match=r"tracking\.wandb needs wandb: pip install 'tunesmith\[wandb\]'"
        ):
            WandbRun(Wandb(mode=mode), tmp_path)
    run = WandbRun(Wandb(mode="disabled"), tmp_path)
    run.on(RunStarted("run", 1, {}, {}, None))
    run.close()
    assert list(tmp_path.iterdir()) == []
