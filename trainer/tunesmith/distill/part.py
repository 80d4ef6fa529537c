"""The teachers in the forward: they read the batch that the student reads, without gradient, and what they give is put
beside its outputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tunesmith.batch import Batch
from tunesmith.data.stream import Stream
from tunesmith.distill.layers import Stack
from tunesmith.distill.teacher import Known, teacher_facts
from tunesmith.distill.terms import PAIRS, TEACHERS
from tunesmith.engine import Engine
from tunesmith.engine.companion import CompanionSource, companion
from tunesmith.errors import UserError
from tunesmith.fused_head import FusedHead, HeadOutput, NotFusable
from tunesmith.module import TrainModule
from tunesmith.objectives import Objective
from tunesmith.parts import EXTRAS, ForwardPart
from tunesmith_kernels.linear_loss.backends import Backend

_TOLERANCE = {
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 5e-3,
}  # relative, of the largest logit
_PACKED_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.05}


@dataclass(frozen=True, slots=True)
class Layers:
    """What a term compares layer by layer: `kind` of output, and for each teacher student's layer → teacher's."""

    term: str
    kind: Literal["hidden", "attention"]
    maps: tuple[Mapping[int, int], ...]
    stack: Stack = ""
    projected: bool = False

    @property
    def output(self) -> str:
        """The name of the outputs, in transformers."""
        name = "hidden_states" if self.kind == "hidden" else "attentions"
        return f"{self.stack}_{name}" if self.stack else name

    def name(self, teacher: int, layer: int) -> str:
        """Of a projection."""
        return f"{self.term}_{teacher}_{layer}"


@dataclass(slots=True)
class _Held:
    """A teacher that is ready: `head` where its logits need not be made."""

    module: nn.Module
    known: Known
    dropped: frozenset[str]
    head: FusedHead | None = None


@dataclass
class TeacherPart(ForwardPart):
    """`token_logits`: the name of the logits over a vocabulary, if there are any; `whole_logits`: the terms need the
    teachers' as they are. `facts` are completed when the teachers are there."""

    objective: Objective
    stream: Stream
    teachers: Sequence[tuple[Known, CompanionSource]]
    layers: Sequence[Layers]
    made: Mapping[str, nn.Module]
    whole_logits: bool
    token_logits: str | None
    backend: Backend | None
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    _held: list[_Held] = field(default_factory=list[_Held])

    def __post_init__(self) -> None:
        kinds = {layers.kind for layers in self.layers}
        names = {"hidden": "output_hidden_states", "attention": "output_attentions"}
        self.options = {names[kind]: True for kind in sorted(kinds)}

    def modules(self, model: nn.Module) -> Mapping[str, nn.Module]:
        return self.made

    def begin(self, engine: Engine) -> None:
        for known, source in self.teachers:
            module = companion(engine, source, sharded=known.settings.placement == "sharded")
            held = _Held(module, known, _unknown(module, self.stream, self.objective))
            if self.token_logits is not None and not self.whole_logits:
                held.head = self._head(engine, held, self.token_logits)
            if self.stream.pack_length is not None:
                self._check_packing(engine, held)
            self._held.append(held)
        self.facts["teachers"] = [teacher_facts(held.module, held.known) for held in self._held]

    def add(self, module: TrainModule, outputs: Mapping[str, Any], batch: Batch) -> Mapping[str, Any]:
        fused = any(isinstance(value, HeadOutput) for value in outputs.values())
        given = [self._outputs(held, batch, fused=fused) for held in self._held]
        extras: Any = getattr(module.model, EXTRAS, {})
        pairs = {layers.term: self._pairs(layers, outputs, given, extras) for layers in self.layers}
        return {TEACHERS: tuple(given), PAIRS: pairs}

    def _outputs(self, held: _Held, batch: Batch, *, fused: bool, **options: Any) -> Mapping[str, Any]:
        device = next(iter(batch.inputs.values())).device
        inputs = {name: value for name, value in batch.inputs.items() if name not in held.dropped}
        standing = held.head.standing_in() if fused and held.head is not None else nullcontext()
        # its arithmetic is its dtype's, whatever the student's precision
        with torch.no_grad(), torch.autocast(device.type, enabled=False), standing:
            return self.objective.outputs(
                held.module, replace(batch, inputs=inputs), **self.options, **options
            )

    @staticmethod
    def _pairs(
        layers: Layers, outputs: Mapping[str, Any], given: Sequence[Mapping[str, Any]], extras: Any
    ) -> list[list[tuple[Tensor, Tensor]]]:
        found: list[list[tuple[Tensor, Tensor]]] = []
        # attention comes without the embeddings' entry
        first = 0 if layers.kind == "hidden" else 1
        for number, (teacher, mapped) in enumerate(zip(given, layers.maps, strict=True)):
            pairs: list[tuple[Tensor, Tensor]] = []
            for ours, theirs in mapped.items():
                student, other = outputs[layers.output][ours - first], teacher[layers.output][theirs - first]
                name = layers.name(number, ours)
                if layers.projected and name in extras:
                    student = extras[name](student)
                if student.shape != other.shape:
                    raise UserError(
                        f"distill.losses: {layers.kind}: layer {ours} of the student gives {[*student.shape]}, layer "
                        f"{theirs} of the teacher {[*other.shape]}: set projection: auto, or name other layers"
                    )
                pairs.append((student, other))
            found.append(pairs)
        return found

    # what is checked before the first step

    def _head(self, engine: Engine, held: _Held, name: str) -> FusedHead | None:
        """The teacher's head, where hidden states and head give the teacher's own logits; the ranks decide alike."""
        head, problem = _plain_head(held.module, self.backend), None
        if isinstance(head, str):
            problem = head
        else:
            batch = self._short(engine)
            own = self._outputs(held, batch, fused=False)[name]
            held.head = head
            stand_in: HeadOutput = self._outputs(held, batch, fused=True)[name]
            held.head = None
            problem = _difference(stand_in, own.float(), _TOLERANCE[own.dtype])
        told = next((one for one in engine.gather(problem) if one is not None), None)
        key = f"teacher {held.known.name}"
        self.facts.setdefault("logits", {})[key] = (
            "hidden states and head, where the student's are" if told is None else f"whole logits: {told}"
        )
        return None if told is not None or isinstance(head, str) else head

    def _short(self, engine: Engine) -> Batch:
        lengths = self.stream.dataset.table.lengths()
        rows = [int(row) for row in lengths.argsort(kind="stable")[len(lengths) // 4 :][:2]]
        return self.stream.batch([[row] for row in rows], 0, rows[0]).to(engine.device)

    def _check_packing(self, engine: Engine, held: _Held) -> None:
        """Raises UserError for a teacher that lets packed rows see each other."""
        lengths = self.stream.dataset.table.lengths()
        rows = [int(row) for row in lengths.argsort(kind="stable")[:2]]
        if len(rows) < 2 or int(lengths[rows].sum()) > (self.stream.pack_length or 0):
            return
        first, second = rows
        both = self.stream.batch([[first, second]], 0, first).to(engine.device)
        alone = self.stream.batch([[second]], 0, second).to(engine.device)
        packed = self._outputs(held, both, fused=False)["logits"].float()[:, int(lengths[first]) :]
        own = self._outputs(held, alone, fused=False)["logits"].float()
        found = float((packed[:, : own.shape[1]] - own).abs().max() / own.abs().max())
        dtype = next(p.dtype for p in held.module.parameters() if p.is_floating_point())
        if not found <= _PACKED_TOLERANCE[dtype]:
            raise UserError(
                f"data.packing: the teacher, {type(held.module).__name__}, lets packed rows see each other (its "
                f"logits change by {found:.1e}): set packing: false"
            )


def _plain_head(module: Any, backend: Backend | None) -> FusedHead | str:
    head = module.get_output_embeddings()
    if type(head) is not nn.Linear:
        return f"its head is {type(head).__name__}, not a plain Linear"
    return FusedHead(head, backend)


def _difference(stand_in: HeadOutput, own: Tensor, tolerance: float) -> str | None:
    try:
        teacher = stand_in.as_teacher(None)
    except NotFusable as error:
        return str(error)
    logits = nn.functional.linear(
        teacher.hidden,
        teacher.weight,
        None if teacher.bias is None else teacher.bias.to(teacher.hidden.dtype),
    )
    made = logits.float() * teacher.scale
    if teacher.softcap is not None:
        made = teacher.softcap * torch.tanh(made / teacher.softcap)
    apart = float((made - own).abs().max() / own.abs().max().clamp_min(1e-6))
    return None if apart <= tolerance else f"its head's logits differ from its own by {apart:.1e}"


def _unknown(module: nn.Module, stream: Stream, objective: Objective) -> frozenset[str]:
    """Inputs of the student's tokenizer that the teacher's forward does not take. Raises UserError where it needs
    them."""
    taken = inspect.signature(module.forward).parameters
    if "token_type_ids" not in stream.dataset.table.kinds or "token_type_ids" in taken:
        return frozenset()
    return frozenset({"token_type_ids"})
