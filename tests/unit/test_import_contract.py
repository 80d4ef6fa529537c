"""Who may import whom: that import-linter's contracts (pyproject.toml) break when they are broken, and the
rules that it cannot express."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = {"tunesmith": "trainer", "tunesmith_launch": "launch", "tunesmith_kernels": "kernels"}
HEAVY = ("torch", "transformers", "datasets", "accelerate", "deepspeed", "numpy", "pyarrow", "wandb")


def modules(package: str) -> Iterator[tuple[str, Path]]:
    """The dotted name and the file of each module of `package`, which may be a subpackage."""
    root = ROOT / SOURCES[package.split(".")[0]]
    for file in sorted(root.joinpath(*package.split(".")).rglob("*.py")):
        yield ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"), file


def imported(file: Path) -> Iterator[str]:
    """The dotted names that a file imports absolutely, anywhere in it; `from a import b` is `a.b`."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def third_party(package: str) -> dict[str, str]:
    """The top-level packages that `package` imports from elsewhere, each with a file that does."""
    return {
        top: str(file.relative_to(ROOT))
        for _, file in modules(package)
        for top in (name.split(".")[0] for name in imported(file))
        if top not in SOURCES and top not in sys.stdlib_module_names
    }


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("checkout")
    shutil.copy(ROOT / "pyproject.toml", copy)
    for package, folder in SOURCES.items():
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder / package, copy / folder / package, ignore=ignored)
    return copy


@pytest.mark.parametrize(
    ("contract", "module", "line"),
    [
        ("one-way", "kernels/tunesmith_kernels/__init__.py", "import tunesmith.errors"),
        ("one-way", "trainer/tunesmith/errors.py", "import tunesmith_launch"),
        ("engines", "trainer/tunesmith/loop.py", "def f(): import accelerate"),
        ("engines", "launch/tunesmith_launch/__init__.py", "from deepspeed import zero"),
        ("quantisation", "trainer/tunesmith/model.py", "import bitsandbytes"),
        ("adapters", "trainer/tunesmith/loop.py", "import peft"),
        ("tracker", "trainer/tunesmith/loop.py", "import wandb"),
        ("loop", "trainer/tunesmith/step.py", "from peft import LoraConfig"),
        ("recipe", "trainer/tunesmith/recipe/values.py", "from tunesmith import optim"),
    ],
)
def test_a_broken_contract_fails_the_linter(checkout: Path, contract: str, module: str, line: str) -> None:
    def lint() -> subprocess.CompletedProcess[str]:
        paths = os.pathsep.join(str(checkout / folder) for folder in SOURCES.values())
        linter = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--contract", contract]
        return subprocess.run(
            linter, cwd=checkout, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
        )

    file = checkout / module
    sound = file.read_text(encoding="utf-8")
    kept = lint()
    assert kept.returncode == 0, kept.stdout + kept.stderr
    try:
        file.write_text(f"{sound}\n{line}\n", encoding="utf-8")
        broken = lint()
    finally:
        file.write_text(sound, encoding="utf-8")
    assert broken.returncode == 1
    assert "0 kept, 1 broken" in broken.stdout


def test_only_the_engines_import_fsdp() -> None:
    sharding = re.compile(r"torch\.distributed\.(fsdp|_composable)\b")
    strangers = [
        f"{module} imports {name}"
        for package in SOURCES
        for module, file in modules(package)
        for name in imported(file)
        if sharding.match(name) and not module.startswith("tunesmith.engine")
    ]
    assert strangers == []


def test_the_kernels_import_torch_and_triton_alone() -> None:
    assert third_party("tunesmith_kernels").keys() <= {"torch", "triton"}


def test_the_recipe_imports_pydantic_and_yaml_alone() -> None:
    assert third_party("tunesmith.recipe").keys() <= {"pydantic", "pydantic_core", "ruamel"}


def test_what_is_imported_is_declared() -> None:
    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", name)[0]).lower()

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    declared = {plain(name) for names in (project["dependencies"], *extras) for name in names}
    distributions = importlib.metadata.packages_distributions()
    undeclared = {
        f"{file} imports {top}"
        for package in SOURCES
        for top, file in third_party(package).items()
        if declared.isdisjoint(plain(name) for name in distributions.get(top, [top]))
    }
    assert undeclared == set()


@pytest.mark.parametrize("package", ["tunesmith_launch", "tunesmith.recipe", "tunesmith.errors"])
def test_what_runs_before_the_ranks_loads_nothing_heavy(package: str) -> None:
    names = [name for name, _ in modules(package) if not name.endswith("__main__")] or [package]
    code = f"import sys, {', '.join(names)}; print(sorted({set(HEAVY)!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
