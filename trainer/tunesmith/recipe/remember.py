"""`remember`: what keeps a model from losing what it could do before, and the measure of what it lost."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from tunesmith.recipe.base import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section
from tunesmith.recipe.data import Sources

Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")]


class L2SP(Section):
    """Li et al. 2018: `weight`/2 × Σ(w − w₀)² over the weights that the model's files gave, w₀ as they began, and
    `new_weight`/2 × Σw² over those that began at random (the head)."""

    weight: PositiveFloat = 0.01
    new_weight: NonNegativeFloat = 0.01


class Anchor(Section):
    """L2-SP with a strength of its own for every layer: `weight`/2 × Σ(w − w₀)² in the embeddings, `factor` times
    less in each layer further up (general features lie low and are kept, the top is free)."""

    weight: PositiveFloat = 0.1
    factor: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5


class EWC(Section):
    """Elastic weight consolidation (Kirkpatrick et al. 2017): `weight`/2 × ΣF(w − w₀)², F the diagonal of the Fisher
    information on `rows` training rows of `remember.run`, or of `data` in the recipe's own objective. `labels`: the
    model's own answers, drawn from what it predicts (the Fisher information), or those of the data (the empirical
    one)."""

    weight: PositiveFloat = 1000.0
    rows: Positive = 500
    labels: Literal["model", "data"] = "model"
    data: Sources | None = None


class LwF(Section):
    """Learning without forgetting (Li & Hoiem 2016): on the new rows, `remember.run`'s head on the model that is
    trained keeps to what the run answered: `weight` × temperature² × KL(old ‖ new)."""

    weight: PositiveFloat = 1.0
    temperature: PositiveFloat = 2.0


class Replay(Section):
    """Old rows among the new: `ratio` of the rows of every window are training rows of `remember.run`, with its
    objective and its head. The run has two tasks then, `new` and `old`, and `final/` a model of each. Rows of the
    recipe's own objective and labels are a further source in `data.train` instead, with its `weight`."""

    ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1


def replayed_rows(settings: Replay, window: int) -> int:
    """How many of a window's rows are old ones: the nearest whole number."""
    return round(settings.ratio * window)


class WiseFT(Section):
    """Wortsman et al. 2022: what `final/` has lies between the weights that the run began with and those that it
    ended with: (1 − `alpha`) w₀ + `alpha` w. Weights that began at random (the head) are not mixed."""

    alpha: Fraction = 0.5


class Probe(Section):
    """A finished run, whose objective, head and rows of `split` are evaluated with the trained backbone before the
    first step and after the last (at most `limit` rows)."""

    run: str
    split: Literal["eval", "test"] | None = None
    limit: Positive | None = None


class Remember(Section):
    """`run`: the folder of the finished run whose abilities are to be kept; `model.model_name_or_path` is then its
    `final/`. It is probed too, under the name `old`, unless `probes` names it. `seed`: of what is drawn for EWC."""

    run: str | None = None
    l2_sp: L2SP | None = None
    anchor: Anchor | None = None
    ewc: EWC | None = None
    lwf: LwF | None = None
    replay: Replay | None = None
    wise_ft: WiseFT | None = None
    probes: dict[Name, Probe] = Field(default_factory=dict[str, Any])
    seed: NonNegative = 0

    @model_validator(mode="after")
    def _has_its_run(self) -> Remember:
        for name in ("lwf", "replay"):
            if getattr(self, name) is not None and self.run is None:
                raise ValueError(f"{name}: needs the run to be remembered: set remember.run")
        for name in ("lwf", "ewc"):
            if self.replay is not None and getattr(self, name) is not None:
                raise ValueError(f"replay: and {name} exclude each other: keep one")
        if self.ewc is not None and self.ewc.data is not None and self.run is not None:
            raise ValueError(
                "ewc.data: and remember.run both give the rows of the Fisher information: keep one"
            )
        return self
