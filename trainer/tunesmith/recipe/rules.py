"""The rules that span settings: what excludes or needs each other, and what would have no effect. A setting
without effect is a fault only where the recipe gives it (`model_fields_set`), never where a default does."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from tunesmith.recipe import (
    rules_augment,
    rules_averaging,
    rules_distill,
    rules_losses,
    rules_regularization,
    rules_remember,
    rules_sampling,
    rules_tasks,
    rules_trainable,
)
from tunesmith.recipe.faults import Problem, problem_at

if TYPE_CHECKING:
    from tunesmith.recipe.data import Source
    from tunesmith.recipe.root import Recipe

_PACKABLE = {"causal_lm", "sft"}
_GENERATING = {"causal_lm", "sft", "seq2seq"}
_CHATS = {"prompt_answer", "alpaca", "messages", "sharegpt"}
_FORMATS = {
    "causal_lm": {"text"},
    "masked_lm": {"text"},
    "span_corruption": {"text"},
    "sft": _CHATS,
    "seq2seq": {"translation"} | _CHATS,
    "classification": {"classification", "pairs"},
    "token_classification": {"tokens"},
    "question_answering": {"squad"},
}
_SET_EVAL = "set data.eval or data.split.eval"


def _has_eval(recipe: Recipe) -> bool:
    data = recipe.data
    return bool(data.eval) or (data.split is not None and data.split.eval > 0)


def _has_test(recipe: Recipe) -> bool:
    data = recipe.data
    return bool(data.test) or (data.split is not None and data.split.test > 0)


def _packing(recipe: Recipe) -> Iterator[Problem]:
    if recipe.data.packing and recipe.objective.type not in _PACKABLE:
        yield problem_at(
            "data.packing", f"packs causal_lm and sft only; the objective is {recipe.objective.type}"
        )


def _group_by_length(recipe: Recipe) -> Iterator[Problem]:
    data = recipe.data
    if data.packing and data.group_by_length and "group_by_length" in data.model_fields_set:
        yield problem_at("data.group_by_length", "has no effect with packing: true")


def _split(recipe: Recipe) -> Iterator[Problem]:
    split = recipe.data.split
    if split is not None and split.eval == 0 and split.test == 0:
        yield problem_at("data.split", "takes no rows: set its eval or test")


def _formats(recipe: Recipe) -> Iterator[Problem]:
    for part in ("train", "eval", "test"):
        yield from _unread(recipe, f"data.{part}", getattr(recipe.data, part))


def _old_formats(recipe: Recipe) -> Iterator[Problem]:
    if recipe.remember is not None and recipe.remember.ewc is not None:
        yield from _unread(recipe, "remember.ewc.data", recipe.remember.ewc.data or [])


def _unread(recipe: Recipe, key: str, sources: Sequence[Source]) -> Iterator[Problem]:
    """The sources whose rows the objective cannot make anything of."""
    allowed = _FORMATS[recipe.objective.type]
    for index, source in enumerate(sources):
        if source.format not in allowed:
            yield problem_at(
                f"{key}.{index}.format",
                f"objective {recipe.objective.type} does not read {source.format}; it reads "
                + ", ".join(sorted(allowed)),
            )


def _doc_stride(recipe: Recipe) -> Iterator[Problem]:
    objective = recipe.objective
    if objective.type == "question_answering" and objective.doc_stride >= recipe.data.max_length:
        yield problem_at(
            "objective.doc_stride",
            f"must be below data.max_length ({recipe.data.max_length}), or the windows never move on",
        )


def _masking(recipe: Recipe) -> Iterator[Problem]:
    objective = recipe.objective
    if objective.type == "masked_lm" and objective.mask_replace_prob + objective.random_replace_prob > 1:
        yield problem_at(
            "objective.random_replace_prob", "with mask_replace_prob it must not exceed 1 in all"
        )


def _regression(recipe: Recipe) -> Iterator[Problem]:
    objective = recipe.objective
    if objective.type == "classification" and objective.problem == "regression":
        if objective.label_smoothing_factor > 0:
            yield problem_at("objective.label_smoothing_factor", "has no effect with problem: regression")
        if objective.labels is not None:
            yield problem_at("objective.labels", "has no effect with problem: regression")


def _nesterov(recipe: Recipe) -> Iterator[Problem]:
    if recipe.optim.name == "sgd" and recipe.optim.nesterov and recipe.optim.momentum == 0:
        yield problem_at("optim.nesterov", "needs a momentum above 0")


def _plateau(recipe: Recipe) -> Iterator[Problem]:
    if recipe.schedule.lr_scheduler_type == "reduce_on_plateau":
        if not _has_eval(recipe):
            yield problem_at(
                "schedule.lr_scheduler_type", f"reduce_on_plateau needs evaluation rows: {_SET_EVAL}"
            )
        elif recipe.evaluation.eval_steps is None:
            yield problem_at(
                "schedule.lr_scheduler_type",
                "reduce_on_plateau needs evaluations while it trains: set evaluation.eval_steps",
            )


def _generate(recipe: Recipe) -> Iterator[Problem]:
    if recipe.evaluation.generate is not None and recipe.objective.type not in _GENERATING:
        yield problem_at("evaluation.generate", f"objective {recipe.objective.type} generates no text")


def _unevaluated(recipe: Recipe) -> Iterator[Problem]:
    evaluation = recipe.evaluation
    given = {name for name in evaluation.model_fields_set if getattr(evaluation, name) is not None}
    if not _has_eval(recipe):
        needs_eval = ["eval_steps", "metric_for_best", "greater_is_better", "early_stopping"]
        for name in (name for name in needs_eval if name in given):
            yield problem_at(f"evaluation.{name}", f"has no effect without evaluation rows: {_SET_EVAL}")
        if not _has_test(recipe):
            needs_any = ["per_device_eval_batch_size", "metrics", "generate"]
            for name in (name for name in needs_any if name in given):
                yield problem_at(
                    f"evaluation.{name}", "has no effect without evaluation or test rows: set data.eval or "
                    "data.test"
                )  # fmt: skip
    elif "greater_is_better" in given and evaluation.metric_for_best is None:
        yield problem_at("evaluation.greater_is_better", "has no effect without metric_for_best")


def _final(recipe: Recipe) -> Iterator[Problem]:
    checkpoint = recipe.checkpoint
    if checkpoint.final == "best" and "final" in checkpoint.model_fields_set and not _has_eval(recipe):
        yield problem_at("checkpoint.final", f"best needs evaluation rows: {_SET_EVAL}, or write last")


def _wandb(recipe: Recipe) -> Iterator[Problem]:
    wandb = recipe.tracking.wandb
    if wandb.mode == "disabled":
        for name in ("project", "entity", "group", "tags"):
            if getattr(wandb, name):
                yield problem_at(f"tracking.wandb.{name}", "has no effect with mode: disabled")


def _sharding(recipe: Recipe) -> Iterator[Problem]:
    strategy = recipe.parallel.strategy
    if strategy in {"auto", "single", "ddp"}:
        return
    match recipe.optim.name:
        case "adafactor":
            yield problem_at(
                "optim.name", f"adafactor looks at whole matrices, which {strategy} cuts: use ddp or adamw"
            )
        case "adamw_8bit" | "lion_8bit" as name:
            yield problem_at(
                "optim.name", f"{name} keeps its states in blocks, which {strategy} cuts: use ddp or adamw"
            )
        case _:
            pass
    if recipe.training.torch_compile and strategy == "zero3":
        yield problem_at(
            "training.torch_compile",
            "zero3 gathers the weights of every linear module in hooks, which no graph can hold: use fsdp2",
        )


def _parameters(recipe: Recipe) -> Iterator[Problem]:
    precision = recipe.training.precision
    if not precision.startswith("bf16_"):
        return
    key = "training.precision"
    if recipe.optim.name != "adamw":
        yield problem_at(
            key, f"{precision} is a way of adamw to update bf16 parameters; {recipe.optim.name} has none"
        )
    elif recipe.each_kernel.adamw == "reference":
        yield problem_at(key, f"{precision} is done by tunesmith's own adamw: leave kernels.adamw at auto")
    parallel = recipe.parallel
    if parallel.strategy in {"zero1", "zero2", "zero3"}:
        yield problem_at(
            key,
            f"{precision} is not for {parallel.strategy}, which shards parameters of fp32: use bf16, or fsdp2",
        )
    elif parallel.strategy == "fsdp2" and parallel.tensor_parallel_size > 1 and precision != "bf16_master":
        yield problem_at(
            key,
            f"{precision} keys its rounding to whole rows, which tensor_parallel_size cuts: use bf16_master",
        )


def _sequence_parallel(recipe: Recipe) -> Iterator[Problem]:
    parallel = recipe.parallel
    if parallel.strategy != "fsdp2" or parallel.sequence_parallel_size == 1:
        return
    key = "parallel.sequence_parallel_size"
    if recipe.objective.type not in _PACKABLE:
        yield problem_at(
            key, f"cuts the sequences of causal_lm and sft; the objective is {recipe.objective.type}"
        )
    if recipe.data.packing:
        yield problem_at(
            key, "and data.packing exclude each other: a packed sequence needs a mask of its whole square"
        )
    if parallel.tensor_parallel_size > 1:
        yield problem_at(key, "and tensor_parallel_size exclude each other: set one of them to 1")
    if recipe.model.attn_implementation != "sdpa":
        yield problem_at(key, f"computes attention by sdpa, not by {recipe.model.attn_implementation}")


Rule = Callable[["Recipe"], Iterator[Problem]]

# each rule with the sections that it reads
_RULES: tuple[tuple[set[str], Rule], ...] = (
    ({"data", "objective"}, _packing),
    ({"data"}, _group_by_length),
    ({"data"}, _split),
    ({"data", "objective"}, _formats),
    ({"remember", "objective"}, _old_formats),
    ({"data", "objective"}, _doc_stride),
    ({"objective"}, _masking),
    ({"objective"}, _regression),
    ({"optim"}, _nesterov),
    ({"optim", "parallel", "training"}, _sharding),
    ({"training", "optim", "kernels", "parallel"}, _parameters),
    ({"parallel", "objective", "data", "model"}, _sequence_parallel),
    ({"schedule", "data", "evaluation"}, _plateau),
    ({"evaluation", "objective"}, _generate),
    ({"evaluation", "data"}, _unevaluated),
    ({"checkpoint", "data"}, _final),
    ({"tracking"}, _wandb),
    *rules_augment.RULES,
    *rules_averaging.RULES,
    *rules_losses.RULES,
    *rules_distill.RULES,
    *rules_regularization.RULES,
    *rules_remember.RULES,
    *rules_sampling.RULES,
    *rules_tasks.RULES,
    *rules_trainable.RULES,
)


def check(recipe: Recipe, sections: Collection[str]) -> list[Problem]:
    """The rules that `recipe` breaks. `recipe` needs to hold only the `sections` named: of a recipe with
    faulty sections, the rules among the sound ones are checked all the same."""
    there, missing = rules_tasks.given(recipe, sections)
    found = [problem for needs, rule in _RULES if needs <= there for problem in rule(recipe)]
    return [*missing, *found, *rules_tasks.of_each_task(recipe, sections, _RULES)]
