"""`tunesmith check --distributed`: the machines and the ranks of a run, started as a run would be."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tunesmith.errors import UserError
from tunesmith.recipe.load import load_recipe
from tunesmith_launch import cluster, command, interface
from tunesmith_launch.muster import muster
from tunesmith_launch.supervise import supervise


def check_distributed(recipe: Path, overrides: Sequence[str], options: cluster.Options, wait: float) -> int:
    """The exit code: 2 where recipe or data differ between nodes, 3 where a machine is not fit, 0 where nothing is
    found. `wait`: seconds for a machine, then for a rank, that does not come. Raises UserError or MachineError."""
    loaded = load_recipe(recipe, overrides)
    found = cluster.resolve(options, loaded, os.environ)
    if found.num_processes == 1:
        raise UserError("--distributed looks at several processes: add --num-processes N, or leave it out")
    if found.num_machines > 1:
        assert found.main_process_ip is not None
        assert found.main_process_port is not None
        muster(found, wait, notice=min(5.0, wait))
        if not all(name in os.environ for name in interface.VARIABLES):
            way = interface.toward(found.main_process_ip, found.main_process_port, wait=wait)
            found = replace(found, interface=way)
    arguments = [str(recipe), *overrides, "--wait", str(wait)]
    started = command.build(arguments, found, os.environ, sys.executable, module="tunesmith.preflight")
    # the run's own folder is left as it is
    with tempfile.TemporaryDirectory(prefix="tunesmith-check-") as folder:
        return supervise(started, Path(folder))
