"""What a rank has when the loop may begin: everything is built here in one straight line, each where it must be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from tunesmith.assemble import Assembled, assemble
from tunesmith.compiling import compile_layers
from tunesmith.data.prepare import Dataset
from tunesmith.data.stream import Stream
from tunesmith.decisions import fit as decisions
from tunesmith.engine import Engine
from tunesmith.features import cache_features
from tunesmith.fused_head import FusedHead
from tunesmith.fusing import choose_head, fuse_loss
from tunesmith.memory import peak_memory_bytes
from tunesmith.module import TrainModule
from tunesmith.objectives import Objective, build_objective
from tunesmith.optim import Spec, describe
from tunesmith.parts import Strategies
from tunesmith.planning.groups import memory_table
from tunesmith.planning.predict import Built, predict_peak
from tunesmith.precision import Precision, round_parameters
from tunesmith.preflight.agree import Preflight
from tunesmith.recipe import Recipe
from tunesmith.recipe.parallel import Parallel
from tunesmith.startup import check_packing, probe
from tunesmith.strategies import Building, build_strategies
from tunesmith.streams import batch_facts, build_stream, count_steps
from tunesmith.tasks.prepare import flat, prepare_rows
from tunesmith.tokenizer import tokenizer_for, tokenizer_hash
from tunesmith.trainable import Plan, counts, plan_trainable
from tunesmith.trainable.facts import group_facts


@dataclass(frozen=True, slots=True)
class Data:
    """The rows, and what reads them. `notes`: on the tokenizer."""

    tokenizer: Any
    objective: Objective
    datasets: dict[str, Dataset]
    notes: list[str]


@dataclass(frozen=True, slots=True)
class Ready:
    """The model that the engine has prepared, and what trains it. `settled`: the recipe with the parallelism that the
    engine has. `facts`: of the model, its parameters and its strategies."""

    settled: Recipe
    data: Data
    built: Assembled
    stream: Stream
    total_steps: int
    strategies: Strategies
    plan: Plan
    spec: Spec
    head: FusedHead | str
    module: TrainModule
    facts: dict[str, Any]

    @property
    def notes(self) -> list[str]:
        objective = self.data.objective
        ours = [*self.data.notes, *self.built.notes, *objective.notes()]
        return [*ours, *self.plan.notes, *self.strategies.notes]


def read_data(recipe: Recipe, base: Path, engine: Engine, preflight: Preflight | None) -> Data:
    """Data before the model: the labels decide the width of its head. While one process of a machine encodes, the
    others wait on its lock, then for each other, outside any collective."""
    tokenizer, notes = tokenizer_for(recipe, base)
    objective = build_objective(recipe, tokenizer)
    datasets = prepare_rows(recipe, base, objective, tokenizer_hash(tokenizer), engine.device)
    decisions.check(recipe.evaluation, objective)
    engine.wait_for_all("data")
    if preflight is not None:
        preflight.tables(flat(datasets))
    return Data(tokenizer, objective, datasets, notes)


def prepare(
    recipe: Recipe, base: Path, data: Data, engine: Engine, precision: Precision, parallel: Parallel
) -> Ready:
    """The model, the rows in their order and the strategies; the engine has prepared them. `parallel`: as settled."""
    # an engine that shards gets a model without weights, and loads each rank's part of them when it has sharded it
    built = assemble(recipe, base, data.objective, data.tokenizer, engine.device, empty=engine.builds_empty)
    stream = build_stream(recipe, data.datasets["train"], data.objective)
    total_steps = count_steps(recipe, stream)
    strategies = build_strategies(
        Building(
            recipe,
            base,
            built,
            data.objective,
            data.tokenizer,
            data.datasets,
            stream,
            total_steps,
            engine.device,
        )
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
    head = choose_head(recipe, built.model, data.objective)
    # compiled before the engine wraps: what it hangs on the layers stays outside their graphs
    compiled = compile_layers(built.model) if recipe.training.torch_compile else 0
    module = TrainModule(
        built.model, data.objective, precision, strategies.terms, strategies.forward, strategies.own
    )
    settled = recipe.model_copy(update={"parallel": parallel})
    groups = memory_table(group_facts(module, spec), settled, engine.world_size)
    engine.rebuilt = built.rebuilt()
    engine.prepare(module, built.fill, spec)

    for part in strategies.forward:
        part.begin(engine)
    for part in strategies.steps:
        part.begin(engine, stream)
    facts = built.facts | trainable | {"groups": groups} | ({"compiled_layers": compiled} if compiled else {})
    facts |= {**strategies.facts, **stream.facts}
    return Ready(settled, data, built, stream, total_steps, strategies, plan, spec, head, module, facts)


def try_out(ready: Ready, recipe: Recipe, base: Path, engine: Engine) -> dict[str, Any]:
    """Facts of what the training will run, once: the kernels, the longest micro-batch, the predicted peak, packing."""
    stream, data = ready.stream, ready.data
    # the fused loss before the probe, which runs what the training will run
    facts: dict[str, Any] = {
        "kernels": fuse_loss(engine, stream, ready.head)
        | {recipe.optim.name: describe(ready.spec, engine.device)}
    }
    if recipe.trainable.cache_features:
        facts |= cache_features(engine, recipe, data.objective, data.datasets)
    # the probe runs before the first reduced step: it finds the parameters that the loss does not use
    facts |= probe(engine, stream)
    if engine.rank == 0:
        per_device = min(
            recipe.training.per_device_train_batch_size,
            ceil(recipe.training.global_batch_size / engine.data_size),
        )
        resident = peak_memory_bytes(engine.device) if engine.device.type == "cpu" else 0
        longest, config = facts["longest_row_tokens"], ready.built.model.config
        found = Built(config, engine.world_size, engine.device.type, per_device, longest, resident)
        facts["predicted_peak"] = _predict_peaks(ready.settled, base, found)
    if packed := [one for one in stream.each.values() if one.pack_length is not None]:
        facts["packing_difference"] = max(check_packing(one, engine) for one in packed)
    return facts | batch_facts(recipe, stream, engine.data_size)


def _predict_peaks(recipe: Recipe, base: Path, built: Built) -> dict[str, Any]:
    """The peak of the task that needs most, where there are several."""
    found = [
        predict_peak(view, base, replace(built, longest=None) if view.data.packing else built)
        for name, view in recipe.views.items()
        if not name or recipe.tasks[name].weight > 0
    ]
    return max(found, key=lambda one: one["bytes"] or 0)
