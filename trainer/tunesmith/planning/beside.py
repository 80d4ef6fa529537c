"""What a recipe's strategies hold in memory beside the plain run, and how often they compute a row."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

from tunesmith.averaging import state_bytes as average_bytes
from tunesmith.errors import UserError
from tunesmith.model import resolve_path
from tunesmith.recipe import Recipe
from tunesmith.recipe.distill import Teacher

_WIDTHS = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0}
_FEW_BITS = {"nf4": 4.5 / 8, "fp4": 4.5 / 8, "int8": 8.25 / 8}  # scales included


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
                size = _elements(name, base) * _bytes_per_weight(teacher)
            except (UserError, OSError) as error:
                notes.append(f"the teacher's weights are not counted: {error}")
                continue
            if teacher.placement == "sharded":
                dealt += size
            else:
                whole += size
    remember = recipe.remember
    if remember is not None and remember.lwf is not None and remember.run is not None:
        try:
            whole += 4.0 * _elements(remember.run, base)
        except (UserError, OSError) as error:
            notes.append(f"the old model's weights are not counted: {error}")
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


def _bytes_per_weight(teacher: Teacher) -> float:
    if teacher.quantization is not None:
        return _FEW_BITS[teacher.quantization.type]
    return _WIDTHS[teacher.dtype]


def _elements(name: str, base: Path) -> int:
    """Of the weights in a model's folder, or in final/ of a run's. Raises UserError where there are no files to ask."""
    from safetensors import safe_open

    folder = Path(resolve_path(name, base))
    folder = folder / "final" if (folder / "final").is_dir() else folder
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{name} has no .safetensors files here")
    total = 0
    for file in files:
        with safe_open(file, framework="pt") as stored:
            total += sum(prod(stored.get_slice(key).get_shape()) for key in stored.keys())  # noqa: SIM118
    return total
