"""`tunesmith check`: what would go wrong in a run of a recipe, found in seconds: everything that the run builds is
built, in its order, and the longest batch is really computed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tunesmith.commands.check_augment import augment_findings
from tunesmith.commands.check_data import data_findings
from tunesmith.commands.check_model import model_findings
from tunesmith.commands.findings import Finding, attempt, error, fine, from_exception, warning
from tunesmith.data.formats import examples
from tunesmith.data.prepare import SPLITS, Dataset, prepare
from tunesmith.ending import holds_a_run
from tunesmith.engine import Engine, build_engine
from tunesmith.errors import MissingExtra, TunesmithError
from tunesmith.memory import free_memory_bytes
from tunesmith.objectives import Objective, build_objective
from tunesmith.objectives.sft import SFTObjective
from tunesmith.precision import choose
from tunesmith.quiet import quiet_libraries
from tunesmith.recipe import Recipe
from tunesmith.recipe.parallel import Single
from tunesmith.recipe.paths import resolve_paths
from tunesmith.tokenizer import tokenizer_for, tokenizer_hash
from tunesmith.tracking.text import size


def check(recipe: Recipe, base: Path) -> Iterator[Finding]:
    """The findings, each as soon as it is known. `base` is the folder that the recipe's paths are relative to. The
    rows are encoded into the cache, where the run finds them; nothing else is written. The model is computed by
    one process, whatever the run is spread over."""
    quiet_libraries()
    resolved = attempt("recipe", lambda: resolve_paths(recipe, base))
    if isinstance(resolved, Finding):
        yield resolved
        return
    run_dir = Path(resolved.output_dir) / resolved.run_name
    yield from _output(run_dir)
    yield from _tracking(resolved)
    alone = resolved.model_copy(update={"parallel": Single(strategy="single")})
    engine = attempt("device", lambda: build_engine(alone))
    yield from _device(resolved, engine)
    prepared = attempt("tokenizer", lambda: _objective(resolved, base))
    if isinstance(prepared, Finding):
        yield prepared
        yield from _sources(resolved, base)
        return
    tokenizer, objective, notes = prepared
    yield from _tokenizer(tokenizer, objective, [*notes, *objective.notes()])
    datasets = attempt("data", lambda: _datasets(resolved, base, objective, tokenizer))
    if isinstance(datasets, Finding):
        yield datasets
        yield from (one for one in _sources(resolved, base) if one.text != datasets.text)
        yield warning(
            "model", "not looked at, for the data have an error", "repair the data, then check again"
        )
        return
    yield from data_findings(resolved, datasets, objective)
    yield from augment_findings(resolved, datasets, objective)
    if isinstance(engine, Finding):
        return
    try:
        yield from model_findings(alone, base, run_dir, engine, objective, tokenizer, datasets)
    finally:
        engine.close()


def _output(run_dir: Path) -> Iterator[Finding]:
    there = next(folder for folder in (run_dir, *run_dir.parents) if folder.exists())
    if not there.is_dir():
        yield error("output", f"{there} is a file", "set output_dir or run_name")
    elif not os.access(there, os.W_OK | os.X_OK):
        yield error("output", f"{there} is not writable", "set output_dir, or get the right to write there")
    elif holds_a_run(run_dir):
        yield warning(
            "output", f"{run_dir} holds a run", "train with --resume or --overwrite, or set run_name"
        )
    else:
        yield fine("output", f"{run_dir}, {size(shutil.disk_usage(there).free)} free")


def _tracking(recipe: Recipe) -> Iterator[Finding]:
    if recipe.tracking.wandb.mode == "disabled":
        return
    if find_spec("wandb") is None:
        yield from_exception("tracking", MissingExtra("wandb", "wandb", "tracking.wandb"))
    else:
        yield fine("tracking", f"W&B, {recipe.tracking.wandb.mode}")


def _device(recipe: Recipe, engine: Engine | Finding) -> Iterator[Finding]:
    if isinstance(engine, Finding):
        yield engine
        return
    chosen = attempt("device", lambda: choose(recipe.training.precision, engine.device))
    if isinstance(chosen, Finding):
        yield chosen
        return
    precision, why = chosen
    text = f"{engine.device}, {size(free_memory_bytes(engine.device))} of memory free, {precision} ({why})"
    slow = "slower" in why
    yield warning("device", text, "set training.precision: fp32 here") if slow else fine("device", text)
    if recipe.parallel.strategy not in ("auto", "single"):
        yield fine("device", f"strategy {recipe.parallel.strategy}; this check computes in one process")


def _objective(recipe: Recipe, base: Path) -> tuple[Any, Objective, list[str]]:
    tokenizer, notes = tokenizer_for(recipe, base)
    return tokenizer, build_objective(recipe, tokenizer), notes


def _tokenizer(tokenizer: Any, objective: Objective, notes: list[str]) -> Iterator[Finding]:
    names = ("pad", "eos", "bos")
    special = ", ".join(f"{name} {getattr(tokenizer, f'{name}_token') or 'none'}" for name in names)
    yield fine("tokenizer", f"{type(tokenizer).__name__}, {len(tokenizer):,} tokens; {special}")
    for note in notes:
        yield fine("tokenizer", note)
    if isinstance(objective, SFTObjective):
        stops = tokenizer.convert_ids_to_tokens(objective.stop_token_ids())
        shown = [*stops, *(repr(text) for text in objective.stop_strings())]
        text = f"generation stops at {', '.join(dict.fromkeys(shown))}"
        yield (
            fine("chat", text)
            if shown
            else error("chat", "nothing stops a generation", "set model.chat_template: chatml")
        )


def _datasets(recipe: Recipe, base: Path, objective: Objective, tokenizer: Any) -> dict[str, Dataset]:
    return prepare(recipe.data, base, objective, tokenizer_hash(tokenizer))


def _sources(recipe: Recipe, base: Path) -> Iterator[Finding]:
    """Each source by itself: the run stops at the first fault, a check names one per source."""
    for split in SPLITS:
        for source in getattr(recipe.data, split):
            try:
                rows = sum(1 for _ in examples(source, base))
            except TunesmithError as caught:
                yield from_exception(split, caught)
            else:
                yield fine(split, f"{source.path}: {rows:,} rows can be read")
