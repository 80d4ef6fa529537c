"""A run's whole state to and from a checkpoint: weights, optimizer, position, schedule."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel
from torch import Tensor

from tunesmith.checkpoint.pieces import Saved, file_prefix, nbytes, save_pieces
from tunesmith.checkpoint.publication import publish
from tunesmith.checkpoint.state import Progress
from tunesmith.checkpoint.store import Checkpoint, Pruned
from tunesmith.checkpoint.tensors import load_state
from tunesmith.engine import Engine
from tunesmith.engine.shards import read_shard_state, shard_state
from tunesmith.errors import UserError
from tunesmith.loss_scale import LossScale
from tunesmith.parts import EXTRAS
from tunesmith.recipe import Recipe
from tunesmith.schedules import Plateau

WEIGHTS, OPTIMIZER, TRAINER = "weights", "optimizer", "trainer"

# what may differ between the run that saved and the one that continues: none of it changes the mathematics
_FREE = {"tracking", "checkpoint", "output_dir", "run_name", "parallel"}


class Part(Protocol):
    """A strategy that has state: as large as the parameters, and small, the same on every rank (`parts.StepPart`)."""

    def sharded_state(self) -> Mapping[str, Mapping[str, Tensor]]: ...

    def load_sharded_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None: ...

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: Mapping[str, Any]) -> None: ...


@dataclass(slots=True)
class RunState:
    """The objects that hold state, as they stand."""

    engine: Engine
    progress: Progress
    scale: LossScale
    plateau: Plateau | None
    extra: dict[str, Any]  # of observers: the W&B run id
    base_files: dict[str, str] = field(default_factory=dict[str, str])
    """Digests of the files whose weights the checkpoints leave out."""
    parts: Mapping[str, Part] = field(default_factory=dict[str, Part])
    """What strategies keep, by names that are words, for they name files."""

    def save(
        self, run_dir: Path, recipe: Recipe, *, keep: int | None, protect: Collection[Path]
    ) -> tuple[Path, Pruned]:
        """Publishes `checkpoint-{step}`. What all ranks hold alike is written by rank 0 alone."""

        engine = self.engine
        parts: list[tuple[str, dict[str, Any]]] = []
        states: list[tuple[str, dict[str, Any], bool]] = [
            (WEIGHTS, engine.weights(), engine.sharded),
            (OPTIMIZER, engine.optimizer_state(), engine.shards_optimizer),
        ]
        for name, part in self.parts.items():
            if pieces := shard_state(engine.shards(), part.sharded_state()):
                states.append((_kind(name), pieces, engine.shards_optimizer))
        for kind, state, sharded in states:
            if sharded:
                parts.append((file_prefix(kind, engine.rank, engine.world_size), state))
            elif engine.rank == 0:
                parts.append((kind, state))
        if engine.rank == 0:
            parts.append((TRAINER, self._rest(recipe)))

        def write(folder: Path) -> list[Path]:
            return [path for name, state in parts for path in save_pieces(folder / name, state)]

        return publish(
            run_dir,
            self.progress.step,
            [write],
            recipe_sha256=mathematics_hash(recipe),
            meta={"base_files": dict(self.base_files)},
            group=self.engine,
            bytes_needed=sum(nbytes(state) for _, state in parts),
            keep=keep,
            protect=protect,
        )

    def _rest(self, recipe: Recipe) -> dict[str, Any]:
        return {
            "progress": self.progress.state(),
            "scale": self.scale.state(),
            "plateau": None if self.plateau is None else self.plateau.state_dict(),
            "extra": self.extra,
            "parts": {name: part.state() for name, part in self.parts.items()},
            "recipe": recipe.model_dump(mode="json"),
        }

    def load(self, checkpoint: Checkpoint, recipe: Recipe) -> None:
        """Restores everything, on every rank. Raises UserError where the recipe trains something else now."""
        refuse_other_recipe(checkpoint, recipe)
        if checkpoint.manifest.meta.get("base_files", {}) != self.base_files:
            raise UserError(
                f"--resume: the weights in {recipe.model.model_name_or_path}, which {checkpoint.path.name} leaves out, "
                "are not those that it was trained on: restore them, or start a new run under another run_name"
            )
        load_weights(self.engine, checkpoint.path)
        self.engine.load_optimizer_state(Saved(checkpoint.path, OPTIMIZER))
        state = load_state(checkpoint.path / TRAINER)
        for name, value in Progress.from_state(state["progress"]).state().items():
            setattr(self.progress, name, value)
        self.scale.load_state(state["scale"])
        if self.plateau is not None and state["plateau"] is not None:
            self.plateau.load_state_dict(state["plateau"])
        self.extra.update(state["extra"])
        load_parts(self.engine, checkpoint.path, self.parts)


def _kind(name: str) -> str:
    assert name.isidentifier(), f"{name!r} cannot name a file"
    return f"part-{name}"


def load_parts(engine: Engine, path: Path, parts: Mapping[str, Part]) -> None:
    """The state of all these strategies from a checkpoint. Raises UserError where it has none of one of them."""
    saved: dict[str, Any] = load_state(path / TRAINER).get("parts", {})
    if missing := [name for name in parts if name not in saved]:
        raise UserError(
            f"--resume: {path.name} has no state of {', '.join(missing)}: it was saved without; start a new run under "
            "another run_name"
        )
    for name, part in parts.items():
        if (pieces := saved_part(path, name)) is not None:
            part.load_sharded_state(read_shard_state(engine.shards(), pieces))
        part.load_state(saved[name])


def saved_part(path: Path, name: str) -> Saved | None:
    """What a strategy has in a checkpoint that is as large as the parameters: parameter's name as in `Shard` → key →
    tensor. None where it has nothing."""
    kind = _kind(name)
    there = any(path.glob(f"{kind}.json")) or any(path.glob(f"{kind}-*-of-*.json"))
    return Saved(path, kind) if there else None


def load_weights(engine: Engine, path: Path, *, model_alone: bool = False) -> None:
    """The weights of a checkpoint into the engine's model, in place. `model_alone`: it has nothing of what strategies
    trained beside it."""
    saved = Saved(path, WEIGHTS)
    if model_alone:
        saved.leave_out(f"{EXTRAS}.")
    engine.load_weights(saved)


def mathematics_hash(recipe: Recipe) -> str:
    """Of all that shapes the weights: where it goes, how often it is saved and what is shown does not."""
    text = recipe.model_dump_json(exclude=_FREE)
    return hashlib.sha256(text.encode()).hexdigest()


def refuse_other_recipe(checkpoint: Checkpoint, recipe: Recipe) -> None:
    if checkpoint.manifest.recipe_sha256 == mathematics_hash(recipe):
        return
    saved: dict[str, Any] = load_state(checkpoint.path / TRAINER)["recipe"]
    now = recipe.model_dump(mode="json")
    changed = [
        line
        for section in now
        if section not in _FREE and not _is_new(recipe, section, saved)
        for line in _differences(section, saved.get(section), now[section], getattr(recipe, section))
    ]
    if not changed:
        return  # saved before there were the settings that make the difference, which have their defaults
    raise UserError(
        f"--resume: the recipe is not the one that {checkpoint.path.name} was saved with: "
        + "; ".join(changed[:5])
        + ". Restore it, or start a new run under another run_name"
    )


def _is_new(model: Any, name: str, saved: Mapping[str, Any]) -> bool:
    """Whether a setting that was not there when `saved` was written stands at its default."""
    if not isinstance(model, BaseModel) or name in saved or name not in type(model).model_fields:
        return False
    known = type(model).model_fields[name]
    return not known.is_required() and getattr(model, name) == known.get_default(call_default_factory=True)


def _differences(key: str, before: Any, now: Any, model: Any) -> list[str]:
    """`model`: what `now` was made from, where it is a section of the recipe."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            line
            for name in sorted({*before, *now})
            if not _is_new(model, name, before)
            for line in _differences(
                f"{key}.{name}", before.get(name), now.get(name), getattr(model, name, None)
            )
        ]
    return [] if before == now else [f"{key} was {before!r} and is {now!r}"]
