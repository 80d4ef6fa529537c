"""`distill` as strategies: teachers in the forward, and the terms of the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tunesmith.data.table import Table
from tunesmith.distill.alignment import aligned_rows
from tunesmith.distill.answers import kind_of
from tunesmith.distill.divergence import Divergence
from tunesmith.distill.layers import (
    Stack,
    depths,
    heads,
    layer_map,
    projections,
    refuse_dropped_attention,
    width,
)
from tunesmith.distill.offline import OfflinePart
from tunesmith.distill.part import Layers, TeacherPart
from tunesmith.distill.readings import Rows, Spans, Tokens, readings
from tunesmith.distill.rollout import OnPolicyPart
from tunesmith.distill.sequences import replace_answers
from tunesmith.distill.teacher import Known, know, predicts_tokens, source
from tunesmith.distill.terms import AttentionTerm, EmbeddingTerm, HiddenTerm, LogitsTerm, TeacherOf
from tunesmith.distill.unlike import UnlikePart, UnlikeTerm
from tunesmith.engine.companion import CompanionSource
from tunesmith.errors import UserError
from tunesmith.parts import ForwardPart, StepPart, Strategies
from tunesmith.recipe.distill import AttentionLoss, EmbeddingLoss, HiddenLoss, LogitsLoss
from tunesmith.terms import Term

if TYPE_CHECKING:
    from tunesmith.strategies import Building


class OwnShare(StepPart):
    """The weight of the objective's own terms: `distill.alpha`."""

    def __init__(self, share: float, names: Sequence[str]) -> None:
        self.name = "distill"
        self.share, self.names = share, tuple(names)

    def weights(self, step: int, terms: Sequence[Term]) -> Mapping[str, float]:
        return dict.fromkeys(self.names, self.share)


def build(building: Building) -> Strategies:
    """Raises UserError where a teacher is none of this student, or a loss has nothing to compare."""
    settings = building.recipe.distill
    if settings is None:
        return Strategies()
    return _Builder(building).build()


class _Builder:
    def __init__(self, building: Building) -> None:
        assert building.recipe.distill is not None
        self.building, self.recipe, self.settings = building, building.recipe, building.recipe.distill
        self.student: Any = building.built.model.config
        self.known = [
            know(teacher, building.base, building.objective, building.tokenizer, self.student)
            for teacher in self.settings.each_teacher
        ]
        total = sum(one.settings.weight for one in self.known)
        self.shares = tuple(one.settings.weight / total for one in self.known)
        self.terms: list[Term] = []
        self.aligned: Table | None = None
        self.layers: list[Layers] = []
        self.widths: dict[str, tuple[int, int]] = {}

    def build(self) -> Strategies:
        building, recipe = self.building, self.recipe
        attention = recipe.model.attn_implementation
        sources = [
            (one, source(one, building.objective, attention, recipe.training.seed)) for one in self.known
        ]
        if (sequences := self.settings.sequences) is not None:
            replace_answers(building, *sources[0], sequences)
        whole_logits = False
        for loss in self.settings.each_loss:
            weight = (1.0 - self.settings.own_share) * loss.weight
            match loss:
                case LogitsLoss():
                    self._logits(loss, weight)
                    whole_logits = loss.top_k is not None
                case HiddenLoss():
                    self._hidden(loss, weight)
                case AttentionLoss():
                    self._attention(loss, weight)
                case EmbeddingLoss():
                    self._embedding(loss, weight)
        facts: dict[str, Any] = {
            "alpha": self.settings.own_share,
            "terms": {term.name: term.weight for term in self.terms},
        }
        own = [term.name for term in building.objective.terms]
        steps: list[StepPart] = [OwnShare(self.settings.own_share, own)]
        if self.settings.on_policy is not None:
            facts["on_policy"] = self.settings.on_policy.model_dump()
            steps.append(
                OnPolicyPart(
                    building.objective, self.settings.on_policy, kind_of(recipe), recipe.training.seed
                )
            )
        if self.settings.sequences is not None:
            facts["sequence_level"] = self.settings.sequences.model_dump()
        return Strategies(
            terms=tuple(self.terms),
            forward=(self._part(sources, whole_logits, facts),) if self.terms else (),
            steps=tuple(steps),
            facts={"distill": facts},
        )

    def _part(
        self, sources: Sequence[tuple[Known, CompanionSource]], whole_logits: bool, facts: dict[str, Any]
    ) -> ForwardPart:
        building, asked = self.building, self.recipe.each_kernel.linear_cross_entropy
        if self.aligned is not None:
            return UnlikePart(*sources[0], self.aligned, facts)
        return self._offline(sources, facts) or TeacherPart(
            building.objective,
            building.stream,
            sources,
            self.layers,
            projections(self.widths, self.recipe.training.seed),
            whole_logits,
            self._token_logits(),
            None if asked in ("auto", "reference") else asked,
            facts,
        )

    def _offline(
        self, sources: Sequence[tuple[Known, CompanionSource]], facts: dict[str, Any]
    ) -> OfflinePart | None:
        building, settings = self.building, self.settings.offline
        if settings is None:
            return None
        (term,) = self.terms
        assert isinstance(term, LogitsTerm)
        reading = term.reading
        if isinstance(reading, Spans) or (isinstance(reading, Rows) and reading.kind != "one"):
            raise UserError(
                "distill.offline: holds the likeliest of many classes, which this objective has not"
            )
        if building.stream.transforms:
            raise UserError("distill.offline: the training rows change as they are drawn: leave it out")
        return OfflinePart(
            building.objective,
            building.stream.dataset,
            sources,
            reading,
            settings,
            self.settings.temperature,
            term.bucket,
            facts,
        )

    def _token_logits(self) -> str | None:
        """The name of the logits over a vocabulary that a term compares."""
        if not predicts_tokens(self.building.objective):
            return None
        found = [term.reading for term in self.terms if isinstance(term, LogitsTerm)]
        return next((one.logits for one in found if isinstance(one, Tokens)), None)

    def _name(self, name: str) -> str:
        """A second term of a kind is told from the first."""
        taken = {term.name for term in self.terms}
        number = 2
        found = name
        while found in taken:
            found, number = f"{name}_{number}", number + 1
        return found

    def _logits(self, loss: LogitsLoss, weight: float) -> None:
        teachers = tuple(
            TeacherOf(share, one.order, one.vocab) for share, one in zip(self.shares, self.known, strict=True)
        )
        if any(one.tokenizer is not None for one in self.known):
            self._unlike(loss, weight)
            return
        divergence = Divergence(loss.divergence, loss.beta or 0.5, self.settings.temperature)
        for reading in readings(self.recipe, self.building.objective):
            name = self._name(f"distill_logits_{reading.name}" if reading.name else "distill_logits")
            bucket = loss.rest == "bucket"
            self.terms.append(LogitsTerm(name, weight, reading, divergence, teachers, loss.top_k, bucket))

    def _unlike(self, loss: LogitsLoss, weight: float) -> None:
        """Refuses what names of classes are needed for."""
        recipe, key = self.recipe, "distill.teachers"
        other = next(one for one in self.known if one.tokenizer is not None)
        told = f"{key}: {other.name} has other tokens than the student"
        if recipe.objective.type not in ("causal_lm", "sft"):
            raise UserError(
                f"{told}, which only causal_lm and sft can align; the objective is {recipe.objective.type}"
            )
        if len(self.known) > 1:
            raise UserError(f"{told}: name it alone")
        if (
            len(self.settings.each_loss) > 1
            or loss.top_k is not None
            or "divergence" in loss.model_fields_set
        ):
            raise UserError(
                f"{told}: they are compared by sorted probabilities: write losses: [{{type: logits}}]"
            )
        for name, setting in (
            ("distill.offline", self.settings.offline),
            ("distill.on_policy", self.settings.on_policy),
            ("data.packing", recipe.data.packing),
            ("data.augment", self.building.stream.transforms),
        ):
            if setting:
                raise UserError(f"{name}: {told}, whose places in the rows are settled before: leave it out")
        table, student = self.building.stream.dataset.table, self.building.tokenizer
        room = getattr(other.config.get_text_config(), "max_position_embeddings", None)
        self.aligned = aligned_rows(table, student, other.tokenizer, room)
        self.terms.append(UnlikeTerm("distill_uld", weight, self.settings.temperature, self.aligned))

    def _maps(self, asked: Any, first: int, stack: Stack) -> tuple[dict[int, int], ...]:
        own = depths(self.student)[stack]
        return tuple(
            layer_map(asked, own, depths(one.config)[stack], first=first, key="distill.losses.layers")
            for one in self.known
        )

    def _projections(self, layers: Layers, projection: str) -> Layers:
        inner = width(self.student)
        wide = {number: width(one.config) for number, one in enumerate(self.known)}
        other = {number: outer for number, outer in wide.items() if outer != inner}
        if other and projection == "none":
            number, outer = next(iter(other.items()))
            raise UserError(
                f"distill.losses: the student is {inner} wide, teacher {self.known[number].name} {outer}: set "
                "projection: auto"
            )
        for number, outer in other.items():
            for layer in layers.maps[number]:
                self.widths[layers.name(number, layer)] = (inner, outer)
        return layers

    def _hidden(self, loss: HiddenLoss, weight: float) -> None:
        for stack in depths(self.student):
            name = self._name(f"distill_hidden_{stack}" if stack else "distill_hidden")
            layers = Layers(name, "hidden", self._maps(loss.layers, 0, stack), stack, projected=True)
            self.layers.append(self._projections(layers, loss.projection))
            self.terms.append(HiddenTerm(name, weight, self.shares, loss.loss, stack))

    def _attention(self, loss: AttentionLoss, weight: float) -> None:
        refuse_dropped_attention(self.student)
        for one in self.known:
            if heads(one.config) != heads(self.student):
                raise UserError(
                    f"distill.losses: attention: teacher {one.name} has {heads(one.config)} heads, the student "
                    f"{heads(self.student)}: they are compared head by head; use a loss of type hidden"
                )
        for stack in depths(self.student):
            name = self._name(f"distill_attention_{stack}" if stack else "distill_attention")
            self.layers.append(Layers(name, "attention", self._maps(loss.layers, 1, stack), stack))
            self.terms.append(AttentionTerm(name, weight, self.shares, loss.loss, stack))

    def _embedding(self, loss: EmbeddingLoss, weight: float) -> None:
        name = self._name("distill_embedding")
        stack: Stack = "encoder" if self.student.is_encoder_decoder else ""
        own = depths(self.student)[stack]
        maps = tuple({own: depths(one.config)[stack]} for one in self.known)
        layers = Layers(name, "hidden", maps, stack, projected=True)
        self.layers.append(self._projections(layers, loss.projection))
        self.terms.append(EmbeddingTerm(name, weight, self.shares, loss.loss, loss.pooling, stack))
