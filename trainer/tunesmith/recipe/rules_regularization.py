"""The rules of `regularization`: what excludes each other, and what would have no effect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tunesmith.recipe.faults import Problem, problem_at
from tunesmith.recipe.regularization import PGD

if TYPE_CHECKING:
    from tunesmith.recipe.root import Recipe


def _r_drop(recipe: Recipe) -> Iterator[Problem]:
    model = recipe.model
    adapters = any(getattr(adapter, "lora_dropout", 0.0) for adapter in recipe.trainable.adapters)
    head = recipe.trainable.head is not None and recipe.trainable.head.dropout
    others = model.drop_path or model.neftune_noise_alpha or adapters or head
    if recipe.regularization.r_drop is not None and model.dropout == 0.0 and not others:
        yield problem_at(
            "regularization.r_drop",
            "has no effect with model.dropout: 0: a row's two passes would be equal; give dropout a value",
        )


def _sharpness(recipe: Recipe) -> Iterator[Problem]:
    sharpness, precision = recipe.regularization.sharpness, recipe.training.precision
    if sharpness is None:
        return
    if precision.startswith("bf16_"):
        yield problem_at(
            "regularization.sharpness",
            f"moves the weights by less than bf16 can tell, in which {precision} keeps them: use precision: bf16",
        )
    steps = recipe.training.max_steps
    if steps is not None and sharpness.every > steps:
        yield problem_at(
            "regularization.sharpness.every", f"{sharpness.every} is more than training.max_steps: {steps}"
        )


def _adversarial(recipe: Recipe) -> Iterator[Problem]:
    adversarial, parallel, key = (
        recipe.regularization.adversarial,
        recipe.parallel,
        "regularization.adversarial",
    )
    if adversarial is None:
        return
    if recipe.trainable.cache_features:
        yield problem_at(
            key, "perturbs embeddings, which trainable.cache_features: true does not compute in training"
        )
    for size in ("tensor_parallel_size", "sequence_parallel_size"):
        if getattr(parallel, size, 1) > 1:
            yield problem_at(
                key, f"and parallel.{size} exclude each other: no rank has the gradient of a row's embeddings"
            )
    if isinstance(adversarial, PGD) and adversarial.step_size is not None:
        reach = adversarial.steps * adversarial.step_size
        if reach <= adversarial.epsilon:
            yield problem_at(
                f"{key}.epsilon",
                f"{adversarial.epsilon:g} has no effect: {adversarial.steps} steps of {adversarial.step_size:g} do "
                "not reach beyond it; raise step_size",
            )


RULES = (
    ({"regularization", "model", "trainable"}, _r_drop),
    ({"regularization", "training"}, _sharpness),
    ({"regularization", "trainable", "parallel"}, _adversarial),
)
