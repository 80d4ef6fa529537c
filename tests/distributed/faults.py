"""Faults of a rank, put in from outside: Python that runs in every rank before each optimizer step, through a
`sitecustomize` of the test's own. Nothing in the product knows of it."""

from __future__ import annotations

from pathlib import Path

# FAULT sees `rank`, `step` (0-based) and `engine`
_SITE = """
import os, sys
if "RANK" in os.environ:
    import importlib.abc, importlib.util
    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name != "tunesmith.loop":
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            run = spec.loader.exec_module
            def exec_module(module):
                run(module)
                original = module.train_step
                def train_step(engine, *arguments, step, **options):
                    fault(int(os.environ["RANK"]), step, engine)
                    return original(engine, *arguments, step=step, **options)
                module.train_step = train_step
            spec.loader.exec_module = exec_module
            return spec
    sys.meta_path.insert(0, Finder())

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def fault(rank, step, engine):
    import ctypes, signal, time
"""


def put_in(folder: Path, fault: str) -> dict[str, str]:
    """The variables under which ranks have the fault, lines of Python; `say` writes to the job's stdout."""
    place = folder / "site"
    place.mkdir(exist_ok=True)
    lines = "".join(f"    {line}\n" for line in [*fault.splitlines(), "pass"])
    (place / "sitecustomize.py").write_text(_SITE + lines, encoding="utf-8")
    return {"PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1"}
