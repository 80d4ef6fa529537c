"""`tunesmith doctor`: what this machine and its installation can and cannot do, each fault with its fix."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from tunesmith import __version__
from tunesmith_launch.cluster import usable_cores

_GIB = 2**30
_SECRETS = ("KEY", "TOKEN", "SECRET", "PASSWORD")
_PREFIXES = ("TUNESMITH_", "NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "HF_", "WANDB_")
_NAMES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM")


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. `fix` is what to do, empty where nothing is wrong."""

    level: Literal["ok", "warn", "fail"]
    what: str
    text: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.level:4}  {self.what:19} {self.text}{f' → {self.fix}' if self.fix else ''}"


Check = Callable[[], Iterator[Finding]]


def main() -> int:
    """Prints the findings; 3 where one is a failure, else 0."""
    failed = 0
    for check in (packages, extras, devices, memory, disk, tools, network, accelerate, environment):
        for finding in check():
            print(finding, flush=True)
            failed += finding.level == "fail"
    return 3 if failed else 0


def packages() -> Iterator[Finding]:
    yield Finding("ok", "python", f"{platform.python_version()} ({sys.executable})")
    yield Finding("ok", "tunesmith", __version__)
    for line in _requirements(extra=None):
        yield _version(line, "pip install -U tunesmith")


def extras() -> Iterator[Finding]:
    for extra in ("deepspeed", "bitsandbytes", "wandb", "triton", "quickstart"):
        for line in _requirements(extra):
            yield _version(line, f"pip install 'tunesmith[{extra}]'", optional=True)


def _requirements(extra: str | None) -> list[str]:
    """What this installation of tunesmith requires: always, or with one extra."""
    from packaging.requirements import Requirement

    found: list[str] = []
    for line in metadata.requires("tunesmith") or []:
        requirement = Requirement(line)
        always = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        with_extra = requirement.marker is not None and requirement.marker.evaluate({"extra": extra or ""})
        if always if extra is None else with_extra and not always:
            found.append(line)
    return found


def _version(line: str, command: str, *, optional: bool = False) -> Finding:
    from packaging.requirements import Requirement

    requirement = Requirement(line)
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        if optional:
            return Finding("ok", requirement.name, "not installed (optional)", command)
        return Finding("fail", requirement.name, "not installed", command)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding("fail", requirement.name, f"{version}, needs {requirement.specifier}", command)
    return Finding("ok", requirement.name, version)


def devices() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("fail", "torch", f"cannot be imported: {error}", "pip install --force-reinstall torch")
        return
    from tunesmith.engine import device_type
    from tunesmith.precision import native_bf16

    kind = device_type()
    if kind == "cpu":
        if list(Path("/dev").glob("nvidia[0-9]*")) and os.environ.get("TUNESMITH_DEVICE") != "cpu":
            built = torch.version.cuda is not None
            fix = (
                "check nvidia-smi, the driver and CUDA_VISIBLE_DEVICES"
                if built
                else "install a CUDA build of torch"
            )
            yield Finding("fail", "device", "there is an NVIDIA GPU, but torch does not see it", fix)
        yield Finding("ok", "device", f"cpu, {usable_cores()} cores, {torch.get_num_threads()} torch threads")
    elif kind != "cuda":
        text = f"{torch.accelerator.device_count()} {kind}"
        yield Finding("warn", "device", text, "untested: tunesmith is tested on CUDA and CPU")
    for index in range(torch.cuda.device_count() if kind == "cuda" else 0):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        text = f"cuda:{index} {name}, {total / _GIB:.1f} GiB, {free / _GIB:.1f} free"
        if free > 0.5 * total:
            yield Finding("ok", "device", text)
        else:
            yield Finding("warn", "device", text, "another process holds its memory: see nvidia-smi")
    device = torch.device("cpu") if kind == "cpu" else torch.device(kind, 0)
    text = "native" if native_bf16(device) else "not native: precision auto means fp32"
    yield Finding("ok", "bf16", text)


def memory() -> Iterator[Finding]:
    import psutil

    total, available = psutil.virtual_memory().total, psutil.virtual_memory().available
    limit = memory_limit()
    if limit is not None and limit < total:
        yield Finding("ok", "memory limit", f"{limit / _GIB:.1f} GiB for this container")
    text = f"{total / _GIB:.1f} GiB, {available / _GIB:.1f} available"
    if available < 2 * _GIB:
        yield Finding("warn", "memory", text, "close other programs; even a small model needs 2 GiB")
    else:
        yield Finding("ok", "memory", text)
    shared = Path("/dev/shm")
    if shared.is_dir() and (size := shutil.disk_usage(shared).total) < _GIB:
        fix = "start the container with --shm-size=8g: NCCL passes data between processes there"
        yield Finding("warn", "/dev/shm", f"{size / 2**20:.0f} MiB", fix)


def memory_limit(cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that the control group may use, None where there is no limit."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (cgroup / name).read_text(encoding="ascii").strip()
        except OSError:
            continue
        return int(text) if text.isdigit() else None
    return None


def disk() -> Iterator[Finding]:
    cache = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    for what, folder in (
        ("disk here", Path.cwd()),
        ("disk models", cache),
        ("disk temp", Path(tempfile.gettempdir())),
    ):
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(there).free
        text = f"{free / _GIB:.1f} GiB free in {folder}"
        if not os.access(there, os.W_OK):
            yield Finding(
                "fail", what, f"{folder} cannot be written", "change its permissions, or the folder"
            )
        elif free < _GIB:
            yield Finding("fail", what, text, "free space: one checkpoint of a small model needs 1 GiB")
        elif free < 20 * _GIB:
            yield Finding("warn", what, text, "a 1 B model's checkpoint is about 14 GiB")
        else:
            yield Finding("ok", what, text)


def tools() -> Iterator[Finding]:
    """DeepSpeed and triton build code at their first use."""
    building = {name for name in ("deepspeed", "triton") if _installed(name)}
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    for what, path, needed in (
        ("C++ compiler", compiler, bool(building)),
        ("ninja", shutil.which("ninja"), "deepspeed" in building),
    ):
        if path is None and needed:
            fix = "apt install g++" if what == "C++ compiler" else "pip install ninja"
            yield Finding("warn", what, f"none, and {' and '.join(sorted(building))} may build code", fix)
        else:
            yield Finding("ok", what, str(path or "none (only deepspeed and triton would use it)"))


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def network() -> Iterator[Finding]:
    """Several processes on one machine find each other by the host's name."""
    name = socket.gethostname()
    try:
        yield Finding("ok", "host name", f"{name} is {socket.gethostbyname(name)}")
    except OSError:
        fix = f"add `127.0.0.1 {name}` to /etc/hosts, or set GLOO_SOCKET_IFNAME (lo on one machine)"
        yield Finding("warn", "host name", f"{name} has no address: several processes may not start", fix)


def accelerate() -> Iterator[Finding]:
    from accelerate.commands.config import default_config_file

    file = Path(str(default_config_file))
    if file.is_file():
        text = f"{file} is ignored by tunesmith train, but not by accelerate launch -m tunesmith"
        yield Finding("warn", "accelerate", text, "nothing, or remove it")
    else:
        yield Finding("ok", "accelerate", "no default config of its own")


def environment(variables: Mapping[str, str] | None = None) -> Iterator[Finding]:
    variables = os.environ if variables is None else variables
    for name, value in sorted(variables.items()):
        if name in {"RANK", "LOCAL_RANK", "WORLD_SIZE"}:
            text = "is what a launcher tells its processes"
            yield Finding("warn", name, f"= {value}: {text}", "unset it, unless this is inside a job")
        elif name.startswith("ACCELERATE_"):
            fix = "unset it: where it contradicts a recipe, the run is refused"
            yield Finding("warn", name, f"= {value}", fix)
        elif name in _NAMES or name.startswith(_PREFIXES):
            secret = any(word in name for word in _SECRETS)
            yield Finding("ok", name, "is set" if secret else f"= {value}")
