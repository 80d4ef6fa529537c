"""One rank of a run: every object is built here, in one straight line, each where it must be."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import torch

from tunesmith.assemble import assemble
from tunesmith.checkpoint.run_state import RunState
from tunesmith.checkpoint.state import Progress
from tunesmith.compiling import compile_layers
from tunesmith.data.augment.pairs import augmentation
from tunesmith.data.order import Order
from tunesmith.data.ordering import build_order, with_curriculum
from tunesmith.data.prepare import Dataset
from tunesmith.data.stream import Stream
from tunesmith.decisions import fit as decisions
from tunesmith.engine import Engine, build_engine
from tunesmith.environment import git_commit, host, versions
from tunesmith.errors import UserError
from tunesmith.export import export_final
from tunesmith.features import cache_features
from tunesmith.fusing import choose_head, fuse_loss
from tunesmith.loop import Loop
from tunesmith.loss_scale import LossScale
from tunesmith.memory import peak_memory_bytes
from tunesmith.module import TrainModule
from tunesmith.objectives import Objective, build_objective
from tunesmith.optim import Spec, describe
from tunesmith.planning.groups import memory_table
from tunesmith.planning.predict import Built, predict_peak
from tunesmith.precision import choose, round_parameters
from tunesmith.preflight.agree import Preflight, agree
from tunesmith.preflight.content import weights_digests
from tunesmith.quiet import quiet_libraries
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
from tunesmith.startup import check_packing, probe
from tunesmith.strategies import Building, build_strategies
from tunesmith.strategy import settle
from tunesmith.tasks.datasets import TaskDataset
from tunesmith.tasks.objective import TaskObjective, greater_is_better
from tunesmith.tasks.prepare import flat, join_streams, prepare_rows, task_view, window_rows
from tunesmith.tasks.runs import read_runs
from tunesmith.tokenizer import tokenizer_for, tokenizer_hash
from tunesmith.tracking import metrics_file
from tunesmith.tracking.events import Evaluated, Message, RunEnded, RunStarted
from tunesmith.tracking.tracker import Tracker
from tunesmith.trainable import counts, plan_trainable
from tunesmith.trainable.facts import group_facts


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

    # data before the model: the labels decide the width of its head; while one process of a machine encodes, the
    # others wait on its lock, then for each other, outside any collective
    tokenizer, notes = tokenizer_for(recipe, base)
    objective = build_objective(recipe, tokenizer)
    datasets = prepare_rows(recipe, base, objective, tokenizer_hash(tokenizer), engine.device)
    decisions.check(recipe.evaluation, objective)
    engine.wait_for_all("data")
    if preflight is not None:
        preflight.tables(flat(datasets))

    # an engine that shards gets a model without weights, and loads each rank's part of them when it has sharded it
    built = assemble(recipe, base, objective, tokenizer, engine.device, empty=engine.builds_empty)
    stream = build_stream(recipe, datasets["train"], objective)
    total_steps = count_steps(recipe, stream)
    strategies = build_strategies(
        Building(recipe, base, built, objective, tokenizer, datasets, stream, total_steps, engine.device)
    )
    # freezing before the optimizer, which takes only what is ever trained; moments need the number of steps
    plan = plan_trainable(
        built.model,
        recipe.trainable,
        recipe.optim.learning_rate,
        total_steps,
        stream.steps_per_epoch,
        built.lr_scale,
    )
    spec = Spec.of(recipe, plan)
    round_parameters(built.model, spec.parameter_dtype)
    trainable = counts(built.model)
    # the head is looked at before the engine hangs hooks on it
    head = choose_head(recipe, built.model, objective)
    # compiled before the engine wraps: what it hangs on the layers stays outside their graphs
    compiled = compile_layers(built.model) if recipe.training.torch_compile else 0
    module = TrainModule(
        built.model, objective, precision, strategies.terms, strategies.forward, strategies.own
    )
    settled = recipe.model_copy(update={"parallel": parallel})
    groups = memory_table(group_facts(module, spec), settled, engine.world_size)
    engine.rebuilt = built.rebuilt()
    engine.prepare(module, built.fill, spec)

    for part in strategies.forward:
        part.begin(engine)
    for part in strategies.steps:
        part.begin(engine, stream)

    # the fused loss before the probe, which runs what the training will run
    facts: dict[str, Any] = {
        "kernels": fuse_loss(engine, stream, head) | {recipe.optim.name: describe(spec, engine.device)}
    }
    if recipe.trainable.cache_features:
        facts |= cache_features(engine, recipe, objective, datasets)
    # the probe runs before the first reduced step: it finds the parameters that the loss does not use
    facts |= probe(engine, stream)
    if engine.rank == 0:
        facts["predicted_peak"] = predict_peaks(
            settled,
            base,
            Built(
                built.model.config,
                engine.world_size,
                engine.device.type,
                min(
                    recipe.training.per_device_train_batch_size,
                    ceil(recipe.training.global_batch_size / engine.data_size),
                ),
                facts["longest_row_tokens"],
                peak_memory_bytes(engine.device) if engine.device.type == "cpu" else 0,
            ),
        )
    if packed := [one for one in stream.each.values() if one.pack_length is not None]:
        facts["packing_difference"] = max(check_packing(one, engine) for one in packed)

    metric = best_metric(recipe, objective) if "eval" in datasets else None
    plateau = Plateau(recipe.schedule) if isinstance(recipe.schedule, ReduceOnPlateau) else None
    scale = LossScale(precision == "fp16", engine.device)
    files = engine.broadcast(weights_digests(recipe, base) if engine.rebuilt and engine.rank == 0 else {})
    parts = {part.name: part for part in strategies.steps}
    state = RunState(engine, Progress(), scale, plateau, {}, files, parts)
    if checkpoint is not None:
        state.load(checkpoint, recipe)
        tracker.load_state(state.extra)

    facts |= engine.facts() | {"engine_why": engine_why} | built.facts | trainable | {"groups": groups}
    facts |= {"compiled_layers": compiled} if compiled else {}
    facts |= {**strategies.facts, **stream.facts}
    facts |= {"precision": precision, "precision_why": why, "total_steps": total_steps}
    facts |= batch_facts(recipe, stream, engine.data_size)
    facts |= {"data": {name: dataset.facts for name, dataset in datasets.items()}}
    facts |= {"preflight": preflight.facts} if preflight is not None else {}
    facts |= {
        "notes": [*notes, *built.notes, *objective.notes(), *plan.notes, *strategies.notes],
        "startup_seconds": time.perf_counter() - started,
    }
    if engine.rank == 0:
        write_environment(run_dir, recipe, base, objective, facts)
    resumed = None if checkpoint is None else checkpoint.manifest.step
    tracker.on(RunStarted(recipe.run_name, total_steps, recipe.model_dump(mode="json"), facts, resumed))

    session = Session(engine, recipe, run_dir, objective, datasets, state, tracker, stop, strategies.steps)
    loop = Loop(
        engine,
        stream,
        module.terms,
        recipe,
        total_steps,
        state.progress,
        scale,
        session,
        metric,
        plateau,
        plan,
        strategies,
    )
    try:
        reason = loop.run()
        session.settle(None if metric is None else metric[0])
        final = export_final(engine, recipe, tokenizer, run_dir)
        decided = _decide(session, datasets, objective)
        summary = (
            _test(session, datasets, objective)
            | decided
            | {
                "final": str(final),
                "best_step": state.progress.best_step,
            }
        )
        summary["next"] = what_next(run_dir, list(recipe.tasks))
        # what a probe opens is a whole model of its own, on one rank; the others wait outside of any collective
        if probes := probes_of(recipe.remember):
            if engine.rank == 0:
                summary["probes"] = probe_all(probes, run_dir)
            engine.wait_for_all("probes")
        tracker.on(RunEnded("done", reason, state.progress.step, summary))
    except BaseException as error:
        tracker.on(RunEnded("stopped", str(error) or type(error).__name__, state.progress.step, {}))
        raise
    finally:
        tracker.close()


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


def predict_peaks(recipe: Recipe, base: Path, built: Built) -> dict[str, Any]:
    """The peak of the task that needs most, where there are several."""
    found = [
        predict_peak(view, base, replace(built, longest=None) if view.data.packing else built)
        for name, view in recipe.views.items()
        if not name or recipe.tasks[name].weight > 0
    ]
    return max(found, key=lambda one: one["bytes"] or 0)


def build_stream(recipe: Recipe, dataset: Dataset, objective: Objective) -> Stream:
    """The training rows in their order."""
    if isinstance(objective, TaskObjective) and isinstance(dataset, TaskDataset):
        rows = window_rows(recipe, list(dataset.parts))
        streams = {
            name: build_stream(task_view(recipe, name, rows[name]), own, objective.of(name))
            for name, own in dataset.parts.items()
        }
        return join_streams(recipe, dataset, streams, objective, count_steps)
    data, training = recipe.data, recipe.training
    drawn, facts = build_order(data, dataset, objective, training.global_batch_size, training.seed)
    order, limits = with_curriculum(drawn, data, dataset, objective, lambda: count_steps(recipe, drawn))
    pack_length = data.max_length if data.packing else None
    per_device = training.per_device_train_batch_size
    changes, collating = augmentation(data.augment, objective, dataset.table, dataset.variants)
    return Stream(dataset, order, collating, per_device, pack_length, changes, limits, facts)


def count_steps(recipe: Recipe, stream: Stream | Order) -> int:
    """`max_steps`, or the steps of the epochs (a part of an epoch rounds up to whole steps)."""
    if recipe.training.max_steps is not None:
        return recipe.training.max_steps
    epochs = recipe.training.epochs
    assert epochs is not None
    # 0.1 epochs of 30 steps are 3 steps, not the 4 that 3.0000000000000004 rounds up to
    return max(1, ceil(round(epochs * stream.steps_per_epoch, 9)))


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


def batch_facts(recipe: Recipe, stream: Stream, world_size: int) -> dict[str, Any]:
    micro_steps = [len(stream.cells(step, world_size)) for step in range(min(4, stream.steps_per_epoch))]
    return {
        "global_batch_size": recipe.training.global_batch_size,
        "gradient_accumulation_steps": max(micro_steps),
        "steps_per_epoch": stream.steps_per_epoch,
    }


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
