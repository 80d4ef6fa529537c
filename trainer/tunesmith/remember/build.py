"""`remember` made into parts of the step."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tunesmith.errors import UserError
from tunesmith.parts import StepPart, Strategies
from tunesmith.recipe import Recipe
from tunesmith.recipe.remember import EWC, L2SP, Anchor
from tunesmith.remember.anchored import Anchored, Interpolated, Strength
from tunesmith.remember.importance import Importance, backbone_names, importance
from tunesmith.remember.lwf import build_lwf
from tunesmith.remember.probes import check_probes
from tunesmith.trainable.structure import Structure

if TYPE_CHECKING:
    from tunesmith.engine.shards import Shard
    from tunesmith.strategies import Building

_MODULE = "model."  # where the model lies in the module that is trained


def build(building: Building) -> Strategies:
    """The parts that `remember` asks for, none without it. Raises UserError where there is nothing to hold on to."""
    settings = building.recipe.remember
    if settings is None:
        return Strategies()
    check_probes(settings, building.built.model.config)
    if settings.run is not None:
        _check_beginning(building.recipe, Path(settings.run))
    model: nn.Module = building.built.model
    new = frozenset(_MODULE + name for name in building.built.facts.get("new_weights", []))
    steps: list[StepPart] = []
    facts: dict[str, Any] = {}
    if settings.l2_sp is not None:
        steps.append(_l2_sp(settings.l2_sp, model, new))
    if settings.anchor is not None:
        steps.append(_anchor(settings.anchor, model, new))
    if settings.ewc is not None:
        found = importance(building, settings.ewc, settings)
        steps.append(_ewc(settings.ewc, model, found))
        facts["fisher"] = {"rows": found.rows, "labels": settings.ewc.labels, "file": str(found.file)}
    if settings.wise_ft is not None:
        steps.append(Interpolated(settings.wise_ft.alpha, new))
    found = Strategies(steps=tuple(steps), facts={"remember": facts} if facts else {})
    if settings.lwf is not None:
        assert settings.run is not None
        found |= build_lwf(building, settings.lwf, Path(settings.run))
    return found


def _check_beginning(recipe: Recipe, run: Path) -> None:
    """Raises UserError where this run does not begin as the remembered one ended."""
    name = recipe.model.model_name_or_path
    if name is None or os.path.realpath(name) != os.path.realpath(run / "final"):
        raise UserError(
            f"remember.run: {run} is not what the run begins with ({name}): set model.model_name_or_path: "
            f"{run / 'final'}"
        )


def _l2_sp(settings: L2SP, model: nn.Module, new: frozenset[str]) -> Anchored:
    strengths: dict[str, Strength] = {}
    for name, _ in model.named_parameters():
        strength = settings.new_weight if _MODULE + name in new else settings.weight
        if strength:
            strengths[_MODULE + name] = strength
    return Anchored("l2_sp", strengths, new)


def _anchor(settings: Anchor, model: nn.Module, new: frozenset[str]) -> Anchored:
    structure = Structure(model)
    strengths: dict[str, Strength] = {}
    for name, _ in model.named_parameters():
        place = structure.place(name)
        if _MODULE + name in new or place.kind not in {"embeddings", "layer"}:
            continue
        above = place.layer + 1 if place.kind == "layer" else 0
        strengths[_MODULE + name] = settings.weight * settings.factor**above
    return Anchored("anchor", strengths)


def _ewc(settings: EWC, model: nn.Module, found: Importance) -> Anchored:
    def reader(name: str) -> Strength:
        def read(shard: Shard) -> Tensor:
            return shard.of(found.of(name)).clone() * settings.weight

        return read

    names = backbone_names(model)
    return Anchored("ewc", {_MODULE + name: reader(own) for name, own in names.items() if own in found.names})
