"""Watching over the ranks of a run. Most tests run the real entry of a rank (`tunesmith.__main__`) with a training
of a few lines in place of `tunesmith.run`, under an agent of a few lines that acts as torchrun's does; the last ones
run `tunesmith train` on two processes as it is.

Every process of a test inherits the supervisor's stdout, so that reading it to its end waits for all of them: a
process left behind would fail the test by the time limit of `communicate`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import indent
from typing import IO, Any

import psutil
import pytest

from tests.support import tiny_recipe
from tunesmith.recipe.load import dump_recipe

RECIPE = """
model: {model_name_or_path: builtin:minilm}
data: {train: {path: a.csv, format: classification, columns: {text: text, label: label}}}
objective: {type: classification}
"""

# one rank: the real entry; READ is what it does before it reads the recipe, BODY what it does for training
RANK = """
import os, signal, sys, types
from tunesmith.errors import *
rank = int(os.environ.get("RANK", "0"))
def say(*words): os.write(1, (" ".join(map(str, words)) + "\\n").encode())
def wait(): os.read(os.open(os.environ["GO"], os.O_RDONLY), 1)
def run(recipe, base, how):
BODY
module = types.ModuleType("tunesmith.run")
module.run, module.Resume = run, lambda *how: how
sys.modules["tunesmith.run"] = module
import tunesmith.__main__ as entry
def reads(load, *given):
READ
    return load(*given)
entry.load_recipe = lambda *given, load=entry.load_recipe: reads(load, *given)
sys.exit(entry.main())
"""

# torchrun's agent: ranks in sessions of their own, the others ended as soon as one fails, a table, and exit code 1
AGENT = """
import os, signal, subprocess, sys
ranks = [subprocess.Popen([sys.executable, *sys.argv[1:]], start_new_session=True,
                          env=os.environ | {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2"}) for r in (0, 1)]
def end(number, frame):
    for rank in ranks:
        rank.send_signal(number)
signal.signal(signal.SIGTERM, end)
failed = False
while left := [rank for rank in ranks if rank.returncode is None]:
    pid, status = os.wait()
    for rank in left:
        if rank.pid == pid:
            rank.returncode = os.waitstatus_to_exitcode(status)
            if rank.returncode and not failed:
                failed = True
                for other in left:
                    if other is not rank:
                        other.send_signal(signal.SIGTERM)
if failed:
    sys.exit("THE TABLE OF FAILURES")
"""

DRIVER = """
import sys
from pathlib import Path
from tunesmith_launch.command import Command
from tunesmith_launch.supervise import Grace, supervise
folder, agent, grace, *argv = sys.argv[1:]
command = Command((sys.executable, *argv), has_agent=bool(agent))
sys.exit(supervise(command, Path(folder), grace=Grace(**eval(grace))))
"""


@dataclass
class Job:
    """A supervised run in a process of its own, which leads a group as a shell would have it."""

    process: subprocess.Popen[str]
    folder: Path
    go: Path
    opened: list[int] = field(default_factory=list[int])

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def lines(self, number: int) -> list[str]:
        return sorted(self.line() for _ in range(number))

    def ctrl_c(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)

    def let_go(self, ranks: int) -> None:
        """Gives each rank the byte that it waits for, whether it has begun to wait or not."""
        self.opened.append(os.open(self.go, os.O_RDWR))
        os.write(self.opened[-1], b"!" * ranks)

    def end(self) -> tuple[int, str, str]:
        """Waits for every process of the job: (exit code, rest of stdout, stderr)."""
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, out, err

    def exit_json(self) -> dict[str, Any]:
        return json.loads((self.folder / "exit.json").read_text(encoding="utf-8"))


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Any]:
    started: list[Job] = []

    def start(
        body: str,
        *,
        read: str = "",
        ranks: int = 2,
        grace: dict[str, float] | None = None,
        **variables: str,
    ) -> Job:
        (tmp_path / "r.yaml").write_text(RECIPE)
        program = RANK.replace("BODY", indent(body, "    ")).replace("READ", indent(read, "    "))
        (tmp_path / "rank.py").write_text(program)
        (tmp_path / "agent.py").write_text(AGENT)
        folder = tmp_path / "runs" / "r"
        go = tmp_path / "go"
        os.mkfifo(go)
        argv = ["rank.py", "r.yaml"] if ranks == 1 else ["agent.py", "rank.py", "r.yaml"]
        started.append(
            Job(
                _start(tmp_path, DRIVER, folder, ranks > 1 or "", grace or {}, *argv, GO=go, **variables),
                folder,
                go,
            )
        )
        return started[-1]

    # under nohup the tests would hand down an ignored SIGHUP, which the launcher respects
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield start
    signal.signal(signal.SIGHUP, before)
    for job in started:
        _kill_all(job)


def _kill_all(job: Job) -> None:
    """What a failed test has left: all that knows the job's pipe."""
    for pipe in job.opened:
        os.close(pipe)
    for process in psutil.process_iter():
        try:
            if process.environ().get("GO") == str(job.go):
                process.kill()
        except psutil.Error:
            continue
    job.process.communicate(timeout=60)


def _start(folder: Path, program: str, *arguments: object, **variables: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        cwd=folder,
        env=os.environ | {name: str(value) for name, value in variables.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


# the end of a run


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_is_done(jobs: Any, ranks: int) -> None:
    job = jobs("say('trained')", ranks=ranks)
    assert job.end() == (0, "trained\n" * ranks, "")
    assert job.exit_json() == {"code": 0, "reason": "done", "rank": 0, "step": None}
    assert [file.name for file in job.folder.iterdir()] == ["exit.json"]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("error", "code"),
    [
        ("UserError('wrong\\nand wrong again')", 2),
        ("MissingExtra('wandb', 'wandb', 'tracking.wandb')", 3),
        ("TrainingStopped('not finite')", 4),
        ("Interrupted('stopped')", 5),
    ],
)
def test_an_error_for_the_user_is_said_once_and_its_code_returned(
    jobs: Any, ranks: int, error: str, code: int
) -> None:
    job = jobs(f"raise {error}", ranks=ranks)
    returned, _, err = job.end()
    assert returned == code
    found = job.exit_json()
    assert (found["code"], err) == (code, found["reason"] + "\n")
    assert "Error" not in err


FIRST_WAITS = "if rank == 0: wait()\n"


def test_a_rank_that_is_ended_before_it_knows_the_folder_leaves_the_word_to_the_other(jobs: Any) -> None:
    """The agent ends rank 0, which has not read the recipe, for rank 1's error."""
    job = jobs("raise UserError('wrong')", read=FIRST_WAITS)
    assert job.end() == (2, "", "wrong\n")
    assert job.exit_json()["rank"] == 1


def test_an_error_that_only_a_later_rank_came_to_is_said(jobs: Any) -> None:
    """No rank knows the folder yet."""
    assert jobs("pass", read=FIRST_WAITS + "raise UserError('wrong')").end() == (2, "", "wrong\n")


def test_an_error_that_all_ranks_came_to_is_said_once(jobs: Any) -> None:
    assert jobs("pass", read="raise UserError('wrong')").end() == (2, "", "wrong\n")


def test_a_fault_of_ours_that_only_a_later_rank_came_to_shows_its_traceback(jobs: Any) -> None:
    code, _, err = jobs("pass", read=FIRST_WAITS + "raise KeyError('ours')").end()
    assert code == 1
    assert err.count("Traceback") == 1
    assert err.endswith("KeyError: 'ours'\n")
    assert "interrupted" not in err


@pytest.mark.parametrize("knows", ["neither", "one"])
def test_a_stop_before_all_ranks_know_the_folder_is_said_once(jobs: Any, knows: str) -> None:
    job = jobs(
        "say('x')\nwait()", read="if rank == 0: say('x'); wait()\n" if knows == "one" else "say('x'); wait()"
    )
    job.lines(2)
    job.ctrl_c()
    code, _, err = job.end()
    assert (code, err) == (130, "interrupted before the first checkpoint: nothing was saved\n")


def test_the_cause_counts_and_not_the_peer_that_lost_its_connection(jobs: Any) -> None:
    """Rank 1 fails once rank 0 has said that it lost a peer."""
    job = jobs(
        "if rank == 0: raise RuntimeError('[gloo/transport/tcp/pair.cc:1] Connection closed by peer [::1]:1')\n"
        "import pathlib, signal\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "from tunesmith.ending import read\n"
        "while read(pathlib.Path('runs/r')) is None: pass\n"
        "raise DataError('bad row')"
    )
    code, _, err = job.end()
    assert (code, job.exit_json()["reason"], job.exit_json()["rank"]) == (2, "bad row", 1)
    assert err.splitlines()[-1] == "bad row"


def test_a_peer_that_lost_its_connection_says_so_where_there_is_no_other_cause(jobs: Any) -> None:
    job = jobs("raise RuntimeError('[gloo/transport/tcp/pair.cc:1] Connection closed by peer [::1]:1')")
    code, _, err = job.end()
    assert (code, job.exit_json()["code"]) == (6, 6)
    assert err.count("a peer was lost") == 1
    assert "--resume" in err


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_fault_of_ours_shows_one_traceback(jobs: Any, ranks: int) -> None:
    job = jobs("raise KeyError('ours')", ranks=ranks)
    code, _, err = job.end()
    assert (code, job.exit_json()["reason"]) == (1, "KeyError: 'ours'")
    assert err.count("Traceback") == 1
    assert err.endswith("KeyError: 'ours'\n")
    assert "TABLE" not in err


def test_debug_shows_the_traceback_and_the_launchers_words(jobs: Any) -> None:
    _, _, err = jobs("raise UserError('wrong')", TUNESMITH_DEBUG="1").end()
    assert "Traceback" in err
    assert "THE TABLE OF FAILURES" in err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        ("MemoryError()", 3, "out of memory; lower training.per_device_train_batch_size"),
        (
            "type('OutOfMemoryError', (RuntimeError,), {})('CUDA out of memory.')",
            3,
            "the device is out of memory",
        ),
        ("OSError(28, 'No space left on device', 'a.bin')", 3, "the disk is full (a.bin)"),
        ("SystemExit(0)", 1, "something called exit(0)"),
    ],
)
def test_what_the_machine_lacks(jobs: Any, error: str, code: int, words: str) -> None:
    returned, _, err = jobs(f"raise {error}", ranks=1).end()
    assert returned == code
    assert words in err
    assert "Traceback" not in err


def test_a_rank_that_is_gone_counts_and_not_the_stop_of_the_others(jobs: Any) -> None:
    """The agent ends rank 1 by SIGTERM, before it can save."""
    job = jobs("if rank == 0: os._exit(9)\nos.makedirs('runs/r/checkpoint-4')\nwait()")
    code, _, err = job.end()
    assert code == job.exit_json()["code"] == 6
    assert err.startswith("rank 0 (process ")
    assert err.count("\n") == 1


def test_a_launcher_that_starts_no_rank_shows_its_words(tmp_path: Path) -> None:
    (tmp_path / "agent.py").write_text("import sys; sys.exit('no address for node7')")
    process = _start(tmp_path, DRIVER, tmp_path / "runs", "agent", {}, "agent.py")
    assert process.communicate(timeout=60)[1] == "no address for node7\n"
    assert process.returncode == 1


def test_the_last_step_is_in_exit_json(jobs: Any) -> None:
    job = jobs(
        "os.makedirs('runs/r/checkpoint-4')\n"
        "open('runs/r/metrics.jsonl', 'w').write('{\"step\": 7}\\n{\"step\": 8, \"lo')\n"
        "raise TrainingStopped('not finite')",
        ranks=1,
    )
    job.end()
    assert job.exit_json()["step"] == 7


# ranks that are killed


def test_a_killed_process_is_told_from_a_wrong_input(jobs: Any) -> None:
    job = jobs("os.kill(os.getpid(), signal.SIGKILL)", ranks=1)
    code, _, err = job.end()
    assert code == job.exit_json()["code"] == 3
    assert "lack of memory" in err


def test_a_crashed_process_names_its_signal(jobs: Any) -> None:
    code, _, err = jobs("os.kill(os.getpid(), signal.SIGSEGV)", ranks=1).end()
    assert code == 1
    assert "Fatal Python error: Segmentation fault" in err
    assert err.endswith("the process was ended by SIGSEGV\n")


def test_a_killed_rank_ends_the_job_as_resumable(jobs: Any) -> None:
    """The other one hangs, as in a collective, and heeds no SIGTERM."""
    job = jobs(
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nsay(rank, os.getpid())\nwait()",
        grace={"failure": 0.5},
    )
    pids = dict(line.split() for line in job.lines(2))
    os.kill(int(pids["1"]), signal.SIGKILL)
    code, _, err = job.end()
    assert code == 6
    assert err == job.exit_json()["reason"] + "\n"
    assert err.startswith(f"rank 1 (process {pids['1']}) is gone")
    assert job.exit_json()["rank"] == 1


def test_ranks_that_outlive_a_killed_launcher_are_stopped(jobs: Any) -> None:
    job = jobs("say(os.getppid())\nwait()")
    agent = {int(line) for line in job.lines(2)}
    assert len(agent) == 1
    os.kill(agent.pop(), signal.SIGKILL)
    code, _, err = job.end()
    assert code == 143
    assert err.count("nothing was saved") == 1


def test_ranks_stop_where_the_supervisor_is_killed(jobs: Any) -> None:
    job = jobs("say('up')\nwait()")
    job.lines(2)
    job.process.kill()
    job.end()
    assert job.exit_json()["code"] == 143


def test_helpers_that_a_rank_leaves_behind_are_ended(jobs: Any) -> None:
    job = jobs("if os.fork() == 0: signal.pause()\nsay('trained')", ranks=1)
    assert job.end()[:2] == (0, "trained\n")


# signals


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_reaches_every_rank_exactly_once(jobs: Any, ranks: int) -> None:
    job = jobs(
        "got = []\n"
        "signal.signal(signal.SIGINT, lambda *_: got.append(1))\n"
        "came, wakeup = os.pipe()\n"
        "os.set_blocking(wakeup, False)\n"
        "signal.set_wakeup_fd(wakeup)\n"
        "say('up')\n"
        "os.read(came, 1)\n"
        "say('stopping')\n"
        "wait()\n"
        "say(len(got))\n"
        "raise Interrupted('stopped after step 3')",
        ranks=ranks,
    )
    assert job.lines(ranks) == ["up"] * ranks
    job.ctrl_c()
    assert job.lines(ranks) == ["stopping"] * ranks
    job.let_go(ranks)
    code, out, err = job.end()
    assert (code, out, err) == (5, "1\n" * ranks, "stopped after step 3\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_end_asked_for_by_a_scheduler_or_a_closed_terminal_is_sigterm(jobs: Any, number: int) -> None:
    job = jobs(
        "def stop(number, frame): raise Interrupted(f'stopped by {number}')\n"
        "signal.signal(signal.SIGTERM, stop)\nsay('up')\nwait()"
    )
    job.lines(2)
    job.process.send_signal(number)
    assert job.end()[::2] == (5, "stopped by 15\n")


def test_a_second_ctrl_c_ends_ranks_that_do_not_listen(jobs: Any) -> None:
    job = jobs(
        "signal.signal(signal.SIGINT, lambda *_: say('heard'))\nsay('up')\nwhile True: signal.pause()",
        grace={"hurry": 0.2},
    )
    job.lines(2)
    job.ctrl_c()
    assert job.lines(2) == ["heard"] * 2
    job.ctrl_c()
    code, _, err = job.end()
    assert code == job.exit_json()["code"] == 130
    assert err == "interrupted before the first checkpoint: nothing was saved\n"


def test_a_stop_before_training_begins(jobs: Any) -> None:
    job = jobs("say('up')\nwait()")
    job.lines(2)
    job.ctrl_c()
    code, _, err = job.end()
    assert (code, err) == (130, "interrupted before the first checkpoint: nothing was saved\n")


def test_a_stop_between_checkpoints_is_resumable(jobs: Any) -> None:
    job = jobs("say('up')\nwait()")
    job.lines(2)
    (job.folder / "checkpoint-4").mkdir(parents=True)
    job.ctrl_c()
    code, _, err = job.end()
    assert (code, job.exit_json()["step"]) == (5, 4)
    assert "continue from the last with --resume" in err


# the whole of it, on two processes


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    found = tiny_recipe(tmp_path, training={"max_steps": 100_000}, checkpoint={"save_steps": 50})
    path = tmp_path / "tiny.yaml"
    path.write_text(dump_recipe(found), encoding="utf-8")
    return path


def _train(recipe: Path, *arguments: str) -> subprocess.Popen[str]:
    program = "from tunesmith_launch.cli import main; main()"
    command = ("train", recipe, "--num-processes", "2", *arguments)
    return _start(recipe.parent, program, *command, OMP_NUM_THREADS="1", TUNESMITH_DEVICE="cpu")


def _until(stream: IO[str] | None, words: str) -> None:
    assert stream is not None
    seen: list[str] = []
    for line in stream:
        seen.append(line)
        if words in line:
            return
    raise AssertionError(f"no {words!r} in\n{''.join(seen)}")


def test_training_on_two_processes_stops_and_continues(recipe: Path) -> None:
    folder = recipe.parent / "runs" / "tiny"
    steps = [0]
    for how in ([], ["--resume"]):
        job = _train(recipe, *how)
        _until(job.stderr, f"step {steps[-1] + 3}/")
        os.killpg(job.pid, signal.SIGINT)
        _, err = job.communicate(timeout=120)
        assert job.returncode == 5, err
        stopped = json.loads((folder / "exit.json").read_text())
        assert (stopped["code"], err.splitlines().count(stopped["reason"])) == (5, 1)
        assert (folder / f"checkpoint-{stopped['step']}").is_dir()
        steps.append(stopped["step"])
    assert steps[0] < steps[1] < steps[2]


def test_training_ends_with_6_where_a_rank_is_killed(recipe: Path) -> None:
    job = _train(recipe)
    _until(job.stderr, "step 3/")
    (agent,) = psutil.Process(job.pid).children()
    victim = next(rank for rank in agent.children() if rank.environ()["RANK"] == "1")
    victim.kill()
    _, err = job.communicate(timeout=120)
    assert job.returncode == 6, err
    assert f"rank 1 (process {victim.pid}) is gone" in err
    assert "Traceback" not in err
    assert "ChildFailedError" not in err


def test_wrong_data_on_two_processes_is_one_line(recipe: Path) -> None:
    job = _train(recipe, "data.train.0.path=none.jsonl")
    _, err = job.communicate(timeout=120)
    assert job.returncode == 2, err
    (line,) = err.splitlines()
    assert "none.jsonl: no such file" in line
