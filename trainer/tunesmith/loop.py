"""The loop over the steps: what happens when. It knows no engine and no objective by name."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol

import torch

from tunesmith.checkpoint.state import Progress
from tunesmith.data.stream import Stream
from tunesmith.engine import Engine
from tunesmith.errors import Interrupted, TrainingStopped
from tunesmith.evaluator import Evaluation
from tunesmith.later import Later
from tunesmith.loss_scale import LossScale
from tunesmith.memory import peak_memory_bytes
from tunesmith.nonfinite import explain_nonfinite
from tunesmith.parts import StepPart, Strategies
from tunesmith.recipe import Recipe
from tunesmith.recipe.schedule import ReduceOnPlateau
from tunesmith.schedules import Plateau, multiplier
from tunesmith.step import StepResult, train_step
from tunesmith.terms import Term
from tunesmith.tracking.events import Evaluated, Event, Message, StepLogged, Stepped
from tunesmith.trainable.plan import Plan

MAX_OVERFLOWS = 50  # in a row: the loss scale is then below 2^-34 and no gradient survives


class Services(Protocol):
    """What the loop asks for and does not do itself."""

    def emit(self, event: Event) -> None: ...

    def evaluate(self, step: int, epoch: float) -> Evaluation: ...

    def save(self, progress: Progress, *, best: bool) -> None: ...

    def stop_requested(self) -> bool: ...


@dataclass(slots=True)
class Loop:
    """Everything a run's steps need; `run` goes from `progress.step` to the last step."""

    engine: Engine
    stream: Stream
    terms: tuple[Term, ...]
    recipe: Recipe
    total_steps: int
    progress: Progress
    scale: LossScale
    services: Services
    metric: tuple[str, bool] | None  # what chooses the best, and whether greater is better
    plateau: Plateau | None = None
    plan: Plan = field(default_factory=Plan)
    strategies: Strategies = field(default_factory=Strategies)
    _stage: int | None = None
    _window: list[StepResult] = field(default_factory=list[StepResult])
    _since: float = 0.0

    def learning_rate(self, step: int) -> float:
        factor = multiplier(self.recipe.schedule, step, self.total_steps)
        if isinstance(self.recipe.schedule, ReduceOnPlateau) and self.plateau is not None:
            factor *= max(self.plateau.factor, self.recipe.schedule.min_lr_ratio)
        own = [part.learning_rate(step) for part in self.strategies.steps]
        return next((rate for rate in own if rate is not None), self.recipe.optim.learning_rate * factor)

    def run(self) -> str:
        """Trains. Returns why it ended: "done" or "early stopping". Raises Interrupted after a signal's save,
        TrainingStopped where a step was not finite."""
        engine, progress = self.engine, self.progress
        broken = torch.zeros((), device=engine.device)
        pending: tuple[int, Later] | None = None
        self._since = time.perf_counter()
        engine.module.train()
        while progress.step < self.total_steps:
            step = progress.step
            self._open(step)
            batches = self.stream.batches(
                step,
                engine.data_rank,
                engine.data_size,
                prefetch=engine.device.type != "cpu" and step + 1 < self.total_steps,
            )
            for part in self.strategies.steps:
                batches = part.rollout(step, batches)
            result = train_step(
                engine,
                batches,
                self.terms,
                step=step,
                seed=self.recipe.training.seed,
                learning_rate=self.learning_rate(step),
                max_grad_norm=self.recipe.optim.max_grad_norm,
                scale=self.scale,
                broken=broken,
                stop=self.services.stop_requested(),
                strategies=self.strategies,
            )
            broken = result.broken
            progress.step += 1
            self._window.append(result)
            now = (
                step,
                Later(torch.stack([result.broken.double(), result.counts[-1], result.overflow.double()])),
            )
            # on a GPU the host reads a step's flags while the next step runs; a save must not outrun them
            due = self._due(step)
            stop = self._check(pending) if pending is not None else False
            pending = now
            if due or engine.device.type == "cpu":
                stop = self._check(pending) or stop
                pending = None
            self.services.emit(Stepped(progress.step))
            if stop:
                self._log(progress.step)
                self.services.save(progress, best=False)
                raise Interrupted(f"stopped by a signal after step {progress.step}; continue with --resume")
            if due and (ended := self._after(step, due)):
                return ended
        return "done"

    def _open(self, step: int) -> None:
        """What `step` trains, where that is not what the step before did: a pure function of the step, so that a
        resumed run needs no state for it."""
        for part in self.strategies.steps:
            part.open(step)
        if not self.plan.openings or (stage := self.plan.stage(step)) == self._stage:
            return
        self._stage = stage
        self.engine.train_only(self.plan.trained_at(step))
        self.engine.module.train()  # parts that are trained from here drop units again
        if step in self.plan.openings:
            self.services.emit(Message(self.plan.opening(step)))

    def _check(self, pending: tuple[int, Later]) -> bool:
        """Reads a step's flags; True where a rank was asked to stop. The flags come from sums over all ranks, so
        every rank decides the same."""
        step, later = pending
        broken, stop, overflow = later.read().tolist()
        if broken:
            where = explain_nonfinite(self.engine, self.stream, step, self.recipe.training.seed)
            raise TrainingStopped(f"step {step + 1}: the loss or its gradient is not finite; {where}")
        self.progress.overflows_in_a_row = self.progress.overflows_in_a_row + 1 if overflow else 0
        self.progress.overflows += int(overflow)
        if self.progress.overflows_in_a_row > MAX_OVERFLOWS:
            raise TrainingStopped(
                f"step {step + 1}: fp16 overflowed {MAX_OVERFLOWS} times in a row, down to a loss scale of "
                f"{float(self.scale.value):.3g}: use bf16 or fp32"
            )
        return stop > 0

    def _due(self, step: int) -> set[str]:
        """What follows on this step (0-based)."""
        done, last = step + 1, step + 1 == self.total_steps
        epoch_ends = done % self.stream.steps_per_epoch == 0
        due: set[str] = set()
        if done % self.recipe.tracking.logging_steps == 0 or last:
            due.add("log")

        def falls(every: int | str | None) -> bool:
            return epoch_ends if every == "epoch" else every is not None and done % int(every) == 0

        if self.metric is not None and (falls(self.recipe.evaluation.eval_steps) or last):
            due.add("evaluate")
        if falls(self.recipe.checkpoint.save_steps) or last:
            due.add("save")
        return due

    def _after(self, step: int, due: set[str]) -> str | None:
        self._log(step + 1)
        best, ended = False, None
        if "evaluate" in due:
            best, ended = self._evaluate(step + 1)
        if "save" in due or ended or (best and self.recipe.checkpoint.final == "best"):
            self.services.save(self.progress, best=best)
        self._since = time.perf_counter()  # evaluations and saves are no training time
        return ended

    def _log(self, step: int) -> None:
        if not self._window:
            return
        seconds = time.perf_counter() - self._since
        losses = torch.stack([result.loss for result in self._window]).tolist()
        counts = torch.stack([result.counts for result in self._window]).sum(0).tolist()
        terms, own = len(self.terms), len(self.engine.train_module.objective.terms)
        self.progress.samples += int(counts[terms])
        self.progress.tokens += int(counts[terms + 1])
        self.progress.train_seconds += seconds
        self.services.emit(
            StepLogged(
                step=step,
                epoch=step / self.stream.steps_per_epoch,
                loss=sum(losses) / len(losses),
                learning_rate=self.learning_rate(step - 1),
                grad_norm=float(self._window[-1].norm),
                units=int(sum(counts[:own])),
                samples=self.progress.samples,
                tokens=int(counts[terms + 1]),
                tokens_per_second=counts[terms + 1] / max(seconds, 1e-9),
                seconds=self.progress.train_seconds,
                peak_memory_bytes=peak_memory_bytes(self.engine.device),
                extra=self._fp16() | self._rates() | self._strategies(),
            )
        )
        self._window.clear()
        self._since = time.perf_counter()

    def _fp16(self) -> dict[str, float]:
        if not self.scale.enabled:
            return {}
        return {"loss_scale": float(self.scale.value), "overflows": self.progress.overflows}

    def _rates(self) -> dict[str, float]:
        """The learning rates of the last step, by part of the model, where there is more than one."""
        groups = self.engine.optimizer.param_groups
        if len({(group["lr_scale"], group["opens"], group["warmup"]) for group in groups}) == 1:
            return {}
        return {f"learning_rate/{group['place']}": group["lr"] for group in groups}

    def _strategies(self) -> dict[str, float]:
        """What each term and each penalty of the window was, where there is more than the objective's own loss, and the
        terms' weights, where they change from step to step."""
        found: dict[str, float] = {}
        if len(self.terms) > 1:
            terms = torch.stack([result.terms for result in self._window])
            there = torch.stack([result.counts[: len(self.terms)] > 0 for result in self._window])
            means = (terms * there).sum(0) / there.sum(0).clamp(min=1)  # over the steps that had units of it
            for term, value, some in zip(self.terms, means.tolist(), there.any(0).tolist(), strict=True):
                found |= {f"loss/{term.name}": value} if some else {}
        if any(type(part).weights is not StepPart.weights for part in self.strategies.steps):
            weights = torch.stack([result.weights for result in self._window]).mean(0)
            pairs = zip(self.terms, weights.tolist(), strict=True)
            found |= {f"weight/{term.name}": value for term, value in pairs}
        for name in self._window[0].penalties:
            values = torch.stack([result.penalties[name] for result in self._window])
            found[f"penalty/{name}"] = float(values.mean())
        return found

    def _evaluate(self, step: int) -> tuple[bool, str | None]:
        """(whether this is the best so far, why to end now)"""
        assert self.metric is not None
        progress, (name, greater) = self.progress, self.metric
        started = time.perf_counter()
        epoch = step / self.stream.steps_per_epoch
        found = self.services.evaluate(step, epoch)
        seconds = time.perf_counter() - started
        self.services.emit(Evaluated(step, epoch, found.loss, found.metrics, found.tables, "eval", seconds))
        told = [line for part in self.strategies.steps for line in part.evaluated(step, found.metrics)]
        for line in told:
            self.services.emit(Message(line, "info"))
        ended = next((part.ended for part in self.strategies.steps if part.ended), None)
        value = found.metrics[name]
        if self.plateau is not None:
            self.plateau.observe(value, greater)
        stopping = self.recipe.evaluation.early_stopping
        delta = stopping.min_delta if stopping is not None else 0.0
        best = progress.best_value is None or improves(value, progress.best_value, greater, 0.0)
        enough = progress.stopping_value is None or improves(value, progress.stopping_value, greater, delta)
        if best:
            progress.best_value, progress.best_step = value, step
        progress.stopping_value = value if enough else progress.stopping_value
        progress.bad_evaluations = 0 if enough else progress.bad_evaluations + 1
        if stopping is not None and progress.bad_evaluations >= stopping.patience:
            self.services.emit(
                Message(f"early stopping: no better {name} in {stopping.patience} evaluations", "info")
            )
            return best, "early stopping"
        return best, ended


def improves(value: float, best: float, greater_is_better: bool, delta: float) -> bool:
    """Whether `value` beats `best` by more than `delta`; NaN never does."""
    return value > best + delta if greater_is_better else value < best - delta
