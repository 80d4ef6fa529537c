"""One rank of `tunesmith check --distributed`: `python -m tunesmith.preflight RECIPE [section.key=value …]`, started
by the launcher as a rank of a run is. Rank 0 prints the report. Exit code 2: recipe or data; 3: a machine; else 0."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.__main__ import Supervisor
from tunesmith.ending import Ending
from tunesmith.errors import TunesmithError
from tunesmith.preflight.exchange import Patience
from tunesmith.preflight.findings import exit_code
from tunesmith.recipe.load import load_recipe
from tunesmith.torch_threads import leave

if TYPE_CHECKING:
    from tunesmith.preflight.agree import Preflight

_COLLECTIVES = timedelta(seconds=60)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tunesmith.preflight", description=__doc__)
    parser.add_argument("recipe", type=Path, metavar="RECIPE")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--wait", type=float, default=20.0, metavar="SECONDS", help="for ranks that do not come"
    )
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    rank = int(os.environ.get("RANK") or 0)
    supervisor: Supervisor | None = None
    try:
        if path := os.environ.pop("TUNESMITH_SUPERVISOR", None):
            supervisor = Supervisor(path, rank)
        code, reason = check(given)
    except TunesmithError as caught:
        # of this rank alone: the others have their own, or wait in vain and name it
        code, reason = caught.exit_code, str(caught)
        print(reason, file=sys.stderr, flush=True)
    if supervisor is not None:
        supervisor.report(Ending(code, reason, rank, None))
        supervisor.stop()
    return code


def check(given: argparse.Namespace) -> tuple[int, str]:
    """(exit code, reason)."""
    from tunesmith.preflight.agree import Preflight
    from tunesmith.preflight.report import lines

    loaded = load_recipe(given.recipe, given.overrides)
    preflight = Preflight(Patience(given.wait, notice=min(5.0, given.wait)), "error")
    preflight.examine(loaded.recipe, loaded.base)
    sums = not preflight.failed and preflight.meeting.claim.world_size > 1
    if sums:
        _sums(preflight)
    code = exit_code(preflight.findings)
    if preflight.meeting.is_first:
        for line in lines(preflight, sums and not preflight.failed):
            print(line, flush=True)
    preflight.meeting.part()
    return code, "; ".join(one.what for one in preflight.findings if one.level == "error") or "done"


def _sums(preflight: Preflight) -> None:
    """On a process group like the run's: NCCL on CUDA, gloo on a CPU."""
    import torch
    import torch.distributed as dist

    from tunesmith.engine import device_type
    from tunesmith.preflight.collectives import check_sums

    kind = device_type()
    device = torch.device("cpu") if kind == "cpu" else torch.device(kind, preflight.meeting.claim.local_rank)
    if kind != "cpu":
        torch.accelerator.set_device_index(device.index)
    dist.init_process_group("gloo" if kind == "cpu" else None, timeout=_COLLECTIVES)
    try:
        preflight.findings += check_sums(preflight.meeting, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    leave(main())
