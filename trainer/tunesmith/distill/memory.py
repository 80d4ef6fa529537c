"""What the teachers of a recipe are, and what they hold in memory, before any of their weights is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.distill.teacher import DTYPES, Known, know, source
from tunesmith.objectives import Objective
from tunesmith.recipe import Recipe
from tunesmith.recipe.distill import Teacher
from tunesmith.unpartitioned import unpartitioned

_FEW_BITS = {"nf4": 4.5, "fp4": 4.5, "int8": 8.25}  # a weight of a linear layer, with its share of the scales


@dataclass(frozen=True, slots=True)
class TeacherSize:
    """`bytes`: its weights on one of `world_size` processes; 0 where only the disk is asked while it trains."""

    known: Known
    parameters: int
    bytes: int


def teacher_sizes(
    recipe: Recipe, base: Path, objective: Objective, tokenizer: Any, student: Any, world_size: int = 1
) -> list[TeacherSize]:
    """`student`: the student's config. Raises UserError for what is no teacher of it."""
    settings = recipe.distill
    if settings is None:
        return []
    found: list[TeacherSize] = []
    asked = bool(settings.each_loss) and settings.offline is None
    for one in settings.each_teacher:
        known = know(one, base, objective, tokenizer, student)
        with unpartitioned():
            empty, _ = source(known, objective, recipe.model.attn_implementation, 0).empty()
        model: Any = empty
        total = sum(p.numel() for p in model.parameters())
        width = bytes_per_weight(one)
        whole = sum(p.numel() for p in model.get_input_embeddings().parameters())
        inside = total - whole
        if one.quantization is not None:  # the embeddings keep 32 bits
            size = inside * width + 4 * whole
        else:
            size = (inside / (world_size if one.placement == "sharded" else 1) + whole) * width
        found.append(TeacherSize(known, total, int(size) if asked else 0))
    return found


def bytes_per_weight(teacher: Teacher) -> float:
    """Of a weight of its layers; the embeddings of a quantised one keep 4."""
    if teacher.quantization is not None:
        return _FEW_BITS[teacher.quantization.type] / 8
    return DTYPES[teacher.dtype].itemsize
