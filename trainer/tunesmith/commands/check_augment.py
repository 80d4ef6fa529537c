"""What `tunesmith check` finds about `data.augment`: tables, tokens, libraries and models, without any translation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from tunesmith.commands.findings import Finding, attempt, fine
from tunesmith.data.augment.pairs import augmentation
from tunesmith.data.augment.synonyms import words_of_table
from tunesmith.data.augment.variants import check_models
from tunesmith.data.prepare import Dataset
from tunesmith.objectives import Objective
from tunesmith.recipe import Recipe
from tunesmith.recipe import augment as settings

_TOPIC = "augment"


def augment_findings(
    recipe: Recipe, datasets: Mapping[str, Dataset], objective: Objective
) -> Iterator[Finding]:
    """`recipe` with absolute paths."""
    asked = recipe.data.augment
    if not asked:
        return
    built = attempt(_TOPIC, lambda: augmentation(asked, objective, datasets["train"].table, None))
    if isinstance(built, Finding):
        yield built
        return
    yield fine(_TOPIC, ", ".join(f"{one.type} of {one.probability:.0%} of the rows" for one in asked))
    for one in asked:
        match one:
            case settings.BackTranslation():
                found = attempt(_TOPIC, lambda one=one: check_models(one))
                made = f"{one.num_variants} variants of each text are made before the training"
                yield found if isinstance(found, Finding) else fine(_TOPIC, f"{', '.join(found)}; {made}")
            case settings.Synonyms(table=str(table)) | settings.TokenInsert(table=str(table)):
                yield fine(_TOPIC, f"{table}: synonyms of {words_of_table(Path(table)):,} words")
            case _:
                pass
