"""A cell, run and looked at: a record of what held, or of why it is refused."""

from __future__ import annotations

import json
import re
import shutil
import traceback
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from tests.matrix.matrix_cells import ENGINE_FAMILY, METHODS, MIDDLE, RANKS, Cell, Method, cell_recipe
from tests.matrix.matrix_told import BrokenError, last_line, of_rules, reason
from tests.matrix.matrix_watch import FILE, NAMES, Seen, Watched, read, watching
from tests.numerics.rank_pool import Pools
from tunesmith.adapters.merge import merge
from tunesmith.commands.export import sample_batch
from tunesmith.commands.finished import open_run
from tunesmith.errors import TunesmithError
from tunesmith.objectives import Objective
from tunesmith.recipe import Recipe
from tunesmith.run import Resume, run
from tunesmith.tracking import metrics_file

SAME = 5e-6
"""How far the outputs of a folder, loaded by PEFT or transformers alone, may be from those of the trained model,
relative to the largest: the same sums in another order."""
SAME_LOSSES = 1e-4
"""How far the losses of ten steps on two processes may be from those on one, relative."""


@dataclass(frozen=True)
class Record:
    """`refused` is why the cell cannot work, `failed` what did not hold; where both are empty everything did. Losses
    are of the first and of the last step, on the same rows. `trained` and `frozen` count parameters, `moved` the
    trained tensors that changed out of `tensors`; `bytes` are those of what was saved. `reloaded` and `merged` are the
    largest differences of outputs, relative to the largest output; `spread` that of losses, from one process's."""

    method: str
    column: str
    refused: str = ""
    failed: str = ""
    first_loss: float = 0.0
    last_loss: float = 0.0
    trained: int = 0
    frozen: int = 0
    tensors: int = 0
    moved: int = 0
    bytes: int = 0
    reloaded: float = 0.0
    merged: float | None = None
    spread: float | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def prove(cell: Cell, workshop: Path, pools: Pools) -> Record:
    """Trains the cell, and again from its middle, and looks at what is left."""
    name = re.sub(r"\W+", "-", str(cell))
    try:
        straight = cell_recipe(cell, workshop, name)
    except ValidationError as error:
        return Record(cell.method, cell.column, refused=of_rules(error))
    resumed = straight.model_copy(update={"run_name": f"{name}-resumed"})
    runs = workshop / "runs"
    for recipe in (straight, resumed):
        shutil.rmtree(runs / recipe.run_name, ignore_errors=True)
    try:
        _train(cell, straight, workshop, pools, Watched())
    except (TunesmithError, RuntimeError, AssertionError) as error:
        if (refused := reason(error)) is None:
            return _failed(cell, error)
        return Record(cell.method, cell.column, refused=refused)
    try:
        record = _look(cell, runs / name)
        if cell.engine != "single":
            record = replace(record, spread=_spread(cell, workshop, runs / name))
        _interrupt(runs / name, runs / resumed.run_name)
        _train(cell, resumed, workshop, pools, Watched(resume=True))
        _check_resumed(runs / name, runs / resumed.run_name)
    except (BrokenError, TunesmithError, RuntimeError, AssertionError) as error:
        return _failed(cell, error)
    return record


def _failed(cell: Cell, error: BaseException) -> Record:
    if isinstance(error, BrokenError):
        return Record(cell.method, cell.column, failed=str(error))
    traceback.print_exception(error)
    return Record(cell.method, cell.column, failed=last_line(error))


def _spread(cell: Cell, workshop: Path, run_dir: Path) -> float:
    """How far the losses are from those of one process, at most."""
    name = f"{run_dir.name}-alone"
    shutil.rmtree(workshop / "runs" / name, ignore_errors=True)
    alone = cell_recipe(Cell(cell.method, ENGINE_FAMILY), workshop, name)
    run(alone, workshop, Resume())
    pairs = zip(_losses(run_dir), _losses(workshop / "runs" / name), strict=True)
    spread = max(abs(a - b) / abs(b) for a, b in pairs)
    if not spread <= SAME_LOSSES:
        raise BrokenError(f"the losses differ from those of one process by {spread:.1e}")
    return spread


def _losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in metrics_file.read(run_dir / "metrics.jsonl") if "loss" in row]


def _train(cell: Cell, recipe: Recipe, workshop: Path, pools: Pools, how: Resume) -> None:
    if cell.engine == "single":
        with watching():
            run(recipe, workshop, how)
    else:
        pools[RANKS].run(recipe, workshop, how)


def _look(cell: Cell, run_dir: Path) -> Record:
    method, seen = METHODS[cell.method], read(run_dir)
    losses = _losses(run_dir)
    if not losses[-1] < 0.99 * losses[0]:
        raise BrokenError(f"the loss does not fall: {losses[0]:.4f} to {losses[-1]:.4f}")
    moved = _check_weights(seen)
    final = run_dir / "final"
    finished = open_run(run_dir)
    objective, opened = finished.objective, finished.model
    if method.has_adapter:
        alone = _peft_alone(cell, finished.recipe, objective, final)
        _check_adapter(final, alone, seen, method)
    else:
        _check_model(final, seen)
        alone = objective.auto_class.from_pretrained(final)
    reloaded = _apart(_logits(alone, objective, seen.logits), seen.logits)
    if not reloaded <= SAME:
        raise BrokenError(f"loaded again, the outputs differ by {reloaded:.1e}")
    again = _apart(_logits(opened, objective, seen.logits), seen.logits)
    if not again <= SAME:
        raise BrokenError(f"opened by evaluate and predict, the outputs differ by {again:.1e}")
    merged = None
    if method.merges is not None:
        merged = _apart(_logits(merge(opened), objective, seen.logits), seen.logits)
        if not merged <= method.merges:
            raise BrokenError(f"merged, the outputs differ by {merged:.1e}")
    parameters = {name for name in seen.ended if name in seen.trained}
    return Record(
        cell.method,
        cell.column,
        first_loss=losses[0],
        last_loss=losses[-1],
        trained=sum(seen.ended[name].numel() for name in parameters),
        frozen=sum(value.numel() for name, value in seen.ended.items() if name not in parameters),
        tensors=len(parameters),
        moved=moved,
        bytes=sum(path.stat().st_size for path in final.glob("*.safetensors")),
        reloaded=reloaded,
        merged=merged,
    )


def _check_weights(seen: Seen) -> int:
    """What is frozen keeps its bits, and what is trained moves: the number of tensors that do."""
    if seen.began.keys() != seen.ended.keys() or not seen.trained <= seen.ended.keys():
        raise BrokenError("the model ends with other tensors than it began with")
    changed = {name for name in seen.ended if not torch.equal(seen.began[name], seen.ended[name])}
    if stray := changed - seen.trained:
        raise BrokenError(f"frozen, but changed: {', '.join(sorted(stray)[:3])}")
    if 2 * len(changed) < len(seen.trained):
        raise BrokenError(f"of {len(seen.trained)} trained tensors {len(changed)} moved")
    return len(changed)


def _check_adapter(final: Path, alone: Any, seen: Seen, method: Method) -> None:
    """The file holds what PEFT would save, and everything that was trained, with the trained values."""
    from peft import get_peft_model_state_dict

    saved = load_file(final / "adapter_model.safetensors")
    if not saved or any(value.numel() == 0 for value in saved.values()):
        raise BrokenError("the adapter's file is empty")
    if odd := saved.keys() ^ get_peft_model_state_dict(alone).keys():
        raise BrokenError(f"the adapter's file and PEFT's differ in {', '.join(sorted(odd)[:3])}")
    settings = method.trainable["adapters"][0]
    loaded = alone.state_dict()
    for name in seen.trained:
        if settings["type"] == "p_tuning" and name.startswith("prompt_encoder."):
            continue  # saved as the table that the encoder makes, which the outputs prove
        trained, value = seen.ended[name], loaded[name]
        if settings.get("init_lora_weights") in {"pissa", "olora"} and ".lora_" in name:
            # beside what the base lost at the start
            value = value[: len(trained)] if ".lora_A." in name else value[:, : trained.shape[1]]
        if not torch.equal(value, trained):
            raise BrokenError(f"the adapter's file has other values for {name} than were trained")


def _check_model(final: Path, seen: Seen) -> None:
    saved = load_file(final / "model.safetensors")
    if wrong := [name for name, value in saved.items() if not torch.equal(value, seen.ended[name])]:
        raise BrokenError(f"saved with other values than were trained: {', '.join(wrong[:3])}")
    if lacking := [name for name in seen.trained if name not in saved and not _tied(name, seen, saved)]:
        raise BrokenError(f"not saved: {', '.join(lacking[:3])}")


def _tied(name: str, seen: Seen, saved: dict[str, Tensor]) -> bool:
    return any(torch.equal(seen.ended[name], value) for value in saved.values())


def _peft_alone(cell: Cell, recipe: Recipe, objective: Objective, final: Path) -> Any:
    """The adapter as anybody loads it: a fresh base by transformers, the adapter by PEFT."""
    from peft import PeftModel

    options: dict[str, Any] = {}
    if quantization := METHODS[cell.method].quantization:
        from transformers import BitsAndBytesConfig

        heads = ["classifier"] if cell.case.model == "bert_single" else ["lm_head"]
        options = {
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=quantization == "nf4",
                load_in_8bit=quantization == "int8",
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.float32,
                llm_int8_skip_modules=heads,
            ),
            "device_map": {"": "cpu"},
        }
    labels = {"num_labels": objective.num_labels} if hasattr(objective, "num_labels") else {}
    base = objective.auto_class.from_pretrained(recipe.model.model_name_or_path, **labels, **options)
    return PeftModel.from_pretrained(base, str(final))


def _logits(model: Any, objective: Objective, like: Tensor) -> Tensor:
    """[rows, positions, classes] of `sample_batch`, without the positions of virtual tokens. In eval mode on a CPU
    bitsandbytes' own layers compute something else than in training; there is no dropout here."""
    model.train(bool(getattr(model, "is_quantized", False)))
    batch = sample_batch(objective)
    with torch.no_grad():
        logits: Tensor = objective.outputs(model, batch)["logits"].float()
    return logits[:, -like.shape[1] :] if logits.dim() == 3 else logits


def _apart(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float((found - expected).abs().max() / expected.abs().max())


def _interrupt(run_dir: Path, copy: Path) -> None:
    """A copy of the run as it stood after the checkpoint in its middle."""
    shutil.copytree(run_dir, copy)
    for path in copy.glob("checkpoint-*"):
        if int(path.name.removeprefix("checkpoint-")) > MIDDLE:
            shutil.rmtree(path)
    shutil.rmtree(copy / "final")
    for name in (FILE, NAMES):
        (copy / name).unlink()
    rows = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    kept = [json.dumps(row) for row in rows if row["step"] <= MIDDLE]
    (copy / "metrics.jsonl").write_text("\n".join(kept) + "\n")


def _check_resumed(straight: Path, resumed: Path) -> None:
    one, two = read(straight).ended, read(resumed).ended
    if different := [name for name, value in one.items() if not torch.equal(value, two[name])]:
        raise BrokenError(f"resumed, other bits than straight through: {', '.join(sorted(different)[:3])}")
    for path in (straight / "final").glob("*.safetensors"):
        if path.read_bytes() != (resumed / "final" / path.name).read_bytes():
            raise BrokenError(f"resumed, another {path.name}")
