"""One rank of a run, from the recipe to final/."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tunesmith.checkpoint.run_state import RunState
from tunesmith.checkpoint.state import Progress
from tunesmith.data.prepare import Dataset
from tunesmith.decisions import fit as decisions
from tunesmith.engine import Engine, build_engine
from tunesmith.environment import git_commit, host, versions
from tunesmith.errors import UserError
from tunesmith.export import export_final
from tunesmith.loop import Loop
from tunesmith.loss_scale import LossScale
from tunesmith.objectives import Objective
from tunesmith.precision import choose
from tunesmith.preflight.agree import Preflight, agree
from tunesmith.preflight.content import weights_digests
from tunesmith.quiet import quiet_libraries
from tunesmith.ready import Data, prepare, read_data, try_out
from tunesmith.recipe import Recipe
from tunesmith.recipe.load import dump_recipe
from tunesmith.recipe.parallel import Parallel
from tunesmith.recipe.paths import resolve_paths
from tunesmith.recipe.schedule import ReduceOnPlateau
from tunesmith.remember.probes import probe_all, probes_of
from tunesmith.run_dir import Resume, open_run_dir
from tunesmith.schedules import Plateau
from tunesmith.session import Session
from tunesmith.signals import StopRequest
from tunesmith.strategy import settle
from tunesmith.tasks.objective import greater_is_better
from tunesmith.tasks.runs import read_runs
from tunesmith.tracking import metrics_file
from tunesmith.tracking.events import Evaluated, Message, RunEnded, RunStarted
from tunesmith.tracking.tracker import Tracker


def run(recipe: Recipe, base: Path, how: Resume) -> None:
    """Trains one rank's part; `base` is the folder that the recipe's paths are relative to. Raises TunesmithError
    with the exit code to return."""
    quiet_libraries()
    started = time.perf_counter()
    # before the process group: in it, ranks that disagree hang, or train something else
    preflight = agree(recipe, base)
    recipe = read_runs(resolve_paths(recipe, base), base)
    run_dir = Path(recipe.output_dir) / recipe.run_name
    settled, why = settle(recipe, base, preflight)
    with StopRequest() as stop:
        # the engine comes first: it makes the process group, and with it the device and the rank
        engine = build_engine(settled)
        try:
            if preflight is not None:
                preflight.sums(engine.device)
            _train(recipe, base, how, engine, run_dir, stop, started, preflight, settled.parallel, why)
        finally:
            engine.close()


def _train(
    recipe: Recipe,
    base: Path,
    how: Resume,
    engine: Engine,
    run_dir: Path,
    stop: StopRequest,
    started: float,
    preflight: Preflight | None,
    parallel: Parallel,
    engine_why: str,
) -> None:
    checkpoint = open_run_dir(engine, run_dir, how)
    compared = recipe.tracking.compare_with
    found = compared is None or (Path(compared) / metrics_file.NAME).is_file()
    if not engine.broadcast(found if engine.rank == 0 else False):
        raise UserError(f"tracking.compare_with: {compared} holds no run (no {metrics_file.NAME})")
    precision, why = choose(recipe.training.precision, engine.device)
    tracker = Tracker.build(recipe, run_dir) if engine.rank == 0 else Tracker([])

    data = read_data(recipe, base, engine, preflight)
    ready = prepare(recipe, base, data, engine, precision, parallel)
    facts = try_out(ready, recipe, base, engine)
    objective, datasets, strategies = data.objective, data.datasets, ready.strategies

    metric = best_metric(recipe, objective) if "eval" in datasets else None
    plateau = Plateau(recipe.schedule) if isinstance(recipe.schedule, ReduceOnPlateau) else None
    scale = LossScale(precision == "fp16", engine.device)
    files = engine.broadcast(weights_digests(recipe, base) if engine.rebuilt and engine.rank == 0 else {})
    parts = {part.name: part for part in strategies.steps}
    state = RunState(engine, Progress(), scale, plateau, {}, files, parts)
    if checkpoint is not None:
        state.load(checkpoint, recipe)
        tracker.load_state(state.extra)

    facts |= engine.facts() | {"engine_why": engine_why} | ready.facts
    facts |= {"precision": precision, "precision_why": why, "total_steps": ready.total_steps}
    facts |= {"data": {name: dataset.facts for name, dataset in datasets.items()}}
    facts |= {"preflight": preflight.facts} if preflight is not None else {}
    facts |= {"notes": ready.notes, "startup_seconds": time.perf_counter() - started}
    if engine.rank == 0:
        write_environment(run_dir, recipe, base, objective, facts)
    resumed = None if checkpoint is None else checkpoint.manifest.step
    tracker.on(RunStarted(recipe.run_name, ready.total_steps, recipe.model_dump(mode="json"), facts, resumed))

    session = Session(engine, recipe, run_dir, objective, datasets, state, tracker, stop, strategies.steps)
    loop = Loop(
        engine,
        ready.stream,
        ready.module.terms,
        recipe,
        ready.total_steps,
        state.progress,
        scale,
        session,
        metric,
        plateau,
        ready.plan,
        strategies,
    )
    try:
        reason = loop.run()
        session.settle(None if metric is None else metric[0])
        summary = _finish(session, data)
        tracker.on(RunEnded("done", reason, state.progress.step, summary))
    except BaseException as error:
        tracker.on(RunEnded("stopped", str(error) or type(error).__name__, state.progress.step, {}))
        raise
    finally:
        tracker.close()


def _finish(session: Session, data: Data) -> dict[str, Any]:
    """final/, and what its weights reach."""
    engine, recipe, run_dir = session.engine, session.recipe, session.run_dir
    final = export_final(engine, recipe, data.tokenizer, run_dir)
    decided = _decide(session, data.datasets, data.objective)
    summary = _test(session, data.datasets, data.objective) | decided
    summary |= {"final": str(final), "best_step": session.state.progress.best_step}
    summary["next"] = what_next(run_dir, list(recipe.tasks))
    # what a probe opens is a whole model of its own, on one rank; the others wait outside of any collective
    if probes := probes_of(recipe.remember):
        if engine.rank == 0:
            summary["probes"] = probe_all(probes, run_dir)
        engine.wait_for_all("probes")
    return summary


def _decide(session: Session, datasets: dict[str, Dataset], objective: Objective) -> dict[str, Any]:
    """What the recipe wants decided on the `eval` rows, by the weights of final/ and before the test sees them."""
    settings, engine = session.recipe.evaluation, session.engine
    if settings.tune_thresholds is None and settings.calibrate is None:
        return {}
    with session.tracker.counting("eval rows to decide on", len(datasets["eval"])) as count:
        seed = session.recipe.training.seed
        decided = decisions.decide(engine, objective, datasets["eval"], settings, seed, count)
    if engine.rank == 0:
        decisions.write(session.run_dir, objective, decided)
    for line in decided.told:
        session.emit(Message(line, "info"))
    return {"decisions": list(decided.told)}


def _test(session: Session, datasets: dict[str, Dataset], objective: Objective) -> dict[str, Any]:
    """The `test` rows, read once, by the weights of final/."""
    summary: dict[str, Any] = {
        "baseline": objective.baseline({name: d.table for name, d in datasets.items()})
    }
    if "test" in datasets:
        started, step = time.perf_counter(), session.state.progress.step
        found = session.evaluate(step, 0.0, "test")
        seconds = time.perf_counter() - started
        session.emit(Evaluated(step, 0.0, found.loss, found.metrics, found.tables, "test", seconds))
        summary["test"] = found.metrics
    return summary


def what_next(run_dir: Path, tasks: Sequence[str] = ()) -> dict[str, str]:
    """What a person wants to know when a run is done."""
    shown = Path(os.path.relpath(run_dir)) if run_dir.is_relative_to(Path.cwd()) else run_dir
    typed = (
        Path(sys.argv[0]).name == "__main__.py" and sys.argv[1:2] and sys.argv[1].endswith((".yaml", ".yml"))
    )
    return {
        "model": str(shown / "final"),
        "report": str(shown / "report.html"),
        "metrics": str(shown / "metrics.jsonl"),
        "predict": f"tunesmith predict {shown} {''.join(f'--task {name} ' for name in tasks[:1])}--text '…'",
        "8 GPUs": f"tunesmith train {sys.argv[1] if typed else shown / 'recipe.yaml'} --num-processes 8 --overwrite",
    }


def best_metric(recipe: Recipe, objective: Objective) -> tuple[str, bool]:
    """What chooses the best evaluation, and whether greater is better."""
    name, greater = objective.default_metric
    asked = recipe.evaluation.metric_for_best
    if asked is not None:
        name = asked.removeprefix("eval_")
        greater = greater_is_better(name)
    if recipe.evaluation.greater_is_better is not None:
        greater = recipe.evaluation.greater_is_better
    if recipe.evaluation.metrics is not None and name not in {"loss", *recipe.evaluation.metrics}:
        raise UserError(f"evaluation.metric_for_best: {name} is not among evaluation.metrics")
    return name, greater


def write_environment(
    run_dir: Path, recipe: Recipe, base: Path, objective: Objective, facts: dict[str, Any]
) -> None:
    """recipe.yaml (resolved, complete), objective.json (the labels) and environment.json."""
    (run_dir / "objective.json").write_text(
        json.dumps(objective.state(), ensure_ascii=False), encoding="utf-8"
    )
    (run_dir / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    about = {
        "versions": versions(),
        "git_commit": git_commit(base),
        "host": host(),
        "process": {"pid": os.getpid(), "torch_threads": torch.get_num_threads()},
        "facts": facts,
    }
    text = json.dumps(about, indent=1, ensure_ascii=False, default=str)
    (run_dir / "environment.json").write_text(text + "\n", encoding="utf-8")
