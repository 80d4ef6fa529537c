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

_LENGTHEN = (settings.TokenInsert, settings.Synonyms, settings.BackTranslation)


def build(building: Building) -> Strategies:
    """The operations of `data.augment` on embeddings, in their order: mixup, then cutoff; and for the report, all of
    its operations."""
    asked = building.recipe.data.augment
    if not asked:
        return Strategies()
    facts = {"augment": [one.model_dump(mode="json") for one in asked]}
    longer = [one.type for one in asked if isinstance(one, _LENGTHEN)]
    notes = (
        f"{', '.join(longer)} can make a row longer than the longest one that was tried, up to max_length",
    )
    plain = Strategies(facts=facts, notes=notes if longer else ())
    changes: list[Change] = []
    mixes = False
    for number, operation in enumerate(asked):
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
        return plain
    part = EmbeddingNoise(changes)
    part.attach(*ways_of_reading(building.built.model))
    return plain | Strategies(forward=(part,), own=MixedTerm if mixes else None)
