"""What every kind of launch needs to know of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.errors import UserError
from tunesmith.recipe.load import Loaded, load_recipe
from tunesmith_launch.cluster import check_strategy


@dataclass(frozen=True, slots=True)
class Job:
    """A recipe on `nodes` machines with `gpus_per_node` processes each; 0 GPUs: one process on the CPU of each.
    `recipe` is the path as the ranks read it, `run_name` the recipe's."""

    recipe: str
    overrides: tuple[str, ...]
    run_name: str
    nodes: int
    gpus_per_node: int

    @property
    def processes(self) -> int:
        return self.nodes * max(1, self.gpus_per_node)

    @property
    def topology(self) -> str:
        return f"{self.nodes}x{self.gpus_per_node}"

    @property
    def rank_arguments(self) -> tuple[str, ...]:
        """Of `python -m tunesmith`."""
        return (self.recipe, *self.overrides)

    @property
    def train_arguments(self) -> tuple[str, ...]:
        """Of `tunesmith train`, the same on every machine."""
        machines = ("--num-machines", str(self.nodes)) if self.nodes > 1 else ()
        return (*self.rank_arguments, "--num-processes", str(self.processes), *machines, "--restart")

    def about(self, kind: str) -> str:
        """One line of a comment."""
        return f"{self.run_name} on {self.topology}, made by tunesmith launch {kind}"


def read(recipe: Path, overrides: Sequence[str], nodes: int, gpus_per_node: int) -> tuple[Job, Loaded]:
    """The job of a sound recipe. Raises UserError where recipe and topology disagree."""
    loaded = load_recipe(recipe, overrides)
    job = Job(
        printable("RECIPE", str(recipe)), tuple(overrides), loaded.recipe.run_name, nodes, gpus_per_node
    )
    check_strategy(loaded, job.processes, "--nodes and --gpus-per-node")
    return job, loaded


def printable(option: str, value: str) -> str:
    """The value of an option, which may end up in a comment or a directive: of one line. Raises UserError."""
    if not value or not value.isprintable():
        raise UserError(f"{option}: {value!r} is empty or holds characters that cannot be printed")
    return value
