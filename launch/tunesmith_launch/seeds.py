"""`tunesmith train --seeds`: one run per seed, one after the other: the members of a deep ensemble (Lakshminarayanan et
al. 2017)."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.ending import STOPPED, holds_a_run, read, run_folder
from tunesmith.errors import UserError
from tunesmith.recipe.load import load_recipe

_COMBINED = {"classification", "token_classification", "question_answering"}

Train = Callable[[Sequence[str], bool], int]
"""(overrides, whether a run that is there is continued) → exit code."""


@dataclass(frozen=True, slots=True)
class Member:
    """One seed's run: what is laid over the recipe, and its folder."""

    seed: int
    overrides: tuple[str, ...]
    folder: Path


def parse_seeds(text: str) -> list[int]:
    """`5` is 0 to 4, `3,7,11` are these. Raises UserError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"--seeds {text}: write how many, as 5, or which, as 0,1,2")
    seeds = list(range(int(parts[0]))) if len(parts) == 1 else [int(part) for part in parts]
    if len(seeds) < 2:
        raise UserError(f"--seeds {text}: takes two or more; one seed is the override training.seed=N")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds {text}: names a seed twice")
    return seeds


def members(recipe: Path, overrides: Sequence[str], seeds: Sequence[int]) -> list[Member]:
    """The runs `run_name-seedN`. Raises UserError where the overrides set the seed too."""
    if any(text.partition("=")[0].strip() == "training.seed" for text in overrides):
        raise UserError("--seeds: goes without the override training.seed, which it sets for each run")
    loaded = load_recipe(recipe, overrides)
    name = loaded.recipe.run_name
    kept = [text for text in overrides if text.partition("=")[0].strip() != "run_name"]
    found: list[Member] = []
    for seed in seeds:
        own = (*kept, f"training.seed={seed}", f"run_name={name}-seed{seed}")
        every = load_recipe(recipe, own)
        found.append(Member(seed, own, run_folder(every.recipe, every.base)))
    return found


def train_seeds(
    recipe: Path, overrides: Sequence[str], seeds: Sequence[int], train: Train, *, resume: bool, replace: bool
) -> int:
    """Trains the seeds' runs, one after the other, and says how to combine them; the greatest of their exit codes. A
    run that stopped itself (4) does not keep the others from running; any other failure ends the row, to be gone on
    with by --resume, which passes over the runs that are done. Raises UserError where a folder is in use, before any
    run begins."""
    every = members(recipe, overrides, seeds)
    if not (resume or replace):
        for member in every:
            if holds_a_run(member.folder):
                raise UserError(
                    f"{member.folder} holds a run: continue the seeds with --resume, replace them with --overwrite, "
                    "or set run_name"
                )
    codes: list[int] = []
    for number, member in enumerate(every, start=1):
        ended = read(member.folder) if resume else None
        if ended is not None and ended.code == 0 and (member.folder / "final").is_dir():
            print(f"seed {member.seed}: {member.folder} is done", file=sys.stderr, flush=True)
            codes.append(0)
            continue
        print(f"seed {member.seed} ({number} of {len(every)}): {member.folder}", file=sys.stderr, flush=True)
        codes.append(train(member.overrides, resume))
        if codes[-1] not in (0, STOPPED):
            break
    worst = max(codes)
    if worst == 0:
        print(_next(recipe, overrides, every))
    else:
        failed = [f"seed {m.seed} ended with code {c}" for m, c in zip(every, codes, strict=False) if c]
        print(f"{'; '.join(failed)}. Go on with --resume", file=sys.stderr, flush=True)
    return worst


def _next(recipe: Path, overrides: Sequence[str], every: Sequence[Member]) -> str:
    loaded = load_recipe(recipe, overrides).recipe
    command = ["tunesmith", "ensemble"] if loaded.objective.type in _COMBINED else ["tunesmith", "average"]
    rest = [] if command[1] == "ensemble" else ["--method", "greedy"]
    folders = [str(member.folder) for member in every]
    out = every[0].folder.with_name(f"{loaded.run_name}-{'ensemble' if not rest else 'soup'}")
    what = (
        "an ensemble of them"
        if not rest
        else "their answers are texts, which no ensemble combines; a soup of them"
    )
    return f"{what}: {shlex.join([*command, *folders, *rest, '--out', str(out)])}"
