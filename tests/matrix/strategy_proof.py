"""A cell of the strategies' matrix, run and looked at: a record of what held, or of why it is refused."""

from __future__ import annotations

import json
import re
import shutil
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from tests.matrix.matrix_told import BrokenError, last_line, of_rules, reason
from tests.matrix.strategy_cells import MIDDLE, RANKS, Cell, cell_recipe
from tests.numerics.rank_pool import Pools
from tunesmith.errors import TunesmithError
from tunesmith.recipe import Recipe
from tunesmith.run import Resume, run
from tunesmith.tracking import metrics_file

SAME = 1e-5
"""How far losses and gradient norms may be from those of another split of the same windows, relative."""


@dataclass(frozen=True)
class Record:
    """`refused` is why the cell cannot work, `failed` what did not hold; where both are empty everything did. `moved`:
    how far the strategy took the weights from where the plain run takes them, relative (‖a − b‖ / ‖b‖). `apart`: how
    far the losses and the gradient's norms of another split of the windows are from these, relative: 8 micro-batches
    in one process, or for an engine those of one process; None where the strategy draws by micro-batch."""

    strategy: str
    column: str
    refused: str = ""
    failed: str = ""
    moved: float = 0.0
    apart: float | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def prove(cell: Cell, workshop: Path, pools: Pools) -> Record:
    """Trains the cell, without the strategy, in another split, and again from its middle."""
    name = re.sub(r"\W+", "-", str(cell))
    try:
        straight = cell_recipe(cell, workshop, name)
    except ValidationError as error:
        return Record(cell.strategy, cell.column, refused=of_rules(error))
    for path in (workshop / "runs").glob(f"{name}*"):
        shutil.rmtree(path)
    try:
        _train(cell, straight, workshop, pools)
    except (TunesmithError, RuntimeError, AssertionError) as error:
        if (refused := reason(error)) is None:
            return _failed(cell, error)
        return Record(cell.strategy, cell.column, refused=refused)
    try:
        run_dir = workshop / "runs" / name
        moved = _moved(cell, workshop, run_dir)
        apart = None if cell.settings.random else _apart(cell, workshop, run_dir)
        _check_resumed(cell, straight, workshop, pools)
    except (BrokenError, TunesmithError, RuntimeError, AssertionError) as error:
        return _failed(cell, error)
    return Record(cell.strategy, cell.column, moved=moved, apart=apart)


def _failed(cell: Cell, error: BaseException) -> Record:
    if isinstance(error, BrokenError):
        return Record(cell.strategy, cell.column, failed=str(error))
    traceback.print_exception(error)
    return Record(cell.strategy, cell.column, failed=last_line(error))


def _train(cell: Cell, recipe: Recipe, workshop: Path, pools: Pools, how: Resume | None = None) -> None:
    if recipe.parallel.strategy == "auto":
        run(recipe, workshop, how or Resume())
    else:
        pools[RANKS].run(recipe, workshop, how or Resume())


def _weights(run_dir: Path) -> dict[str, Tensor]:
    """All tensors of final/, by their file and name."""
    final = run_dir / "final"
    return {
        f"{path.relative_to(final)}:{name}": value
        for path in sorted(final.rglob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def _moved(cell: Cell, workshop: Path, run_dir: Path) -> float:
    """From the plain run's weights. What changes nothing but what is decided after the training (thresholds) shows in
    objective.json."""
    plain = cell_recipe(cell, workshop, f"{run_dir.name}-plain", plain=True, alone=True)
    run(plain, workshop, Resume())
    without = workshop / "runs" / plain.run_name
    found, expected = _weights(run_dir), _weights(without)
    if not all(torch.isfinite(value).all() for value in found.values() if value.is_floating_point()):
        raise BrokenError("the weights are not finite")
    if found.keys() != expected.keys():
        return 1.0
    squares = sum(
        float((found[name].double() - value.double()).square().sum()) for name, value in expected.items()
    )
    moved = (squares / sum(float(value.double().square().sum()) for value in expected.values())) ** 0.5
    told = [json.loads((folder / "objective.json").read_text()) for folder in (run_dir, without)]
    if moved < 1e-7 and told[0] == told[1]:
        raise BrokenError(f"it has no effect: the weights are those of the plain run to {moved:.0e}")
    return moved


def _apart(cell: Cell, workshop: Path, run_dir: Path) -> float:
    """The engine's curve from one process's, or the curve of whole windows from that of 8 micro-batches."""
    if cell.engine == "single":
        other = cell_recipe(cell, workshop, f"{run_dir.name}-accumulated", accumulated=True)
    else:
        other = cell_recipe(cell, workshop, f"{run_dir.name}-alone", alone=True)
    run(other, workshop, Resume())
    own, others = _curve(run_dir), _curve(workshop / "runs" / other.run_name)
    if len(own) != len(others):
        raise BrokenError(f"{len(own)} steps and {len(others)}")
    pairs = [(a[key], b[key], key) for a, b in zip(own, others, strict=True) for key in ("loss", "grad_norm")]
    worst, key = max((abs(a - b) / max(abs(b), 1e-12), key) for a, b, key in pairs)
    if not worst <= SAME:
        raise BrokenError(f"{key} differs by {worst:.1e} from that of another split of the same rows")
    return worst


def _curve(run_dir: Path) -> list[dict[str, Any]]:
    return [row for row in metrics_file.read(run_dir / "metrics.jsonl") if "loss" in row]


def _check_resumed(cell: Cell, straight: Recipe, workshop: Path, pools: Pools) -> None:
    run_dir = workshop / "runs" / straight.run_name
    resumed = straight.model_copy(update={"run_name": f"{straight.run_name}-resumed"})
    copy = workshop / "runs" / resumed.run_name
    shutil.copytree(run_dir, copy)
    for path in copy.glob("checkpoint-*"):
        if int(path.name.removeprefix("checkpoint-")) > MIDDLE:
            shutil.rmtree(path)
    shutil.rmtree(copy / "final")
    rows = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    kept = [json.dumps(row) for row in rows if row["step"] <= MIDDLE]
    (copy / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    _train(cell, resumed, workshop, pools, Resume(resume=True))
    one, two = _weights(run_dir), _weights(copy)
    if different := [name for name, value in one.items() if not torch.equal(value, two[name])]:
        raise BrokenError(f"resumed, other bits than straight through: {', '.join(different[:3])}")
    first, again = ((path / "objective.json").read_text() for path in (run_dir, copy))
    if first != again:
        raise BrokenError("resumed, another objective.json")
