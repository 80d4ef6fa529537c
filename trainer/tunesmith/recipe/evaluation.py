"""`evaluation`: when the `eval` rows are looked at, what is measured, and what may stop the run."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from tunesmith.recipe.base import NonNegative, NonNegativeFloat, Positive, Section


class Generate(Section):
    """Greedy or beam search on the evaluation prompts. `answer` is a regular expression whose first group is
    the answer that exact match compares, or `gsm8k` for the number behind `####`."""

    max_new_tokens: Positive = 128
    num_beams: Positive = 1
    limit: Positive | None = None
    answer: str | None = None
    show: NonNegative = 3


class EarlyStopping(Section):
    """Stop after `patience` evaluations without an improvement of more than `min_delta`."""

    patience: Positive = 3
    min_delta: NonNegativeFloat = 0.0


class TuneThresholds(Section):
    """Where scores become answers, chosen after training on the evaluation rows, for the best `metric`. One label of
    two: the score of the rarer one from which on it is the answer. Several labels per row: a threshold for each. One
    label of many: a factor on the score of each (macro_f1, balanced_accuracy or accuracy)."""

    metric: Literal["f1", "macro_f1", "balanced_accuracy", "accuracy", "mcc"] = "macro_f1"


class Evaluation(Section):
    """`eval_steps: epoch` evaluates at the end of every epoch, a number every so many optimizer steps;
    the last step is always evaluated, with `eval_steps: null` it alone. `metrics: null` computes all that
    the objective has. `metric_for_best` chooses `final: best`, early stopping and reduce-on-plateau.
    After training, `calibrate: temperature` divides the logits by the number that suits the evaluation rows best."""

    eval_steps: Positive | Literal["epoch"] | None = "epoch"
    per_device_eval_batch_size: Positive = 32
    metrics: list[str] | None = None
    metric_for_best: str | None = None
    greater_is_better: bool | None = None
    early_stopping: EarlyStopping | None = None
    generate: Generate | None = None
    tune_thresholds: TuneThresholds | None = None
    calibrate: Literal["temperature"] | None = None

    @model_validator(mode="after")
    def _stopping_has_evaluations(self) -> Evaluation:
        if self.early_stopping is not None and self.eval_steps is None:
            raise ValueError("early_stopping needs evaluations: set eval_steps")
        return self
