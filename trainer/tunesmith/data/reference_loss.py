"""The loss of every training row under a finished run, for `data.curriculum: {by: loss}`: computed once, by a process
of its own (the ranks of a run have an engine already), and kept beside the prepared data."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunesmith.batch import Batch
from tunesmith.data.order import Salt
from tunesmith.data.prepare import Dataset, cache_root
from tunesmith.data.table import Table
from tunesmith.errors import UserError
from tunesmith.objectives import Objective
from tunesmith.preflight.content import digest_file
from tunesmith.recipe.data import Data
from tunesmith.tracking.progress import track

_TOKENS = 4096  # of one forward, padding included: logits of a vocabulary of 128k are 2 GiB then
_KEY = "data.curriculum.reference"
_RANKS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE",
          "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # fmt: skip


def reference_losses(
    run_dir: Path, data: Data, dataset: Dataset, objective: Objective
) -> NDArray[np.float64]:
    """fp64 [rows of the table]: Σ over the objective's terms of weight × (sum / units of the row). Raises UserError
    for a folder that holds no finished run, or one of another objective, other labels or another tokenizer."""
    _check(run_dir, objective)
    path = cache_root(data) / f"losses-{_digest(run_dir, dataset.table)}.npy"
    with filelock.FileLock(f"{path}.lock"):
        if not path.is_file():
            environment = {
                name: value
                for name, value in os.environ.items()
                if name not in _RANKS and not name.startswith(("TORCHELASTIC_", "ACCELERATE_"))
            }
            command = [sys.executable, "-m", __name__, str(run_dir), str(dataset.table.folder), str(path)]
            done = subprocess.run(command, env=environment, check=False)
            if done.returncode:
                raise UserError(f"{_KEY}: the losses of {run_dir} could not be computed (see above)")
    return np.load(path)


def _check(run_dir: Path, objective: Objective) -> None:
    from tunesmith.commands.finished import describe_run, weights_folder  # which reads data, as we do
    from tunesmith.tokenizer import tokenizer_hash

    try:
        described = describe_run(run_dir)
        weights_folder(run_dir)
    except UserError as error:
        raise UserError(f"{_KEY}: {error}") from None
    if type(described.objective) is not type(objective):
        raise UserError(f"{_KEY}: {run_dir} was trained with objective {described.recipe.objective.type}")
    if described.objective.state().get("labels") != objective.state().get("labels"):
        raise UserError(f"{_KEY}: {run_dir} was trained on other labels")
    if tokenizer_hash(described.tokenizer) != tokenizer_hash(objective.tokenizer):
        raise UserError(f"{_KEY}: {run_dir} has another tokenizer")


def _digest(run_dir: Path, table: Table) -> str:
    files = sorted((run_dir / "final").glob("*.safetensors"))
    about = [table.folder.name, *(digest_file(file) for file in files)]
    return hashlib.sha256("\n".join(about).encode()).hexdigest()[:24]


def row_losses(module: Any, table: Table, device: torch.device) -> NDArray[np.float64]:
    """fp64 [rows]; `module`: a TrainModule in evaluation mode, on `device`."""
    losses = np.full(len(table), np.nan)
    objective: Objective = module.objective
    cells = list(_cells(table.lengths()))
    with torch.no_grad():
        for cell in track(cells, "losses of the curriculum's reference", len(cells)):
            rows = [objective.draw(table.row(row), (0, 0, row, Salt.CURRICULUM)) for row in cell]
            batch = objective.collate(rows, cell).to(device)
            outputs = objective.outputs(module.model, batch)
            for i, row in enumerate(cell):
                losses[row] = _row_loss(objective, outputs, batch, i)
    return losses


def _cells(lengths: NDArray[np.int64]) -> Iterator[list[int]]:
    """The rows, longest first, as many together as _TOKENS holds."""
    order, start = np.argsort(-lengths, kind="stable"), 0
    while start < len(order):
        rows = max(1, _TOKENS // max(1, int(lengths[order[start]])))
        yield order[start : start + rows].tolist()
        start += rows


def _row_loss(objective: Objective, outputs: Any, batch: Batch, i: int) -> float:
    count = len(batch.rows)

    def part(values: dict[str, Any]) -> dict[str, Any]:
        return {
            name: value[i : i + 1]
            for name, value in values.items()
            if isinstance(value, Tensor) and value.ndim and len(value) == count
        }

    one = replace(batch, inputs=part(batch.inputs), targets=part(batch.targets), rows=batch.rows[i : i + 1])
    found, unit = part(dict(outputs)), torch.ones((), device=next(iter(one.inputs.values())).device)
    return sum(
        term.weight * float(term(found, one, unit)) / max(1, term.units(one)) for term in objective.terms
    )


def main(run_dir: str, table: str, out: str) -> None:
    from tunesmith.commands.finished import open_run
    from tunesmith.errors import TunesmithError

    try:
        run = open_run(Path(run_dir))
        losses = row_losses(run.engine.train_module, Table(Path(table)), run.engine.device)
    except TunesmithError as error:
        sys.exit(str(error))
    temporary = Path(f"{out}.tmp.npy")
    np.save(temporary, losses)
    temporary.replace(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
