"""What `tunesmith check` finds when it builds the model and computes with it: memory, time, disk, metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tunesmith.assemble import Assembled, assemble
from tunesmith.batch import Batch
from tunesmith.commands.check_disk import disk_finding, save_count
from tunesmith.commands.check_strategies import begin, rehearsed, strategy_findings
from tunesmith.commands.findings import Finding, attempt, error, fine, from_exception, warning
from tunesmith.data.prepare import Dataset
from tunesmith.data.stream import Stream
from tunesmith.distill.memory import teacher_sizes
from tunesmith.engine import Engine
from tunesmith.errors import TunesmithError
from tunesmith.evaluator import predict_rows
from tunesmith.fused_head import FusedHead
from tunesmith.fusing import choose_head, fuse_loss
from tunesmith.generation import evaluate_generation
from tunesmith.loss_scale import LossScale
from tunesmith.memory import free_memory_bytes, peak_memory_bytes
from tunesmith.module import TrainModule
from tunesmith.objectives import Objective
from tunesmith.optim import Spec
from tunesmith.parts import Strategies
from tunesmith.planning.optimizers import BF16_STATE_BYTES
from tunesmith.precision import choose, round_parameters
from tunesmith.recipe import Recipe
from tunesmith.recipe.advice import close
from tunesmith.run import best_metric
from tunesmith.startup import check_packing, probe
from tunesmith.step import train_step
from tunesmith.strategies import Building, build_strategies
from tunesmith.streams import build_stream, count_steps
from tunesmith.tracking.text import duration, size
from tunesmith.trainable import apply_trainable

_TIMED_STEPS = 3
_TRIED_ROWS = 8
_STATE_BYTES = {
    "adamw": 8,
    "adam": 8,
    "sgd": 4,
    "rmsprop": 8,
    "adagrad": 4,
    "adafactor": 0,
    "adamw_8bit": 2,
    "lion_8bit": 1,
}  # of the optimizer, at most, per trained parameter


def model_findings(
    recipe: Recipe,
    base: Path,
    run_dir: Path,
    engine: Engine,
    objective: Objective,
    tokenizer: Any,
    datasets: Mapping[str, Dataset],
) -> Iterator[Finding]:
    """Stops at the first error that leaves nothing to compute."""
    loaded = attempt("model", lambda: assemble(recipe, base, objective, tokenizer, engine.device))
    if isinstance(loaded, Finding):
        yield loaded
        return
    yield from _about(loaded, tokenizer)
    sizes = attempt("distill", lambda: teacher_sizes(recipe, base, objective, tokenizer, loaded.model.config))
    if isinstance(sizes, Finding):
        yield sizes
        return
    for one in sizes:
        held = f"{size(one.bytes)} in this process" if one.bytes else "not held while it trains"
        yield fine("teacher", f"{one.known.name}, {one.parameters:,} parameters, {held}")
    stream = attempt("data", lambda: build_stream(recipe, datasets["train"], objective))
    if isinstance(stream, Finding):
        yield stream
        return
    steps = count_steps(recipe, stream)
    strategies = attempt(
        "strategies",
        lambda: build_strategies(
            Building(
                rehearsed(recipe),
                base,
                loaded,
                objective,
                tokenizer,
                dict(datasets),
                stream,
                steps,
                engine.device,
            )
        ),
    )
    if isinstance(strategies, Finding):
        yield strategies
        return
    yield from strategy_findings(recipe, strategies)
    frozen = attempt("trainable", lambda: apply_trainable(loaded.model, recipe.trainable))
    if isinstance(frozen, Finding):
        yield frozen
        return
    if frozen["trainable_parameters"] < frozen["total_parameters"]:
        yield fine("trainable", f"{frozen['trainable_parameters']:,} parameters are trained")
    found = [*_positions(loaded.model, datasets), *_predicted_memory(recipe, loaded.model, engine)]
    yield from found
    if any(one.level == "error" for one in found):
        return
    head = attempt("optim", lambda: _prepare(recipe, engine, loaded, objective, strategies, stream))
    if isinstance(head, Finding):
        yield head
        return
    # as a run does it: what is measured next is the loss that will be trained
    kernels = attempt("kernels", lambda: fuse_loss(engine, stream, head))
    if isinstance(kernels, Finding):
        yield kernels
        return
    yield from (fine("kernels", f"{op}: {how}") for op, how in kernels.items())
    yield from _computed(recipe, run_dir, engine, stream, strategies, "eval" in datasets)
    if "eval" in datasets:
        yield from _metrics(recipe, engine, objective, datasets["eval"])


def _about(loaded: Assembled, tokenizer: Any) -> Iterator[Finding]:
    facts, embeddings = loaded.facts, loaded.model.get_input_embeddings()
    yield fine(
        "model", f"{facts['model_class']}, {facts['parameters']:,} parameters, {facts['attn_implementation']}"
    )
    if embeddings is not None:
        yield fine("model", f"{embeddings.num_embeddings:,} embeddings for {len(tokenizer):,} tokens")
    for note in loaded.notes:
        yield fine("model", note)


def _positions(model: Any, datasets: Mapping[str, Dataset]) -> Iterator[Finding]:
    """The longest row against the positions that the model has."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    longest = max(int(dataset.table.lengths().max()) for dataset in datasets.values())
    if positions is None:
        return
    positions -= getattr(model, "virtual_positions", 0)
    rotary = bool(getattr(config, "rope_parameters", None))
    if not rotary:
        # where padding has a position of its own (RoBERTa), positions begin behind it
        tables = [
            module
            for name, module in model.named_modules()
            if name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
        ]
        positions -= sum((table.padding_idx or -1) + 1 for table in tables[:1])
    text = f"the longest row has {longest:,} tokens, the model {positions:,} positions"
    fix = f"set data.max_length: {positions}"
    if longest <= positions:
        yield fine("model", text)
    elif rotary:
        yield warning("model", f"{text}; beyond these it was not trained", fix)
    else:
        yield error("model", text, fix)


def _predicted_memory(recipe: Recipe, model: nn.Module, engine: Engine) -> Iterator[Finding]:
    """Gradients and optimizer state, and on an accelerator the weights: what is needed before any activation."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    state = BF16_STATE_BYTES.get(recipe.training.precision, _STATE_BYTES[recipe.optim.name])
    needed = trained * (Spec.of(recipe).parameter_dtype.itemsize + state)
    if engine.device.type != "cpu":
        needed += sum(p.nbytes for p in model.parameters())
    free = free_memory_bytes(engine.device)
    if needed > free:
        text = f"gradients and optimizer state need {size(needed)}, {size(free)} are free on {engine.device}"
        yield error("memory", text, "take a smaller model, or freeze a part of it", 3)


def _prepare(
    recipe: Recipe,
    engine: Engine,
    loaded: Assembled,
    objective: Objective,
    strategies: Strategies,
    stream: Stream,
) -> FusedHead | str:
    head = choose_head(recipe, loaded.model, objective)
    precision, _ = choose(recipe.training.precision, engine.device)
    module = TrainModule(
        loaded.model, objective, precision, strategies.terms, strategies.forward, strategies.own
    )
    spec = Spec.of(recipe)
    round_parameters(loaded.model, spec.parameter_dtype)
    engine.prepare(module, loaded.fill, spec)
    begin(strategies, engine, stream)
    return head


def _computed(
    recipe: Recipe, run_dir: Path, engine: Engine, stream: Stream, strategies: Strategies, has_eval: bool
) -> Iterator[Finding]:
    """Forward, backward and an update (with a learning rate of 0) are run on the longest batch, then on a few others,
    which gives the time."""
    started = time.perf_counter()
    facts = attempt("memory", lambda: probe(engine, stream))
    if isinstance(facts, Finding):
        yield facts
        return
    seconds = time.perf_counter() - started
    rows = min(stream.per_device, len(stream.dataset))
    shape = f"{rows} × {facts['longest_row_tokens']} tokens"
    # after it the optimizer has its state, too
    longest = stream.batch([[int(stream.dataset.table.lengths().argmax())]] * rows, 0, 0)
    tried = attempt("memory", lambda: _step(recipe, engine, strategies, longest))
    if isinstance(tried, Finding):
        yield tried
        return
    peak = size(peak_memory_bytes(engine.device))
    yield fine("memory", f"the longest batch ({shape}) ran, {duration(seconds)}, peak {peak} in this process")
    if unused := facts["unused_parameters"]:
        assert isinstance(unused, list)
        few = ", ".join(unused[:3])
        yield warning("model", f"the loss does not use {len(unused)} parameters ({few})", "freeze them")
    if recipe.data.packing:
        packed = attempt("packing", lambda: check_packing(stream, engine))
        yield (
            packed
            if isinstance(packed, Finding)
            else fine("packing", f"packed rows do not see each other (the logits differ by {packed:.0e})")
        )
    steps = count_steps(recipe, stream)
    total = _mean_step_seconds(recipe, engine, stream, strategies) * steps
    yield fine(
        "time",
        f"roughly {duration(total)} for {steps:,} steps on {engine.device} in one process, without evaluations and "
        "saves (extrapolated from a few batches)",
    )
    saves = save_count(recipe, steps, stream.steps_per_epoch, has_eval)
    yield disk_finding(
        recipe, run_dir, engine, saves, keeps_best=has_eval and recipe.checkpoint.final == "best"
    )


def _step(recipe: Recipe, engine: Engine, strategies: Strategies, batch: Batch) -> float:
    """Seconds of one micro-batch with an update that changes nothing."""
    started = time.perf_counter()
    result = train_step(
        engine,
        [batch],
        engine.train_module.terms,
        step=0,
        seed=recipe.training.seed,
        learning_rate=0.0,
        max_grad_norm=recipe.optim.max_grad_norm,
        scale=LossScale(engine.train_module.precision == "fp16", engine.device),
        broken=torch.zeros((), device=engine.device),
        stop=False,
        strategies=strategies,
    )
    float(result.norm)  # waits for the device
    return time.perf_counter() - started


def _mean_step_seconds(recipe: Recipe, engine: Engine, stream: Stream, strategies: Strategies) -> float:
    """Of a step's middle micro-batch, times its micro-batches, over steps spread through the first epoch."""
    last = stream.steps_per_epoch - 1
    steps = sorted({last * i // max(1, _TIMED_STEPS - 1) for i in range(_TIMED_STEPS)})
    seconds: list[float] = []
    engine.module.train()
    for step in steps:
        cells = stream.cells(step, 1)
        (cell,) = cells[len(cells) // 2]
        seconds.append(_step(recipe, engine, strategies, stream.batch(cell, 0, 0)) * len(cells))
    return sum(seconds) / len(seconds)


def _metrics(recipe: Recipe, engine: Engine, objective: Objective, dataset: Dataset) -> Iterator[Finding]:
    """A few rows are evaluated, to know that it works and which metrics there are."""
    try:
        names = _tried(recipe, engine, objective, dataset)
        best, greater = best_metric(recipe, objective)
    except TunesmithError as caught:
        yield from_exception("evaluation", caught)
        return
    settings = recipe.evaluation
    asked = dict.fromkeys(settings.metrics or (), "evaluation.metrics")
    for name, key in {**asked, best: "evaluation.metric_for_best"}.items():
        if name not in names:
            guess = close(name, names)
            fix = f"did you mean {guess}?" if guess else "use one of these"
            yield error("evaluation", f"{key}: {name} is not measured; there are {', '.join(names)}", fix)
    order = "the greatest" if greater else "the least"
    yield fine("evaluation", f"measures {', '.join(names)}; the best has {order} {best}")


def _tried(recipe: Recipe, engine: Engine, objective: Objective, dataset: Dataset) -> Sequence[str]:
    rows = range(min(_TRIED_ROWS, len(dataset)))
    per_device, seed = recipe.evaluation.per_device_eval_batch_size, recipe.training.seed
    _, _, predictions = predict_rows(engine, objective, dataset, rows, per_device, seed)
    names = ["loss", *objective.loss_metrics(1.0)]
    if predictions:
        names += objective.score(dataset.table, rows, predictions).metrics
    if len(objective.terms) > 1:
        names += [f"{term.name}_loss" for term in objective.terms]
    if recipe.evaluation.generate is not None:
        brief = recipe.evaluation.generate.model_copy(update={"max_new_tokens": 2, "limit": 2})
        names += evaluate_generation(engine, objective, dataset, brief, per_device).metrics
    return list(dict.fromkeys(names))
