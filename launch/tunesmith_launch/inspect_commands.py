"""The commands that look at a recipe before it runs, or at a run that is done."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from tunesmith.errors import UserError

RunDir = Annotated[
    Path,
    typer.Argument(metavar="RUN_DIR", show_default=False, help="The folder of a run, or of an ensemble."),
]
Task = Annotated[str | None, typer.Option(metavar="NAME", help="Of several tasks, which.")]
Checkpoint = Annotated[
    int | None, typer.Option(min=0, help="The step of a checkpoint; default: the weights of final/.")
]
RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE", show_default=False, help="The recipe's YAML file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="section.key=value", show_default=False, help="Settings laid over the recipe's."),
]


def register(app: typer.Typer) -> None:
    """Adds the commands to the command line."""
    for command in (check, preview, evaluate, predict, export):
        app.command()(command)


def check(
    recipe: RecipePath,
    overrides: Overrides = None,
    distributed: Annotated[
        bool, typer.Option("--distributed", help="Start the ranks, and compare machines instead.")
    ] = False,
    num_processes: Annotated[
        int | None, typer.Option(min=1, help="As for train, with --distributed.")
    ] = None,
    num_machines: Annotated[int, typer.Option(min=1, help="As for train.")] = 1,
    machine_rank: Annotated[int | None, typer.Option(min=0, help="As for train.")] = None,
    main_process_ip: Annotated[str | None, typer.Option(help="As for train.")] = None,
    main_process_port: Annotated[int | None, typer.Option(min=1, max=65535, help="As for train.")] = None,
    wait: Annotated[
        float | None,
        typer.Option(min=1, help="Seconds for machines and ranks that do not come; default: 20."),
    ] = None,
) -> None:
    """Find what would go wrong: recipe, data, memory, disk, time; or, with --distributed, between machines.

    Exit code 0: nothing; 2: the recipe or the data; 3: the machine.

    \b
    Example: tunesmith check recipe.yaml training.global_batch_size=64
    """
    from tunesmith_launch.cluster import Options

    options = Options(num_processes, num_machines, machine_rank, main_process_ip, main_process_port)
    if distributed:
        from tunesmith_launch.check_distributed import check_distributed

        raise typer.Exit(check_distributed(recipe, overrides or [], options, wait or 20.0))
    if options != Options() or wait is not None:
        raise UserError("check: the options of a launch have no effect without --distributed")
    from tunesmith.commands.check import check
    from tunesmith.commands.findings import Finding, exit_code
    from tunesmith.recipe.load import load_recipe
    from tunesmith.tasks.runs import read_runs

    loaded = load_recipe(recipe, overrides or [])
    found: list[Finding] = []
    for name, view in read_runs(loaded.recipe, loaded.base).views.items():
        if name:
            print(f"task {name}, as if it were trained alone:", flush=True)
        for finding in check(view, loaded.base):
            found.append(finding)
            print(finding, flush=True)
    levels = [finding.level for finding in found]
    errors, warnings = levels.count("error"), levels.count("warning")
    print(f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}")
    raise typer.Exit(exit_code(found))


def preview(
    recipe: RecipePath,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="How many samples.")] = 4,
    split: Annotated[Literal["train", "eval", "test"], typer.Option(help="Which rows.")] = "train",
    task: Task = None,
) -> None:
    """Show samples token by token, and what is trained in them.

    \b
    Example: tunesmith preview recipe.yaml --rows 2 --split eval
    """
    from rich.console import Console

    from tunesmith.commands.finished import of_task
    from tunesmith.commands.preview import preview, show
    from tunesmith.recipe.load import load_recipe
    from tunesmith.tasks.runs import read_runs

    loaded = load_recipe(recipe, overrides or [])
    seen = of_task(read_runs(loaded.recipe, loaded.base), task)
    show(preview(seen, loaded.base, split, rows), Console(highlight=False))


def evaluate(
    run_dir: RunDir,
    split: Annotated[
        Literal["eval", "test"] | None, typer.Option(help="Rows of the recipe; default: eval, else test.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(metavar="FILE", help="Other rows, of the same format; repeatable.")
    ] = None,
    checkpoint: Checkpoint = None,
    task: Task = None,
) -> None:
    """Measure a finished run on eval, test or other rows.

    \b
    Example: tunesmith evaluate runs/quickstart --split test
    """
    from tunesmith.commands.evaluate import evaluate_run
    from tunesmith.commands.finished import open_run
    from tunesmith.ensemble.record import is_ensemble
    from tunesmith.tracking.progress import end_table

    if is_ensemble(run_dir):
        from tunesmith_launch import combine_commands

        if task is not None:
            raise UserError(f"--task {task}: an ensemble has one task: leave it out")
        combine_commands.evaluate(run_dir, split, data or [], checkpoint)
        return
    run = open_run(run_dir, checkpoint, task)
    found = evaluate_run(run, split, data or [])
    end_table(found.table(), f"{run.weights} on {found.on}: {found.rows:,} rows")
    for reason, count in found.dropped.items():
        print(f"{count:,} dropped: {reason}")
    if found.truncated:
        print(f"{found.truncated:,} truncated to max_length {run.recipe.data.max_length}")
    print(f"written to {found.path}")


def predict(
    run_dir: RunDir,
    input: Annotated[
        str | None, typer.Option(metavar="FILE", help="Rows of the recipe's format, or plain lines.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Where to; default: standard output.")
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="A text in place of a file; repeatable.")] = None,
    scores: Annotated[
        bool, typer.Option("--scores", help="Each row's texts, and every label's score: soft labels.")
    ] = False,
    checkpoint: Checkpoint = None,
    task: Task = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Of a generated text.")] = None,
    num_beams: Annotated[int | None, typer.Option(min=1, help="Beams of the search; 1 is greedy.")] = None,
) -> None:
    """Write a finished run's answers, a JSON object per row.

    \b
    Example: tunesmith predict runs/quickstart --text "Return a random element."
    """
    import json

    from tunesmith.commands.finished import open_run
    from tunesmith.commands.predict import generation_settings, predict_file, predict_texts, write_answers
    from tunesmith.ensemble.record import is_ensemble

    if (input is None) == (not text):
        raise UserError("predict: give the rows with --input FILE or with --text, one of the two")
    if text and output is not None:
        raise UserError("--output goes with --input; the answers to --text are printed")
    if is_ensemble(run_dir):
        from tunesmith_launch import combine_commands

        if task is not None:
            raise UserError(f"--task {task}: an ensemble has one task: leave it out")
        if max_new_tokens is not None or num_beams is not None:
            raise UserError("--max-new-tokens and --num-beams: an ensemble generates no text")
        answers = combine_commands.answers(run_dir, input, text or [], checkpoint, scores=scores)
        if input is None:
            for given, (_, answer) in zip(text or [], answers, strict=True):
                print(json.dumps({"text": given} | answer, ensure_ascii=False))
            return
        counts = write_answers(answers, input, output or sys.stdout)
        _told(counts, output)
        return
    run = open_run(run_dir, checkpoint, task)
    settings = generation_settings(run, max_new_tokens, num_beams)
    if text:
        for answer in predict_texts(run, text, settings, scores=scores):
            print(json.dumps(answer, ensure_ascii=False))
        return
    assert input is not None
    _told(predict_file(run, input, settings, output or sys.stdout, scores=scores), output)


def _told(counts: dict[str, int], output: Path | None) -> None:
    said = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count or name == "rows")
    print(said + ("" if output is None else f", written to {output}"), file=sys.stderr)


def export(
    run_dir: RunDir,
    target: Annotated[Path, typer.Argument(metavar="TARGET", show_default=False, help="A new folder.")],
    checkpoint: Checkpoint = None,
    task: Task = None,
    dtype: Annotated[Literal["bf16", "fp16", "fp32"], typer.Option(help="Of the weights.")] = "fp32",
    max_shard_size: Annotated[str, typer.Option(help="The most that a file of weights holds.")] = "5GB",
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge the adapters into the (dequantised) base; else they alone.")
    ] = False,
) -> None:
    """Write a finished run as a Hugging Face folder, and verify it.

    \b
    Example: tunesmith export runs/quickstart my-model --dtype bf16
    """
    from tunesmith.commands.export import export
    from tunesmith.commands.finished import open_run
    from tunesmith.ensemble.record import is_ensemble
    from tunesmith.tracking.text import size

    if is_ensemble(run_dir):
        raise UserError(
            f"{run_dir} is an ensemble: its members are several models, which no single folder of weights holds; "
            "export them one by one, or make one model of them with tunesmith average"
        )
    found = export(open_run(run_dir, checkpoint, task), target, dtype, max_shard_size, merge=merge)
    weights = {
        "model": f"its weights are those of the run in {dtype}; outputs",
        "adapter": f"with the base, the adapter's outputs in {dtype}",
        "merged": f"the merged model's outputs in {dtype}",
    }[found.what]
    print(
        f"{found.target}: {found.parameters:,} parameters, {size(found.bytes)}. Loaded again, {weights} differ from "
        f"the trained fp32 model's by at most {found.difference:.3g} (the largest output is {found.scale:.3g})"
    )
