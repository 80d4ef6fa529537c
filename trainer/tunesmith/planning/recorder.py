"""The live bytes of a computation, op by op, without doing it: fake tensors have shapes, dtypes and storages, but no
data.

Every operation that autograd or the model dispatches is an event. A storage counts from the operation that made it
until Python and autograd let go of it, which is when torch's allocators would take it back: on real CPU tensors the
running sum equals the profiler's allocations to the byte (tests/unit/test_planning_trace.py).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tunesmith.planning.fused import OPERATOR, Loss
from tunesmith_kernels.linear_loss.workspace import Shapes

Phase = Literal["forward", "backward", "step"]

_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
_ADD = torch.ops.aten.add.Tensor


@dataclass(slots=True)
class Event:
    """One operation. `live`: bytes of activations and temporaries after it; `gradients`: bytes of parameter
    gradients finished in the span so far; `logits`: the part of `live` that is as large as the logits; `flops` and
    `moved` (bytes read and written) are the operation's own."""

    live: int
    gradients: int
    logits: int
    flops: int
    moved: int


@dataclass(slots=True)
class Span:
    """The events of one part of the model in one phase: `layer` is its number among the traced layers, -1 for what
    comes before the first of its stack, -2 for what comes behind the last (the head and the loss). `fused`: the
    events at which a loss is computed without logits, which say nothing of what happens within it."""

    phase: Phase
    layer: int
    events: list[Event] = field(default_factory=list[Event])
    fused: list[tuple[int, Shapes]] = field(default_factory=list[tuple[int, Shapes]])


class Recorder(TorchDispatchMode):
    """Records events while it is entered. Tensors [..., vocabulary] of `logits_rows` rows are booked as logits.
    `regular` answers what model code asks about the *values* of masks: whether nothing is padded or packed.
    `copies[n]`: how many more layers than itself layer n stands for; what it made and the head or the embedding lets go
    of (autocast's copies of weights, say), they let go of for all of them. `loss`: what computes a fused loss."""

    def __init__(
        self,
        *,
        logits_rows: frozenset[int] = frozenset(),
        vocabulary: int = 0,
        regular: bool = True,
        copies: Mapping[int, int] | None = None,
        loss: Loss | None = None,
    ) -> None:
        super().__init__()
        self._loss = loss
        self._copies = copies or {}
        self._let_go = 0  # bytes of layers that are not there
        self.live = 0
        self.logits = 0
        self.gradients = 0
        self.spans: list[Span] = [Span("forward", -1, [Event(0, 0, 0, 0, 0)])]
        self._logits_rows = logits_rows
        self._vocabulary = vocabulary
        self._regular = regular
        self._sizes: dict[int, tuple[int, bool, int]] = {}  # bytes, whether logits, more bytes elsewhere
        self._pending: tuple[Event, weakref.ref[Any], int, bool] | None = None
        self._returned: set[int] = set()  # storages of what a fused loss returned
        self._in_place: tuple[Event, int] | None = None
        self.in_backward = False

    def begin(self, phase: Phase, layer: int) -> None:
        """What follows belongs to this part of the model."""
        self._settle()
        self.gradients = 0
        self.spans.append(Span(phase, layer, [Event(self.live - self._let_go, 0, self.logits, 0, 0)]))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _READS:
            return self._answer(func, args)
        given = list(_tensors((args, kwargs)))
        for (
            tensor
        ) in given:  # what was there before (parameters) is no part of the computation, nor are its views
            self._know(tensor, counted=False)
        out = func(*args, **kwargs)
        self._settle()
        made = sum(self._know(tensor, counted=True) for tensor in _tensors(out))
        if func is torch.ops.prim.device.default:
            return out
        event = Event(
            self.live - self._let_go, self.gradients, self.logits, _flops(func, args, kwargs, out), 0
        )
        if func.overloadpacket is OPERATOR:
            assert self._loss is not None
            # where rows are padded or packed, some positions have no label
            call = self._loss.call(args, all_rows=self._regular)
            self.spans[-1].fused.append((len(self.spans[-1].events), call))
            self._returned |= {_key(tensor.untyped_storage()) for tensor in out}
        elif made or not _is_view(func):
            event.moved = made + sum(t.numel() * t.element_size() for t in given)
        self.spans[-1].events.append(event)
        if func is _ADD and self.in_backward and made and isinstance(args[0], Tensor):
            first = args[0].untyped_storage()
            self._pending = (event, weakref.ref(first), made, _key(first) in self._returned)
        return out

    def _answer(self, func: Any, args: tuple[Any, ...]) -> Any:
        value: Tensor = args[0]
        if value.dtype == torch.bool:
            return self._regular
        return 1 if not value.is_floating_point() else 1.0

    def _settle(self) -> None:
        """Autograd adds a second gradient of the same tensor in place, unless a mode like this one is active
        (InputBuffer.cpp, TensorSubclassLikeUtils.h): an add whose first operand is gone by the next operation
        needed no memory of its own."""
        if self._pending is None:
            return
        event, first, size, of_fused_loss = self._pending
        if first() is None:
            event.live -= size
            self._in_place = None if of_fused_loss else (event, size)
        self._pending = None

    def _know(self, tensor: Tensor, *, counted: bool) -> int:
        storage = tensor.untyped_storage()
        key = _key(storage)
        if key in self._sizes:
            return 0
        size = storage.nbytes() if counted else 0
        is_logits = self._is_logits(tensor)
        span = self.spans[-1]
        elsewhere = size * self._copies.get(span.layer, 0) if span.phase == "forward" else 0
        self._sizes[key] = (size, is_logits, elsewhere)
        self.live += size
        self.logits += size * is_logits
        weakref.finalize(storage, self._drop, key)
        return size

    def _is_logits(self, tensor: Tensor) -> bool:
        if not tensor.is_floating_point() or tensor.ndim < 2 or tensor.shape[-1] != self._vocabulary:
            return False
        return tensor.numel() // max(1, self._vocabulary) in self._logits_rows

    def hand_on(self, tensor: Tensor) -> None:
        """A layer's output is the next one's to let go of, and of no other of the layers that it stands for."""
        key = _key(tensor.untyped_storage())
        if key in self._sizes:
            size, is_logits, _ = self._sizes[key]
            self._sizes[key] = (size, is_logits, 0)

    def _drop(self, key: int) -> None:
        size, is_logits, elsewhere = self._sizes.pop(key)
        self._returned.discard(key)
        self.live -= size
        if self.spans[-1].layer < 0:
            self._let_go += elsewhere
        self.logits -= size * is_logits

    def take_gradient(self, parameter: Tensor) -> None:
        """A hook behind a parameter's accumulated gradient: books it apart and lets it go."""
        assert parameter.grad is not None
        size = parameter.grad.untyped_storage().nbytes()
        self.gradients += size
        # a tied parameter's two gradients are added to a third tensor, but where the first is a fused loss's own
        # (seen in the allocator's record)
        if self._in_place is not None and self._in_place[0] in self.spans[-1].events[-3:]:
            self._in_place[0].live += self._in_place[1] * (self._in_place[1] == size)
            self._in_place = None
        parameter.grad = None
        self._settle()
        self.spans[-1].events.append(Event(self.live - self._let_go, self.gradients, self.logits, 0, 0))


def _key(storage: torch.UntypedStorage) -> int:
    """The address of a storage, its identity."""
    return storage._cdata  # pyright: ignore[reportPrivateUsage]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _tensors(inner)


def _is_view(func: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    count: Callable[..., int] | None = flop_registry.get(func.overloadpacket)
    if count is None:
        return 0
    return int(count(*args, **kwargs, out_val=out))


@contextlib.contextmanager
def values_are_asked() -> Generator[None]:
    """transformers builds every attention mask where it sees fake tensors, since it may not look at their values;
    here it may, and the recorder answers."""
    from transformers.utils import import_utils

    original = import_utils.is_fake_tensor
    import_utils.is_fake_tensor = lambda x: False
    try:
        yield
    finally:
        import_utils.is_fake_tensor = original


def fake_parameters(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Puts fake tensors of the same shapes in the place of the module's parameters, buffers and others, in the active
    fake mode; floating parameters in `dtype`. Tied parameters stay tied."""
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        slots: Any = vars(part)  # setattr would refuse a parameter where a tied one sits
        for name, parameter in list(part.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) not in made:
                kind = dtype if parameter.is_floating_point() else parameter.dtype
                value = torch.empty(parameter.shape, dtype=kind, device=device)
                made[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
            slots["_parameters"][name] = made[id(parameter)]
        for name, buffer in list(part.named_buffers(recurse=False, remove_duplicate=False)):
            slots["_buffers"][name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
        for name, held in list(
            slots.items()
        ):  # PEFT keeps the numbers of its virtual tokens in a plain dictionary
            if not name.startswith("_") and isinstance(held, dict):
                found: dict[Any, Any] = held
                slots[name] = {
                    key: torch.empty(value.shape, dtype=value.dtype, device=device)
                    if isinstance(value, Tensor)
                    else value
                    for key, value in found.items()
                }
