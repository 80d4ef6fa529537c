"""`tunesmith plan`: what a recipe would need on some GPUs, before there is one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from tunesmith_launch.inspect_commands import Overrides, RecipePath


def register(app: typer.Typer) -> None:
    """Adds the command to the command line."""
    app.command()(plan)


def plan(
    recipe: RecipePath,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="Devices over all machines.")] = 1,
    gpu_memory: Annotated[float, typer.Option(min=0.1, help="GiB of one device.")] = 80.0,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="Devices of one machine.")] = 8,
    gpu: Annotated[
        Literal["h100", "h200", "a100", "l40s", "cpu"], typer.Option(help="Whose speeds the times are for.")
    ] = "h100",
    everything: Annotated[bool, typer.Option("--all", help="Show every row.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print all rows as JSON.")] = False,
    apply_to: Annotated[
        Path | None,
        typer.Option(
            "--apply", metavar="FILE", help="Write the recommended settings into a copy of the recipe."
        ),
    ] = None,
) -> None:
    """Predict memory and step time, and recommend how to run. Neither weights nor a GPU are needed.

    \b
    Example: tunesmith plan recipe.yaml --gpus 8 --gpu-memory 80 --apply planned.yaml
    """
    from rich.console import Console

    from tunesmith.errors import UserError
    from tunesmith.planning.apply import apply
    from tunesmith.planning.choose import GIB, recommend, table
    from tunesmith.planning.inspect import inspect
    from tunesmith.planning.table import as_json as to_json
    from tunesmith.planning.table import show
    from tunesmith.planning.timing import DEVICES
    from tunesmith.planning.trace import check
    from tunesmith.quiet import quiet_libraries
    from tunesmith.recipe.load import load_recipe
    from tunesmith.tasks.runs import read_runs

    if apply_to is not None and apply_to.exists():
        raise UserError(f"--apply: {apply_to} exists already: name another file")
    quiet_libraries()
    loaded = load_recipe(recipe, overrides or [])
    # of several tasks each is as large as the backbone that they share: the first that is trained
    views = read_runs(loaded.recipe, loaded.base).views
    name = next((task for task in views if task and loaded.recipe.tasks[task].weight > 0), "")
    found = inspect(views[name], loaded.base)
    if name:
        found.notes.append(f"planned as task {name} alone: the other tasks' heads are not among the figures")
    for key in ("tensor_parallel_size", "sequence_parallel_size", "shard_size"):
        if getattr(loaded.recipe.parallel, key, 1) not in {1, None}:
            found.notes.append(
                f"the recipe's parallel.{key} is not among the rows: no layer or sequence is split"
            )
    kind = "cpu" if gpu == "cpu" else "cuda"
    rows = table(found, gpus, gpus_per_node, DEVICES[gpu], gpu_memory * GIB, kind)
    best = recommend(rows)
    checked = None if best is None else check(found, best)
    if as_json:
        print(json.dumps(to_json(found, rows, best, checked), indent=1))
    else:
        show(found, rows, best, checked, DEVICES[gpu], Console(highlight=False), everything=everything)
    if apply_to is not None:
        if best is None:
            raise UserError("--apply: nothing fits, so there is nothing to write")
        written = apply(recipe, best, apply_to)
        said = ", ".join(f"{key}={json.dumps(value)}" for key, value in written.items())
        if not as_json:
            print(f"written to {apply_to}: {said}")
