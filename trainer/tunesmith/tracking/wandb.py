"""Weights & Biases. What goes wrong with it never stops a run, nor holds it up for longer than the bounds below.

This module shares its name with the package; imports are absolute, so `import wandb` is always the package."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.errors import MissingExtra
from tunesmith.recipe.tracking import Wandb
from tunesmith.tracking.events import (
    DispensableObserver,
    Evaluated,
    Event,
    RunEnded,
    RunStarted,
    StepLogged,
    first_line,
    say,
)
from tunesmith.tracking.text import redacted

if TYPE_CHECKING:
    from wandb.sdk.wandb_run import Run

INIT_SECONDS = 20.0  # for the server's answer at the start
FINISH_SECONDS = 60.0  # for what is left to send at the end
STEP = "global_step"


class WandbRun(DispensableObserver):
    """A W&B run in `run_dir`/wandb. Without an answer from the server at the start it is kept offline, under the same
    id, for `wandb sync` to send later. The x-axis of every chart is `global_step`, our optimizer step: steps that a
    killed run logged and a resumed one makes again appear twice in W&B (metrics.jsonl has them once).

    Raises MissingExtra when the package is not installed, unless the mode is disabled."""

    name = "wandb"

    def __init__(
        self,
        settings: Wandb,
        run_dir: Path,
        *,
        init_seconds: float = INIT_SECONDS,
        finish_seconds: float = FINISH_SECONDS,
    ) -> None:
        self.settings = settings
        self.run_dir = run_dir
        self.off = settings.mode == "disabled"
        self._init_seconds, self._finish_seconds = init_seconds, finish_seconds
        # W&B's own form of an id: eight of a-z and 0-9
        self._id = "".join(secrets.choice("abcdefghijklmnopqrstuvwxyz0123456789") for _ in range(8))
        self._run: Run | None = None
        if not self.off:
            _require()

    def state_dict(self) -> dict[str, str]:
        """The id, which a resumed run continues."""
        return {"id": self._id}

    def load_state_dict(self, state: dict[str, str]) -> None:
        self._id = state["id"]

    def observe(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._start(event)
            case StepLogged():
                self._log(event.step, _of_step(event))
            case Evaluated():
                values = {"loss": event.loss, "seconds": event.seconds} | event.metrics
                self._log(event.step, {f"{event.split}/{name}": value for name, value in values.items()})
            case RunEnded():
                self._finish(0 if event.status == "done" else 1)
            case _:
                pass

    def release(self) -> None:
        self._finish(1)

    def _start(self, event: RunStarted) -> None:
        import wandb
        from wandb.errors import Error

        offline = self.settings.mode == "offline"
        if not offline:
            try:
                self._run = self._login_and_init(event)
                say(f"wandb: {self._run.url}")
            except Error as error:
                say(f"warning: wandb: {first_line(error)}; kept offline, `wandb sync` sends it later")
                wandb.teardown()  # its service process still holds the id of the run that did not start
                offline = True
        if offline:
            self._run = self._init(event, "offline")
            say(f"wandb: offline in {self._run.settings.sync_dir}")
        assert self._run is not None
        self._run.define_metric(STEP, hidden=True)
        self._run.define_metric("*", step_metric=STEP)

    def _login_and_init(self, event: RunStarted) -> Run:
        import wandb
        from wandb.errors import UsageError

        wandb.setup(settings=wandb.Settings(silent=True))  # our lines say what matters
        # wandb.init would ask for a key on a terminal, and a run must not wait for an answer
        if not wandb.login(prompt=False, verify=False):
            raise UsageError("no API key (`wandb login` sets one)")
        return self._init(event, "online")

    def _init(self, event: RunStarted, mode: str) -> Run:
        import wandb

        run = wandb.init(
            mode="online" if mode == "online" else "offline",
            id=self._id,
            resume="allow"
            if mode == "online"
            else None,  # W&B joins offline parts by their id when they are synced
            name=event.run_name,
            project=self.settings.project or "tunesmith",
            entity=self.settings.entity,
            group=self.settings.group,
            tags=self.settings.tags,
            dir=self.run_dir,
            config=redacted(event.recipe) | {"facts": redacted(event.facts)},
            allow_val_change=True,  # a resumed run may have other facts
            settings=wandb.Settings(
                init_timeout=self._init_seconds,
                finish_timeout=self._finish_seconds,
                finish_timeout_raises=True,
                silent=True,
                console="off",  # a captured terminal breaks the progress bar
                save_code=False,
            ),
        )
        return run

    def _log(self, step: int, values: dict[str, Any]) -> None:
        assert self._run is not None, "RunStarted comes first"
        self._run.log({STEP: step} | values)

    def _finish(self, exit_code: int) -> None:
        if self._run is not None:
            run, self._run = self._run, None
            folder = run.settings.sync_dir
            try:
                run.finish(exit_code=exit_code)
            except TimeoutError:
                say(
                    f"warning: wandb: not all was sent in {self._finish_seconds:.0f} s; "
                    f"`wandb sync {folder}` sends the rest"
                )


def _of_step(event: StepLogged) -> dict[str, float]:
    names = [name for name in event.__dataclass_fields__ if name not in {"step", "extra"}]
    return {f"train/{name}": getattr(event, name) for name in names} | {
        f"train/{name}": value for name, value in event.extra.items()
    }


def _require() -> None:
    """The package, and not the folder `wandb` that its runs leave in the working directory."""
    # its telemetry goes to the same server, and where that hangs, holds the end of the process up for 20 s
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb
    except ImportError:
        found = False
    else:
        found = hasattr(wandb, "init")
    if not found:
        raise MissingExtra("wandb", "wandb", "tracking.wandb")
