"""What a recipe's strategies hold in memory beside the plain run, and how often they compute a row."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path

from tunesmith.averaging import state_bytes as average_bytes
from tunesmith.distill.memory import bytes_per_weight
from tunesmith.errors import UserError
from tunesmith.hub import resolve_path
from tunesmith.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Beside:
    """`per_weight`: bytes for each element that is trained, sharded as the optimizer's state is; `whole`: bytes on
    every device; `dealt`: bytes dealt out over the devices; `views`: how often a row passes in one forward; `notes`:
    what could not be counted."""

    per_weight: float = 0.0
    whole: float = 0.0
    dealt: float = 0.0
    views: int = 1
    notes: tuple[str, ...] = ()

    def on_one(self, world_size: int) -> float:
        """Bytes on one device that are no trained weight's."""
        return self.whole + self.dealt / world_size


PLAIN = Beside()


def beside(recipe: Recipe, base: Path) -> Beside:
    """`base`: the folder that the recipe's paths are relative to. What a teacher holds follows from its files' headers;
    one that is not on this disk is a note."""
    whole, dealt, notes = 0.0, 0.0, list[str]()
    settings = recipe.distill
    if settings is not None and settings.each_loss and settings.offline is None:
        for teacher in settings.each_teacher:
            name = teacher.model_name_or_path
            try:
                inside, table = _elements(name, base)
            except (UserError, OSError) as error:
                notes.append(f"the teacher's weights are not counted: {error}")
                continue
            width = bytes_per_weight(teacher)
            whole += table * (width if teacher.quantization is None else 4.0)
            if teacher.placement == "sharded":
                dealt += inside * width
            else:
                whole += inside * width
    remember = recipe.remember
    if remember is not None and remember.lwf is not None and remember.run is not None:
        try:
            whole += 4.0 * sum(_elements(remember.run, base))
        except (UserError, OSError) as error:
            notes.append(f"the old model's weights are not counted: {error}")
    if whole or dealt:
        notes.append(
            "what a forward of the teacher (or of the old model) needs beside its weights is not counted"
        )
    views = 1 if recipe.regularization.r_drop is None else 2
    return Beside(per_weight(recipe), whole, dealt, views, tuple(notes))


def per_weight(recipe: Recipe) -> float:
    """Bytes that strategies keep for each element that is trained: averages, where the weights began, what they count
    for, the weights that SAM steps away from."""
    found = per_weight_from_the_start(recipe)
    found += 0.0 if recipe.averaging is None else average_bytes(1)
    return found if recipe.regularization.sharpness is None else found + 4.0


def per_weight_from_the_start(recipe: Recipe) -> float:
    """The part of it that is there before the first step."""
    remember = recipe.remember
    if remember is None:
        return 0.0
    starts = sum(part is not None for part in (remember.l2_sp, remember.anchor, remember.wise_ft))
    return 4.0 * starts + (0.0 if remember.ewc is None else 8.0)


def _elements(name: str, base: Path) -> tuple[int, int]:
    """(of the layers, of the tables with a row for each token) in a model's folder, or in final/ of a run's. Raises
    UserError where there are no files to ask."""
    from safetensors import safe_open

    folder = Path(resolve_path(name, base))
    folder = folder / "final" if (folder / "final").is_dir() else folder
    files, config = sorted(folder.glob("*.safetensors")), folder / "config.json"
    if not files:
        raise UserError(f"{name} has no .safetensors files here")
    tokens = json.loads(config.read_text(encoding="utf-8")).get("vocab_size") if config.is_file() else None
    inside = table = 0
    for file in files:
        with safe_open(file, framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118
                shape = stored.get_slice(key).get_shape()
                if len(shape) == 2 and shape[0] == tokens:
                    table += prod(shape)
                else:
                    inside += prod(shape)
    return inside, table
