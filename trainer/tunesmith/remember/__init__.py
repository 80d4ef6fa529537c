"""What keeps a model from losing what it could do before (`remember`)."""

from tunesmith.remember.build import build

__all__ = ["build"]
