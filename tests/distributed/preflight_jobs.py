"""Faults between the machines of a run, each put into real processes: network namespaces for machines, ranks started
as a launcher starts them (or the launcher itself), files, mounts, limits, routes and queues really changed. What
this machine cannot have (accelerators, a wrong clock, another Python) is put into the rank's `Probe` by code that runs
in the rank before the preflight does.

tests/distributed/test_preflight_ranks.py runs a few of them, bench/preflight_faults.py all."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.distributed.nodes import Nodes
from tests.support import tiny_recipe
from tunesmith.recipe.load import dump_recipe

ROOT = Path(__file__).parents[2]
NAMES = ("nodea", "nodeb", "nodec")
LIMIT = 90.0  # seconds after which a job counts as hanging
_PORTS = itertools.count(20_000 + os.getpid() % 10_000)

# the rank of a case: its faults, then the entry as it is
DRIVER = """
import runpy, sys
from tunesmith.preflight.probe import Device, Probe
exec(sys.argv.pop(1))
sys.argv[0] = "tunesmith.preflight"
runpy.run_module("tunesmith.preflight", run_name="__main__", alter_sys=True)
"""


@dataclass(frozen=True, slots=True)
class Start:
    """One process: on which node, with which variables, options and overrides. `shell` runs before it in mounts and
    limits of its own; `patch` is Python that runs in it; `rank` is RANK (or, `cli`, the machine's)."""

    node: int
    rank: int
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    shell: str = ""
    patch: str = ""
    more: tuple[str, ...] = ()
    cli: tuple[str, ...] = ()  # options of `tunesmith check --distributed`; else the rank itself is started


@dataclass(frozen=True, slots=True)
class Case:
    """`node`, `fact` and `fix` are patterns that one line of the job's output must have, in this order. `change`
    puts faults into the folder, which holds a folder for each node and the shared `out`; `nodes` does and undoes what
    concerns nodes as a whole."""

    name: str
    starts: tuple[Start, ...]
    node: str = ""
    fact: str = ""
    fix: str = ""
    code: int = 3
    change: Callable[[Path], None] | None = None
    nodes: Callable[[Nodes], list[tuple[int, str, str]]] | None = (
        None  # (node, command, command that undoes it)
    )


@dataclass(frozen=True, slots=True)
class Result:
    """`named`: a line has node and fact; `fixed`: and the fix; `told`: seconds until that line was there; `codes` are
    those of the processes, `seconds` those until all had ended."""

    told: float | None
    seconds: float
    codes: tuple[int | None, ...]
    output: str
    line: str
    named: bool
    fixed: bool


def ranks(count: int = 2, **faults: Mapping[int, object]) -> tuple[Start, ...]:
    """A rank on each of `count` nodes; `faults` are fields of a Start by rank: `env={1: {…}}`."""
    given = [{key: values[n] for key, values in faults.items() if n in values} for n in range(count)]
    return tuple(Start(n, n, **given[n]) for n in range(count))  # type: ignore[arg-type]


def machines(count: int = 2, **options: Mapping[int, tuple[str, ...]]) -> tuple[Start, ...]:
    """`tunesmith check --distributed` on each node; `options` replace one by node: `machine_rank={1: ("0",)}`."""
    starts: list[Start] = []
    for n in range(count):
        values = {
            "num_processes": str(count),
            "num_machines": str(count),
            "machine_rank": str(n),
            "main_process_ip": "nodea",
            "main_process_port": "{port}",
        }
        values |= {key: by_node[n][0] for key, by_node in options.items() if n in by_node}
        words = [word for key, value in values.items() for word in (f"--{key.replace('_', '-')}", value)]
        starts.append(Start(n, n, cli=tuple(words)))
    return tuple(starts)


def make_folders(folder: Path) -> None:
    """A folder for each node with the same recipe and data, and `out`, which all share."""
    recipe = tiny_recipe(folder / NAMES[0])
    text = dump_recipe(recipe)
    for part in ("train.jsonl", "tokenizer", "cache"):
        text = text.replace(str(folder / NAMES[0] / part), part)
    text = text.replace(str(folder / NAMES[0] / "runs"), str(folder / "out"))
    (folder / NAMES[0] / "r.yaml").write_text(text, encoding="utf-8")
    for name in NAMES[1:]:
        shutil.copytree(folder / NAMES[0], folder / name)
    (folder / "out").mkdir()


def add_model(folder: Path, parameters: int = 1_000_000) -> None:
    """A model folder of so many fp32 parameters, of which only the headers are read."""
    for name in NAMES:
        model = folder / name / "model"
        model.mkdir()
        (model / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
        save_file({"a": torch.zeros(parameters // 1000, 1000)}, model / "model.safetensors")
        recipe = folder / name / "r.yaml"
        text = recipe.read_text(encoding="utf-8").replace(
            "model_name_or_path: null", "model_name_or_path: model"
        )
        recipe.write_text(text, encoding="utf-8")


def run_case(case: Case, nodes: Nodes) -> Result:
    """Runs the case to its end, or for LIMIT seconds."""
    with tempfile.TemporaryDirectory(prefix="preflight-") as place, ExitStack() as stack:
        folder = Path(place)
        make_folders(folder)
        if case.change is not None:
            case.change(folder)
        if case.nodes is not None:
            stack.enter_context(_changed(nodes, case.nodes(nodes)))
        port, started = next(_PORTS), time.monotonic()
        jobs: list[subprocess.Popen[str]] = []
        for number, start in enumerate(case.starts):
            with (folder / f"{number}.out").open("w", encoding="utf-8") as out:
                jobs.append(_start(nodes, folder, start, len(case.starts), port, out))
        told = _wait(jobs, case, folder, started)
        seconds = time.monotonic() - started
        codes = _end(jobs)
        output = _output(folder)
    named = [line for line in output.splitlines() if re.search(f"{case.node}.*{case.fact}", line)]
    fixed = [line for line in named if re.search(f"{case.node}.*{case.fact}.* → .*{case.fix}", line)]
    line = (fixed or named or [""])[0]
    return Result(told, seconds, codes, output, line, bool(named and case.fact), bool(fixed and case.fix))


@contextmanager
def _changed(nodes: Nodes, changes: Sequence[tuple[int, str, str]]) -> Iterator[None]:
    try:
        for number, command, _ in changes:
            nodes.run(nodes[number], ["sh", "-c", command])
        yield
    finally:
        for number, _, command in changes:
            nodes.run(nodes[number], ["sh", "-c", command])


def _start(
    nodes: Nodes, folder: Path, start: Start, count: int, port: int, out: object
) -> subprocess.Popen[str]:
    base = folder / NAMES[start.node]
    env = {
        "OMP_NUM_THREADS": "1",
        "TUNESMITH_DEVICE": "cpu",
        "GLOO_SOCKET_IFNAME": "eth0",
        "NCCL_SOCKET_IFNAME": "=eth0",
        "FOLDER": str(folder),
        "PORT": str(port),
        "PYTHON": sys.executable,
    }
    if start.cli:
        options = [word.replace("{port}", str(port)) for word in start.cli]
        command = [sys.executable, "-c", "from tunesmith_launch.cli import main; main()", "check", "r.yaml"]
        command += [*start.more, "--distributed", *options]
    else:
        env |= {"RANK": str(start.rank), "WORLD_SIZE": str(count), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        env |= {"GROUP_RANK": str(start.rank), "MASTER_ADDR": "nodea", "MASTER_PORT": str(port)}
        command = [sys.executable, "-c", DRIVER, start.patch, "r.yaml", *start.more]
    env |= {name: value.replace("{folder}", str(folder)) for name, value in start.env.items()}
    if start.shell:
        command = ["unshare", "-m", "sh", "-c", f'{start.shell}\nexec "$@"', "sh", *command]
    return nodes.start(nodes[start.node], command, env, base, stdout=out, stderr=subprocess.STDOUT)  # type: ignore[arg-type]


def _output(folder: Path) -> str:
    return "\n".join(file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.out")))


def _wait(jobs: Sequence[subprocess.Popen[str]], case: Case, folder: Path, started: float) -> float | None:
    """Until all have ended; when the line that names the fault with its fix was first there."""
    told = None
    while True:
        ended = all(job.poll() is not None for job in jobs)
        if told is None and re.search(f"{case.node}.*{case.fact}.* → .*{case.fix}", _output(folder)):
            told = time.monotonic() - started
        if ended or time.monotonic() > started + LIMIT:
            return told
        time.sleep(0.1)


def _end(jobs: Sequence[subprocess.Popen[str]]) -> tuple[int | None, ...]:
    codes = tuple(job.poll() for job in jobs)
    for job in jobs:
        with suppress(ProcessLookupError):  # also what a case has put beside it
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()
    return codes


def edit(name: str, file: str, old: str, new: str) -> Callable[[Path], None]:
    """Replaces a text of one node's file once."""

    def change(folder: Path) -> None:
        path = folder / name / file
        text = path.read_text(encoding="utf-8")
        assert old in text, f"{path} has no {old!r}"
        path.write_text(text.replace(old, new, 1), encoding="utf-8")

    return change


def with_model(change: Callable[[Path], None]) -> Callable[[Path], None]:
    def both(folder: Path) -> None:
        add_model(folder)
        change(folder)

    return both


def other_version(name: str, package: str, version: str) -> Callable[[Path], None]:
    """The metadata of another version of a package, which a node finds first (PYTHONPATH={folder}/other)."""

    def change(folder: Path) -> None:
        place = folder / "other" / f"{package}-{version}.dist-info"
        place.mkdir(parents=True)
        (place / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")

    return change


def other_code(folder: Path) -> None:
    """tunesmith with another comment in one file, which a node finds first."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "trainer" / "tunesmith", folder / "other" / "tunesmith", ignore=ignored)
    with (folder / "other" / "tunesmith" / "step.py").open("a", encoding="utf-8") as file:
        file.write("# another\n")


def cuda(memory: int = 80, count: int = 1, name: str = "H100") -> str:
    """Patches what the rank computes on."""
    return (
        f"Probe.device = lambda self, rank: Device('cuda', {name!r}, {count}, {memory} << 30, {memory} << 30)"
    )
