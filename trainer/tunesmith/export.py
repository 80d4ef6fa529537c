"""`final/`: the trained model in Hugging Face's format."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from tunesmith import quantization
from tunesmith.adapters.save import save
from tunesmith.engine import Engine
from tunesmith.objectives import Objective
from tunesmith.parts import EXTRAS
from tunesmith.recipe import Recipe
from tunesmith.tasks.objective import TaskObjective
from tunesmith.tokenizer import save_tokenizer


def stop_where_taught(model: Any, objective: Objective) -> None:
    """Whoever generates from the saved folder stops at the end markers that the training taught."""
    stops = objective.stop_token_ids()
    if model.can_generate() and model.generation_config is not None and stops:
        model.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
        model.generation_config.pad_token_id = objective.tokenizer.pad_token_id


def _write(model: Any, objective: Objective, whole: dict[str, Tensor], recipe: Recipe, folder: Path) -> None:
    stop_where_taught(model, objective)
    if recipe.trainable.adapters:
        save(model, folder, whole)
    elif recipe.model.quantization is not None:
        # nobody else's loader knows which of its layers stayed as they were
        quantization.dequantized(copy.deepcopy(model)).save_pretrained(folder)
    else:
        model.save_pretrained(folder, state_dict=whole)


def export_final(engine: Engine, recipe: Recipe, tokenizer: Any, run_dir: Path) -> Path:
    """Writes the model, or its adapters, and the tokenizer to `final/` (rank 0) and returns it; of several tasks each
    to a folder of its own there. An older `final/` is replaced whole."""
    final = run_dir / "final"
    objective = engine.train_module.objective
    every = engine.whole_weights()
    whole = {name: value for name, value in every.items() if not name.startswith(f"{EXTRAS}.")}
    if engine.rank == 0:
        temporary = run_dir / ".final.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        model: Any = engine.train_module.model
        beside = model._modules.pop(EXTRAS, None)
        if isinstance(objective, TaskObjective):
            for name in objective.parts:
                with model.whole(name) as one:
                    _write(one, objective.of(name), model.state_of(name, whole), recipe, temporary / name)
                save_tokenizer(tokenizer, temporary / name)
        else:
            _write(model, objective, whole, recipe, temporary)
            save_tokenizer(tokenizer, temporary)
        if beside is not None:
            model.add_module(EXTRAS, beside)
            state = {name.removeprefix(f"{EXTRAS}."): v for name, v in every.items() if name not in whole}
            for part in engine.train_module.parts:
                part.export(state, run_dir)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    engine.barrier()
    return final
