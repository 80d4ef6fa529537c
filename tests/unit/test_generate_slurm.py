"""What a generated batch script does with the codes and signals of its nodes, under stand-ins for Slurm's commands and
a `tunesmith` that ends as it is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.slurm_stubs import install, requeued
from tunesmith_launch.generate.job import Job
from tunesmith_launch.generate.slurm import Options, script

# CODES: what the run of each node ends with; term: 5, when it is told to stop; hang: never otherwise
TUNESMITH = """
import json, os, pathlib, signal, sys
node = os.environ["SLURM_NODEID"]
pathlib.Path(f"argv-{node}.json").write_text(json.dumps(sys.argv[1:]))
code = os.environ["CODES"].split(",")[int(node)]
if code in {"term", "hang"}:
    def stop(number, frame):
        pathlib.Path(f"stopped-{node}").touch()
        sys.exit(5)
    signal.signal(signal.SIGTERM, stop)
    os.write(int(os.environ["READY"]), b"!")
    while True:
        signal.pause()
sys.exit(int(code))
"""
# what the wait for the others does: returns at once, or lasts until srun kills it
SLEEP = """
import os, signal, sys
assert sys.argv[1:] == ["30"]
if os.environ.get("SLEEP") == "forever":
    signal.pause()
"""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return install(tmp_path / "bin", tunesmith=TUNESMITH, sleep=SLEEP)


@pytest.fixture
def start(tmp_path: Path, environment: dict[str, str]) -> Iterator[Start]:
    started: list[subprocess.Popen[str]] = []

    def start(codes: str, nodes: int = 2, requeues: int = 3, **variables: Any) -> subprocess.Popen[str]:
        job = Job("my recipe.yaml", ("run_name=x y",), "tiny", nodes, 8)
        file = tmp_path / "job.sh"
        file.write_text(script(job, Options(str(tmp_path), requeues=requeues)))
        ready = variables.pop("ready", None)
        own = {"CODES": codes, "SLURM_JOB_NUM_NODES": str(nodes), "READY": str(ready), **variables}
        process = subprocess.Popen(
            ["bash", file],
            cwd=tmp_path,
            env=os.environ | environment | {"SLURM_NODEID": "7"} | own,  # the head's, which must not be used
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=() if ready is None else (ready,),
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with process:  # one that a failed test has left runs without end
            if process.poll() is None:
                for descendant in psutil.Process(process.pid).children(recursive=True):
                    descendant.kill()
                process.kill()


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = process.communicate(timeout=60)
    return process.returncode, err


@pytest.mark.parametrize(
    ("codes", "code", "again"),
    [
        ("0,0", 0, False),
        ("1,1", 1, False),
        ("2,2", 2, False),
        ("3,3", 3, False),
        ("4,4", 4, False),
        ("5,5", 5, True),
        ("6,6", 6, True),
        ("143,143", 143, True),
        ("127,127", 3, False),
    ],
)
def test_the_job_ends_with_the_code_of_the_run(
    start: Start, environment: dict[str, str], codes: str, code: int, again: bool
) -> None:
    """Though srun kills one of the two nodes, which it would call 137."""
    assert end(start(codes))[0] == code
    assert requeued(environment) == (["requeue 1234567"] if again else [])


@pytest.mark.parametrize("codes", ["2,6", "6,2", "5,3", "1,hang"])
def test_the_cause_counts_and_not_who_lost_the_other(
    start: Start, environment: dict[str, str], codes: str
) -> None:
    """He leaves the other time, here for ever, until srun kills him."""
    read, write = os.pipe()
    code, _ = end(start(codes, SLEEP="forever", ready=write))
    os.close(read)
    os.close(write)
    assert str(code) in codes.split(",")
    assert code in {1, 2, 3}
    assert requeued(environment) == []


@pytest.mark.parametrize("codes", ["2,6", "6,2", "5,2", "2,5"])
def test_of_two_that_ended_at_once_the_cause_counts(
    start: Start, environment: dict[str, str], codes: str
) -> None:
    assert end(start(codes, SRUN_TOO_LATE="1"))[0] == 2
    assert requeued(environment) == []


def test_slurms_signal_reaches_every_run_and_their_codes_are_waited_for(
    start: Start, environment: dict[str, str], tmp_path: Path
) -> None:
    read, write = os.pipe()
    process = start("term,term", ready=write)
    os.close(write)
    assert len(os.read(read, 1) + os.read(read, 1)) == 2
    os.kill(int(Path(environment["SRUN_PID"]).read_text()), signal.SIGUSR1)
    assert end(process)[0] == 5
    os.close(read)
    assert sorted(file.name for file in tmp_path.glob("stopped-*")) == ["stopped-0", "stopped-1"]
    assert requeued(environment) == ["requeue 1234567"]


def test_each_node_is_told_its_own_number(start: Start, tmp_path: Path) -> None:
    assert end(start("0,0")) == (0, "")
    for node in range(2):
        assert json.loads((tmp_path / f"argv-{node}.json").read_text()) == [
            "train",
            "my recipe.yaml",
            "run_name=x y",
            *("--num-processes", "16", "--num-machines", "2", "--restart"),
            *("--main-process-ip", "127.0.0.1", "--main-process-port", str(15000 + 2 * (1234567 % 7500))),
            *("--machine-rank", str(node)),
        ]


@pytest.mark.parametrize(("codes", "code", "again"), [("0", 0, 0), ("2", 2, 0), ("5", 5, 1), ("6", 6, 1)])
def test_one_node(
    start: Start, environment: dict[str, str], tmp_path: Path, codes: str, code: int, again: int
) -> None:
    assert end(start(codes, nodes=1)) == (code, "")
    words = ["train", "my recipe.yaml", "run_name=x y", "--num-processes", "8", "--restart"]
    assert json.loads((tmp_path / "argv-0.json").read_text()) == words
    assert len(requeued(environment)) == again


def test_requeues_have_an_end(start: Start, environment: dict[str, str]) -> None:
    assert end(start("6,6", SLURM_RESTART_COUNT="3"))[0] == 6
    assert requeued(environment) == []
    assert end(start("6,6", SLURM_RESTART_COUNT="2"))[0] == 6
    assert requeued(environment) == ["requeue 1234567"]
    assert end(start("6,6", requeues=0))[0] == 6
    assert requeued(environment) == ["requeue 1234567"]


def test_out_of_memory_as_slurm_says_it(start: Start) -> None:
    assert end(start("253,0"))[0] == 3


def test_what_is_missing_fails_the_job(start: Start, environment: dict[str, str], tmp_path: Path) -> None:
    """And never falls back to a world of one."""
    code, err = end(start("0,0", SLURM_JOB_NODELIST="unknown"))
    assert code == 1
    assert "scontrol:" in err
    code, err = end(start("0,0", SCONTROL_HOSTS=""))
    assert (code, err) == (3, "scontrol names no host of this job\n")
    code, err = end(start("0,0", SLURM_JOB_NUM_NODES="1"))
    assert (code, err) == (2, "this script is for --nodes 2, not 1: generate another\n")
    (tmp_path / "bin" / "tunesmith").unlink()
    path = f"{tmp_path}/bin:/usr/bin:/bin"
    code, err = end(start("0,0", PATH=path))
    assert code == 3
    assert err.startswith("no tunesmith on ")
    assert not list(tmp_path.glob("argv-*"))
