"""How much each weight counts for what the model could do before (EWC's Fisher information): computed once by one
process of a machine, kept on disk, and read by every rank for its own shards."""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tunesmith import __version__
from tunesmith.assemble import assemble
from tunesmith.commands.finished import describe_run, open_model
from tunesmith.data.adhoc import encode_examples
from tunesmith.data.formats import examples
from tunesmith.data.order import shuffled
from tunesmith.data.prepare import cache_root, prepare
from tunesmith.data.rows import content_hash
from tunesmith.data.table import Table
from tunesmith.errors import UserError
from tunesmith.objectives import Objective
from tunesmith.preflight.content import weights_digests
from tunesmith.recipe.remember import EWC, Remember
from tunesmith.remember.fisher import fisher
from tunesmith.tokenizer import tokenizer_hash
from tunesmith.tracking.progress import track
from tunesmith.unpartitioned import unpartitioned

if TYPE_CHECKING:
    from tunesmith.strategies import Building

_KEY = "remember.ewc"


@dataclass(frozen=True, slots=True)
class Importance:
    """F by parameter name relative to the backbone, in a file; `rows`: by how many it was found."""

    file: Path
    names: frozenset[str]
    rows: int

    def of(self, name: str) -> Tensor:
        """The whole tensor: fp32, on the CPU."""
        with safe_open(self.file, framework="pt") as stored:
            return stored.get_tensor(name)


def backbone_names(model: nn.Module) -> dict[str, str]:
    """The names of the backbone's parameters in `model` → relative to the backbone, by which two models with other
    heads know each other's."""
    base: nn.Module = getattr(model, "base_model", model)
    within = {id(p): name for name, p in base.named_parameters()}
    return {name: within[id(p)] for name, p in model.named_parameters() if id(p) in within}


def importance(building: Building, settings: EWC, remember: Remember) -> Importance:
    """Computes what is not on disk yet. Raises UserError where there is nothing to compute it from."""
    root = cache_root(building.recipe.data)
    with tempfile.TemporaryDirectory(prefix="tunesmith-") as scratch:
        source = (
            _of_run(Path(remember.run), settings) if remember.run else _of_data(building, settings, scratch)
        )
        about = {
            **source.about,
            "settings": settings.model_dump(include={"rows", "labels"}),
            "drawn": remember.seed,
            "v": __version__,
        }
        digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:24]
        file = root / f"fisher-{digest}.safetensors"
        with filelock.FileLock(f"{file}.lock"):
            if not file.is_file():
                with unpartitioned():
                    _write(file, source, settings, remember.seed, building.device)
    with safe_open(file, framework="pt") as stored:
        rows = int((stored.metadata() or {})["rows"])
        return Importance(file, frozenset(stored.keys()), rows)


@dataclass(frozen=True, slots=True)
class _Source:
    """`about`: all that decides F. `model`: makes it, when it is needed."""

    about: dict[str, Any]
    objective: Objective
    table: Table
    model: Any


def _of_run(run_dir: Path, settings: EWC) -> _Source:
    described = describe_run(run_dir)
    table = prepare(described.recipe.data, run_dir, described.objective, tokenizer_hash(described.tokenizer))[
        "train"
    ].table
    final = described.recipe.model_copy(
        update={
            "model": described.recipe.model.model_copy(update={"model_name_or_path": str(run_dir / "final")})
        }
    )
    about = {"weights": weights_digests(final, run_dir), "rows": table.folder.name}
    return _Source(about, described.objective, table, lambda device: open_model(described, device).model)


def _of_data(building: Building, settings: EWC, scratch: str) -> _Source:
    if settings.data is None:
        raise UserError(f"{_KEY}: needs old rows: set remember.run (a finished run) or {_KEY}.data")
    recipe, base, objective = building.recipe, building.base, building.objective
    given = (example for source in settings.data for example in examples(source, base))
    encoding = encode_examples(given, objective, Path(scratch) / "rows", "old")
    if len(encoding.dataset) == 0:
        raise UserError(f"{_KEY}.data: no row of it can be used: {encoding.reasons}")
    about = {
        "weights": weights_digests(recipe, base),
        "rows": [content_hash(source, base) for source in settings.data],
        "objective": objective.fingerprint,
        "seed": recipe.training.seed,  # of weights that are drawn
    }

    def model(device: torch.device) -> nn.Module:
        return assemble(recipe, base, objective, building.tokenizer, device).model

    return _Source(about, objective, encoding.dataset.table, model)


def _write(file: Path, source: _Source, settings: EWC, seed: int, device: torch.device) -> None:
    every = torch.arange(len(source.table)).numpy()
    rows = [int(row) for row in shuffled(every, seed, 0)[: settings.rows]]
    model: nn.Module = source.model(device)
    shown = track(iter(rows), "Fisher information of old rows")
    found = fisher(model, source.objective, source.table, shown, settings.labels, seed, device)
    names = backbone_names(model)
    kept = {names[name]: value.cpu().contiguous() for name, value in found.items() if name in names}
    part = file.with_suffix(".part")
    save_file(kept, part, {"rows": str(len(rows))})
    part.replace(file)
