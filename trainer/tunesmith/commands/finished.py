"""A run that is done, opened again: its recipe, tokenizer, objective and weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunesmith.adapters.save import load as load_adapters
from tunesmith.assemble import Assembled, assemble
from tunesmith.averaging import put_average
from tunesmith.checkpoint.run_state import load_weights
from tunesmith.checkpoint.store import verify
from tunesmith.engine import Engine, alone
from tunesmith.errors import UserError
from tunesmith.fusing import choose_head
from tunesmith.model import load_tokenizer
from tunesmith.module import TrainModule
from tunesmith.objectives import Objective, build_objective
from tunesmith.optim import Spec
from tunesmith.precision import choose, round_parameters
from tunesmith.quiet import quiet_libraries
from tunesmith.recipe import Recipe
from tunesmith.recipe.load import load_recipe
from tunesmith.recipe.optim import SGD
from tunesmith.tasks.models import load_task
from tunesmith.tokenizer import tokenizer_for


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """`weights` says which they are: "final" or "checkpoint-N". The engine holds the model on the device."""

    run_dir: Path
    recipe: Recipe
    weights: str
    tokenizer: Any
    objective: Objective
    engine: Engine
    task: str = ""  # of a run of several

    @property
    def model(self) -> Any:
        return self.engine.train_module.model


@dataclass(frozen=True, slots=True)
class Described:
    """What a run says of itself before its weights are read."""

    run_dir: Path
    recipe: Recipe
    tokenizer: Any
    objective: Objective
    task: str = ""  # of a run of several

    @property
    def final(self) -> Path:
        return self.run_dir / "final" / self.task


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights of a run: `RUN` are those of its final/, `RUN:checkpoint-N` those of a checkpoint."""

    run_dir: Path
    checkpoint: int | None = None

    def __str__(self) -> str:
        return (
            str(self.run_dir) if self.checkpoint is None else f"{self.run_dir}:checkpoint-{self.checkpoint}"
        )

    @staticmethod
    def parse(text: str) -> Weights:
        """Raises UserError for a text that names neither."""
        folder, mark, name = text.rpartition(":")
        if not mark or Path(text).is_dir():
            return Weights(Path(text))
        if (found := re.fullmatch(r"checkpoint-(\d+)", name)) is None:
            raise UserError(f"{text}: write RUN or RUN:checkpoint-N")
        return Weights(Path(folder), int(found[1]))


def describe_run(run_dir: Path, task: str | None = None) -> Described:
    """Recipe, tokenizer and objective with what it learnt, without the model; of a run of several tasks those of
    `task`, as if it had been run alone. Raises UserError."""
    recipe = of_task(read_recipe(run_dir), task)
    tokenizer, recipe = _tokenizer(recipe, run_dir, run_dir / "final" / (task or ""))
    objective = build_objective(recipe, tokenizer)
    state = _objective_state(run_dir)
    objective.load_state(state if task is None else state[task])
    return Described(run_dir, recipe, tokenizer, objective, task or "")


def of_task(recipe: Recipe, task: str | None) -> Recipe:
    """The recipe as `task` sees it, itself where it has one task. Raises UserError for a task that it has not."""
    if not recipe.tasks:
        if task is not None:
            raise UserError(f"--task {task}: there is one task, without a name: leave it out")
        return recipe
    if task not in recipe.tasks:
        asked = "there are several tasks" if task is None else f"--task {task}: there is none of that name"
        raise UserError(f"{asked}: name one of them with --task: {', '.join(recipe.tasks)}")
    return recipe.view(task)


def weights_folder(run_dir: Path, checkpoint: int | None = None) -> Path:
    """`final/`, or `checkpoint-N`, whose every byte was verified. Raises UserError where it is not there."""
    if checkpoint is not None:
        return _checkpoint(run_dir, checkpoint)
    if not (run_dir / "final").is_dir():
        raise UserError(f"{run_dir} has no final/: the run did not end. {_offer(run_dir)}")
    return run_dir / "final"


def checkpoint_numbers(run_dir: Path) -> list[int]:
    """The steps of a run's checkpoints, ascending."""
    names = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in run_dir.iterdir())
    return sorted(int(match[1]) for match in names if match)


def open_run(run_dir: Path, checkpoint: int | None = None, task: str | None = None) -> FinishedRun:
    """The run in `run_dir` with the weights of `final/`, or of `checkpoint-N` (the average where the run's evaluations
    saw that); of a run of several tasks the model of `task`. Raises UserError where the folder is no run, lacks what is
    asked for, or its weights do not fill the model."""
    quiet_libraries()
    of_task(read_recipe(run_dir), task)  # what is no run is told so first
    found = weights_folder(run_dir, checkpoint)
    saved = None if checkpoint is None else found
    described = describe_run(run_dir, task)
    recipe, tokenizer, objective = described.recipe, described.tokenizer, described.objective
    # one process, whatever the run was spread over
    engine = alone()
    built = open_model(described, engine.device)
    precision, _ = choose(recipe.training.precision, engine.device)
    round_parameters(built.model, Spec.of(recipe).parameter_dtype)
    module = TrainModule(built.model, objective, precision)
    if _was_fused(run_dir):  # the same arithmetic as the run's own evaluations
        head = choose_head(recipe, built.model, objective)
        module.fused_head = None if isinstance(head, str) else head
    engine.rebuilt = built.rebuilt()
    engine.prepare(module, built.fill, Spec(SGD(name="sgd")))  # which holds no state, and takes no step
    if saved is not None:
        names: dict[str, str] = {}
        if described.task:
            names = load_task(built.model, saved, described.task)
        else:
            load_weights(engine, saved, model_alone=True)
        if recipe.averaging is not None and recipe.averaging.evaluate == "averaged":
            put_average(built.model, saved, names)
    engine.module.eval()
    weights = saved.name if saved else "final"
    return FinishedRun(run_dir, recipe, weights, tokenizer, objective, engine, described.task)


def _was_fused(run_dir: Path) -> bool:
    """Whether the run computed its loss without logits, and had held it against theirs."""
    try:
        about = json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))
        path = about["facts"]["kernels"]["linear_cross_entropy"]
    except (OSError, ValueError, LookupError, TypeError):
        return False  # of a run that did not get so far, or of an older version
    return not path.startswith("reference")


def read_recipe(run_dir: Path) -> Recipe:
    """The resolved recipe of a run."""
    path = run_dir / "recipe.yaml"
    if not path.is_file():
        above = run_dir.parent
        hint = f"; did you mean {above}?" if (above / "recipe.yaml").is_file() else ""
        raise UserError(f"{run_dir} is not the folder of a run: it has no recipe.yaml{hint}")
    return load_recipe(path).recipe


def _checkpoint(run_dir: Path, number: int) -> Path:
    path = run_dir / f"checkpoint-{number}"
    if not path.is_dir():
        raise UserError(f"--checkpoint {number}: {run_dir} has no {path.name}. {_offer(run_dir)}")
    if problems := verify(path):
        raise UserError(f"--checkpoint {number}: {path} is broken: {'; '.join(problems)}")
    return path


def _offer(run_dir: Path) -> str:
    numbers = checkpoint_numbers(run_dir)
    found = ", ".join(map(str, numbers))
    return f"It has checkpoints: --checkpoint {found}" if numbers else "It has no checkpoint either"


def _tokenizer(recipe: Recipe, run_dir: Path, final: Path) -> tuple[Any, Recipe]:
    """The tokenizer that was saved with the model, which a template of the recipe's is part of; the recipe's own where
    the run has no final/ yet."""
    if not final.is_dir():
        return tokenizer_for(recipe, run_dir)[0], recipe
    settings = recipe.model.model_copy(update={"tokenizer": str(final), "revision": None})
    tokenizer, _ = load_tokenizer(settings, run_dir)
    if tokenizer.chat_template is not None:
        settings = settings.model_copy(update={"chat_template": None})
    return tokenizer, recipe.model_copy(update={"model": settings})


def _objective_state(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "objective.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: it holds the labels; start the run again") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def open_model(described: Described, device: torch.device) -> Assembled:
    """The model of final/; where there is none yet, the one that the run began with, for a checkpoint to fill."""
    recipe, run_dir, final = described.recipe, described.run_dir, described.final
    objective, tokenizer = described.objective, described.tokenizer
    calm = {"dropout": None, "drop_path": None, "neftune_noise_alpha": None, "gradient_checkpointing": False}
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update=calm)})
    if not final.is_dir():
        return assemble(recipe, run_dir, objective, tokenizer, device)
    if recipe.trainable.adapters:
        built = assemble(recipe, run_dir, objective, tokenizer, device)
        load_adapters(built.model, final)
        return built
    changes = {
        "model_name_or_path": str(final),
        "init": "pretrained",
        "config": {},
        "revision": None,
        "quantization": None,
    }
    sections = {
        "model": recipe.model.model_copy(update=changes),
        "trainable": recipe.trainable.model_copy(update={"head": None}),
        "distill": None,
    }
    recipe = recipe.model_copy(update=sections)
    built = assemble(recipe, run_dir, objective, tokenizer, device)
    if new := built.facts.get("new_weights"):
        raise UserError(f"{final} lacks weights of the model: {', '.join(new[:5])}")
    return built


@contextmanager
def counting(what: str, total: int) -> Generator[Callable[[int], None]]:
    """A bar on a terminal (stderr), gone when done; what it yields takes the number of rows done."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda rows: bar.advance(task, rows)
