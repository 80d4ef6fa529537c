"""What an evaluation measures: pure functions of (predictions, references), in this order everywhere, on the
whole evaluation set at once (a mean of batch scores is another number).

Scales are those of the publications: `bleu`, `chrf` and SQuAD's `exact_match` and `f1` are 0 to 100, every
other bounded score is 0 to 1 (correlations −1 to 1). No input makes a function warn: a ratio whose
denominator is zero is 0.0, a score of nothing (no rows, no references) is nan, each said where it applies.
The tables are the same counts per class, label or entity type."""

from tunesmith.metrics.calibration import multi_label_calibration, single_label_calibration
from tunesmith.metrics.labels import (
    ClassScore,
    LabelTable,
    majority_baseline_accuracy,
    multi_label_metrics,
    multi_label_table,
    single_label_metrics,
    single_label_table,
)
from tunesmith.metrics.ranking import average_precision, curve_areas, roc_auc
from tunesmith.metrics.regression import regression_metrics
from tunesmith.metrics.spans import entity_metrics, entity_spans, entity_table
from tunesmith.metrics.squad import normalize_answer, squad_metrics
from tunesmith.metrics.text import (
    Signed,
    bleu,
    bleu_tokenizer,
    chrf,
    exact_match,
    extract_answer,
    rouge,
    rouge_tokenizer,
    text_unit,
)

__all__ = [
    "ClassScore",
    "LabelTable",
    "Signed",
    "average_precision",
    "bleu",
    "bleu_tokenizer",
    "chrf",
    "curve_areas",
    "entity_metrics",
    "entity_spans",
    "entity_table",
    "exact_match",
    "extract_answer",
    "majority_baseline_accuracy",
    "multi_label_calibration",
    "multi_label_metrics",
    "multi_label_table",
    "normalize_answer",
    "regression_metrics",
    "roc_auc",
    "rouge",
    "rouge_tokenizer",
    "single_label_calibration",
    "single_label_metrics",
    "single_label_table",
    "squad_metrics",
    "text_unit",
]
