"""The folder of a run, as a run begins: new, continued or replaced."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tunesmith.checkpoint.store import Checkpoint, clean_leftovers, find_latest
from tunesmith.ending import holds_a_run
from tunesmith.engine import Engine
from tunesmith.errors import TunesmithError, UserError


@dataclass(frozen=True, slots=True)
class Resume:
    """`--resume` (the newest whole checkpoint of the run), `--overwrite`, or `--restart` (what a job that may be
    started again passes always: the newest whole checkpoint, or from the beginning where there is none); none of
    them refuses a used folder."""

    resume: bool = False
    overwrite: bool = False
    restart: bool = False


def open_run_dir(engine: Engine, run_dir: Path, how: Resume) -> Checkpoint | None:
    """Makes the folder on rank 0; the checkpoint to continue from, the same on every rank."""
    error: TunesmithError | None = None
    found: Checkpoint | None = None
    if engine.rank == 0:
        try:
            found = _open(run_dir, how)
        except TunesmithError as caught:
            error = caught
    error = engine.broadcast(error)
    if error is not None:
        raise error
    return engine.broadcast(found)


def _open(run_dir: Path, how: Resume) -> Checkpoint | None:
    if how.resume or how.restart:
        clean_leftovers(run_dir)
    used = holds_a_run(run_dir)
    if how.resume or how.restart:
        found = find_latest(run_dir)
        for broken in found.skipped:
            print(f"skipped {broken.path.name}: {broken.reason}", flush=True)
        if found.latest is not None:
            return found.latest
        if how.resume and used:
            raise UserError(f"--resume: {run_dir} has no whole checkpoint; start again with --overwrite")
        if how.resume:
            raise UserError(f"--resume: there is no run in {run_dir}")
        if used:
            print(f"--restart: {run_dir} has no whole checkpoint: the run begins again", flush=True)
    elif used and not how.overwrite:
        raise UserError(
            f"{run_dir} holds a run: continue it with --resume, replace it with --overwrite, or set run_name"
        )
    if used:
        replace_run(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    return None


def replace_run(run_dir: Path) -> None:
    """Removes what a run of ours wrote into its folder, and nothing else."""
    import shutil

    for pattern in ("checkpoint-*", ".checkpoint-*", "final", "wandb"):
        for path in run_dir.glob(pattern):
            shutil.rmtree(path)
    for name in (
        "metrics.jsonl",
        "environment.json",
        "recipe.yaml",
        "report.html",
        "report.json",
        "exit.json",
    ):
        (run_dir / name).unlink(missing_ok=True)
