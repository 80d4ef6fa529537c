"""`ensemble.json`: an ensemble on disk. Plain numbers and paths; nothing is unpickled."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.commands.finished import Described, Weights, describe_run
from tunesmith.ensemble.combine import Combiner
from tunesmith.ensemble.fit import Linear
from tunesmith.ensemble.members import member_digest, undecided
from tunesmith.environment import versions
from tunesmith.errors import UserError

FILE = "ensemble.json"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Ensemble:
    """`members` with their `digests`; `lead`, the first of them, says how rows are read and which labels there are.
    `out_of_fold`: in how many folds its figure was found."""

    folder: Path
    members: tuple[Weights, ...]
    digests: tuple[str, ...]
    lead: Described
    labels: list[str]
    combiner: Combiner
    out_of_fold: int | None = None

    @property
    def cache(self) -> Path:
        return self.folder / "predictions"


def is_ensemble(folder: Path) -> bool:
    return (folder / FILE).is_file()


def write_ensemble(ensemble: Ensemble, found: Sequence[dict[str, Any]]) -> None:
    """`found`: the table that was printed. Raises UserError where the folder cannot be written."""
    stack = ensemble.combiner.stack
    about: dict[str, Any] = {
        "format": FORMAT,
        "kind": ensemble.combiner.kind,
        "method": ensemble.combiner.method,
        "labels": ensemble.labels,
        "members": [
            {
                "run": str(member.run_dir.resolve()),
                "relative": os.path.relpath(member.run_dir.resolve(), ensemble.folder.resolve()),
                "checkpoint": member.checkpoint,
                "sha256": digest,
            }
            for member, digest in zip(ensemble.members, ensemble.digests, strict=True)
        ],
        "weights": list(ensemble.combiner.weights),
        "stack": None
        if stack is None
        else {"weight": stack.weight.tolist(), "bias": stack.bias.tolist(), "strength": stack.strength},
        "out_of_fold": ensemble.out_of_fold,
        "eval": list(found),
        "versions": versions(),
    }
    partial = ensemble.folder / f".{FILE}.tmp"
    try:
        ensemble.folder.mkdir(parents=True, exist_ok=True)
        partial.write_text(
            json.dumps(about, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
        )
        partial.replace(ensemble.folder / FILE)
    except OSError as error:
        raise UserError(f"{ensemble.folder}: cannot be written: {error.strerror}") from None


def read_ensemble(folder: Path) -> Ensemble:
    """Raises UserError where the file is damaged, or a member is gone or has changed since."""
    path = folder / FILE
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise UserError(
                f"{path}: is of format {about['format']}, this version reads {FORMAT}: make it again"
            )
        members = tuple(_member(folder, one) for one in about["members"])
        digests = tuple(str(one["sha256"]) for one in about["members"])
        stack = about["stack"]
        combiner = Combiner(
            about["kind"],
            about["method"],
            tuple(float(w) for w in about["weights"]),
            None
            if stack is None
            else Linear(np.asarray(stack["weight"]), np.asarray(stack["bias"]), stack["strength"]),
        )
        labels, folds = list(about["labels"]), about["out_of_fold"]
    except FileNotFoundError:
        raise UserError(f"{folder} is not the folder of an ensemble: it has no {FILE}") from None
    except (ValueError, LookupError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged: {error!r}: make it again with tunesmith ensemble") from None
    for member, digest in zip(members, digests, strict=True):
        if member_digest(member) != digest:
            raise UserError(f"{member} is not what it was when {folder} was made: make the ensemble again")
    return Ensemble(
        folder, members, digests, undecided(describe_run(members[0].run_dir)), labels, combiner, folds
    )


def _member(folder: Path, one: dict[str, Any]) -> Weights:
    """Where it was, or where it lies as seen from the ensemble: both may have been moved together."""
    for place in (Path(one["run"]), folder / one["relative"]):
        if place.is_dir():
            return Weights(place, one["checkpoint"])
    raise UserError(f"{folder}: its member {one['run']} is gone")
