"""`tunesmith train`: check what can be checked at once, then start the ranks and watch them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tunesmith.ending import holds_a_run, run_folder
from tunesmith.errors import MachineError, UserError
from tunesmith.recipe.load import load_recipe
from tunesmith_launch import cluster, command, interface
from tunesmith_launch.muster import muster
from tunesmith_launch.supervise import supervise


def train(
    recipe: Path,
    overrides: Sequence[str],
    options: cluster.Options,
    *,
    resume: bool = False,
    overwrite: bool = False,
    restart: bool = False,
    dry_run: bool = False,
) -> int:
    """The exit code of the run (docs/run-folder.md). Raises UserError before anything is started."""
    given = (("--resume", resume), ("--overwrite", overwrite), ("--restart", restart))
    how = [flag for flag, is_given in given if is_given]
    if len(how) > 1:
        raise UserError(f"{' and '.join(how)} exclude each other")
    loaded = load_recipe(recipe, overrides)
    folder = run_folder(loaded.recipe, loaded.base)
    if holds_a_run(folder) and not (how or dry_run):
        raise UserError(
            f"{folder} holds a run: continue it with --resume, replace it with --overwrite, or set run_name"
        )
    found = cluster.resolve(options, loaded, os.environ)
    if found.num_machines > 1 and not all(name in os.environ for name in interface.VARIABLES):
        found = replace(found, interface=_interface(found, dry_run=dry_run))
    started = command.build([str(recipe), *overrides, *how], found, os.environ, sys.executable)
    if dry_run:
        print(started.render())
        return 0
    if found.machine_rank == 0:
        (folder / "exit.json").unlink(missing_ok=True)
    if found.num_machines > 1:
        muster(found, loaded.recipe.parallel.timeout)
    return supervise(started, folder, found, loaded.recipe.parallel.timeout)


def _interface(found: command.Cluster, *, dry_run: bool) -> str | None:
    assert found.main_process_ip is not None
    assert found.main_process_port is not None
    if not dry_run:
        return interface.toward(found.main_process_ip, found.main_process_port)
    try:
        return interface.toward(found.main_process_ip, found.main_process_port, wait=0)
    except MachineError as error:  # what only shows need not be on a machine of the cluster
        print(f"without {' and '.join(interface.VARIABLES)}: {error}", file=sys.stderr)
        return None
