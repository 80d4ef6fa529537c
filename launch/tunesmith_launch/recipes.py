"""The recipes that come with tunesmith."""

from __future__ import annotations

from pathlib import Path

from tunesmith.errors import UserError
from tunesmith.recipe.advice import close
from tunesmith.recipe.load import shipped_recipes


def listing() -> str:
    """One line for each: its name and its first comment line."""
    found = shipped_recipes()
    if not found:
        raise UserError("no recipes came with this installation of tunesmith")
    width = max(map(len, found))
    return "\n".join(f"{name:{width}}  {_about(file)}".rstrip() for name, file in found.items())


def _about(file: Path) -> str:
    with file.open(encoding="utf-8") as lines:
        return next((line.lstrip("# ").rstrip() for line in lines if line.startswith("#")), "")


def copy(name: str, target: Path) -> Path:
    """Copies the recipe `name` to the new file `target`, or into the folder `target`; the file written. Raises
    UserError where there is no such recipe, or the file exists."""
    found = shipped_recipes()
    source = found.get(name.removesuffix(".yaml"))
    if source is None:
        guess = close(name, found)
        advice = f"did you mean {guess}?" if guess else f"there are {', '.join(found)}"
        raise UserError(f"no recipe is called {name}; {advice}")
    file = target / source.name if target.is_dir() else target
    try:
        with file.open("xb") as copied:
            copied.write(source.read_bytes())
    except FileExistsError:
        raise UserError(
            f"{file} exists already: name another file (tunesmith recipes copy {name} TARGET)"
        ) from None
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}") from None
    return file
