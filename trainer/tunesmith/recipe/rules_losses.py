"""The rules of `objective.loss`: which losses an objective takes, and settings of theirs without effect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tunesmith.recipe.data import Source
from tunesmith.recipe.faults import Problem, problem_at
from tunesmith.recipe.losses import (
    ALLOWED,
    LDAM,
    SMOOTHED,
    VOCABULARY,
    ClassBalanced,
    CrossEntropy,
    Focal,
    Ranking,
    unfit,
)

if TYPE_CHECKING:
    from tunesmith.recipe.root import Recipe

_PROBLEMS = ("single_label", "multi_label", "regression")


def _kinds(recipe: Recipe) -> tuple[str, ...]:
    """The kinds of labels that the recipe may mean: `problem: auto` leaves it to the data."""
    objective = recipe.objective
    if objective.type != "classification":
        return (objective.type,)
    return _PROBLEMS if objective.problem == "auto" else (objective.problem,)


def _fits(recipe: Recipe) -> Iterator[Problem]:
    loss, kinds = recipe.objective.loss, _kinds(recipe)
    if loss is None:
        return
    told = [unfit(kind, loss) for kind in kinds]
    if all(told):
        if len(kinds) == 1:
            yield problem_at("objective.loss", str(told[0]))
        else:
            known = sorted(frozenset().union(*(ALLOWED[kind] for kind in kinds)))
            yield problem_at(
                "objective.loss", f"{loss.type} is no loss for classification; it takes {', '.join(known)}"
            )


def _smoothing(recipe: Recipe) -> Iterator[Problem]:
    loss = recipe.objective.loss
    if (
        loss is not None
        and loss.type not in SMOOTHED
        and getattr(recipe.objective, "label_smoothing_factor", 0)
    ):
        yield problem_at(
            "objective.label_smoothing_factor",
            f"has no effect with loss: {loss.type}; it smooths {' and '.join(sorted(SMOOTHED))}",
        )


def _vocabulary(recipe: Recipe) -> Iterator[Problem]:
    loss, kind = recipe.objective.loss, recipe.objective.type
    if kind not in VOCABULARY | {"question_answering"}:
        return
    why = "are the tokens of the vocabulary" if kind in VOCABULARY else "are places in a text"
    if isinstance(loss, CrossEntropy) and loss.class_weights is not None:
        yield problem_at("objective.loss.class_weights", f"weigh labels; those of {kind} {why}: leave it out")
    if isinstance(loss, Focal) and loss.alpha is not None:
        yield problem_at("objective.loss.alpha", f"weighs labels; those of {kind} {why}: leave it out")


def _without_effect(recipe: Recipe) -> Iterator[Problem]:
    match recipe.objective.loss:
        case ClassBalanced(base=base, gamma=gamma) if base != "focal" and gamma is not None:
            yield problem_at(
                "objective.loss.gamma", f"has no effect with base: {base}; it is that of base: focal"
            )
        case LDAM(reweight_from=None, beta=beta) if beta is not None:
            yield problem_at("objective.loss.beta", "has no effect without reweight_from")
        case LDAM(reweight_from=int() as step) if (
            recipe.training.max_steps is not None and step >= recipe.training.max_steps
        ):
            yield problem_at(
                "objective.loss.reweight_from",
                f"step {step} is not before the last of training.max_steps: {recipe.training.max_steps}",
            )
        case Ranking(method=method, margin=margin) if method != "margin" and margin is not None:
            yield problem_at("objective.loss.margin", f"has no effect with method: {method}")
        case _:
            pass


def _sources(recipe: Recipe) -> Iterator[tuple[str, Source]]:
    for part in ("train", "eval", "test"):
        for index, source in enumerate(getattr(recipe.data, part)):
            yield f"data.{part}.{index}", source


def _soft_labels(recipe: Recipe) -> Iterator[Problem]:
    places = [place for place, source in _sources(recipe) if "soft_labels" in source.columns]
    if not places or recipe.objective.type != "classification":
        return  # other formats have no such column, which reading them says
    key, objective = f"{places[0]}.columns.soft_labels", recipe.objective
    if not places[0].startswith("data.train."):
        yield problem_at(key, "have no effect where no training rows have such a column")
    if objective.problem not in {"auto", "single_label"}:
        yield problem_at(key, f"are shares of one label; the problem is {objective.problem}")
    if objective.loss is not None and objective.loss.type not in SMOOTHED:
        yield problem_at(
            key, f"have no effect with loss: {objective.loss.type}; it is {' or '.join(sorted(SMOOTHED))}"
        )


def _groups(recipe: Recipe) -> Iterator[Problem]:
    places = {place: "group" in source.columns for place, source in _sources(recipe)}
    if not isinstance(recipe.objective.loss, Ranking):
        if (given := next((place for place, found in places.items() if found), None)) and (
            recipe.objective.type == "classification"
        ):
            yield problem_at(f"{given}.columns.group", "has no effect without objective.loss: ranking")
        return
    if recipe.objective.type != "classification":
        return
    if missing := next((place for place, found in places.items() if not found), None):
        yield problem_at(
            f"{missing}.columns", "ranking needs the column that says which rows are one list: group: …"
        )
    split = recipe.data.split
    if split is not None and split.group is None:
        yield problem_at(
            "data.split", "would part the rows of a list: set its group to the column of the lists"
        )
    if recipe.trainable.cache_features:
        yield problem_at(
            "trainable.cache_features", "keeps features row by row; the rows of ranking are lists of texts"
        )


RULES = (
    ({"objective"}, _fits),
    ({"objective"}, _smoothing),
    ({"objective"}, _vocabulary),
    ({"objective", "training"}, _without_effect),
    ({"objective", "data"}, _soft_labels),
    ({"objective", "data", "trainable"}, _groups),
)
