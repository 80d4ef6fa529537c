"""`kernels`: which implementation computes the hot operations."""

from __future__ import annotations

from typing import Literal

from tunesmith.recipe.base import Section


class Kernels(Section):
    """An operation, and what computes it. `auto`: tunesmith's own kernel where it applies, the start-up report says
    which and why. `reference`: torch's operators, on whole logits. `cpu` and `triton` are an error where they cannot
    run, `torch` is the kernel's form in torch's own operators."""

    linear_cross_entropy: Literal["auto", "reference", "torch", "cpu", "triton"] = "auto"
    adamw: Literal["auto", "reference", "cpu", "triton"] = "auto"
    adamw_8bit: Literal["auto", "reference", "cpu", "triton"] = "auto"
