"""What `tunesmith average` may be asked, and what of it goes together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tunesmith.ensemble.task_vectors import MERGES
from tunesmith.errors import UserError

Method = Literal[
    "uniform", "greedy", "weighted", "wise", "linear", "ties", "dare_linear", "dare_ties", "task"
]


@dataclass(frozen=True, slots=True)
class Asked:
    """The options, None where not given. `base`: a run or a pretrained model."""

    method: Method
    weights: tuple[float, ...] | None = None
    alphas: tuple[float, ...] | None = None
    density: float | None = None
    base: str | None = None
    seed: int | None = None
    overwrite: bool = False


def weights_of(given: Sequence[str], asked: Asked) -> tuple[float, ...]:
    """One weight per member. Raises UserError for options that are missing or have no effect."""
    method, members = asked.method, len(given)
    fewest = 1 if method == "task" else 2
    if members < fewest:
        raise UserError(f"--method {method}: takes {fewest} or more, {members} given")
    _check_options(asked, members)
    if asked.weights is None:
        return (1.0,) * members if method in ("ties", "dare_ties") else (1.0 / members,) * members
    if len(asked.weights) == 1 and members > 1:
        return asked.weights * members
    if len(asked.weights) != members:
        raise UserError(f"--weights: {len(asked.weights)} weights for {members} members")
    if method in ("weighted", "linear") and abs(sum(asked.weights) - 1.0) > 1e-6:
        raise UserError(
            f"--weights: sum to {sum(asked.weights):g}; an average has weights that sum to 1 (--method task has not)"
        )
    return asked.weights


def _check_options(asked: Asked, members: int) -> None:
    method = asked.method
    takes = {
        "--weights": (asked.weights, {"weighted", *MERGES}),
        "--alpha": (asked.alphas, {"wise"}),
        "--density": (asked.density, {"ties", "dare_linear", "dare_ties"}),
        "--seed": (asked.seed, {"dare_linear", "dare_ties"}),
        "--base": (asked.base, {"task", "ties", "dare_linear", "dare_ties"}),
    }
    for option, (value, methods) in takes.items():
        if value is not None and method not in methods:
            raise UserError(f"{option}: has no effect on --method {method}")
    if method in ("weighted", "task") and asked.weights is None:
        raise UserError(f"--method {method}: needs --weights, one per member" + _of_task(method))
    if method == "wise" and (members != 2 or asked.alphas is None):
        raise UserError(
            "--method wise: takes BASE RUN and --alpha, the run's share (0.5, or 0,0.25,0.5,0.75,1)"
        )
    if method in ("ties", "dare_linear", "dare_ties"):
        if asked.density is None:
            raise UserError(f"--method {method}: needs --density, the share of entries that are kept, as 0.2")
        if not 0.0 < asked.density <= 1.0:
            raise UserError(f"--density {asked.density:g}: is a share of the entries, above 0 and at most 1")


def _of_task(method: str) -> str:
    return " or one for all: the factor on what the training added" if method == "task" else ""
