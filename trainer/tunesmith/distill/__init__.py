"""Distillation: what a frozen teacher gives beside the student's own outputs, and the terms of the loss that compare
the two."""

from tunesmith.distill.build import build

__all__ = ["build"]
