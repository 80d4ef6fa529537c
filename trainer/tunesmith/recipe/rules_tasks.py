"""The rules of `tasks` and `multitask`. The rules of `data` and `objective` hold for every task: they are asked of the
recipe as that task sees it (`Recipe.view`)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import permutations
from typing import TYPE_CHECKING

from tunesmith.recipe.augment import Cutoff, Mixup
from tunesmith.recipe.faults import Problem, problem_at
from tunesmith.recipe.losses import LDAM
from tunesmith.recipe.model import TrainTokenizer
from tunesmith.recipe.parallel import FSDP2
from tunesmith.recipe.remember import replayed_rows
from tunesmith.recipe.tasks import FixedWeights, GradNorm, Multitask, TogetherMixing

if TYPE_CHECKING:
    from tunesmith.recipe.root import Recipe

Rule = Callable[["Recipe"], Iterator[Problem]]
OWN = ("data", "objective")
_OF_ALL = ("evaluation", "checkpoint", "schedule")  # what is in order if it is so for one task
_NAMED = {"metrics", "metric_for_best", "greater_is_better", "early_stopping"}


def given(recipe: Recipe, sections: Collection[str]) -> tuple[set[str], list[Problem]]:
    """The sections that there are, and what is missing: `data` and `objective`, unless there are tasks."""
    absent = {name for name in OWN if name in sections and getattr(recipe, name) is None}
    if "tasks" not in sections or recipe.tasks:
        return set(sections) - absent, []
    return set(sections) - absent, [problem_at(name, "is missing") for name in OWN if name in absent]


def of_each_task(
    recipe: Recipe, sections: Collection[str], rules: Sequence[tuple[set[str], Rule]]
) -> Iterator[Problem]:
    """What every rule about `data` or `objective` says of each task."""
    if "tasks" not in sections or not recipe.tasks or not {"trainable", "evaluation"} <= set(sections):
        return
    there = {*sections, *OWN}
    views = {name: recipe.view(name) for name, task in recipe.tasks.items() if task.run is None}
    about: dict[str, list[Problem]] = {}
    for name, view in views.items():
        found = (p for needs, rule in rules if needs & set(OWN) and needs <= there for p in rule(view))
        about[name] = [_placed(problem, name, recipe) for problem in found]
    seen: dict[str, int] = {}
    for problem in (problem for found in about.values() for problem in found):
        seen[problem.key] = seen.get(problem.key, 0) + 1
        needed = len(recipe.tasks) if problem.path[0] in _OF_ALL else 1
        if seen[problem.key] == needed:
            yield problem


def _placed(problem: Problem, name: str, recipe: Recipe) -> Problem:
    """Where the setting stands in a recipe of tasks."""
    section, *rest = problem.path
    if section in OWN:
        return Problem(("tasks", name, section, *rest), problem.message)
    if section == "evaluation" and rest[0] in recipe.tasks[name].evaluation.model_fields_set:
        return Problem(("tasks", name, *problem.path), problem.message)
    if problem.path[:2] == ("trainable", "head") and recipe.tasks[name].head is not None:
        return Problem(("tasks", name, "head", *rest[1:]), problem.message)
    return problem


def _sections(recipe: Recipe) -> Iterator[Problem]:
    if not recipe.tasks:
        if recipe.multitask != Multitask():
            yield problem_at("multitask", "has no effect without tasks")
        return
    for name in OWN:
        if getattr(recipe, name, None) is not None:
            yield problem_at(name, f"and tasks exclude each other: write it as tasks.NAME.{name}")


def _names(recipe: Recipe) -> Iterator[Problem]:
    for one, other in permutations(recipe.tasks, 2):
        if other.startswith(f"{one}_"):
            yield problem_at(
                f"tasks.{other}",
                f"its metrics could not be told from those of the task {one}: give it another name",
            )
    if "tasks" in recipe.tasks:
        yield problem_at("tasks.tasks", "tasks_mean is the mean over all tasks: give it another name")


def _weights(recipe: Recipe) -> Iterator[Problem]:
    if recipe.tasks and not trained(recipe):
        yield problem_at("tasks", "no task has a weight above 0: nothing would be trained")
    elif recipe.tasks and all(recipe.tasks[name].run is not None for name in trained(recipe)):
        yield problem_at("tasks", "all that are trained have run: one must be new, with data and objective")
    for name, task in recipe.tasks.items():
        if task.weight == 0:
            if task.evaluation.early_stopping is not None:
                yield problem_at(
                    f"tasks.{name}.evaluation.early_stopping", "has no effect on a task of weight 0"
                )
            if task.data is not None and not _evaluates(task.data):
                yield problem_at(
                    f"tasks.{name}.weight",
                    "with 0 the task is evaluated only, and it has no evaluation or test rows: set its data.eval",
                )


def _evaluates(data: object) -> bool:
    split = getattr(data, "split", None)
    return any(getattr(data, n) or (split and getattr(split, n) > 0) for n in ("eval", "test"))


def trained(recipe: Recipe) -> list[str]:
    """The names of the tasks that are trained."""
    return [name for name, task in recipe.tasks.items() if task.weight > 0]


def _balancing(recipe: Recipe) -> Iterator[Problem]:
    balancing, mixing = recipe.multitask.balancing, recipe.multitask.mixing
    if not recipe.tasks or isinstance(balancing, FixedWeights):
        return
    key = "multitask.balancing"
    if len(trained(recipe)) < 2:
        yield problem_at(key, f"{balancing.type} has no effect: one task is trained")
    if isinstance(balancing, GradNorm) and not isinstance(mixing, TogetherMixing):
        yield problem_at(
            f"{key}.type",
            f"gradnorm compares the gradients of all tasks in every step, and {mixing.type} mixing gives a step one "
            "task: set multitask.mixing: {type: together}",
        )


def _gradnorm(recipe: Recipe) -> Iterator[Problem]:
    if not isinstance(recipe.multitask.balancing, GradNorm):
        return
    key, parallel = "multitask.balancing.type", recipe.parallel
    if recipe.training.torch_compile:
        yield problem_at(
            key, "gradnorm looks into a layer, which training.torch_compile hides: set it to false"
        )
    if (
        isinstance(parallel, FSDP2)
        and max(parallel.tensor_parallel_size, parallel.sequence_parallel_size) > 1
    ):
        yield problem_at(key, "gradnorm needs whole matrices and sequences: set fsdp2's parallel sizes to 1")


def _rows(recipe: Recipe) -> Iterator[Problem]:
    mixing, rows = recipe.multitask.mixing, recipe.training.global_batch_size
    names = trained(recipe)
    if not isinstance(mixing, TogetherMixing) or not names:
        return
    if mixing.epoch is not None and mixing.epoch not in names:
        yield problem_at("multitask.mixing.epoch", f"is no task that is trained: {', '.join(names)}")
    if mixing.rows is None:
        if rows < len(names):
            yield problem_at(
                "training.global_batch_size",
                f"{rows} rows are not one of each of {len(names)} tasks (mixing: together)",
            )
        return
    key = "multitask.mixing.rows"
    if set(mixing.rows) != set(names):
        yield problem_at(key, f"needs a number for each task that is trained: {', '.join(names)}")
    elif sum(mixing.rows.values()) != rows:
        yield problem_at(
            key, f"{sum(mixing.rows.values())} rows in all are not training.global_batch_size: {rows}"
        )


def _replay(recipe: Recipe) -> Iterator[Problem]:
    settings, rows = recipe.remember, recipe.training.global_batch_size
    if settings is None or settings.replay is None:
        return
    key = "remember.replay.ratio"
    if recipe.tasks:
        yield problem_at(
            "remember.replay", "and tasks exclude each other: make the old run a task (tasks.NAME.run)"
        )
    elif not 0 < replayed_rows(settings.replay, rows) < rows:
        few, fix = (
            ("old", f"{1 / rows:.2g} or more")
            if settings.replay.ratio < 0.5
            else ("new", f"{1 - 1 / rows:.2g} or less")
        )
        yield problem_at(
            key, f"leaves no {few} row among {rows} (training.global_batch_size): set it to {fix}"
        )


def _elsewhere(recipe: Recipe) -> Iterator[Problem]:
    """Settings of a run that are a task's where there are tasks."""
    if not recipe.tasks:
        return
    for name in sorted(_NAMED - {"early_stopping", "metric_for_best", "greater_is_better"}):
        if getattr(recipe.evaluation, name) is not None:
            yield problem_at(f"evaluation.{name}", f"is each task's: write tasks.NAME.evaluation.{name}")
    if recipe.evaluation.greater_is_better is not None and recipe.evaluation.metric_for_best is None:
        yield problem_at("evaluation.greater_is_better", "has no effect without metric_for_best")
    if recipe.evaluation.generate is not None:
        yield problem_at(
            "evaluation.generate",
            "is not for several tasks: evaluate the task when the run is done (tunesmith predict RUN --task NAME)",
        )
    for name in ("tune_thresholds", "calibrate"):
        if getattr(recipe.evaluation, name):
            yield problem_at(f"evaluation.{name}", "is for a run of one task: leave it out")
    if recipe.trainable.head is not None:
        yield problem_at("trainable.head", "is each task's: write tasks.NAME.head")


def _together_with(recipe: Recipe) -> Iterator[Problem]:
    """What does not go with several tasks."""
    if not recipe.tasks:
        return
    fix = "leave it out, or train the tasks one by one"
    if recipe.trainable.adapters:
        yield problem_at(
            "trainable.adapters", f"a PEFT folder holds one head, which several tasks do not share: {fix}"
        )
    if recipe.trainable.cache_features:
        yield problem_at("trainable.cache_features", f"keeps the rows of one task: {fix}")
    if recipe.model.quantization is not None:
        yield problem_at("model.quantization", f"needs adapters, which tasks do not have: {fix}")
    if isinstance(recipe.model.tokenizer, TrainTokenizer):
        yield problem_at("model.tokenizer", f"is trained on the rows of one task: {fix}")


def _strategies(recipe: Recipe) -> Iterator[Problem]:
    """Strategies that know one objective, or one task's rows."""
    if not recipe.tasks:
        return
    if recipe.distill is not None:
        yield problem_at("distill", "and tasks exclude each other: a teacher has one head")
    if recipe.regularization.r_drop is not None:
        yield problem_at("regularization.r_drop", "and tasks exclude each other: it knows one objective")
    if recipe.remember is not None:
        for name in ("run", "ewc"):
            if getattr(recipe.remember, name):
                yield problem_at(
                    f"remember.{name}", "is of one objective: make the finished run a task (tasks.NAME.run)"
                )
    for name, task in recipe.tasks.items():
        for number, operation in enumerate(() if task.data is None else task.data.augment):
            if isinstance(operation, Mixup | Cutoff):
                yield problem_at(
                    f"tasks.{name}.data.augment.{number}.type",
                    f"{operation.type} changes the embeddings of every task: leave it out",
                )
        loss = None if task.objective is None else task.objective.loss
        if isinstance(loss, LDAM) and loss.reweight_from is not None:
            yield problem_at(
                f"tasks.{name}.objective.loss.reweight_from", "is for a run of one task: leave it out"
            )


RULES: tuple[tuple[set[str], Rule], ...] = (
    ({"tasks", "multitask"}, _sections),
    ({"tasks"}, _names),
    ({"tasks"}, _weights),
    ({"tasks", "multitask"}, _balancing),
    ({"multitask", "training", "parallel"}, _gradnorm),
    ({"tasks", "multitask", "training"}, _rows),
    ({"tasks", "remember", "training"}, _replay),
    ({"tasks", "evaluation", "trainable"}, _elsewhere),
    ({"tasks", "trainable", "model"}, _together_with),
    ({"tasks", "distill", "regularization", "remember"}, _strategies),
)
