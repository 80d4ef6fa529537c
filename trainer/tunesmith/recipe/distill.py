"""`distill`: a frozen teacher, or several, and what of it the model learns to imitate."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from tunesmith.recipe.base import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section
from tunesmith.recipe.quantization import Quantization

Map = Literal["uniform"] | dict[NonNegative, NonNegative]
"""Student's layer → teacher's; 0 is what the embeddings give, n what layer n (from 1) gives."""

Rest = Literal["bucket", "renormalize"]


class Teacher(Section):
    """A frozen model with the same kind of head: a folder, a hub id, or the folder of a finished run. `weight`: its
    share among several. `placement`: each process holds it whole, or (fsdp2) a shard of it."""

    model_name_or_path: str
    revision: str | None = None
    weight: PositiveFloat = 1.0
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    quantization: Quantization | None = None
    placement: Literal["replicated", "sharded"] = "replicated"
    trust_remote_code: bool = False

    @field_validator("quantization", mode="before")
    @classmethod
    def _one_word(cls, value: Any) -> Any:
        return {"type": value} if value in ("nf4", "fp4", "int8") else value


class LogitsLoss(Section):
    """temperature² × D(teacher, student) over what both predict (Hinton et al. 2015). `beta` is jsd's: 0 is forward
    KL's side, 1 reverse KL's. `top_k`: of the teacher's distribution only its likeliest classes are told apart; the
    `rest` is one class more, or both are normalised over these alone."""

    type: Literal["logits"]
    weight: PositiveFloat = 1.0
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    beta: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    top_k: Positive | None = None
    rest: Rest = "bucket"


class HiddenLoss(Section):
    """The hidden states of the student's layers held against those of the teacher's. `projection: auto`: a trained
    matrix takes the student's to the teacher's width, where the two differ."""

    type: Literal["hidden"]
    weight: PositiveFloat = 1.0
    layers: Map = "uniform"
    projection: Literal["auto", "none"] = "auto"
    loss: Literal["mse", "cosine"] = "mse"


class AttentionLoss(Section):
    """The attention of the student's layers held against that of the teacher's, head by head."""

    type: Literal["attention"]
    weight: PositiveFloat = 1.0
    layers: Map = "uniform"
    loss: Literal["kl", "mse"] = "kl"


class EmbeddingLoss(Section):
    """One vector of each row, the last hidden states pooled, held against the teacher's."""

    type: Literal["embedding"]
    weight: PositiveFloat = 1.0
    loss: Literal["cosine", "mse"] = "cosine"
    pooling: Literal["mean", "cls", "last"] = "mean"
    projection: Literal["auto", "none"] = "auto"


Loss = Annotated[LogitsLoss | HiddenLoss | AttentionLoss | EmbeddingLoss, Field(discriminator="type")]


class OnPolicy(Section):
    """A row is, with probability `lmbda`, answered by the student itself, and the divergence taken on its answer
    (Agarwal et al. 2024). `temperature`: at which it samples; 0 takes the likeliest token."""

    lmbda: Fraction = 0.5
    max_new_tokens: Positive = 128
    temperature: NonNegativeFloat = 1.0


class SequenceLevel(Section):
    """The teacher's own answers take the place of the targets (Kim & Rush 2016): generated once, by beam search, and
    kept on disk."""

    max_new_tokens: Positive = 256
    num_beams: Positive = 1
    per_device_teacher_batch_size: Positive = 8


class Offline(Section):
    """The teacher's `top_k` log-probabilities of every labelled unit, written once; the training then runs without
    the teacher. `path`: the folder of these files; without it they lie beside the prepared rows."""

    top_k: Positive = 32
    path: str | None = None
    per_device_teacher_batch_size: Positive = 8


class Distill(Section):
    """alpha × the objective's own loss + (1 − alpha) × Σ weight × loss of the `losses`, each of these over the
    teachers by their weights. Without `teachers`, `teacher_model_name_or_path` names the only one. `temperature`
    divides both logits. `init`: the student's layers begin as these of the teacher's (the first named), its embeddings
    and head as the teacher's."""

    teacher_model_name_or_path: str | None = None
    teachers: list[Teacher] = Field(default_factory=list[Teacher])
    alpha: Fraction | None = None
    temperature: PositiveFloat = 1.0
    losses: list[Loss] | None = None
    on_policy: OnPolicy | None = None
    sequence_level: bool | SequenceLevel = False
    offline: Offline | None = None
    init: Literal["every_k", "first_k", "last_k"] | list[NonNegative] | None = None

    @model_validator(mode="after")
    def _has_a_teacher(self) -> Distill:
        if (self.teacher_model_name_or_path is None) == (not self.teachers):
            raise ValueError(
                "write either teacher_model_name_or_path, or teachers: [{model_name_or_path: …}, …]"
            )
        return self

    @property
    def each_teacher(self) -> list[Teacher]:
        """`teachers`, with the one name for all written out."""
        if self.teacher_model_name_or_path is None:
            return self.teachers
        return [Teacher(model_name_or_path=self.teacher_model_name_or_path)]

    @property
    def each_loss(self) -> list[LogitsLoss | HiddenLoss | AttentionLoss | EmbeddingLoss]:
        """`losses`; by default the divergence of the logits, or none where the teacher's answers are learnt."""
        if self.losses is not None:
            return list(self.losses)
        return [] if self.sequences is not None else [LogitsLoss(type="logits")]

    @property
    def sequences(self) -> SequenceLevel | None:
        """`sequence_level`, with `true` written out."""
        if isinstance(self.sequence_level, SequenceLevel):
            return self.sequence_level
        return SequenceLevel() if self.sequence_level else None

    @property
    def own_share(self) -> float:
        """`alpha`: half, where nothing else is said; nothing of answers that the student made up itself, all where
        there is no other loss."""
        if self.alpha is not None:
            return self.alpha
        if self.on_policy is not None:
            return 0.0
        return 0.5 if self.each_loss else 1.0

    @property
    def trains_projections(self) -> bool:
        """Whether it may train what no file has."""
        return any(getattr(loss, "projection", "none") == "auto" for loss in self.each_loss)
