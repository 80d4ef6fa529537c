"""The rules of `data.augment`: what would change labels, has no effect, or cannot be done where it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tunesmith.recipe.augment import OF_WORDS, BackTranslation, Cutoff, Mixup, TokenMask
from tunesmith.recipe.faults import Problem, problem_at

if TYPE_CHECKING:
    from tunesmith.recipe.augment import Operation
    from tunesmith.recipe.root import Recipe

_KEY = "data.augment"
_CHANGED = {"classification", "token_classification", "question_answering", "seq2seq", "sft"}
_HIDES_ITSELF = {
    "masked_lm": "masks words on its own: raise objective.mlm_probability",
    "span_corruption": "replaces words on its own: raise objective.noise_density",
}


def _objectives(recipe: Recipe) -> Iterator[Problem]:
    for index, operation in enumerate(recipe.data.augment):
        if (why := _unfit(recipe, operation)) is not None:
            yield problem_at(f"{_KEY}.{index}.type", f"{operation.type} {why}")


def _unfit(recipe: Recipe, operation: Operation) -> str | None:
    """Why an operation is not for the objective."""
    kind = recipe.objective.type
    loss = getattr(recipe.objective, "loss", None)
    if loss is not None and loss.type == "ranking":
        return "changes texts one by one; the rows of objective.loss: {type: ranking} are lists of them"
    if isinstance(operation, Mixup):
        if kind == "classification":
            return None
        return f"mixes the labels of whole rows: it is for classification; the objective is {kind}"
    if isinstance(operation, TokenMask | Cutoff) and kind in _HIDES_ITSELF:
        return f"is not for {kind}, which {_HIDES_ITSELF[kind]}"
    if isinstance(operation, Cutoff | TokenMask) and kind == "causal_lm":
        return None
    if kind in {"causal_lm", *_HIDES_ITSELF}:
        return f"is not for {kind}, where the text is what is learnt: it would change the labels"
    if kind not in _CHANGED:
        return f"is not for {kind}"
    if recipe.objective.type == "sft" and recipe.objective.train_on_prompt:
        return "is for prompts, which objective.train_on_prompt makes labels: set it to false"
    if isinstance(operation, BackTranslation) and kind == "token_classification":
        return "leaves no word to put a tag on: token_classification has synonyms and the token_ operations"
    return None


def _lengths(recipe: Recipe) -> Iterator[Problem]:
    if not recipe.data.packing:
        return
    for index, operation in enumerate(recipe.data.augment):
        if isinstance(operation, Cutoff):
            why = "hides a fraction of a row, not of a packed sequence"
        elif recipe.objective.type == "sft" and isinstance(operation, OF_WORDS):
            why = "changes the lengths by which rows are packed"
        else:
            continue
        yield problem_at(f"{_KEY}.{index}.type", f"{operation.type} {why}: set data.packing: false")


def _order(recipe: Recipe) -> Iterator[Problem]:
    augment = recipe.data.augment
    for index, operation in enumerate(augment):
        if isinstance(operation, BackTranslation) and index > 0:
            yield problem_at(
                f"{_KEY}.{index}.type", "back_translation is made of the texts as they are: put it first"
            )
        if isinstance(operation, Cutoff | Mixup):
            later = [one.type for one in augment[index + 1 :] if isinstance(one, OF_WORDS)]
            if later:
                yield problem_at(
                    f"{_KEY}.{index}.type",
                    f"{operation.type} works on embeddings, when the words are final: put it behind {later[-1]}",
                )
            if any(one.type == operation.type for one in augment[:index]):
                yield problem_at(f"{_KEY}.{index}.type", f"{operation.type} stands there twice: keep one")
    kinds = [one.type for one in augment if isinstance(one, Cutoff | Mixup)]
    if kinds == ["cutoff", "mixup"]:
        yield problem_at(f"{_KEY}", "cutoff hides what mixup has mixed: put it behind")


def _cached(recipe: Recipe) -> Iterator[Problem]:
    if recipe.data.augment and recipe.trainable.cache_features:
        yield problem_at(
            "trainable.cache_features",
            "data.augment makes other rows in every epoch, whose features no cache has: set it to false",
        )


def _taught(recipe: Recipe) -> Iterator[Problem]:
    for index, operation in enumerate(recipe.data.augment):
        if isinstance(operation, Mixup) and recipe.distill is not None:
            yield problem_at(
                f"{_KEY}.{index}.type",
                "mixup and distill exclude each other: a teacher reads the row unmixed",
            )


def _cut_sequences(recipe: Recipe) -> Iterator[Problem]:
    parallel = recipe.parallel
    if parallel.strategy != "fsdp2":
        return
    for index, operation in enumerate(recipe.data.augment):
        for name in ("sequence_parallel_size", "tensor_parallel_size"):
            if isinstance(operation, Cutoff | Mixup) and getattr(parallel, name) > 1:
                yield problem_at(
                    f"{_KEY}.{index}.type",
                    f"{operation.type} needs whole rows and embeddings on each rank: set parallel.{name}: 1",
                )


RULES = (
    ({"data", "objective"}, _objectives),
    ({"data", "objective"}, _lengths),
    ({"data"}, _order),
    ({"data", "trainable"}, _cached),
    ({"distill", "data"}, _taught),
    ({"parallel", "data"}, _cut_sequences),
)
