"""Fused losses and optimizers: pure tensor functions on torch (and, where a GPU is, triton); usable without the
trainer."""

from tunesmith_kernels.adamw import AdamW
from tunesmith_kernels.adamw8bit import AdamW8bit
from tunesmith_kernels.explain import explain
from tunesmith_kernels.linear_loss.cross_entropy import Stats, linear_cross_entropy
from tunesmith_kernels.linear_loss.distillation import DistillationStats, linear_distillation
from tunesmith_kernels.linear_loss.distillation_checks import TeacherHidden, TeacherLogits, TeacherTopK

__all__ = [
    "AdamW",
    "AdamW8bit",
    "DistillationStats",
    "Stats",
    "TeacherHidden",
    "TeacherLogits",
    "TeacherTopK",
    "explain",
    "linear_cross_entropy",
    "linear_distillation",
]
