"""What ends a job whose ranks or machines fail, in what time, and whom it names. Real runs on two processes, on one
machine and on two, each with the fault of one rank put in from outside (tests/distributed/faults.py)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.distributed.faults import put_in
from tests.distributed.nodes import Node, Nodes
from tests.support import tiny_recipe
from tunesmith.recipe.load import dump_recipe

pytestmark = pytest.mark.slow

TIMEOUT = 10.0  # of a collective, seconds
PROMISE = TIMEOUT + 15.0  # from the fault to the end of every process, on all machines
AT = 12  # the 0-based step of the faults

TRAIN = "from tunesmith_launch.cli import main; main()"

STOPS = f"if rank == 1 and step == {AT}: say('FAULT'); os.kill(os.getpid(), signal.SIGSTOP)"
BLOCKS = f"if rank == 1 and step == {AT}: say('FAULT'); time.sleep(1000)"
HOLDS = f"if rank == 1 and step == {AT}: say('FAULT'); [ctypes.PyDLL(None).sleep(1000) for _ in range(99)]"
DIES = f"if rank == 1 and step == {AT}: say('FAULT'); os.kill(os.getpid(), signal.SIGKILL)"
CRASHES = f"if rank == 1 and step == {AT}: say('FAULT'); os.kill(os.getpid(), signal.SIGSEGV)"
ABORTS = f"if rank == 1 and step == {AT}: say('FAULT'); os.kill(os.getpid(), signal.SIGABRT)"
SKIPS = f"""
if rank == 1 and step == {AT}:
    say("FAULT")
    whole = engine.sum
    def skip(values):
        engine.sum = whole
        return values
    engine.sum = skip
"""
FAILS = f"""
if rank == 1 and step == {AT}:
    from tunesmith.errors import TrainingStopped
    say("FAULT")
    raise TrainingStopped("no use")
"""
HEALTHY = """
if rank == 1 and step == 3: time.sleep(7)
if rank == 0 and step == 4: ctypes.PyDLL(None).sleep(7)
"""


@dataclass
class Part:
    """What was started on one machine. Its stdout is that of all its processes: it ends with the last of them."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list[str])
    err: str = ""
    over: float | None = None
    _faulty: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list[threading.Thread])

    def __post_init__(self) -> None:
        for read in (self._read_out, self._read_err):
            self._threads.append(threading.Thread(target=read, daemon=True))
            self._threads[-1].start()

    def _read_out(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.strip())
            if line.startswith("FAULT"):
                self._faulty.set()
        self.process.wait()
        self.over = time.monotonic()
        self._faulty.set()

    def _read_err(self) -> None:
        assert self.process.stderr is not None
        self.err = self.process.stderr.read()

    def until_fault(self) -> float:
        assert self._faulty.wait(180), "no fault"
        return time.monotonic()

    def end(self, started: float) -> float:
        """The seconds from then to the end of all its processes."""
        for thread in self._threads:
            thread.join(PROMISE + 60)
        assert self.over is not None, "a process is left"
        return self.over - started


@dataclass
class Job:
    folder: Path
    parts: list[Part]

    def verdict(self) -> dict[str, Any]:
        return json.loads((self.folder / "exit.json").read_text(encoding="utf-8"))

    def seen(self) -> str:
        return "\n".join(f"{part.process.returncode}:\n{part.err}" for part in self.parts)


class Bench:
    """Starts jobs, and ends what is left of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.job: Job | None = None
        self._mark = f"{os.getpid()}-{time.monotonic_ns()}"

    def train(self, fault: str, *, launcher: str = "tunesmith", **sections: Any) -> Job:
        argv = self._argv(launcher, None, None, sections)
        process = subprocess.Popen(
            argv,
            cwd=self.folder,
            env=os.environ | self._env(fault),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        self.job = Job(self.folder / "runs" / "tiny", [Part(process)])
        return self.job

    def train_on(self, nodes: Nodes, fault: str, *, launcher: str = "tunesmith", **sections: Any) -> Job:
        env = self._env(fault)
        parts = [
            Part(nodes.start(node, self._argv(launcher, nodes, rank, sections), env, self.folder))
            for rank, node in enumerate(nodes)
        ]
        self.job = Job(self.folder / "runs" / "tiny", parts)
        return self.job

    def _argv(
        self, launcher: str, nodes: Nodes | None, rank: int | None, sections: dict[str, Any]
    ) -> list[str]:
        values: dict[str, Any] = {
            "training": {"max_steps": 100_000},
            "checkpoint": {"save_steps": 100_000},
            "parallel": {"strategy": "ddp", "timeout": TIMEOUT},
        }
        recipe = self.folder / "tiny.yaml"
        if not recipe.exists():
            recipe.write_text(dump_recipe(tiny_recipe(self.folder, **(values | sections))), encoding="utf-8")
        address = nodes[0].address if nodes is not None else None
        if launcher == "torchrun":
            how = ["--nnodes=2", "--nproc-per-node=1", f"--node-rank={rank}", f"--master-addr={address}"]
            how = how if nodes is not None else ["--standalone", "--nproc-per-node=2"]
            return [sys.executable, "-m", "torch.distributed.run", *how, "-m", "tunesmith", str(recipe)]
        machines = ["--num-machines", "2", "--machine-rank", str(rank), "--main-process-ip", str(address)]
        argv = ["-c", TRAIN, "train", str(recipe), "--num-processes", "2"]
        return [sys.executable, *argv, *(machines if nodes is not None else [])]

    def _env(self, fault: str) -> dict[str, str]:
        env = {"OMP_NUM_THREADS": "1", "TUNESMITH_DEVICE": "cpu", "ACCELERATE_USE_CPU": "true"}
        return put_in(self.folder, fault) | env | {"TUNESMITH_TEST": self._mark}

    def close(self) -> None:
        for process in psutil.process_iter():
            try:
                if process.environ().get("TUNESMITH_TEST") == self._mark:
                    process.kill()
            except psutil.Error:
                continue
        for part in [] if self.job is None else self.job.parts:
            part.end(0.0)
            for pipe in (part.process.stdout, part.process.stderr):
                assert pipe is not None
                pipe.close()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


def check(job: Job, seconds: float, culprit: str, *, waited: bool = True) -> dict[str, Any]:
    """The promise, and who is named."""
    assert seconds < PROMISE, job.seen()
    assert {part.process.returncode for part in job.parts} == {6}, job.seen()
    found = job.verdict()
    reason = found["reason"]
    assert (found["code"], found["rank"]) == (6, 1), job.seen()
    assert reason.startswith(culprit), reason
    assert f"in step {AT + 1}" in reason
    assert found["step"] == AT
    if waited:
        assert "rank 0 was in collective " in reason
        assert "(all_reduce of 4 Double)" in reason  # the counts, the first of a step
    assert all(part.err.count(reason) == 1 for part in job.parts), job.seen()
    return found


@pytest.mark.parametrize(
    ("fault", "how"),
    [
        (DIES, "is gone: killed"),
        (CRASHES, "is gone: crashed (Segmentation fault)"),
        (STOPS, "is stopped (SIGSTOP)"),
        (BLOCKS, "is in no collective: stuck in code of its own"),
        (HOLDS, "has not answered for"),
    ],
)
def test_a_rank_of_one_machine(bench: Bench, fault: str, how: str) -> None:
    job = bench.train(fault)
    seconds = job.parts[0].end(job.parts[0].until_fault())
    reason = check(job, seconds, "rank 1 (process ")["reason"]
    assert how in reason


def test_a_rank_that_skips_a_collective_is_named_and_not_the_one_that_dies_of_it(bench: Bench) -> None:
    job = bench.train(SKIPS)
    seconds = job.parts[0].end(job.parts[0].until_fault())
    reason = check(job, seconds, "rank 1 (process ", waited=False)["reason"]
    assert "skipped collective " in reason
    assert "(all_reduce of 4 Double)" in reason


def test_a_rank_that_aborts(bench: Bench) -> None:
    """As NCCL has one do that waited past the time-out; here nobody waited, so it is the culprit itself."""
    job = bench.train(ABORTS)
    seconds = job.parts[0].end(job.parts[0].until_fault())
    check(job, seconds, "rank 1 (process ")


def test_a_real_cause_stays_the_answer(bench: Bench) -> None:
    job = bench.train(FAILS)
    job.parts[0].end(job.parts[0].until_fault())
    assert job.parts[0].process.returncode == 4
    assert job.verdict()["reason"] == "no use"
    assert job.parts[0].err.count("no use") <= 2  # the report's line of the stop, and the reason


@pytest.mark.parametrize("launcher", ["tunesmith", "torchrun"])
def test_a_slow_rank_is_left_alone(bench: Bench, launcher: str) -> None:
    """Asleep, and in code that holds the interpreter, both for longer than several beats and below the time-out."""
    job = bench.train(HEALTHY, launcher=launcher, training={"max_steps": 8})
    job.parts[0].until_fault()
    job.parts[0].end(0.0)
    assert job.parts[0].process.returncode == 0, job.seen()
    assert job.verdict()["code"] == 0


@pytest.mark.parametrize(
    ("fault", "how"), [(STOPS, "is stopped (SIGSTOP)"), (BLOCKS, "is in no collective"), (DIES, "rank 1 ")]
)
def test_ranks_that_nobody_supervises(bench: Bench, fault: str, how: str) -> None:
    job = bench.train(fault, launcher="torchrun")
    seconds = job.parts[0].end(job.parts[0].until_fault())
    assert seconds < PROMISE, job.seen()
    found = job.verdict()
    assert (found["code"], found["rank"], found["step"]) == (6, 1, AT), job.seen()
    assert how in found["reason"]
    assert f"in step {AT + 1}" in found["reason"]


# two machines


def of(nodes: Nodes, part: int, rank: str) -> psutil.Process:
    """The rank's process on a machine."""
    for pid in nodes.pids(nodes[part]):
        process = psutil.Process(pid)
        if process.environ().get("RANK") == rank and "tunesmith" in process.cmdline():
            return process
    raise AssertionError(f"no rank {rank}")


def fault_on(job: Job) -> float:
    """When rank 1 had its fault."""
    return job.parts[-1].until_fault()


@pytest.mark.parametrize(
    ("fault", "how"),
    [(STOPS, "is stopped (SIGSTOP)"), (BLOCKS, "is in no collective"), (DIES, "is gone: killed")],
)
def test_a_rank_of_another_machine(bench: Bench, nodes: Nodes, fault: str, how: str) -> None:
    job = bench.train_on(nodes, fault)
    started = fault_on(job)
    seconds = max(part.end(started) for part in job.parts)
    assert how in check(job, seconds, "rank 1 on nodeb (process ")["reason"]


SAYS = f"if rank == 1 and step == {AT}: say('FAULT')"


@pytest.mark.parametrize("what", ["kill", "pull"])
def test_a_machine_that_is_gone(bench: Bench, nodes: Nodes, what: str) -> None:
    """All its processes at once; or its link, with everything on it alive."""
    job = bench.train_on(nodes, f"if step >= {AT}: time.sleep(0.05)\n{SAYS}")
    started = fault_on(job)
    lost(nodes[1], nodes, what)
    seconds = max(part.end(started) for part in job.parts)
    assert seconds < PROMISE, job.seen()
    first, second = job.parts
    assert first.process.returncode == 6, job.seen()
    assert second.process.returncode == (-signal.SIGKILL if what == "kill" else 6), job.seen()
    found = job.verdict()
    assert (found["code"], found["rank"]) == (6, 1 if "machine 1" in found["reason"] else 0)
    assert found["step"] >= AT
    how = "it has closed the connection" if what == "kill" else "nothing was heard from it for 1"
    assert f"machine 1 (nodeb) is lost: {how}" in first.err, job.seen()
    assert " was in collective " in first.err
    if what == "pull":
        assert "machine 0 (nodea) is lost: nothing was heard from it for" in second.err, job.seen()


def lost(node: Node, nodes: Nodes, what: str) -> None:
    if what == "kill":
        nodes.kill(node)
    else:
        nodes.link_down(node)


@pytest.mark.parametrize("what", ["block", "pull"])
def test_ranks_on_two_machines_that_nobody_supervises(bench: Bench, nodes: Nodes, what: str) -> None:
    """torchrun's agent of the other machine may outlive a pulled cable; the ranks do not."""
    job = bench.train_on(
        nodes, BLOCKS if what == "block" else f"time.sleep(0.02)\n{SAYS}", launcher="torchrun"
    )
    started = fault_on(job)
    ranks = [of(nodes, part, str(part)) for part in range(2)]
    if what == "pull":
        nodes.link_down(nodes[1])
    _, alive = psutil.wait_procs(ranks, timeout=PROMISE - (time.monotonic() - started))
    assert not alive, job.seen()
    assert job.verdict()["code"] == 6


def test_a_fault_of_another_machine_is_everybodys_exit_code(bench: Bench, nodes: Nodes) -> None:
    job = bench.train_on(nodes, FAILS)
    started = fault_on(job)
    for part in job.parts:
        part.end(started)
    assert [part.process.returncode for part in job.parts] == [4, 4], job.seen()
    assert job.verdict()["reason"] == "no use"
    assert all("no use" in part.err for part in job.parts), job.seen()
