"""Which parameters ZeRO-3 holds whole at each moment: DeepSpeed's PartitionedParameterCoordinator, once it knows the
order of the modules (from the second step on), played through on element counts."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from tunesmith.planning.workload import Parameter, Workload

_LIVE = 1_000_000_000  # stage3_max_live_parameters, DeepSpeed's default: prefetching stops there
_REUSE = 1_000_000_000  # stage3_max_reuse_distance: what is used again within so many elements stays
_PERSISTED = 1_000  # stage3_param_persistence_threshold: whole all the time (tunesmith.engine.zero_config)


EMBEDDING, HEAD = "first", "last"


@dataclass(frozen=True, slots=True)
class Asked:
    """When a module asks for its parameters: all elements at that moment, those of the larger gather that it begins."""

    elements: float
    batch: float


@dataclass(slots=True)
class Gathers:
    """By (phase, unit), where EMBEDDING is the root's first module and HEAD what comes behind the layers: the worst
    moment of asking, and the elements there are `during` the computation; `end`: after the backward."""

    asked: dict[tuple[str, str], Asked] = field(default_factory=dict[tuple[str, str], Asked])
    during: dict[tuple[str, str], float] = field(default_factory=dict[tuple[str, str], float])
    end: float = 0.0


@dataclass(slots=True, eq=False)
class _Batch:
    """A coalesced gather. Its output stays until each of its parameters was asked for; parameters are copies of it,
    made at once when the first is asked for. A lone parameter is its own output."""

    waiting: set[str]
    numel: int
    copied: bool = False


@dataclass(slots=True)
class _State:
    whole: dict[str, int] = field(default_factory=dict[str, int])  # available, in elements
    batches: dict[str, _Batch] = field(default_factory=dict[str, _Batch])

    def elements(self) -> int:
        alive = {id(batch): batch for batch in self.batches.values()}
        return sum(self.whole.values()) + sum(batch.numel for batch in alive.values())

    def available(self) -> int:
        flying = sum(b.numel for b in {id(b): b for b in self.batches.values()}.values() if not b.copied)
        return sum(self.whole.values()) + flying

    def has(self, name: str) -> bool:
        return name in self.whole or name in self.batches

    def gather(self, wanted: list[Parameter]) -> None:
        if wanted:
            batch = _Batch({p.name for p in wanted}, sum(p.numel for p in wanted))
            for p in wanted:
                self.batches[p.name] = batch

    def take(self, own: list[Parameter], sizes: dict[str, int]) -> int:
        """Waits for a module's own parameters; the most elements there were meanwhile."""
        most = self.elements()
        for p in own:
            batch = self.batches.pop(p.name, None)
            if batch is None:
                continue
            if not batch.copied:
                batch.copied = True
                lone = len(batch.waiting) == 1
                self.whole |= {name: sizes[name] for name in batch.waiting}
                most = max(most, self.elements() + (0 if lone else batch.numel))
        return most


def simulate(workload: Workload, bucket: int) -> Gathers:
    """One step with prefetches of `bucket` elements."""
    modules = _modules(workload)
    order = [(name, own, "forward") for name, own in modules]
    order += [(name, own, "backward") for name, own in reversed(modules)]
    sizes = {p.name: p.numel for _, own in modules for p in own}
    found, state = Gathers(), _State()
    queue = deque(p for _, own, _ in order for p in own)
    left = [sum(p.numel for p in own) for _, own, _ in order]
    for name, own, phase in order:
        left.pop(0)
        missing = [p for p in own if not state.has(p.name)]
        state.gather(missing)
        most = state.take(own, sizes)
        for _ in own:
            if queue:
                queue.popleft()
        ahead: list[Parameter] = []
        room = min(_LIVE - state.available(), bucket)
        while queue and sum(p.numel for p in ahead) < room:
            following = queue.popleft()
            if not state.has(following.name) and following not in ahead:
                ahead.append(following)
        state.gather(ahead)
        key, now = (phase, name), state.elements()
        batch = max(sum(p.numel for p in missing), sum(p.numel for p in ahead))
        before = found.asked.get(key, Asked(0.0, 0.0))
        found.asked[key] = Asked(max(before.elements, most, now), max(before.batch, batch))
        # the head is the last of the root in the forward, and what counts there is what is left when it computes
        found.during[key] = now if name == HEAD else max(found.during.get(key, 0.0), now)
        if phase == "backward" or sum(left) > 2 * _REUSE:
            for p in own:
                state.whole.pop(p.name, None)
    found.end = state.elements()
    return found


def _modules(workload: Workload) -> list[tuple[str, list[Parameter]]]:
    """(the unit, the parameters of one module) in the order of the forward: the root's first module embeds, its
    others come behind the layers."""

    def split(unit_name: str, parameters: tuple[Parameter, ...]) -> list[tuple[str, list[Parameter]]]:
        owners: dict[str, list[Parameter]] = {}
        for p in parameters:
            if p.numel > _PERSISTED:
                owners.setdefault(p.name.rpartition(".")[0], []).append(p)
        return [(unit_name, own) for own in owners.values()]

    root = split(HEAD, workload.root.parameters)
    root = [(EMBEDDING, own) for _, own in root[:1]] + root[1:]
    layers = [m for stack in workload.layers for unit in stack for m in split(unit.name, unit.parameters)]
    return [*root[:1], *layers, *root[1:]]
