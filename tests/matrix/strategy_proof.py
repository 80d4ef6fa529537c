"""A cell of the strategies' matrix, run and looked at: a record of what held, or of why it is refused."""

from __future__ import annotations

import json
import math
import shutil
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.matrix.matrix_told import BrokenError, last_line, reason
from tests.matrix.strategy_cells import MIDDLE, RANKS, SPLIT, Cell, RefusedError, cell_recipe, plain_recipe
from tests.numerics.rank_pool import Pools
from tunesmith.recipe import Recipe
from tunesmith.run import Resume, run
from tunesmith.tracking import metrics_file

SAME = 1e-5
"""How far losses, norms and weights may be from those of another split of the same windows, relative."""
_DIGITS = 1e-6  # weights of last digits alone: new biases of spans, whose gradient is zero


@dataclass(frozen=True)
class Record:
    """`refused` is why the cell cannot work, `failed` what did not hold; where both are empty everything did. `moved`:
    how far the strategy took the weights from where the plain run takes them, relative (‖a − b‖ / ‖b‖). `apart`: how
    far losses, norms of the gradient and weights of another split of the windows are from these, relative: 8
    micro-batches in one process, or for an engine those of one process; None where the strategy draws by
    micro-batch."""

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
    runs = workshop / "runs"
    run_dir = runs / cell.run_name
    for path in (run_dir, runs / f"{cell.run_name}-split", runs / f"{cell.run_name}-resumed"):
        shutil.rmtree(path, ignore_errors=True)
    try:
        straight = _trained(cell, workshop, pools)
    except RefusedError as refused:
        return Record(cell.strategy, cell.column, refused=_without(workshop, str(refused)))
    except Exception as error:  # noqa: BLE001 — whatever it is, the other cells are run
        if (refused := reason(error)) is None:
            return _failed(cell, workshop, error)
        return Record(cell.strategy, cell.column, refused=_without(workshop, refused))
    try:
        moved = _moved(cell, workshop, run_dir)
        apart = None if cell.settings.random else _apart(cell, workshop, run_dir)
        _check_resumed(straight, workshop, pools)
    except Exception as error:  # noqa: BLE001
        return _failed(cell, workshop, error)
    finally:
        for path in [*run_dir.glob("checkpoint-*"), *runs.glob(f"{cell.run_name}-split"),
                     *runs.glob(f"{cell.run_name}-resumed")]:  # fmt: skip
            shutil.rmtree(path)
    return Record(cell.strategy, cell.column, moved=moved, apart=apart)


def _without(workshop: Path, text: str) -> str:
    """The text as it would be in any folder."""
    return text.replace(f"{workshop}/", "")


def _failed(cell: Cell, workshop: Path, error: BaseException) -> Record:
    if isinstance(error, BrokenError):
        return Record(cell.strategy, cell.column, failed=str(error))
    traceback.print_exception(error)
    return Record(cell.strategy, cell.column, failed=_without(workshop, last_line(error)))


def _trained(cell: Cell, workshop: Path, pools: Pools) -> Recipe:
    made = cell_recipe(cell, workshop)
    _train(made, workshop, pools, Resume())
    return made


def _train(recipe: Recipe, workshop: Path, pools: Pools, how: Resume) -> None:
    if recipe.parallel.strategy == "auto":
        run(recipe, workshop, how)
    else:
        pools[RANKS].run(recipe, workshop, how)


def _once(recipe: Recipe, workshop: Path) -> Path:
    """The folder of a run in one process that several cells are compared with."""
    folder = workshop / "runs" / recipe.run_name
    if not (folder / "final").is_dir():
        run(recipe, workshop, Resume(overwrite=True))
        for path in folder.glob("checkpoint-*"):
            shutil.rmtree(path)
    return folder


def _weights(run_dir: Path) -> dict[str, Tensor]:
    """All tensors of final/, by their file and name."""
    final = run_dir / "final"
    return {
        f"{path.relative_to(final)}:{name}": value
        for path in sorted(final.rglob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def _moved(cell: Cell, workshop: Path, run_dir: Path) -> float:
    """From the plain run's weights, of several tasks those of the cell's own. What changes nothing but what is decided
    after the training (thresholds) shows in objective.json."""
    plain = _once(plain_recipe(cell, workshop), workshop)
    if not all(torch.isfinite(value).all() for value in _weights(run_dir).values()):
        raise BrokenError("the weights are not finite")
    final = run_dir / "final"
    own = next((final / name for name in ("own", "new") if (final / name).is_dir()), final)
    found, expected = (load_file(one / "model.safetensors") for one in (own, plain / "final"))
    moved = _distance(found, {n: v for n, v in expected.items() if n in found and found[n].shape == v.shape})
    if moved < 1e-7 and _told(run_dir) == _told(plain):
        raise BrokenError(f"it has no effect: the weights are those of the plain run to {moved:.0e}")
    return moved


def _distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    squares = sum(float((found[name].double() - v.double()).square().sum()) for name, v in expected.items())
    return (squares / sum(float(value.double().square().sum()) for value in expected.values())) ** 0.5


def _apart(cell: Cell, workshop: Path, run_dir: Path) -> float:
    """The engine's curve and weights from one process's, or those of whole windows from those of 8 micro-batches."""
    if cell.engine == "single":
        other = _once(cell_recipe(cell, workshop, SPLIT), workshop)
    else:
        other = _once(cell_recipe(cell.alone, workshop), workshop)
    own, others = _curve(run_dir), _curve(other)
    if len(own) != len(others):
        raise BrokenError(f"{len(own)} steps and {len(others)}")
    pairs = [(a[key], b[key], key) for a, b in zip(own, others, strict=True) for key in ("loss", "grad_norm")]
    worst, key = max((abs(a - b) / max(abs(b), 1e-12), key) for a, b, key in pairs)
    a, b = _weights(run_dir), _weights(other)
    tensors = [
        (_distance({"": a[name]}, {"": value}), name)
        for name, value in b.items()
        if value.abs().max() > _DIGITS
    ]
    decided = _decided_apart(*(_told(folder) for folder in (run_dir, other)))
    worst, key = max((worst, key), *tensors, (decided, "what is decided after training"))
    if not worst <= SAME:
        raise BrokenError(f"{key} differs by {worst:.1e} from that of another split of the same rows")
    return worst


def _told(run_dir: Path) -> Any:
    return json.loads((run_dir / "objective.json").read_text(encoding="utf-8"))


def _decided_apart(one: Any, other: Any) -> float:
    """The largest relative difference between the numbers of two objective.json."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) / max(abs(other), 1e-12)
    if isinstance(one, dict | list) and type(one) is type(other) and len(one) == len(other):
        keys: Any = one if isinstance(one, dict) else range(len(one))
        return max((_decided_apart(one[key], other[key]) for key in keys), default=0.0)
    return 0.0 if one == other else math.inf


def _curve(run_dir: Path) -> list[dict[str, Any]]:
    return [row for row in metrics_file.read(run_dir / "metrics.jsonl") if "loss" in row]


def _check_resumed(straight: Recipe, workshop: Path, pools: Pools) -> None:
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
    _train(resumed, workshop, pools, Resume(resume=True))
    one, two = _weights(run_dir), _weights(copy)
    if different := [name for name, value in one.items() if not torch.equal(value, two[name])]:
        raise BrokenError(f"resumed, other bits than straight through: {', '.join(different[:3])}")
    if _told(run_dir) != _told(copy):
        raise BrokenError("resumed, another objective.json")
