"""What a forward and backward keep and need, as a function of the micro-batch: measured op by op on fake tensors for
one layer of each kind, the embedding and the head, and put together for the whole depth.

Nothing here knows an architecture. Two micro-batches are traced; an event's live bytes are affine in the rows, so
two points give all of them, and the peak of any micro-batch is the largest of the events' values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tunesmith.fused_head import FusedHead
from tunesmith.module import Loss, TrainModule
from tunesmith.planning import fused
from tunesmith.planning.fused import Spike, traceable
from tunesmith.planning.kernels import kernels_of
from tunesmith.planning.layers import Stack, layer_modules
from tunesmith.planning.recorder import Phase, Recorder, Span, fake_parameters, values_are_asked
from tunesmith.planning.tasks import Shape, Task

_ROWS = (2, 4)  # the two micro-batches: not 1, where torch and transformers take short cuts
_FIELDS = ("live", "gradients", "logits", "flops", "moved")


@dataclass(frozen=True, slots=True)
class Variant:
    """How the arithmetic runs. `parameters`: their dtype in the forward; `autocast`: the
    precision of torch's autocast; `checkpointing`: layers are recomputed in the backward; `zero3`: linear layers are
    DeepSpeed's; `cuda`: dropout and attention are CUDA's."""

    parameters: torch.dtype = torch.float32
    autocast: str = "fp32"
    checkpointing: bool = False
    zero3: bool = False
    cuda: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """A span for any micro-batch: `at(rows)` [events, 5] are live, gradients, logits (bytes), flops and moved
    (bytes) of each event. `stack` and `place` say which layer it is: place -1 for what is none. `spikes` come on top:
    the fused losses."""

    phase: Phase
    stack: int
    place: int
    constant: NDArray[np.float64]  # [events, 5]
    slope: NDArray[np.float64]  # [events, 5], per row
    advance: tuple[float, float] = (
        0.0,
        0.0,
    )  # live bytes when the next part begins, less those at the beginning
    spikes: tuple[Spike, ...] = ()

    def at(self, rows: int) -> NDArray[np.float64]:
        table = self.constant + rows * self.slope
        for spike in self.spikes:
            table[spike.event, [0, 2, 3, 4]] += spike.at(rows)
        return table

    def kept(self, rows: int) -> float:
        """What the part leaves behind (or, negative, lets go of)."""
        return self.advance[0] + rows * self.advance[1]


@dataclass(frozen=True, slots=True)
class Profile:
    """The parts of one micro-step in their order, layers that stand for several included once."""

    parts: tuple[Part, ...]
    stacks: tuple[Stack, ...]

    def expanded(self) -> Iterator[tuple[Part, int]]:
        """Every part of the whole depth in order, with its layer's number in its stack (-1 where it is none)."""
        index = 0
        while index < len(self.parts):
            part = self.parts[index]
            if part.place < 0:
                yield part, -1
                index += 1
                continue
            run = [part]
            while index + len(run) < len(self.parts):
                following = self.parts[index + len(run)]
                if (following.phase, following.stack) != (part.phase, part.stack) or following.place < 0:
                    break
                run.append(following)
            yield from self._layers(run)
            index += len(run)

    def _layers(self, run: list[Part]) -> Iterator[tuple[Part, int]]:
        stack = self.stacks[run[0].stack]
        by_place = {part.place: part for part in run}
        order = range(stack.depth) if run[0].phase == "forward" else reversed(range(stack.depth))
        for layer in order:
            place = stack.represented[layer]
            if (
                place in by_place
            ):  # a backward that ends early (everything below is frozen) has no spans there
                yield by_place[place], layer


def profile(
    model: Any, stacks: Sequence[Stack], task: Task, shape: Shape, variant: Variant, head: FusedHead | None
) -> Profile:
    """Traces `model` (cut to its kept layers, on meta) at two micro-batches; `shape.rows` is not looked at. `head`: of
    the model, where the loss is computed without logits. Raises ValueError where it cannot be."""
    few, many = (record(model, stacks, task, _with_rows(shape, rows), variant, head) for rows in _ROWS)
    assert [(s.phase, s.layer) for s in few] == [(s.phase, s.layer) for s in many]
    names = _places(stacks)
    parts = [_part(a, b, *names.get(a.layer, (-1, -1))) for a, b in zip(few, many, strict=True)]
    return Profile(tuple(_advanced(part, after) for part, after in pairwise(parts)), tuple(stacks))


def _advanced(part: Part, after: Part) -> Part:
    constant, slope = after.constant[0, 0] - part.constant[0, 0], after.slope[0, 0] - part.slope[0, 0]
    return replace(part, advance=(float(constant), float(slope)))


def _with_rows(shape: Shape, rows: int) -> Shape:
    return Shape(rows, shape.length, shape.target_length, shape.padded, shape.packed)


def _places(stacks: Sequence[Stack]) -> dict[int, tuple[int, int]]:
    """The running number of a kept layer → (its stack, its place in it)."""
    pairs = [(s, place) for s, stack in enumerate(stacks) for place in range(len(stack.kept))]
    return dict(enumerate(pairs))


def _stands_for(stacks: Sequence[Stack], stack: int, place: int) -> int:
    return stacks[stack].represented.count(place)


def _part(few: Span, many: Span, stack: int, place: int) -> Part:
    a, b = _table(few), _table(many)
    spikes = _spikes(few, _ROWS[0])
    if len(a) != len(
        b
    ):  # an operation that only one of the sizes needs: what counts is where each ends and peaks
        a, b = _outline(few), _outline(many)
        spikes = tuple(replace(spike, event=1 + i) for i, spike in enumerate(spikes))
    slope = (b - a) / (_ROWS[1] - _ROWS[0])
    return Part(few.phase, stack, place, a - _ROWS[0] * slope, slope, spikes=spikes)


def _spikes(span: Span, rows: int) -> tuple[Spike, ...]:
    return tuple(Spike(event, call, call.rows / rows) for event, call in span.fused)


def _table(span: Span) -> NDArray[np.float64]:
    rows = [[getattr(event, name) for name in _FIELDS] for event in span.events]
    return np.array(rows or [[0] * len(_FIELDS)], dtype=np.float64)


def _outline(span: Span) -> NDArray[np.float64]:
    table = _table(span)
    inner = [table[table[:, 0].argmax()], table[(table[:, 0] + table[:, 1]).argmax()]]
    total = table[:, 3:].sum(0)
    rows = np.stack([table[0], *(table[event] for event, _ in span.fused), *inner, table[-1]])
    rows[:, 3:] = total / len(rows)
    return rows


def traced(
    model: Any, stacks: Sequence[Stack], task: Task, shape: Shape, variant: Variant, head: FusedHead | None
) -> Profile:
    """The profile of exactly `shape.rows` rows of a model that is not cut: nothing in it is put together. For the rest
    see `profile`."""
    spans = record(model, stacks, task, shape, variant, head)
    names = _places(stacks)
    parts: list[Part] = []
    for span in spans:
        table = _table(span)
        where = names.get(span.layer, (-1, -1))
        parts.append(Part(span.phase, *where, table, np.zeros_like(table), spikes=_spikes(span, shape.rows)))
    return Profile(tuple(_advanced(part, after) for part, after in pairwise(parts)), tuple(stacks))


def record(
    model: Any, stacks: Sequence[Stack], task: Task, shape: Shape, variant: Variant, head: FusedHead | None
) -> list[Span]:
    """The spans of one forward and backward of `model`, whose parameters are replaced by fake ones."""
    from torch._subclasses import FakeTensorMode

    device = torch.device("cpu")
    with values_are_asked(), FakeTensorMode(), kernels_of(zero3=variant.zero3, cuda=variant.cuda):
        _set_checkpointing(model, variant.checkpointing)
        fake_parameters(model, device, variant.parameters)
        module = TrainModule(model, task, variant.autocast)  # type: ignore[arg-type]
        module.train()
        module.fused_head = None if head is None else traceable(head)
        loss = None if head is None else fused.Loss(head.backend, variant.cuda)
        copies = {number: _stands_for(stacks, *place) - 1 for number, place in _places(stacks).items()}
        regular = not (shape.padded or shape.packed)
        recorder = Recorder(
            logits_rows=_logits_rows(shape),
            vocabulary=vocabulary_of(model.config),
            regular=regular,
            copies=copies,
            loss=loss,
        )
        handles = list(_mark(model, stacks, recorder))
        try:
            with recorder:
                _step(module, task, shape, device, recorder)
        finally:
            for handle in handles:
                handle.remove()
    return recorder.spans


def _step(module: TrainModule, task: Task, shape: Shape, device: torch.device, recorder: Recorder) -> None:
    batch = task.batch(shape, module.model.config, device)
    loss = module(batch, "loss", torch.ones(len(task.terms), device=device))
    assert isinstance(loss, Loss)
    recorder.in_backward = True
    loss.total.backward()
    del loss, batch
    recorder.begin("step", -1)


def _logits_rows(shape: Shape) -> frozenset[int]:
    length = shape.target_length or shape.length
    return frozenset(shape.rows * positions for positions in (length, length - 1))


def vocabulary_of(config: Any) -> int:
    """Classes of a language model's head; 0 where there is none."""
    return int(getattr(config.get_text_config(), "vocab_size", 0) or 0)


def _set_checkpointing(model: Any, wanted: bool) -> None:
    if not model.supports_gradient_checkpointing:
        return
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    if wanted:
        enable({"use_reentrant": False})
    else:
        disable()


def _mark(model: nn.Module, stacks: Sequence[Stack], recorder: Recorder) -> Iterator[Any]:
    """Hooks that begin a span at each layer's borders, in the forward and in the backward."""
    number = 0
    for _, layers in layer_modules(model, stacks):
        for place, layer in enumerate(layers):
            yield layer.register_forward_pre_hook(_entering(recorder, number, place == 0), with_kwargs=True)
            yield layer.register_forward_hook(_leaving(recorder, number, place == len(layers) - 1))
            number += 1
    for parameter in model.parameters():
        if parameter.requires_grad:
            yield parameter.register_post_accumulate_grad_hook(recorder.take_gradient)


def _entering(recorder: Recorder, number: int, first: bool) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if recorder.in_backward:  # a checkpointed layer computes again
            return
        hidden = args[0] if args else kwargs.get("hidden_states")
        if first and isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.register_hook(lambda _: recorder.begin("backward", -1))
        recorder.begin("forward", number)

    return hook


def _leaving(recorder: Recorder, number: int, last: bool) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if recorder.in_backward:
            return
        hidden = output if isinstance(output, Tensor) else output[0]
        recorder.hand_on(hidden)
        if hidden.requires_grad:
            hidden.register_hook(lambda _: recorder.begin("backward", number))
        if last:
            recorder.begin("forward", -2)

    return hook
