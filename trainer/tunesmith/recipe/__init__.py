"""The recipe's models, a file per section. They import pydantic alone, so that the launcher stays light."""

from tunesmith.recipe.root import Recipe

__all__ = ["Recipe"]
