"""The wheel and the sdist: what they hold, and that the wheel works away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = {"tunesmith": "trainer", "tunesmith_launch": "launch", "tunesmith_kernels": "kernels"}


def run(*command: str | Path, cwd: Path) -> str:
    """The stdout of a command that runs in `cwd` and does not see the checkout or the user's settings."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        command, cwd=cwd, env=clean, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build_wheel(source: Path, folder: Path) -> Path:
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, "--wheel-dir", folder, source, cwd=folder)
    (wheel,) = folder.glob("tunesmith-*.whl")
    return wheel


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    (archive,) = folder.glob("tunesmith-*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel, and of ours only the dependencies: a .pth line adds
    our site-packages without the .pth files in it, so the editable install of the checkout is not seen."""
    venv = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv)
    python = venv / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index")
    run(*pip, wheel, cwd=venv)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=venv).strip()
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return python.parent


def test_the_wheel_holds_the_three_packages_their_data_and_the_recipes(wheel: Path) -> None:
    def files(folder: Path, name: str) -> set[str]:
        found = (file for file in folder.rglob("*") if file.is_file() and file.suffix != ".pyc")
        return {f"{name}/{file.relative_to(folder).as_posix()}" for file in found}

    expected = files(ROOT / "configs", "tunesmith/configs").union(
        *(files(ROOT / folder / package, package) for package, folder in SOURCES.items())
    )
    held = contents(wheel)
    assert {name for name in held if ".dist-info/" not in name} == expected
    assert any(name.endswith(".jinja") for name in held)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in held)


def test_a_wheel_from_the_sdist_is_the_same(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    assert contents(build_wheel(sdist, tmp_path)) == contents(wheel)


def test_the_sdist_holds_no_tests_and_no_tools(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        tops = {name.split("/")[1] for name in archive.getnames()}
    written = {"PKG-INFO", "pyproject.toml", ".gitignore"}
    assert tops == {"trainer", "launch", "kernels", "configs", "README.md", "LICENSE"} | written


def test_the_installed_packages_are_those_of_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = f"import {', '.join(SOURCES)}; print(*(p.__file__ for p in ({', '.join(SOURCES)})))"
    for file in run(installed / "python", "-c", code, cwd=tmp_path).split():
        assert Path(file).is_relative_to(installed.parent)


def test_the_version_is_that_of_the_package(installed: Path, tmp_path: Path) -> None:
    code = "import tunesmith, importlib.metadata as m; print(tunesmith.__version__, m.version('tunesmith'))"
    package, distribution = run(installed / "python", "-c", code, cwd=tmp_path).split()
    assert package == distribution


def test_the_shipped_recipes_are_found(installed: Path, tmp_path: Path) -> None:
    code = (
        "from importlib.resources import files\n"
        "from tunesmith.recipe.load import load_recipe, shipped_recipes\n"
        "for name, file in shipped_recipes().items():\n"
        "    assert file.is_relative_to(files('tunesmith') / 'configs'), file\n"
        "    load_recipe(file)\n"
        "    print(name)\n"
    )
    shipped = run(installed / "python", "-c", code, cwd=tmp_path).split()
    assert len(shipped) == len(list((ROOT / "configs").rglob("*.yaml"))) > 0


@pytest.mark.skipif(find_spec("tunesmith_launch.cli") is None, reason="there is no command line yet")
def test_the_command_runs(installed: Path, tmp_path: Path) -> None:
    assert "train" in run(installed / "tunesmith", "--help", cwd=tmp_path)
