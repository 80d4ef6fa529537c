"""report.html: one file that shows a run, without a request to anywhere. Made of what the run's folder holds:
metrics.jsonl, environment.json, recipe.yaml, report.json, decisions.json, exit.json; only the first must be there."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from tunesmith.errors import UserError
from tunesmith.tracking import metrics_file
from tunesmith.tracking.events import DispensableObserver, Evaluated, Event, RunEnded, RunStarted
from tunesmith.tracking.report_sections import Run, body
from tunesmith.tracking.text import redacted

NAME, DATA = "report.html", "report.json"
DECIDED = "decisions.json"
EVERY_SECONDS = 60.0  # between two reports of a run that goes on,
EVERY_COSTS = 50.0  # and so many times what the last one took: 100,000 rows take some seconds


class ReportWriter(DispensableObserver):
    """Keeps report.json and writes report.html: at the end, and after an evaluation where the last one is a minute
    old. report.json:

        {"run_name", "total_steps", "status": "running" | "done" | "stopped", "reason", "step",
         "summary": that of RunEnded, "tables": {split: {"step", "tables": those of its last evaluation}}}"""

    name = "report.html"

    def __init__(self, run_dir: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.run_dir = run_dir
        self._clock = clock
        self._due = -math.inf
        self._data: dict[str, Any] = {}

    def observe(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._data = {
                    "run_name": event.run_name,
                    "total_steps": event.total_steps,
                    "status": "running",
                }
                self._data |= {"reason": "", "step": event.resumed_from or 0, "summary": {}, "tables": {}}
                if event.resumed_from is not None:
                    kept: dict[str, Any] = _json(self.run_dir / DATA).get("tables", {})
                    self._data["tables"] = {
                        split: found for split, found in kept.items() if found["step"] <= event.resumed_from
                    }
                self._save()
            case Evaluated():
                self._data["tables"][event.split] = {"step": event.step, "tables": plain(event.tables)}
                self._data["step"] = event.step
                self._save()
                if (before := self._clock()) >= self._due:
                    write_report(self.run_dir)
                    now = self._clock()
                    self._due = now + max(EVERY_SECONDS, EVERY_COSTS * (now - before))
            case RunEnded():
                self._data |= {"status": event.status, "reason": event.reason, "step": event.step}
                self._data["summary"] = plain(event.summary)
                self._save()
                write_report(self.run_dir)
            case _:
                pass

    def release(self) -> None:
        pass

    def _save(self) -> None:
        _replace(self.run_dir / DATA, json.dumps(self._data, ensure_ascii=False, allow_nan=False) + "\n")


def write_report(run_dir: Path) -> Path:
    """Writes `run_dir`/report.html and returns its path. Raises UserError where the folder holds no run."""
    metrics = run_dir / metrics_file.NAME
    if not metrics.is_file():
        raise UserError(f"{run_dir}: holds no run (no {metrics_file.NAME})")
    run = _collect(run_dir, metrics_file.read(metrics))
    template = (
        resources.files("tunesmith.tracking").joinpath("report_template.html").read_text(encoding="utf-8")
    )
    path = run_dir / NAME
    _replace(path, Template(template).substitute(title=escape(run.name), body=body(run)))
    return path


def _collect(run_dir: Path, rows: list[dict[str, Any]], *, compares: bool = True) -> Run:
    data = _json(run_dir / DATA)
    recipe, text = _recipe(run_dir / "recipe.yaml")
    status, reason = data.get("status", "unknown"), data.get("reason", "")
    ended = run_dir / "exit.json"
    # a run that was killed never reported its end; whoever watched it then wrote exit.json
    if status == "running" and ended.exists() and ended.stat().st_mtime >= (run_dir / DATA).stat().st_mtime:
        found = _json(ended)
        status = "done" if found.get("code") == 0 else "stopped"
        reason = str(found.get("reason", ""))
    tables = {split: (found["step"], found["tables"]) for split, found in data.get("tables", {}).items()}
    return Run(
        name=data.get("run_name") or str(recipe.get("run_name") or run_dir.name),
        status=status,
        reason=reason,
        rows=rows,
        summary=data.get("summary", {}),
        tables=tables,
        total_steps=data.get("total_steps"),
        recipe=recipe,
        recipe_text=text,
        environment=redacted(_json(run_dir / "environment.json")),
        decided=_json(run_dir / DECIDED),
        beside=_beside(recipe) if compares else None,
    )


def _beside(recipe: dict[str, Any]) -> Run | None:
    """The run of `tracking.compare_with`; None where there is none, or none any more."""
    other = (recipe.get("tracking") or {}).get("compare_with")
    if other is None or not (metrics := Path(other) / metrics_file.NAME).is_file():
        return None
    return _collect(Path(other), metrics_file.read(metrics), compares=False)


def _recipe(path: Path) -> tuple[dict[str, Any], str]:
    """The recipe without secrets, and as text."""
    from io import StringIO

    from ruamel.yaml import YAML

    if not path.exists():
        return {}, ""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]
    recipe = redacted(yaml.load(path.read_text(encoding="utf-8")))
    out = StringIO()
    yaml.dump(recipe, out)
    return recipe, out.getvalue()


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _replace(path: Path, text: str) -> None:
    """Whole or not at all: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def plain(value: Any) -> Any:
    """Dataclasses, NumPy values, paths and containers as JSON can hold them; a number that is not finite is null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    to_list: Callable[[], Any] | None = getattr(value, "tolist", None)  # NumPy's arrays and scalars
    if to_list is not None:
        value = to_list()
    match value:
        case float():
            return value if math.isfinite(value) else None
        case None | bool() | int() | str():
            return value
        case dict():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case _:
            return str(value)
