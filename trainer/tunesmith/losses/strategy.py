"""What the loss of an objective adds to a run beside its own term: facts, and weights that come later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunesmith.errors import UserError
from tunesmith.parts import StepPart, Strategies
from tunesmith.recipe.losses import LDAM
from tunesmith.recipe.moments import step_of
from tunesmith.terms import Term

if TYPE_CHECKING:
    from tunesmith.strategies import Building


@dataclass
class DeferredReweighting(StepPart):
    """Deferred re-weighting (Cao et al. 2019, §3.3): `before` is the loss until `start` steps are done, `after` from
    then on. A function of the step alone: a run that goes on needs no state for it."""

    before: str
    after: str
    start: int
    name: str = "reweighting"

    def weights(self, step: int, terms: Sequence[Term]) -> Mapping[str, float]:
        later = step >= self.start
        return {self.before: float(not later), self.after: float(later)}


def build(building: Building) -> Strategies:
    objective, loss = building.objective, building.recipe.objective.loss
    facts = {} if loss is None else {"loss": loss.model_dump(mode="json")}
    if objective.reweighted is None:
        return Strategies(facts=facts)
    assert isinstance(loss, LDAM)
    assert loss.reweight_from is not None
    start = step_of(loss.reweight_from, building.total_steps, building.stream.steps_per_epoch)
    if start >= building.total_steps:
        raise UserError(
            f"objective.loss.reweight_from: {loss.reweight_from} is step {start}, and the run has "
            f"{building.total_steps}"
        )
    (own,) = objective.terms
    return Strategies(
        terms=(objective.reweighted,),
        steps=(DeferredReweighting(own.name, objective.reweighted.name, start),),
        facts=facts,
        notes=(
            f"from step {start + 1} on rows are weighed too; evaluations' loss stays the one without weights",
        ),
    )
