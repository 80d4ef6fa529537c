"""Saving under real faults: killed processes, full disks, damaged files, a rank that fails or dies.

This file is also the program of the processes that get killed: `python FILE sweep|rank ...`.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import pytest

from tunesmith.checkpoint import publication
from tunesmith.checkpoint.publication import publish
from tunesmith.checkpoint.store import clean_leftovers, find_latest, verify
from tunesmith.errors import MachineError, TunesmithError

T = TypeVar("T")


def text_writer(name: str, content: str, halfway: Callable[[], object] = lambda: None) -> publication.Writer:
    def write(folder: Path) -> list[Path]:
        with (folder / name).open("w") as file:
            file.write(content[: len(content) // 2])
            file.flush()
            halfway()
            file.write(content[len(content) // 2 :])
        return [folder / name]

    return write


def put(
    run: Path, step: int, content: str, halfway: Callable[[], object] = lambda: None, **settings: Any
) -> None:
    writers = [text_writer(name, content, halfway) for name in ("weights", "optim", "progress")]
    publish(run, step, writers, recipe_sha256="r", meta={"samples": 12, "best": 0.25}, **settings)


# Killed at every point.


def kill_at(point: int, run: Path) -> Callable[[], None]:
    """Arms this process: SIGKILL before the `point`-th action on the file system below `run`. Returns what an
    action that Python does not audit calls."""
    count = 0

    def tick() -> None:
        nonlocal count
        if count == point:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") or (
            event == "open" and str(arguments[0]).startswith(str(run))
        ):
            tick()

    fsync = os.fsync

    def ticking_fsync(descriptor: int) -> None:
        fsync(descriptor)
        tick()

    sys.addaudithook(audit)
    os.fsync = ticking_fsync
    return tick


def sweep(base: Path, before: int | None, step: int) -> None:
    """For every point of a publication: forks a process that dies there, and prints what is then found."""
    outcomes: list[Any] = []
    for point in range(1000):
        run = base / str(point)
        run.mkdir()
        if before is not None:
            put(run, before, "the old content")
        pid = os.fork()
        if pid == 0:
            put(run, step, "the new content", kill_at(point, run), keep=1)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        clean_leftovers(run)
        found = find_latest(run)
        assert not any(verify(path) for path in run.iterdir()), "a half checkpoint under its name"
        content = (found.latest.path / "weights").read_text() if found.latest else None
        outcomes.append([found.latest and found.latest.manifest.step, content, sorted(os.listdir(run))])
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    print(json.dumps(outcomes))


@pytest.mark.parametrize("before", [None, 100, 200])
def test_whatever_the_moment_of_the_kill_a_whole_checkpoint_is_found(
    tmp_path: Path, before: int | None
) -> None:
    """`before`: the step of the checkpoint that is there when step 200 is published with `keep=1`."""
    command = [sys.executable, __file__, "sweep", str(tmp_path), str(before), "200"]
    result = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    *killed, finished = json.loads(result.stdout)
    new = [200, "the new content", ["checkpoint-200"]]
    old = [before, "the old content", [f"checkpoint-{before}"]] if before else [None, None, []]
    # killed after the rename, before the old one is deleted
    both = [200, "the new content", ["checkpoint-100", "checkpoint-200"]]
    assert finished == new
    assert len(killed) > 20
    assert old in killed
    assert all(outcome in (old, new) or (before == 100 and outcome == both) for outcome in killed)
    # once the new one has been seen, the old one is never seen again
    assert killed == sorted(killed, key=lambda outcome: outcome[1] == "the new content")


# Damage.


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two whole checkpoints."""
    put(tmp_path, 100, "the content of one hundred")
    put(tmp_path, 200, "the content of two hundred")
    return tmp_path


def assert_skipped(run: Path, reason: str) -> None:
    found = find_latest(run)
    assert found.latest is not None
    assert found.latest.path.name == "checkpoint-100"
    assert [(broken.path.name, broken.reason) for broken in found.skipped] == [("checkpoint-200", reason)]
    assert (run / "checkpoint-200").is_dir()


@pytest.mark.parametrize("name", ["weights", "optim", "progress", "manifest.json"])
def test_a_flipped_bit_anywhere_is_found_and_named(run: Path, name: str) -> None:
    rng = random.Random(name)
    path = run / "checkpoint-200" / name
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        found = find_latest(run)
        assert found.latest is not None
        assert found.latest.path.name == "checkpoint-100", f"byte {position}: {bytes(damaged)!r}"
        assert found.skipped[0].reason.startswith(f"{name}: ")
    path.write_bytes(whole)
    latest = find_latest(run).latest
    assert latest is not None
    assert latest.path.name == "checkpoint-200"


@pytest.mark.parametrize("name", ["weights", "optim", "progress"])
def test_truncated_longer_and_missing_files(run: Path, name: str) -> None:
    path = run / "checkpoint-200" / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert_skipped(run, f"{name}: 25 bytes instead of 26")
    path.write_bytes(b"")
    assert_skipped(run, f"{name}: 0 bytes instead of 26")
    path.write_bytes(whole + b"\0")
    assert_skipped(run, f"{name}: 27 bytes instead of 26")
    path.unlink()
    assert_skipped(run, f"{name}: missing")
    path.mkdir()
    assert_skipped(run, f"{name}: not a regular file")


def test_every_damaged_file_is_named(run: Path) -> None:
    (run / "checkpoint-200" / "optim").unlink()
    (run / "checkpoint-200" / "weights").write_text("the content of two hundreD")
    assert_skipped(run, "weights: damaged (its sha256 does not match); optim: missing")


def test_a_missing_truncated_or_edited_manifest(run: Path) -> None:
    path = run / "checkpoint-200" / "manifest.json"
    text = path.read_text()
    edited = "manifest.json: edited or damaged (its own sha256 does not match)"
    for old, new in [('"samples": 12', '"samples": 13'), ('"size": 26', '"size": 25'), ("{", '{"x": 1,')]:
        assert old in text
        path.write_text(text.replace(old, new, 1))
        assert_skipped(run, edited)
    body = json.loads(text)
    del body["sha256"]
    path.write_text(json.dumps(body))
    assert_skipped(run, edited)
    path.write_text("[]")
    assert_skipped(run, edited)
    path.write_text("")
    assert_skipped(run, "manifest.json: not JSON (Expecting value: line 1 column 1 (char 0))")
    path.unlink()
    assert_skipped(run, "manifest.json: missing")


def test_a_checkpoint_under_another_step_is_refused(run: Path) -> None:
    os.rename(run / "checkpoint-200", run / "checkpoint-300")
    found = find_latest(run)
    assert found.latest is not None
    assert found.latest.path.name == "checkpoint-100"
    assert found.skipped[0].reason == "manifest.json: belongs to step 200"


def test_nothing_whole_is_no_checkpoint(run: Path) -> None:
    for step in (100, 200):
        (run / f"checkpoint-{step}" / "weights").unlink()
    found = find_latest(run)
    assert found.latest is None
    assert [broken.path.name for broken in found.skipped] == ["checkpoint-200", "checkpoint-100"]


# A full disk.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 800 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=800k", "tmpfs", str(disk)]
    if mount is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("cannot mount a tmpfs (needs root)")
    yield disk
    # lazily: torch.save's file stays open as long as the traceback of its failure
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def model_and_optimizer() -> tuple[Any, Any]:
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.Tanh(), torch.nn.Linear(512, 8))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def train(model: Any, optimizer: Any, steps: range) -> None:
    import torch

    for step in steps:
        inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()


def state_writer(model: Any, optimizer: Any, how: str) -> publication.Writer:
    import torch
    from safetensors.torch import save_file

    from tunesmith.checkpoint.tensors import save_state

    def write(folder: Path) -> list[Path]:
        state = {"model": dict(model.state_dict()), "optim": optimizer.state_dict()}
        match how:
            case "torch":
                torch.save(state, folder / "state.pt")
                return [folder / "state.pt"]
            case "safetensors":
                tensors = {
                    f"{i}.{key}": value
                    for i, item in state["optim"]["state"].items()
                    for key, value in item.items()
                }
                save_file({**state["model"], **tensors}, folder / "state.safetensors")
                return [folder / "state.safetensors"]
            case _:
                return list(save_state(folder / "state", state))

    return write


@pytest.mark.parametrize("how", ["ours", "torch", "safetensors"])
def test_a_full_disk_leaves_the_old_checkpoint_and_it_resumes(small_disk: Path, how: str) -> None:
    import torch

    from tunesmith.checkpoint.tensors import load_state

    def save(step: int, how: str) -> None:
        writer = state_writer(model, optimizer, how)
        publish(small_disk, step, [writer], recipe_sha256="r", meta={}, keep=1)

    model, optimizer = model_and_optimizer()
    train(model, optimizer, range(4))
    save(4, "ours")
    train(model, optimizer, range(4, 8))
    with pytest.raises(MachineError) as caught:
        save(8, how)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"checkpoint-8 was not saved in {small_disk}: rank 0: ")
    assert str(caught.value).endswith(f" bytes needed, {shutil.disk_usage(small_disk).free:,} free")
    if how != "torch":
        assert "No space left on device" in str(caught.value)
    assert os.listdir(small_disk) == ["checkpoint-4"]

    found = find_latest(small_disk).latest
    assert found is not None
    resumed, resumed_optimizer = model_and_optimizer()
    state = load_state(found.path / "state")
    resumed.load_state_dict(state["model"])
    resumed_optimizer.load_state_dict(state["optim"])
    train(resumed, resumed_optimizer, range(4, 8))
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


# Several ranks.


class GlooGroup:
    """Two real processes."""

    def __init__(self, rank: int, rendezvous: str) -> None:
        import torch.distributed

        self.dist = torch.distributed
        self.rank = rank
        self.world_size = 2
        self.dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)

    def broadcast(self, obj: T) -> T:
        box: list[Any] = [obj if self.rank == 0 else None]
        self.dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, obj: T) -> list[T]:
        into: list[Any] | None = [None, None] if self.rank == 0 else None
        self.dist.gather_object(obj, into, dst=0)
        return into or []

    def barrier(self) -> None:
        self.dist.barrier()


def divide_by_zero() -> NoReturn:
    raise ZeroDivisionError("nothing to divide by")


def kill_self() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))


def refuse_rename(source: Path, target: Path) -> NoReturn:
    raise PermissionError(13, "Permission denied", str(source))


def rank_program(run: Path, rank: int, scenarios: list[str]) -> None:
    """Publishes once per scenario, prints what each raised or None, and on rank 0 what is there then."""
    group = GlooGroup(rank, f"{run}.rendezvous")
    outcomes: list[Any] = []
    for step, scenario in enumerate(scenarios, 1):
        where, halfway, needed, rename = run, lambda: None, None, os.rename
        match scenario, rank:
            case "disk", 1:
                halfway = limit_files
            case "bug", 1:
                halfway = divide_by_zero
            case "kill", 1:
                halfway = kill_self
            case "elsewhere", 1:
                where = run.with_name("elsewhere")
            case "space", _:
                needed = 10**15
            case "rename", 0:
                os.rename = refuse_rename
            case _:
                pass
        writer = text_writer(f"weights-{rank}", f"of rank {rank}, step {step}", halfway)
        try:
            publish(
                where, step, [writer], recipe_sha256="r", meta={}, group=group, keep=1, bytes_needed=needed
            )
            raised = None
        except (TunesmithError, ZeroDivisionError) as error:
            raised = [type(error).__name__, str(error)]
        os.rename = rename
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        outcomes.append([raised, sorted(os.listdir(run)) if rank == 0 else None])
    group.dist.destroy_process_group()
    print(json.dumps(outcomes))


def run_ranks(run: Path, *scenarios: str) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of both ranks."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "rank", str(run), str(rank), *scenarios],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    results: list[tuple[int, str, str]] = []
    for process in ranks:
        out, err = process.communicate(timeout=300)
        results.append((process.returncode, out, err))
    return results


def test_a_rank_that_cannot_write_stops_both_and_the_old_checkpoint_stays(tmp_path: Path) -> None:
    run = tmp_path / "run"
    results = run_ranks(run, "none", "disk", "bug", "elsewhere", "space", "rename", "none")
    assert [code for code, _, _ in results] == [0, 0], results
    lead, peer = (json.loads(out) for _, out, _ in results)
    for _, listing in lead[:-1]:
        assert listing == ["checkpoint-1"]
    raised = [[a, b] for (a, _), (b, _) in zip(lead, peer, strict=True)]

    assert raised[0] == [None, None]
    where = f"was not saved in {run}"
    for step, start, end in [
        (2, f"checkpoint-2 {where}: rank 1: File too large; more than ", " free"),
        (4, f"checkpoint-4 {where[:-3]}elsewhere: rank 1: {tmp_path}/elsewhere/.checkpoint-4.tmp-", " free"),
        (5, f"checkpoint-5 {where}: rank 0: 2,000,000,000,000,000 bytes needed, ", " free"),
        (6, f"checkpoint-6 {where}: rank 0: {run}/.checkpoint-6.tmp-", " free"),
    ]:
        (kind, line), other = raised[step - 1]
        assert other == [kind, line]
        assert kind == "MachineError"
        assert line.startswith(start), line
        assert line.endswith(end), line
    bug = f"checkpoint-3 {where}: rank 1: ZeroDivisionError: nothing to divide by"
    assert raised[2] == [["TunesmithError", bug], ["ZeroDivisionError", "nothing to divide by"]]

    assert raised[6] == [None, None]
    assert lead[-1][1] == ["checkpoint-7"]
    found = find_latest(run).latest
    assert found is not None
    assert found.manifest.world_size == 2
    assert list(found.manifest.files) == ["weights-0", "weights-1"]
    assert (found.path / "weights-1").read_text() == "of rank 1, step 7"


def test_a_rank_that_is_killed_while_it_saves(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (code, out, _), (peer_code, _, _) = run_ranks(run, "none", "kill")
    assert peer_code == -signal.SIGKILL
    assert code == 1
    assert out == ""
    (leftover,) = clean_leftovers(run)
    assert leftover.name.startswith(".checkpoint-2.tmp-")
    found = find_latest(run)
    assert found.latest is not None
    assert found.latest.path.name == "checkpoint-1"
    assert os.listdir(run) == ["checkpoint-1"]


if __name__ == "__main__":
    if sys.argv[1] == "sweep":
        sweep(Path(sys.argv[2]), None if sys.argv[3] == "None" else int(sys.argv[3]), int(sys.argv[4]))
    else:
        rank_program(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
