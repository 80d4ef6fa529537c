"""Makes transformers' Auto classes know models with a head of ours, without importing transformers: the config is
registered as soon as transformers' own table of configs is there, the models when the first such config is made."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_CONFIGS = "transformers.models.auto.configuration_auto"


class _AfterConfigs:
    """A finder of `sys.meta_path`: finds the one module that holds the table, as Python itself does, and registers
    when it has run. (No subclass of importlib.abc's, whose import alone takes 50 ms.)"""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _CONFIGS:
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return None
        _register_behind(spec.loader)
        return spec


def _register_behind(loader: Any) -> None:
    run = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        run(module)
        _register()

    loader.exec_module = exec_module


def _register() -> None:
    # by name: the statement would be an import of transformers by all that imports tunesmith
    import_module("tunesmith.heads.config").register()


def install() -> None:
    """Called by `import tunesmith`."""
    if _CONFIGS in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterConfigs) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterConfigs())  # pyright: ignore[reportArgumentType]
