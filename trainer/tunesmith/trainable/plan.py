"""What is trained, from which step on, and how fast: names and numbers alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby


@dataclass(frozen=True, slots=True)
class Training:
    """How one parameter is trained. `opens`: the optimizer steps before its first update. `factor`: its learning rate,
    in units of `optim.learning_rate`. `warmup`: the steps over which its rate rises, from its own first one on.
    `place`: the part of the model in which it lies, for people. `numel`: of the whole parameter."""

    opens: int = 0
    factor: float = 1.0
    warmup: int = 0
    place: str = ""
    numel: int = 0


_FROM_THE_START = Training()


@dataclass(frozen=True, slots=True)
class Plan:
    """`parameters`: each one that is ever trained, by its name in the TrainModule that holds the model. A plan without
    any: every parameter that requires a gradient is trained from the start, at the recipe's learning rate. `notes`:
    what a person should know of it."""

    parameters: Mapping[str, Training] = field(default_factory=dict[str, Training])
    notes: tuple[str, ...] = ()

    def of(self, name: str) -> Training:
        """How the parameter is trained; it must be."""
        return self.parameters[name] if self.parameters else _FROM_THE_START

    @property
    def openings(self) -> tuple[int, ...]:
        """The steps, above 0 and in order, from which more is trained than before."""
        return tuple(sorted({one.opens for one in self.parameters.values()} - {0}))

    def stage(self, step: int) -> int:
        """How many openings there have been when step `step` (0-based) is made."""
        return sum(opening <= step for opening in self.openings)

    def trained_at(self, step: int) -> frozenset[str]:
        """The names of the parameters that step `step` (0-based) updates."""
        return frozenset(name for name, one in self.parameters.items() if one.opens <= step)

    def opening(self, step: int) -> str:
        """What is trained from `step` on, in one line."""
        opened = [one for one in self.parameters.values() if one.opens == step]
        numel = sum(one.numel for one in opened)
        verb = "are" if len({one.place for one in opened}) > 1 else "is"
        return (
            f"step {step + 1}: {places(one.place for one in opened)} {verb} trained from here, {count(numel)}"
        )


def warmed_up(step: int, opens: int, warmup: int) -> float:
    """The share of its learning rate that a parameter has at `step`, which rises linearly over `warmup` steps from
    `opens` on, as the schedule's warm-up does from the first: (s − opened + 1) / (warmup + 1), at most 1."""
    return 0.0 if step < opens else min(1.0, (step - opens + 1) / (warmup + 1))


def places(names: Iterable[str]) -> str:
    """Parts of a model in words, each once: layers 2-5 and head."""
    distinct = list(dict.fromkeys(names))
    layers = sorted(int(name.removeprefix("layer ")) for name in distinct if name.startswith("layer "))
    runs = [[one for _, one in run] for _, run in groupby(enumerate(layers), lambda pair: pair[1] - pair[0])]
    ranges = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    words = [name for name in distinct if not name.startswith("layer ")]
    if layers:
        words.append(("layer " if len(layers) == 1 else "layers ") + ", ".join(ranges))
    return " and ".join(words)


def count(numel: int) -> str:
    """A number of parameters for people: 1.8 M parameters."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if numel >= size:
            return f"{numel / size:.1f} {unit} parameters"
    return f"{numel} parameters"
