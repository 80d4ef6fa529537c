"""All observers of a run behind one face. Only rank 0 has any; observers never alter training."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.recipe import Recipe
from tunesmith.tracking.events import Event, Observer
from tunesmith.tracking.metrics_file import MetricsFile
from tunesmith.tracking.progress import ProgressDisplay
from tunesmith.tracking.report import ReportWriter
from tunesmith.tracking.wandb import WandbRun


@dataclass(slots=True)
class Tracker:
    """The observers, in the order in which they hear of an event."""

    observers: list[Observer]
    display: ProgressDisplay | None = None
    wandb: WandbRun | None = None
    _closed: bool = field(default=False)

    @staticmethod
    def build(recipe: Recipe, run_dir: Path) -> Tracker:
        settings = recipe.tracking
        display = ProgressDisplay(settings.progress)
        observers: list[Observer] = [MetricsFile(run_dir), display]
        wandb = None
        if settings.wandb.mode != "disabled":
            wandb = WandbRun(settings.wandb, run_dir)
            observers.append(wandb)
        observers.append(ReportWriter(run_dir))
        return Tracker(observers, display, wandb)

    def on(self, event: Event) -> None:
        for observer in self.observers:
            observer.on(event)

    @contextmanager
    def counting(self, what: str, total: int) -> Generator[Callable[[int], None]]:
        """A bar of its own for work between steps."""
        if self.display is None:
            yield lambda _: None
        else:
            with self.display.counting(what, total) as advance:
                yield advance

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the W&B run id."""
        return {} if self.wandb is None else {"wandb": self.wandb.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        if self.wandb is not None and "wandb" in state:
            self.wandb.load_state_dict(state["wandb"])

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            for observer in self.observers:
                observer.close()
