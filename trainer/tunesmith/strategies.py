"""The recipe's strategies, each built by its own module, put together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunesmith import averaging, distill, embedding_noise, losses, regularization, remember, tasks
from tunesmith.assemble import Assembled
from tunesmith.data.prepare import Dataset
from tunesmith.data.stream import Stream
from tunesmith.objectives import Objective
from tunesmith.parts import EXTRAS, Strategies
from tunesmith.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Building:
    """What there is when strategies are built: before the engine has prepared the model."""

    recipe: Recipe
    base: Path
    built: Assembled
    objective: Objective
    tokenizer: Any
    datasets: dict[str, Dataset]
    stream: Stream
    total_steps: int
    device: torch.device


def build_strategies(building: Building) -> Strategies:
    """All that the recipe asks for; the model has got what is trained beside it as its child EXTRAS."""
    # what an objective or its rows bring along, the rules refuse to one task of several
    one = (
        losses.build(building) | embedding_noise.build(building)
        if not building.recipe.tasks
        else Strategies()
    )
    found = (
        one
        | tasks.build(building)
        | remember.build(building)
        | regularization.build(building)
        | averaging.build(building)
        | distill.build(building)
    )
    model: nn.Module = building.built.model
    extras = {name: child for part in found.forward for name, child in part.modules(model).items()}
    if extras:
        model.add_module(EXTRAS, nn.ModuleDict(extras))
    return found
