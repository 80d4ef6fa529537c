"""A student that begins as a part of its teacher: chosen layers, embeddings and head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tunesmith.distill.layers import depths
from tunesmith.distill.teacher import know, source
from tunesmith.errors import UserError
from tunesmith.objectives import Objective
from tunesmith.recipe.distill import Distill

Init = Literal["every_k", "first_k", "last_k"] | Sequence[int]
_KEY = "distill.init"


@dataclass(frozen=True, slots=True)
class Begun:
    """`layers`: of each stack, by its name in the model, the teacher's layers in the order of the student's, numbered
    as in the weights' names, from 0. `kept`: the student's weights that the teacher does not have."""

    layers: dict[str, list[int]]
    kept: list[str]

    def facts(self) -> dict[str, Any]:
        return {"teacher_layers": self.layers, "not_from_teacher": self.kept}


def chosen(init: Init, student: int, teacher: int) -> list[int]:
    """Which of `teacher` layers (from 0) the student's `student` layers begin as. every_k: the last one of each of
    `student` equal groups, so that layer i of the student has as much of the teacher below it as `layers: uniform`
    compares it with. Raises UserError."""
    if student > teacher:
        raise UserError(f"{_KEY}: the student has {student} layers, the teacher only {teacher}")
    match init:
        case "every_k":
            return [(2 * (i + 1) * teacher + student) // (2 * student) - 1 for i in range(student)]
        case "first_k":
            return list(range(student))
        case "last_k":
            return list(range(teacher - student, teacher))
        case _:
            found = [int(one) for one in init]  # pyright: ignore[reportArgumentType]
            if len(found) != student or not all(0 <= one < teacher for one in found):
                raise UserError(
                    f"{_KEY}: names {len(found)} layers: write {student} of 0 to {teacher - 1}, one for each layer of "
                    "the student"
                )
            return found


def stacks(model: nn.Module, config: Any) -> dict[str, int]:
    """The names of a model's stacks of layers, and how many each has."""
    wanted, found = set(depths(config).values()), dict[str, int]()
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in found)
        if isinstance(module, nn.ModuleList) and len(module) in wanted and not inside:
            found[name] = len(module)
    return found


@torch.no_grad()
def begin_as_teacher(
    model: Any, settings: Distill, base: Path, objective: Objective, tokenizer: Any, seed: int
) -> Begun:
    """Gives the whole `model`, on the CPU, the weights of the first teacher, in place. Raises UserError where they do
    not fit."""
    assert settings.init is not None
    first = settings.each_teacher[0].model_copy(update={"quantization": None, "dtype": "fp32"})
    known = know(first, base, objective, tokenizer, model.config)
    if known.tokenizer is not None:
        raise UserError(
            f"{_KEY}: teacher {known.name} has other tokens than the student: its embeddings mean others"
        )
    attention = model.config._attn_implementation
    teacher: Any = source(known, objective, attention, seed).whole()
    begun = _layers(settings.init, stacks(model, model.config), stacks(teacher, known.config))
    theirs: Mapping[str, Tensor] = teacher.state_dict()
    classes = 0 if known.order is None else len(known.order)
    kept: list[str] = []
    for name, value in model.state_dict().items():
        stack = next((stack for stack in begun if name.startswith(f"{stack}.")), None)
        found = _find(name, stack, begun, theirs)
        if found is None or (stack is None and classes and value.shape[:1] == (classes,)):
            kept.append(name)
        elif found.shape == value.shape:
            value.copy_(found)
        elif stack is None and found.dim() > 0 and found.shape[1:] == value.shape[1:]:
            rows = min(len(found), len(value))  # one of the two has more rows than tokens
            value[:rows].copy_(found[:rows])
        else:
            raise UserError(
                f"{_KEY}: {name} is {[*value.shape]} in the student and {[*found.shape]} in the teacher: only models "
                "of one width and kind can share layers"
            )
    return Begun(begun, kept)


def _layers(init: Init, ours: Mapping[str, int], theirs: Mapping[str, int]) -> dict[str, list[int]]:
    if not ours or ours.keys() != theirs.keys():
        raise UserError(
            f"{_KEY}: the layers of student ({', '.join(ours) or 'none'}) and teacher ({', '.join(theirs) or 'none'}) "
            "do not lie in the same places: both must be of one kind of model"
        )
    return {name: chosen(init, count, theirs[name]) for name, count in ours.items()}


def _find(
    name: str, stack: str | None, begun: Mapping[str, list[int]], theirs: Mapping[str, Tensor]
) -> Tensor | None:
    if stack is None:
        return theirs.get(name)
    number, _, leaf = name[len(stack) + 1 :].partition(".")
    # what a first layer has alone (T5's relative positions) is the teacher's first layer's
    return theirs.get(f"{stack}.{begun[stack][int(number)]}.{leaf}", theirs.get(name))
