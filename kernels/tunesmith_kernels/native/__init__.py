"""The C++ row and optimizer kernels: one shared library, built by the machine's own compiler on first use.

Plain functions with C linkage that take pointers and numbers, called through ctypes: no header of Python's or
torch's is needed, and a build takes seconds. The library is cached under a name that holds a hash of its sources,
the compiler's version, the flags and the processor's features, so that a home folder shared by different machines is
safe. `TUNESMITH_KERNELS_CACHE` names the cache's folder, `CXX` the compiler; `TUNESMITH_KERNELS_NATIVE=0` turns the
library off."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

_SOURCES = Path(__file__).parent
# no -ffast-math: it would flush subnormals to zero in the whole process, and hide non-finite numbers
_FLAGS = [
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"),
    *("-fPIC", "-shared", "-Wall", "-Wextra"),
]
_BUILD_SECONDS = 300


class Unavailable(RuntimeError):  # noqa: N818
    """There is no native library here; the message is the reason, in one line."""


@functools.cache
def _loaded() -> ctypes.CDLL | Unavailable:
    try:
        return ctypes.CDLL(str(_built()))
    except Unavailable as error:
        return error
    except OSError as error:
        return Unavailable(f"the native library does not load: {error}".replace("\n", " "))


def library() -> ctypes.CDLL:
    """The loaded library, built first where it is not cached. Raises Unavailable; the answer is remembered for the
    life of the process."""
    found = _loaded()
    if isinstance(found, Unavailable):
        raise found
    return found


def unavailable() -> str | None:
    """Why there is no native library here; None if there is one."""
    found = _loaded()
    return str(found) if isinstance(found, Unavailable) else None


def _built() -> Path:
    if os.environ.get("TUNESMITH_KERNELS_NATIVE", "1") == "0":
        raise Unavailable("TUNESMITH_KERNELS_NATIVE=0 turns the native library off")
    compiler = _compiler()
    target = _cache_folder() / f"kernels-{_key(compiler)}.so"
    if _sealed(target):
        return target
    with (target.parent / ".lock").open("w") as lock:  # the other ranks of this machine wait for one build
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _sealed(target):
            _build(compiler, target)
    return target


def _with_seal(content: bytes) -> bytes:
    """With a hash at its end, which the loader ignores: to load a library that was cut short can kill the process."""
    return content + hashlib.sha256(content).digest()


def _sealed(path: Path) -> bool:
    """Whether there is a library, and whole."""
    try:
        found = path.read_bytes()
    except FileNotFoundError:
        return False
    return found == _with_seal(found[: -hashlib.sha256().digest_size])


def _compiler() -> str:
    asked = os.environ.get("CXX")
    for name in [asked] if asked else ["g++", "c++", "clang++"]:
        if path := shutil.which(name):
            return path
    wanted = f"CXX={asked}" if asked else "g++, c++ and clang++"
    raise Unavailable(f"no C++ compiler found ({wanted})")


def _cache_folder() -> Path:
    asked = os.environ.get("TUNESMITH_KERNELS_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(asked) if asked else Path(home).expanduser() / "tunesmith" / "kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(f"{folder} is not writable")
    except (OSError, RuntimeError) as error:
        raise Unavailable(f"no folder to keep the native library in: {error}") from error
    return folder


def _key(compiler: str) -> str:
    sources = [path.name + "\n" + path.read_text(encoding="utf-8") for path in _source_files()]
    parts = [*sources, _version(compiler), *_FLAGS, platform.machine(), _processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _source_files() -> list[Path]:
    return sorted([*_SOURCES.glob("*.cpp"), *_SOURCES.glob("*.h")])


def _version(compiler: str) -> str:
    try:
        return subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, check=True, timeout=60
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"{compiler} does not run: {error}") from error


def _processor() -> str:
    """The processor's features: a library for this machine may hold instructions that another lacks."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")


def _build(compiler: str, target: Path) -> None:
    sources = [str(path) for path in _source_files() if path.suffix == ".cpp"]
    try:
        with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as folder:
            made = Path(folder) / target.name
            done = subprocess.run(
                [compiler, *_FLAGS, "-o", str(made), *sources],
                capture_output=True,
                text=True,
                check=False,
                timeout=_BUILD_SECONDS,
            )
            if done.returncode:
                said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
                raise Unavailable(f"{compiler} failed: {said.strip()}")
            made.write_bytes(_with_seal(made.read_bytes()))
            made.replace(target)
    except (OSError, subprocess.SubprocessError) as error:
        raise Unavailable(f"the native library was not built: {error}") from error
