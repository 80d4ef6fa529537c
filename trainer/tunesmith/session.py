"""What surrounds the loop of a run: its folder, its observers, its evaluations and saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tunesmith.averaging import average_among
from tunesmith.checkpoint.run_state import RunState, load_parts, load_weights
from tunesmith.checkpoint.state import Progress
from tunesmith.data.prepare import Dataset
from tunesmith.decisions.scores import UNTUNED
from tunesmith.engine import Engine
from tunesmith.errors import UserError
from tunesmith.evaluator import Evaluation, evaluate
from tunesmith.generation import evaluate_generation
from tunesmith.objectives import Objective
from tunesmith.parts import StepPart
from tunesmith.recipe import Recipe
from tunesmith.signals import StopRequest
from tunesmith.tracking.events import Event, Message, Saved, Stepped
from tunesmith.tracking.tracker import Tracker
from tunesmith.watchdog import stepped


@dataclass(slots=True)
class Session:
    """The loop's services."""

    engine: Engine
    recipe: Recipe
    run_dir: Path
    objective: Objective
    datasets: dict[str, Dataset]
    state: RunState
    tracker: Tracker
    stop: StopRequest
    parts: Sequence[StepPart] = ()
    _told: set[Path] = field(default_factory=set[Path])

    def emit(self, event: Event) -> None:
        if isinstance(event, Stepped):
            stepped(event.step)
        self.tracker.on(event)

    def evaluate(self, step: int, epoch: float, split: str = "eval") -> Evaluation:
        """Loss, metrics and, where the recipe asks for it, metrics of generated text: of the training's evaluations by
        the average of the weights where the recipe says so, else by the weights as they are."""
        average = average_among(self.parts) if split == "eval" else None
        if average is not None and average.settings.evaluate == "averaged":
            with average.swapped():
                return self._evaluate(step, split)
        return self._evaluate(step, split)

    def _evaluate(self, step: int, split: str) -> Evaluation:
        dataset, settings = self.datasets[split], self.recipe.evaluation
        per_device, seed = settings.per_device_eval_batch_size, self.recipe.training.seed
        with self.tracker.counting(f"{split} at step {step}", len(dataset)) as count:
            found = evaluate(self.engine, self.objective, dataset, per_device, seed, count)
        if settings.generate is not None:
            rows = min(len(dataset), settings.generate.limit or len(dataset))
            with self.tracker.counting(f"generating for {split}", rows) as count:
                scores = evaluate_generation(
                    self.engine, self.objective, dataset, settings.generate, per_device, count
                )
            found = Evaluation(found.loss, found.metrics | scores.metrics, found.tables | scores.tables)
        known = ", ".join(found.metrics)
        asked = [(f"evaluation.metrics: {name}", name) for name in settings.metrics or ()]
        if settings.metric_for_best is not None:
            name = settings.metric_for_best.removeprefix("eval_")
            asked.append((f"evaluation.metric_for_best: {name}", name))
        for key, name in asked:
            if name not in found.metrics:
                raise UserError(f"{key} is not among this objective's metrics: {known}")
        if settings.metrics is not None:
            kept = {"loss", *settings.metrics, *(f"{name}{UNTUNED}" for name in settings.metrics)}
            chosen = {name: value for name, value in found.metrics.items() if name in kept}
            found = Evaluation(found.loss, chosen, found.tables)
        return found

    def save(self, progress: Progress, *, best: bool) -> None:
        best_step = progress.best_step if self.recipe.checkpoint.final == "best" else None
        protect = set() if best_step is None else {self.run_dir / f"checkpoint-{best_step}"}
        self.state.extra.update(self.engine.broadcast(self.tracker.state()))
        path, pruned = self.state.save(
            self.run_dir, self.recipe, keep=self.recipe.checkpoint.save_total_limit, protect=protect
        )
        for broken in pruned.left:
            if broken.path not in self._told:
                self._told.add(broken.path)
                self.emit(Message(f"{broken.path.name} is left as it is: {broken.reason}", "warning"))
        self.emit(Saved(progress.step, str(path)))

    def settle(self, metric: str | None) -> None:
        """Gives the engine the weights of `final/`: those of the best step by `metric`, where the recipe wants it, or
        the last ones; averaged where it says so. Called by all ranks, once, when the training is done."""
        progress, best = self.state.progress, self.state.progress.best_step
        average = average_among(self.parts)
        if metric is not None and self.recipe.checkpoint.final == "best" and best != progress.step:
            assert best is not None
            path = self.run_dir / f"checkpoint-{best}"
            load_weights(self.engine, path)
            if average is not None:
                load_parts(self.engine, path, {average.name: average})
            self.emit(Message(f"final/ has the weights of step {best}, the best {metric}", "info"))
        if average is not None and average.settings.final == "averaged":
            if average.begun:
                average.settle()
                self.emit(Message("final/ has the average of the weights (averaging)", "info"))
            else:
                self.emit(
                    Message("averaging: none had begun at that step: final/ has its weights", "warning")
                )
        for part in self.parts:
            if part is not average:
                part.settle()

    def stop_requested(self) -> bool:
        return self.stop.requested
