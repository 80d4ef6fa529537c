"""What is wrong with a recipe: one line per fault, all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.errors import UserError

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """A fault that has no line yet. `path` is the way to the setting: `("data", "train", 0, "format")`."""

    path: Path
    message: str

    @property
    def key(self) -> str:
        return ".".join(map(str, self.path))


def problem_at(key: str, message: str) -> Problem:
    """`key` as users write it: `data.train.0.format`."""
    return Problem(tuple(int(part) if part.isdigit() else part for part in key.split(".")), message)


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault of a recipe. `line` is 1-based, None where the file as a whole is meant; `key` is the
    dotted setting, empty where the text is not even YAML; `override` is the command-line override at
    fault, if any."""

    line: int | None
    key: str
    message: str
    override: str | None = None

    def render(self, recipe: str) -> str:
        """`RECIPE:line: section.key: what is wrong`, or `override 'x': section.key: what is wrong`."""
        if self.override is not None:
            place = f"override '{self.override}'"
        else:
            place = recipe if self.line is None else f"{recipe}:{self.line}"
        return f"{place}: {self.key}: {self.message}" if self.key else f"{place}: {self.message}"


class RecipeError(UserError):
    """The recipe is wrong. `str()` gives one line per fault, in the order of the file, the overrides last.
    Exit code 2."""

    def __init__(self, recipe: str, faults: Sequence[Fault]) -> None:
        self.recipe = recipe
        self.faults = sorted(faults, key=lambda fault: (fault.override is not None, fault.line or 0))
        super().__init__("\n".join(fault.render(recipe) for fault in self.faults))
