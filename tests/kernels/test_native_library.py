"""The native library is built once and kept; where it can't be, linear_cross_entropy runs without, and says why."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tunesmith_kernels import native

# one process: the loss's gradient, the path and why
PROGRAM = """
import json, torch
from tunesmith_kernels import linear_cross_entropy
from tunesmith_kernels.linear_loss.backends import path_for
hidden = torch.ones(5, 8, requires_grad=True)
loss = linear_cross_entropy(hidden, torch.eye(8), torch.arange(5))
loss.backward()
print(json.dumps({"loss": loss.item(), "gradient": hidden.grad.tolist(),
                  "path": path_for(hidden.device, hidden.dtype)}))
"""
FLAG = "-o"  # of a build; the compiler is also asked for its version


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fresh folder for the library, and nothing loaded; afterwards as before."""
    monkeypatch.setenv("TUNESMITH_KERNELS_CACHE", str(tmp_path / "cache"))
    native._loaded.cache_clear()
    yield tmp_path / "cache"
    native._loaded.cache_clear()


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with one line for each build: by a compiler that notes how it is called."""
    log, wrapper = tmp_path / "builds", tmp_path / "cxx"
    log.touch()
    found = shutil.which(os.environ.get("CXX", "g++"))
    assert found, "these tests want a C++ compiler"
    wrapper.write_text(
        f'#!/bin/sh\ncase " $* " in *" {FLAG} "*) echo built >> {log};; esac\nexec {found} "$@"\n',
        encoding="utf-8",
    )
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", str(wrapper))
    return log


@pytest.fixture
def little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources that are compiled in no time."""
    folder = tmp_path / "little"
    folder.mkdir()
    (folder / "little.cpp").write_text('extern "C" int little() { return 7; }\n', encoding="utf-8")
    monkeypatch.setattr(native, "_SOURCES", folder)


def _count(builds: Path) -> int:
    return len(builds.read_text(encoding="utf-8").splitlines())


def _run(**environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _answer(process: subprocess.Popen[str]) -> dict[str, object]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out)


@pytest.mark.usefixtures("little")
def test_built_once_then_loaded(cache: Path, builds: Path) -> None:
    assert native.library().little() == 7
    native.library()
    native._loaded.cache_clear()
    assert native.library().little() == 7
    assert native.unavailable() is None
    assert _count(builds) == 1
    (made,) = cache.glob("*.so")
    assert sorted(path.name for path in cache.iterdir()) == [".lock", made.name]
    assert cache.stat().st_mode & 0o077 == 0, "others of the machine could write what we load"


def test_processes_that_start_together_build_once(cache: Path, builds: Path) -> None:
    together = [_run(), _run()]
    answers = [_answer(process) for process in together]
    assert [answer["path"][0] for answer in answers] == ["cpu", "cpu"]
    assert answers[0] == answers[1]
    assert _count(builds) == 1
    assert len(list(cache.glob("*.so"))) == 1


@pytest.mark.usefixtures("little")
@pytest.mark.parametrize("left", ["nothing", "half", "one byte less", "a flipped bit"])
def test_a_damaged_library_is_built_again(left: str, cache: Path, builds: Path) -> None:
    native.library()
    (made,) = cache.glob("*.so")
    whole = made.read_bytes()
    flipped = whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:]
    parts = {
        "nothing": b"",
        "half": whole[: len(whole) // 2],
        "one byte less": whole[:-1],
        "a flipped bit": flipped,
    }
    damaged = made.with_suffix(".damaged")
    damaged.write_bytes(parts[left])
    damaged.replace(made)  # the loaded one keeps its own file
    native._loaded.cache_clear()
    assert native.unavailable() is None
    assert native.library().little() == 7
    assert _count(builds) == 2


def _cache_is_a_file(folder: Path) -> dict[str, str]:
    (folder / "file").touch()
    return {"TUNESMITH_KERNELS_CACHE": str(folder / "file")}


def _broken_compiler(folder: Path) -> dict[str, str]:
    """Says its version, and fails at the work."""
    script = folder / "cxx"
    script.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "x.cpp:1: error: no" >&2\nexit 1\n', encoding="utf-8"
    )
    script.chmod(0o755)
    return {"CXX": str(script)}


WITHOUT = {
    "a compiler that always fails": (lambda _: {"CXX": "/bin/false"}, "/bin/false does not run"),
    "a compiler that fails at the work": (_broken_compiler, "failed: x.cpp:1: error: no"),
    "no such compiler": (lambda _: {"CXX": "no-such-c++"}, "no C++ compiler found (CXX=no-such-c++)"),
    "no compiler": (
        lambda folder: {"PATH": str(folder), "CXX": ""},
        "no C++ compiler found (g++, c++ and clang++)",
    ),
    "turned off": (lambda _: {"TUNESMITH_KERNELS_NATIVE": "0"}, "TUNESMITH_KERNELS_NATIVE=0 turns"),
    "no folder": (_cache_is_a_file, "no folder to keep the native library in"),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_the_reason_is_named(name: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment, reason = WITHOUT[name]
    for variable, value in environment(tmp_path).items():
        monkeypatch.setenv(variable, value)
    found = native.unavailable()
    assert found is not None
    assert reason in found
    assert "\n" not in found
    with pytest.raises(native.Unavailable):
        native.library()
    assert not list(cache.glob("*.so"))
    assert not list(cache.glob(".build-*"))


@pytest.mark.parametrize("name", ["a compiler that always fails", "no compiler", "turned off", "no folder"])
def test_without_the_library(name: str, tmp_path: Path) -> None:
    """A process that can't have it trains all the same, by torch's operators, and the reason can be read."""
    environment, reason = WITHOUT[name]
    cache = tmp_path / "cache"
    answer = _answer(_run(**{"TUNESMITH_KERNELS_CACHE": str(cache), **environment(tmp_path)}))
    path, why = answer["path"]
    assert path == "torch"
    assert reason in why
    assert "\n" not in why
    assert answer["loss"] == pytest.approx(5 * 2.0794415)
    assert answer["gradient"][0] == pytest.approx([1 / 8 - 1, *[1 / 8] * 7])
    assert not list(cache.glob("*.so"))
    assert not list(cache.glob(".build-*"))


def test_the_name_depends_on_all_that_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = native._compiler()
    names = {native._key(compiler)}
    assert native._key(compiler) in names

    copy = shutil.copytree(
        native._SOURCES, tmp_path / "sources", ignore=shutil.ignore_patterns("__pycache__")
    )
    monkeypatch.setattr(native, "_SOURCES", copy)
    assert native._key(compiler) in names, "where the sources lie is no matter"
    for source in native._source_files():
        source.write_text(source.read_text(encoding="utf-8") + "// changed\n", encoding="utf-8")
        names.add(native._key(compiler))
    assert len(names) == 1 + len(native._source_files())

    monkeypatch.setattr(native, "_FLAGS", [*native._FLAGS, "-g"])
    names.add(native._key(compiler))
    monkeypatch.setattr(native, "_processor", lambda: "flags: fewer")
    names.add(native._key(compiler))
    monkeypatch.setattr(native, "_version", lambda _: "another version")
    names.add(native._key(compiler))
    assert len(names) == 4 + len(native._source_files())
