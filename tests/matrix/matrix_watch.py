"""What only the ranks of a run can tell: their weights as it begins and as it ends, and the logits of the trained
model. A run that is to be watched is started with `Watched()` in ranks, within `watching()` in this process."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import tunesmith.ready
import tunesmith.run
from tunesmith.commands.export import sample_batch
from tunesmith.engine import Engine
from tunesmith.run import Resume

FILE, NAMES = "watched.safetensors", "watched.json"

_fuse_loss, _export_final = tunesmith.ready.fuse_loss, tunesmith.run.export_final
_began: dict[str, Tensor] = {}
_trained: set[str] = set()


class Watched(Resume):
    """As Resume; a process that it is sent to watches its runs from then on."""

    def __reduce__(self) -> tuple[Any, tuple[bool]]:
        return _arrived, (self.resume,)


@dataclass(frozen=True)
class Seen:
    """All weights by their names in the run's model, as it began and as it ended; the names of those that were
    trained at either time; the logits of `sample_batch` at the end, from the live model."""

    began: dict[str, Tensor]
    ended: dict[str, Tensor]
    trained: set[str]
    logits: Tensor


def read(run_dir: Path) -> Seen:
    tensors = load_file(run_dir / FILE)
    began, ended = (
        {name.removeprefix(part): value for name, value in tensors.items() if name.startswith(part)}
        for part in ("began/", "ended/")
    )
    return Seen(began, ended, set(json.loads((run_dir / NAMES).read_text())), tensors["logits"])


def _whole(engine: Engine) -> dict[str, Tensor]:
    """Also what the model's files give again."""
    rebuilt, engine.rebuilt = engine.rebuilt, frozenset()
    whole = {name: value.detach().cpu().clone() for name, value in engine.whole_weights().items()}
    engine.rebuilt = rebuilt
    return whole


def _names_trained(engine: Engine) -> set[str]:
    return {
        name
        for name, p in engine.train_module.model.named_parameters(remove_duplicate=False)
        if p.requires_grad
    }


def _at_the_beginning(engine: Engine, *rest: Any) -> Any:
    global _began, _trained
    _began, _trained = _whole(engine), _names_trained(engine)
    return _fuse_loss(engine, *rest)


def _at_the_end(engine: Engine, recipe: Any, tokenizer: Any, run_dir: Path, *rest: Any) -> Any:
    ended = _whole(engine)
    engine.module.eval()
    with torch.no_grad():
        logits: Tensor = engine.forward(sample_batch(engine.train_module.objective), "logits")
    if engine.rank == 0:
        tensors = {f"began/{name}": value for name, value in _began.items()}
        tensors |= {f"ended/{name}": value for name, value in ended.items()}
        save_file(tensors | {"logits": logits.cpu().contiguous()}, run_dir / FILE)
        (run_dir / NAMES).write_text(json.dumps(sorted(_trained | _names_trained(engine))))
    return _export_final(engine, recipe, tokenizer, run_dir, *rest)


def _watch(began: Any, ended: Any) -> None:
    tunesmith.ready.fuse_loss, tunesmith.run.export_final = began, ended


@contextmanager
def watching() -> Generator[None]:
    """Runs of this process are watched."""
    _watch(_at_the_beginning, _at_the_end)
    try:
        yield
    finally:
        _watch(_fuse_loss, _export_final)


def _arrived(resume: bool) -> Watched:
    """In a rank, which has no other runs: for good."""
    _watch(_at_the_beginning, _at_the_end)
    return Watched(resume=resume)
