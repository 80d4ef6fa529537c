"""`distill`: a frozen teacher, or several, and what of it the model learns to imitate."""

from __future__ import annotations

from tunesmith.recipe.base import Section


class Distill(Section):
    """`teacher_model_name_or_path`: a folder or a hub id of a model with the same kind of head."""

    teacher_model_name_or_path: str
