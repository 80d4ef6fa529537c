"""Augmentation of embedded training rows (`data.augment`: cutoff, mixup): parts of the forward, built here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.embedding_noise.cutoff import Cutoff
from tunesmith.embedding_noise.hook import Change, EmbeddingNoise, ways_of_reading
from tunesmith.embedding_noise.mixup import MixedTerm, mix
from tunesmith.parts import Strategies
from tunesmith.recipe import augment as settings

if TYPE_CHECKING:
    from tunesmith.strategies import Building


def build(building: Building) -> Strategies:
    """The operations of `data.augment` on embeddings, in their order: mixup, then cutoff."""
    changes: list[Change] = []
    mixes = False
    for number, operation in enumerate(building.recipe.data.augment):
        match operation:
            case settings.Mixup():
                mixes = True
                changes.append(mix)
            case settings.Cutoff():
                special = building.tokenizer.all_special_ids
                changes.append(
                    Cutoff(operation, number, tuple(special), building.recipe.objective.type == "sft")
                )
            case _:
                pass
    if not changes:
        return Strategies()
    part = EmbeddingNoise(changes)
    part.attach(*ways_of_reading(building.built.model))
    return Strategies(forward=(part,), own=MixedTerm if mixes else None)
