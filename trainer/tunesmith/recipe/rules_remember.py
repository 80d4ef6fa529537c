"""The rules of `remember`: what excludes or needs each other, and what would have no effect. Whether a finished run is
there, and what it learnt, is looked at where the run begins."""

from __future__ import annotations

from collections.abc import Iterator
from os.path import normpath
from typing import TYPE_CHECKING

from tunesmith.recipe.adapters import PrefixTuning, PromptTuning, PTuning
from tunesmith.recipe.faults import Problem, problem_at
from tunesmith.recipe.model import TrainTokenizer
from tunesmith.recipe.trainable import Gradual

if TYPE_CHECKING:
    from tunesmith.recipe.root import Recipe

_PENALTIES = ("l2_sp", "anchor", "ewc")
_HOLDING = (*_PENALTIES, "lwf", "wise_ft")
_VIRTUAL_TOKENS = (PromptTuning, PrefixTuning, PTuning)
_DRAWN = {
    "classification", "token_classification", "masked_lm", "span_corruption", "causal_lm", "sft", "seq2seq",
}  # fmt: skip


def given(recipe: Recipe, names: tuple[str, ...] = _HOLDING) -> list[str]:
    """Which of the ways `names` the recipe asks for."""
    remember = recipe.remember
    return [] if remember is None else [name for name in names if getattr(remember, name) is not None]


def stays_frozen(recipe: Recipe) -> bool:
    """Whether no weight of the backbone is ever trained."""
    trainable = recipe.trainable
    if trainable.adapters or not {"backbone", "all"} & set(trainable.freeze):
        return False
    opened = isinstance(trainable.unfreeze, Gradual) or bool(trainable.later)
    return not opened and all(name == "head" for name in trainable.exceptions)


def _effect(recipe: Recipe) -> Iterator[Problem]:
    remember = recipe.remember
    if remember is None:
        return
    if remember.run is None and not remember.probes and not given(recipe):
        yield problem_at("remember", "has no effect: set run or probes, or a way to remember such as l2_sp")
    if "seed" in remember.model_fields_set and remember.ewc is None:
        yield problem_at("remember.seed", "has no effect without remember.ewc, which draws rows and answers")
    if remember.l2_sp is not None and remember.anchor is not None:
        yield problem_at(
            "remember.anchor", "and l2_sp hold the same weights to the same values: keep one of them"
        )
    if remember.wise_ft is not None and remember.wise_ft.alpha == 1.0:
        yield problem_at(
            "remember.wise_ft.alpha", "has no effect at 1: final/ has the trained weights anyway"
        )
    if remember.wise_ft is not None and remember.wise_ft.alpha == 0.0:
        yield problem_at(
            "remember.wise_ft.alpha", "at 0 leaves nothing of what is trained: write a number between 0 and 1"
        )


def _probes(recipe: Recipe) -> Iterator[Problem]:
    remember = recipe.remember
    if remember is None:
        return
    own = remember.probes.get("old")
    named = {normpath(probe.run) for probe in remember.probes.values()}
    if own is not None and remember.run is not None and normpath(remember.run) not in named:
        yield problem_at(
            "remember.probes.old", "is the name of the probe of remember.run: give this one another name"
        )
    seen: dict[tuple[str, str | None], str] = {}
    for name, probe in remember.probes.items():
        first = seen.setdefault((normpath(probe.run), probe.split), name)
        if first != name:
            yield problem_at(
                f"remember.probes.{name}",
                f"evaluates the same rows as probes.{first}: keep one of them, or set its split",
            )


def _begins_with(recipe: Recipe) -> Iterator[Problem]:
    """What is remembered is what the run begins with."""
    remember, model = recipe.remember, recipe.model
    if remember is None:
        return
    if model.init == "from_config":
        for name in given(recipe):
            yield problem_at(
                f"remember.{name}", "has nothing to hold on to: model.init: from_config draws the weights"
            )
        if remember.run is not None:
            yield problem_at("remember.run", f"is not what the run begins with: {_begin(remember.run)}")
    elif remember.run is not None and normpath(remember.run).endswith("/final"):
        yield problem_at(
            "remember.run", f"is a run's folder: write {remember.run.rstrip('/')[: -len('/final')]}"
        )
    elif remember.run is not None and is_another(remember.run, model.model_name_or_path):
        yield problem_at(
            "remember.run",
            f"is not what the run begins with ({model.model_name_or_path}): {_begin(remember.run)}; or to measure it "
            f"only, write probes: {{old: {{run: {remember.run}}}}}",
        )


def _begin(run: str) -> str:
    return f"set model.model_name_or_path: {run.rstrip('/')}/final"


def is_another(run: str, name: str | None) -> bool:
    """Whether the model is another one than that of the finished run, as far as the recipe alone can tell: names with
    variables, and a relative one beside an absolute one, may be the same."""
    if name is None:
        return True
    model, final = normpath(name), normpath(f"{run}/final")
    if any("$" in text or text.startswith("~") for text in (run, name)):
        return False
    return model != final and model.startswith("/") == final.startswith("/")


def _trained(recipe: Recipe) -> Iterator[Problem]:
    """What holds weights that are not trained, or that are other ones than the model's own."""
    remember, adapters = recipe.remember, recipe.trainable.adapters
    if remember is None:
        return
    for name in given(recipe, _PENALTIES) if adapters else ():
        yield problem_at(
            f"remember.{name}",
            "and adapters exclude each other: the model's own weights are frozen and stay what they were; to hold the "
            "adapters near zero, set regularization.l2",
        )
    if adapters and remember.wise_ft is not None:
        yield problem_at(
            "remember.wise_ft",
            "and adapters exclude each other: what lies between their matrices is not what lies between the models; "
            "afterwards, tunesmith average --method task --weights ALPHA RUN",
        )
    if any(isinstance(one, _VIRTUAL_TOKENS) for one in adapters) and (remember.run or remember.probes):
        kind = next(one.type for one in adapters if isinstance(one, _VIRTUAL_TOKENS))
        yield problem_at(
            "remember.run" if remember.run else "remember.probes",
            f"is measured on the backbone's weights, which {kind} leaves as they are: leave it out, or train a lora",
        )
    for name in given(recipe) if stays_frozen(recipe) else ():
        yield problem_at(
            f"remember.{name}",
            "has no effect: trainable.freeze keeps the backbone as it is"
            + ("; for the head, set regularization.l2" if name == "l2_sp" else ""),
        )


def _tokens(recipe: Recipe) -> Iterator[Problem]:
    remember, model = recipe.remember, recipe.model
    if remember is None or not (remember.run or remember.probes):
        return
    said = "makes other embeddings than those of the run that is remembered: leave it out"
    if model.add_tokens:
        yield problem_at("model.add_tokens", said)
    if isinstance(model.tokenizer, TrainTokenizer):
        yield problem_at("model.tokenizer", said)


def _ewc(recipe: Recipe) -> Iterator[Problem]:
    remember, objective = recipe.remember, recipe.objective
    if remember is None or remember.ewc is None:
        return
    if remember.ewc.data is None and remember.run is None:
        yield problem_at(
            "remember.ewc", "needs old rows: set remember.run (a finished run) or remember.ewc.data"
        )
    elif remember.ewc.data is not None and remember.ewc.labels == "model":
        numbers = objective.type == "classification" and objective.problem == "regression"
        if numbers or objective.type not in _DRAWN:
            kind = "regression" if numbers else objective.type
            yield problem_at(
                "remember.ewc.labels",
                f"answers are not drawn from what a model of {kind} predicts: set labels: data",
            )


def _lwf(recipe: Recipe) -> Iterator[Problem]:
    remember, parallel, key = recipe.remember, recipe.parallel, "remember.lwf"
    if remember is None or remember.lwf is None:
        return
    if recipe.data.packing:
        yield problem_at(key, "a packed sequence has no rows for the old head: set data.packing: false")
    for index, operation in enumerate(recipe.data.augment):
        if operation.type in {"mixup", "cutoff"}:
            yield problem_at(
                f"data.augment.{index}.type",
                f"{operation.type}: the old model reads whole rows (remember.lwf): leave it out",
            )
    for size in ("tensor_parallel_size", "sequence_parallel_size"):
        if getattr(parallel, size, 1) > 1:
            yield problem_at(
                f"parallel.{size}",
                "the old model (remember.lwf) sees whole rows on every process: set it to 1",
            )


def _teacher(recipe: Recipe) -> Iterator[Problem]:
    remember, distill = recipe.remember, recipe.distill
    if remember is None or remember.lwf is None or distill is None or remember.run is None:
        return
    names = [distill.teacher_model_name_or_path, *(one.model_name_or_path for one in distill.teachers)]
    same = {normpath(remember.run), normpath(f"{remember.run}/final")}
    if any(name is not None and normpath(name) in same for name in names):
        yield problem_at(
            "remember.lwf", "and distill keep to the answers of the same model: leave one of them out"
        )


RULES = (
    ({"remember"}, _effect),
    ({"remember"}, _probes),
    ({"remember", "model"}, _begins_with),
    ({"remember", "trainable"}, _trained),
    ({"remember", "model"}, _tokens),
    ({"remember", "objective"}, _ewc),
    ({"remember", "data", "parallel"}, _lwf),
    ({"remember", "distill"}, _teacher),
)
"""Each rule with the sections that it reads."""
