"""The rules of `distill`: what excludes or needs each other, and what would have no effect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tunesmith.recipe.distill import AttentionLoss, EmbeddingLoss, LogitsLoss
from tunesmith.recipe.faults import Problem, problem_at

if TYPE_CHECKING:
    from tunesmith.recipe.root import Recipe

_ANSWERING = {"sft", "causal_lm", "seq2seq"}
_DRAWN = {"masked_lm", "span_corruption"}  # whose rows are other ones in every epoch


def _losses(recipe: Recipe) -> Iterator[Problem]:
    distill = recipe.distill
    if distill is None:
        return
    if not distill.each_loss and distill.sequences is None:
        yield problem_at("distill.losses", "is empty: nothing is learnt from the teacher")
    if not distill.each_loss and distill.own_share != 1.0:
        yield problem_at(
            "distill.alpha", "has no effect without losses: the objective's own loss is the only one"
        )
    if distill.each_loss and distill.own_share == 1.0:
        yield problem_at("distill.alpha", "at 1 the teacher has no part in the loss")
    kinds = [loss.type for loss in distill.each_loss]
    for index, loss in enumerate(distill.each_loss):
        key = f"distill.losses.{index}"
        if isinstance(loss, LogitsLoss):
            if kinds.count("logits") > 1:
                yield problem_at(f"{key}.type", "logits stands there more than once: keep one divergence")
            if loss.beta is not None and loss.divergence != "jsd":
                yield problem_at(f"{key}.beta", f"has no effect with divergence: {loss.divergence}")
            if "rest" in loss.model_fields_set and loss.top_k is None and distill.offline is None:
                yield problem_at(f"{key}.rest", "has no effect without top_k")
        if isinstance(loss, AttentionLoss) and recipe.model.attn_implementation != "eager":
            yield problem_at(
                f"{key}.type",
                f"attention: {recipe.model.attn_implementation} keeps no attention probabilities: set "
                "model.attn_implementation: eager",
            )
        if isinstance(loss, EmbeddingLoss) and recipe.data.packing:
            yield problem_at(f"{key}.type", "embedding pools a row: set data.packing: false")
    if "temperature" in distill.model_fields_set and "logits" not in kinds:
        yield problem_at("distill.temperature", "has no effect without a loss on the logits")


def _inputs(recipe: Recipe) -> Iterator[Problem]:
    if recipe.distill is None:
        return
    for index, operation in enumerate(recipe.data.augment):
        if operation.type == "mixup":
            yield problem_at(
                f"data.augment.{index}.type",
                "mixup: a teacher reads the rows, not their mixtures: leave it out",
            )
    if recipe.trainable.cache_features:
        for index, loss in enumerate(recipe.distill.each_loss):
            if not isinstance(loss, LogitsLoss):
                yield problem_at(
                    f"distill.losses.{index}.type",
                    f"{loss.type} is of the backbone, which trainable.cache_features keeps frozen: leave it out",
                )


def _init(recipe: Recipe) -> Iterator[Problem]:
    if recipe.distill is None or recipe.distill.init is None:
        return
    key = "distill.init"
    if recipe.model.quantization is not None:
        yield problem_at(
            key, "copies weights, which model.quantization has in few bits: leave one of them out"
        )
    if recipe.trainable.head is not None:
        yield problem_at(key, "takes the teacher's head too: leave trainable.head out")


def _engines(recipe: Recipe) -> Iterator[Problem]:
    distill, parallel = recipe.distill, recipe.parallel
    if distill is None:
        return
    for index, teacher in enumerate(distill.teachers):
        key = f"distill.teachers.{index}"
        if teacher.placement == "sharded":
            if parallel.strategy not in {"auto", "fsdp2"}:
                yield problem_at(
                    f"{key}.placement",
                    f"sharded is for fsdp2; {parallel.strategy} cannot shard a model that it does not train: write "
                    "replicated",
                )
            if parallel.strategy == "auto":
                yield problem_at(f"{key}.placement", "sharded is for fsdp2: set parallel.strategy: fsdp2")
            if teacher.quantization is not None:
                yield problem_at(
                    f"{key}.quantization", "blocks of few bits cannot be cut: write placement: replicated"
                )
        if teacher.quantization is not None and "dtype" in teacher.model_fields_set:
            yield problem_at(
                f"{key}.dtype", "has no effect with quantization: set quantization.compute_dtype"
            )
    if parallel.strategy == "fsdp2" and parallel.sequence_parallel_size > 1:
        yield problem_at(
            "parallel.sequence_parallel_size",
            "a teacher sees whole sequences: set it to 1, or leave distill out",
        )
    if parallel.strategy == "fsdp2" and parallel.tensor_parallel_size > 1:
        yield problem_at(
            "parallel.tensor_parallel_size",
            "is not proven beside a teacher: set it to 1, or leave distill out",
        )


def _rows(recipe: Recipe) -> Iterator[Problem]:
    distill, kind = recipe.distill, recipe.objective.type
    if distill is None:
        return
    if distill.on_policy is not None:
        key = "distill.on_policy"
        if kind not in _ANSWERING:
            yield problem_at(
                key, f"objective {kind} gives no answers: it is for {', '.join(sorted(_ANSWERING))}"
            )
        if distill.own_share > 0:
            yield problem_at(
                "distill.alpha", "must be 0 with on_policy: the student's own answers are no labels"
            )
        if recipe.data.packing:
            yield problem_at(key, "answers are as long as they come: set data.packing: false")
        if [loss.type for loss in distill.each_loss] != ["logits"]:
            yield problem_at(
                key, "takes the divergence of the logits on the student's answers: name no other loss"
            )
        if distill.offline is not None:
            yield problem_at(key, "and offline exclude each other: a teacher must read answers that are new")
        if distill.on_policy.lmbda == 0:
            yield problem_at(f"{key}.lmbda", "0: no row is answered by the student: leave on_policy out")
    if distill.sequences is not None and kind not in _ANSWERING:
        yield problem_at(
            "distill.sequence_level",
            f"objective {kind} gives no answers: it is for {', '.join(sorted(_ANSWERING))}",
        )
    if distill.sequences is not None and len(distill.each_teacher) > 1:
        yield problem_at("distill.sequence_level", "takes the answers of one teacher: name only one")
    if distill.offline is not None:
        for index, teacher in enumerate(distill.teachers):
            if teacher.placement == "sharded":
                yield problem_at(
                    f"distill.teachers.{index}.placement",
                    "offline: one process asks the teacher: write replicated",
                )
        if kind in _DRAWN:
            yield problem_at(
                "distill.offline", f"objective {kind} draws other rows in every epoch: leave it out"
            )
        if [loss.type for loss in distill.each_loss] != ["logits"]:
            yield problem_at(
                "distill.offline", "holds what the teacher predicts, no more: name a loss of type logits only"
            )
        for index, loss in enumerate(distill.each_loss):
            if isinstance(loss, LogitsLoss) and loss.top_k is not None:
                yield problem_at(f"distill.losses.{index}.top_k", "is offline.top_k here: leave it out")


def _tasks(recipe: Recipe) -> Iterator[Problem]:
    if recipe.distill is not None and recipe.tasks:
        yield problem_at(
            "distill", "a teacher has one head: it is for a run of one task; distil task by task"
        )


RULES = (
    ({"distill", "tasks"}, _tasks),
    ({"distill", "model", "data"}, _losses),
    ({"distill", "parallel"}, _engines),
    ({"distill", "model", "trainable"}, _init),
    ({"distill", "data", "trainable"}, _inputs),
    ({"distill", "objective", "data"}, _rows),
)
