"""What happens in a run, as observers hear it. Only rank 0 has observers."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Split = Literal["eval", "test"]
Level = Literal["info", "warning"]


@dataclass(frozen=True, slots=True)
class RunStarted:
    """Everything is built; no step was made yet. `resumed_from` is the step of the checkpoint."""

    run_name: str
    total_steps: int
    recipe: dict[str, Any]
    facts: dict[str, Any]
    resumed_from: int | None


@dataclass(frozen=True, slots=True)
class Stepped:
    """Optimizer step `step` (1-based) is done. No numbers: reading one would wait for the device."""

    step: int


@dataclass(frozen=True, slots=True)
class StepLogged:
    """The numbers of the steps since the last such event. `loss` is their mean; `units` and `tokens` are counted
    over those steps; `samples` and `seconds` (training only) since the run's first step, resumes included.
    `learning_rate` and `grad_norm` are those of step `step`. `extra` adds keys of its own."""

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    units: int
    samples: int
    tokens: int
    tokens_per_second: float
    seconds: float
    peak_memory_bytes: int
    extra: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True)
class Evaluated:
    """An evaluation after step `step`. `metrics` are numbers by name (`loss` may be among them); `tables` are for
    the report: dataclasses, NumPy arrays and plain containers."""

    step: int
    epoch: float
    loss: float
    metrics: dict[str, float]
    tables: dict[str, Any]
    split: Split
    seconds: float


@dataclass(frozen=True, slots=True)
class Saved:
    step: int
    path: str


@dataclass(frozen=True, slots=True)
class Message:
    """A line for whoever watches."""

    text: str
    level: Level = "info"


@dataclass(frozen=True, slots=True)
class RunEnded:
    """`status` is "done" or "stopped"; `summary` may hold `baseline` {split: {metric: value}}, `test` {metric: value},
    `best_step`, `final`, and `next` {what: where it lies, or the command to type}."""

    status: str
    reason: str
    step: int
    summary: dict[str, Any] = field(default_factory=dict[str, Any])


Event = RunStarted | Stepped | StepLogged | Evaluated | Saved | Message | RunEnded


class Observer(Protocol):
    """Hears of events and never alters training. What an observer raises ends the run."""

    def on(self, event: Event) -> None: ...

    def close(self) -> None: ...


class DispensableObserver(ABC):
    """An observer that a run can do without: whatever goes wrong in it turns it off, with one line on stderr."""

    name: str
    off: bool = False

    def on(self, event: Event) -> None:
        self._guarded(lambda: self.observe(event))

    def close(self) -> None:
        self._guarded(self.release)
        self.off = True

    @abstractmethod
    def observe(self, event: Event) -> None:
        """`on`, free to raise."""

    @abstractmethod
    def release(self) -> None:
        """`close`, free to raise."""

    def _guarded(self, work: Callable[[], None]) -> None:
        if self.off:
            return
        try:
            work()
        # the services behind observers raise what they like (wandb's errors have no common base), and no failure
        # of a dispensable part may cost a training run
        except Exception as error:  # noqa: BLE001
            self.off = True
            what = f"{type(error).__name__}: {first_line(error)}"
            say(f"warning: {self.name} is turned off, the run goes on: {what}")


def say(line: str) -> None:
    """A line on stderr (rich prints it above a live bar)."""
    print(line, file=sys.stderr, flush=True)


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or "no message").splitlines()[0]
