"""The objectives, a file each, and the one place that tells them apart."""

from __future__ import annotations

from typing import Any

from tunesmith.objectives.base import Objective
from tunesmith.recipe import Recipe, losses
from tunesmith.recipe import objective as settings


def build_objective(recipe: Recipe, tokenizer: Any) -> Objective:
    """The recipe's objective; the modules of the others are not imported."""
    if recipe.tasks:
        from tunesmith.tasks.prepare import build_objectives

        return build_objectives(recipe, tokenizer)
    chosen = recipe.objective
    common = (tokenizer, recipe.data.max_length, recipe.data.truncation)
    generates = recipe.evaluation.generate is not None
    match chosen:
        case settings.CausalLM():
            from tunesmith.objectives.causal_lm import CausalLMObjective

            return CausalLMObjective(chosen, *common, generates=generates)
        case settings.SFT():
            from tunesmith.objectives.sft import SFTObjective

            return SFTObjective(chosen, *common, recipe.model.chat_template, generates=generates)
        case settings.MaskedLM():
            from tunesmith.objectives.masked_lm import MaskedLMObjective

            return MaskedLMObjective(chosen, *common)
        case settings.SpanCorruption():
            from tunesmith.objectives.span_corruption import SpanCorruptionObjective

            return SpanCorruptionObjective(chosen, *common)
        case settings.Classification(loss=losses.Ranking()):
            from tunesmith.objectives.ranking import RankingObjective

            return RankingObjective(chosen, *common)
        case settings.Classification():
            from tunesmith.objectives.classification import ClassificationObjective

            return ClassificationObjective(chosen, *common)
        case settings.TokenClassification():
            from tunesmith.objectives.token_classification import TokenClassificationObjective

            return TokenClassificationObjective(chosen, *common)
        case settings.QuestionAnswering():
            from tunesmith.objectives.question_answering import QuestionAnsweringObjective

            return QuestionAnsweringObjective(chosen, *common)
        case settings.Seq2Seq():
            from tunesmith.objectives.seq2seq import Seq2SeqObjective

            return Seq2SeqObjective(chosen, *common)


__all__ = ["Objective", "build_objective"]
