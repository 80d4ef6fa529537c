"""The commands that make one of several finished runs: an ensemble of their answers, an average of their weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tunesmith.errors import UserError

if TYPE_CHECKING:
    from tunesmith.commands.ensemble import Measured
    from tunesmith.data.examples import Example

Members = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN...", show_default=False, help="Finished runs; RUN:checkpoint-N is a checkpoint."
    ),
]


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    for command in (ensemble, average):
        app.command()(command)


def ensemble(
    runs: Members,
    method: Annotated[
        Literal["vote", "mean", "weighted", "stack"],
        typer.Option(
            help="Majority; mean; weights fitted on eval rows; a model on top, fitted on eval rows."
        ),
    ] = "mean",
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="A new folder; default: FIRST_RUN-ensemble.")
    ] = None,
    split: Annotated[
        Literal["eval", "test"], typer.Option(help="The rows to fit and measure on: eval alone.")
    ] = "eval",
    out_of_fold: Annotated[
        int | None, typer.Option(metavar="K", help="Measure each of K folds by a fit on the others.")
    ] = None,
    checkpoints: Annotated[
        str | None, typer.Option(metavar="all|N,M", help="Members are these checkpoints of one run.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the ensemble in the folder; answers are used again.")
    ] = False,
) -> None:
    """Combine finished runs into an ensemble, which predict and evaluate take like a run.

    \b
    Example: tunesmith ensemble runs/a runs/b runs/c --method weighted --out-of-fold 5 --out runs/abc
    """
    from tunesmith.commands.ensemble import checkpoints_of, make_ensemble
    from tunesmith.commands.finished import Weights

    if split == "test":
        raise UserError(
            "--split test: an ensemble is fitted and compared on eval rows; measure it on test rows once, with "
            "tunesmith evaluate ENSEMBLE --split test"
        )
    if checkpoints is None:
        members = [Weights.parse(text) for text in runs]
    elif len(runs) == 1:
        members = checkpoints_of(Path(runs[0]), checkpoints)
    else:
        raise UserError("--checkpoints: goes with one run; name others as RUN:checkpoint-N")
    first = members[0].run_dir
    folder = out or first.with_name(f"{first.name}-ensemble")
    measured = make_ensemble(members, method, folder, out_of_fold, overwrite=overwrite)
    _show(measured)
    print(f"measure it once on test rows: tunesmith evaluate {folder} --split test")


def average(
    given: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN_OR_CHECKPOINT...",
            show_default=False,
            help="RUN or RUN:checkpoint-N; wise: BASE RUN.",
        ),
    ],
    method: Annotated[
        Literal[
            "uniform", "greedy", "weighted", "wise", "linear", "ties", "dare_linear", "dare_ties", "task"
        ],
        typer.Option(help="Soups; wise: from a base to a run; the others: arithmetic on what was trained."),
    ] = "uniform",
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The new run's folder; wise compares alphas without."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="W,W,…", help="One per member, or one for all.")
    ] = None,
    alpha: Annotated[
        str | None,
        typer.Option(metavar="A,A,…", help="The run's share in wise; of several the best on eval."),
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="The share of entries that ties and dare keep.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="What task vectors are differences to; default: what the runs began with."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of what dare drops; default: 0.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the average in the folder.")
    ] = False,
) -> None:
    """Average the weights of finished runs or checkpoints into a new finished run.

    \b
    Example: tunesmith average runs/a runs/b runs/c --method greedy --out runs/soup
    """
    from tunesmith.commands.average import average
    from tunesmith.ensemble.options import Asked
    from tunesmith.tracking.progress import end_table

    asked = Asked(
        method, _numbers("--weights", weights), _numbers("--alpha", alpha), density, base, seed, overwrite
    )
    made = average(given, asked, out)
    if made.table:
        end_table(made.table, made.how)
    else:
        print(made.how)
    if made.note:
        print(made.note)
    if made.folder is not None:
        print(
            f"written to {made.folder}; measure it once on test rows: tunesmith evaluate {made.folder} --split test"
        )


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{option} {text}: write numbers with commas between them, as 0.5,0.5") from None


def evaluate(
    folder: Path, split: Literal["eval", "test"] | None, data: Sequence[str], checkpoint: int | None
) -> None:
    """`tunesmith evaluate` of an ensemble."""
    from tunesmith.commands.ensemble import evaluate_ensemble
    from tunesmith.ensemble.record import read_ensemble

    _no_checkpoint(checkpoint)
    _show(evaluate_ensemble(read_ensemble(folder), split, data))


def answers(
    folder: Path, path: str | None, texts: Sequence[str], checkpoint: int | None, *, scores: bool
) -> Iterator[tuple[Example, dict[str, Any]]]:
    """`tunesmith predict` of an ensemble."""
    from tunesmith.commands.ensemble import ensemble_rows, predict_ensemble
    from tunesmith.ensemble.record import read_ensemble

    _no_checkpoint(checkpoint)
    opened = read_ensemble(folder)
    return predict_ensemble(opened, ensemble_rows(opened, path, texts), scores=scores)


def _no_checkpoint(checkpoint: int | None) -> None:
    if checkpoint is not None:
        raise UserError("--checkpoint: an ensemble has none; its members are fixed")


def _show(measured: Measured) -> None:
    from tunesmith.tracking.progress import end_table

    end_table(measured.table, f"{measured.rows:,} rows")
    for reason, count in measured.dropped.items():
        print(f"{count:,} dropped: {reason}")
    if measured.truncated:
        print(f"{measured.truncated:,} truncated to max_length by a member")
    print(f"written to {measured.path}")
