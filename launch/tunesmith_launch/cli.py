"""The command line. A command is its options, one call, and an exit code; what it needs is imported inside it, so
that `--help` answers at once."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith import __version__
from tunesmith.errors import TunesmithError, UserError
from tunesmith_launch import combine_commands, launch_commands, plan_command
from tunesmith_launch.inspect_commands import Overrides, RecipePath, register

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tunesmith_launch.cluster import Options

app = typer.Typer(
    name="tunesmith",
    help="Fine-tunes pretrained models from one recipe.\n\nBegin with: tunesmith recipes, tunesmith doctor",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The entry point. Every error made for the user becomes lines on stderr and its exit code here, and only
    here; TUNESMITH_DEBUG=1 adds the traceback."""
    try:
        app()
    except TunesmithError as error:
        if os.environ.get("TUNESMITH_DEBUG") == "1":
            traceback.print_exc()
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


def _version(asked: bool) -> None:
    if asked:
        print(f"tunesmith {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    num_processes: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processes over all machines; default: the visible accelerators, 1 on a CPU."
        ),
    ] = None,
    num_machines: Annotated[int, typer.Option(min=1, help="Machines; start the command on each.")] = 1,
    machine_rank: Annotated[int | None, typer.Option(min=0, help="This machine's number, from 0.")] = None,
    main_process_ip: Annotated[str | None, typer.Option(help="The address of machine 0.")] = None,
    main_process_port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65535, help="A free port of machine 0; default: 29500, or any on one machine."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest whole checkpoint.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the folder.")] = False,
    restart: Annotated[
        bool,
        typer.Option(
            "--restart", help="For a job that is started again: --resume where it can, else begin again."
        ),
    ] = False,
    seeds: Annotated[
        str | None, typer.Option(metavar="N|S,S,…", help="A run for each seed, one after the other.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be started.")] = False,
) -> None:
    """Train what a recipe describes.

    \b
    Example: tunesmith train recipe.yaml optim.learning_rate=1e-4 --num-processes 2
    """
    from tunesmith_launch.cluster import Options
    from tunesmith_launch.train import train

    options = Options(num_processes, num_machines, machine_rank, main_process_ip, main_process_port)
    if seeds is not None:
        raise typer.Exit(
            _train_seeds(
                recipe, overrides or [], seeds, options, (resume, overwrite, restart), dry_run=dry_run
            )
        )
    code = train(
        recipe,
        overrides or [],
        options,
        resume=resume,
        overwrite=overwrite,
        restart=restart,
        dry_run=dry_run,
    )
    raise typer.Exit(code)


def _train_seeds(
    recipe: Path,
    overrides: list[str],
    seeds: str,
    options: Options,
    how: tuple[bool, bool, bool],
    *,
    dry_run: bool,
) -> int:
    from tunesmith_launch.seeds import parse_seeds, train_seeds
    from tunesmith_launch.train import train

    resume, overwrite, restart = how
    if sum(how) > 1:
        raise UserError("--resume, --overwrite and --restart exclude each other")
    if options.num_machines > 1:
        raise UserError(
            "--seeds: with --num-machines the machines would have to begin each run together: start one run after "
            "the other, with training.seed=N run_name=NAME-seedN"
        )

    def one(own: Sequence[str], again: bool) -> int:
        return train(recipe, own, options, overwrite=overwrite, restart=again, dry_run=dry_run)

    # a seed that has not begun is begun, so that --resume goes on wherever the row was left
    go_on = resume or restart
    return train_seeds(recipe, overrides, parse_seeds(seeds), one, resume=go_on, replace=overwrite or dry_run)


register(app)
plan_command.register(app)
combine_commands.register(app)
app.add_typer(launch_commands.app, name="launch")

recipes = typer.Typer(rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"]})
app.add_typer(recipes, name="recipes")


@recipes.callback(invoke_without_command=True)
def list_recipes(context: typer.Context) -> None:
    """List the recipes that come with tunesmith, or copy one.

    \b
    Example: tunesmith recipes copy quickstart
    """
    if context.invoked_subcommand is None:
        from tunesmith_launch.recipes import listing

        print(listing())


@recipes.command("copy")
def copy_recipe(
    name: Annotated[
        str, typer.Argument(metavar="NAME", show_default=False, help="As `tunesmith recipes` lists it.")
    ],
    target: Annotated[
        Path | None, typer.Argument(metavar="TARGET", help="A new file or a folder; default: here.")
    ] = None,
) -> None:
    """Copy a recipe, to be changed. Nothing is overwritten.

    \b
    Example: tunesmith recipes copy quickstart my-recipe.yaml
    """
    from tunesmith_launch.recipes import copy

    print(copy(name, target or Path()))


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors.

    \b
    Example: tunesmith schema > recipe.schema.json
    """
    from tunesmith.recipe.schema import json_schema

    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))


@app.command()
def doctor() -> None:
    """Check this machine and its installation.

    \b
    Example: tunesmith doctor
    """
    from tunesmith_launch.doctor import main

    raise typer.Exit(main())
