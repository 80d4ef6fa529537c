"""Everything about the kernels that only a GPU can show: parity, memory, ratios beside each peer in the same run,
compute-sanitizer, training end to end. In under ten minutes; needs torch and triton, and for the end-to-end parts
transformers and peft; what else is missing is said in the results.

    python3 bench/gpu_check.py [--only PART,…] [--quick] [--tune] [--again] [--text FILE] [--minutes 9.5]
    python3 bench/gpu_check.py --status | --write-docs
    python3 bench/gpu_check.py --dry                     the same code on the CPU, with tiny shapes

Each part runs in processes of its own with its own time, so that none can stop another, and is written to
kernels/results/<device>.json when it ends. A later call runs what is missing or failed there, as long as the kernels'
sources are the same; --again runs everything anew. The exit code is 1 where something failed or missed its limit.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
sys.path[1:1] = [str(_ROOT / folder) for folder in ("kernels", "trainer", "tests/kernels")]

from gpu import parts, record, results  # noqa: E402 - the folders must be on the path

_GRACE = 15.0  # seconds that a part gets to end by itself once its time is up


def main() -> int:
    arguments = _arguments()
    if arguments.status:
        return _status(arguments.out)
    if arguments.write_docs:
        changed = results.write_docs()
        print("\n".join(f"written: {path.relative_to(_ROOT)}" for path in changed) or "nothing to write")
        return 0
    if arguments.exercise:
        return _exercise(arguments.dry)
    if arguments.part:
        shard, shards = (int(number) for number in arguments.shard.split("/"))
        lines = record.Record(arguments.lines, arguments.seconds)
        options = {"quick": arguments.quick, "dry": arguments.dry, "text": arguments.text}
        parts.run(arguments.part, lines, **options, shard=shard, shards=shards)
        return 0
    if not arguments.dry and (problem := _no_gpu()):
        print(f"gpu-check: {problem}; --dry runs the same code on the CPU", file=sys.stderr)
        return 3
    return _check(arguments)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.name for part in (*parts.PARTS, parts.TUNE)]
    parser.add_argument("--only", type=lambda text: text.split(","), help=f"some of {', '.join(names)}")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and rounds")
    parser.add_argument("--dry", action="store_true", help="on the CPU, with tiny shapes")
    parser.add_argument("--tune", action="store_true", help="try other launch configurations, too")
    parser.add_argument("--again", action="store_true", help="also what is there already")
    parser.add_argument("--text", type=Path, help="a text file to train on, end to end")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything")
    parser.add_argument("--out", type=Path, default=results.FOLDER, help="folder of the results file")
    parser.add_argument("--status", action="store_true", help="which results there are, and whether stale")
    parser.add_argument("--write-docs", action="store_true", help="fill the blocks that quote results")
    for name in ("--part", "--shard"):
        parser.add_argument(name, default="0/1" if name == "--shard" else None, help=argparse.SUPPRESS)
    parser.add_argument("--lines", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    for name in ("--exercise", "--processes"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.only or ()) - set(names):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if arguments.text is not None and not arguments.text.is_file():
        parser.error(f"--text {arguments.text}: no such file")
    return arguments


def _no_gpu() -> str | None:
    probe = "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 9)"
    code = subprocess.run([sys.executable, "-c", probe], check=False, capture_output=True).returncode
    return {0: None, 9: "torch sees no CUDA device"}.get(code, f"{sys.executable} has no torch")


def _status(folder: Path) -> int:
    for path in results.files(folder):
        result, age = results.load(path), "stale" if results.stale(path) else "fresh"
        done = ", ".join(result["parts"])
        print(f"{path.name}: {age}; {len(results.missed(result))} failed or missed; {done}")
    if not results.files(folder):
        print("no results")
    print("\n".join(results.quote_faults()) or "every quotation in README.md and docs is fresh")
    return 0


def _exercise(dry: bool) -> int:
    import torch
    from gpu import sanitizer
    from gpu.device import Machine

    sanitizer.exercise(Machine(torch.device("cpu" if dry else "cuda"), dry=dry))
    return 0


def _check(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    path, result = None, None
    chosen = [*parts.PARTS, *([parts.TUNE] if arguments.tune else [])]
    if arguments.only:
        chosen = [part for part in (*parts.PARTS, parts.TUNE) if part.name in ("device", *arguments.only)]
    for part in chosen:
        left = arguments.minutes * 60 - (time.monotonic() - started)
        if result is not None and _done(result, part.name, arguments):
            print(f"{part.name}: there already", flush=True)
            continue
        if left < 10:
            found = {"seconds": 0.0, "rows": [], "failures": ["not run: out of time"], "notes": []}
        else:
            found = _part(part, min(part.seconds, left), arguments)
        facts = found.pop("facts", [])
        if result is None:
            if not facts:
                print(f"gpu-check: nothing can run: {found['failures']}", file=sys.stderr)
                return 1
            path = arguments.out / f"{facts[0]['device']['slug']}.json"
            result = _opened(path, facts[0], arguments)
        result["parts"][part.name] = {"date": _now(), "quick": arguments.quick, **found}
        assert path is not None
        results.save(path, result)
        print(f"{part.name}: {found['seconds']:.0f} s, {len(found['failures'])} failures", flush=True)
    assert result is not None
    return _reported(result, path, dry=arguments.dry)


def _opened(path: Path, facts: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """The results file to go on with: what is there, if it is of these sources and versions."""
    kept: dict[str, Any] = {}
    if path.is_file() and not arguments.again:
        before = results.load(path)
        if not results.stale(path) and before.get("versions") == facts["versions"]:
            kept = before["parts"]
    head = {"format": results.FORMAT, **facts, "date": _now(), "commit": _commit()}
    return {**head, "source_hash": results.source_hash(), "parts": kept}


def _done(result: dict[str, Any], name: str, arguments: argparse.Namespace) -> bool:
    part = result["parts"].get(name)
    if part is None or arguments.again or name in (arguments.only or ()):
        return False
    return not part["failures"] and (arguments.quick or not part["quick"])


def _part(part: parts.Part, seconds: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs a part in its processes; what they wrote, until they ended or were ended."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        within = arguments.dry and not arguments.processes
        shards = 1 if within else max(1, min(part.shards, (os.cpu_count() or 2) // 2))
        files = [Path(folder, f"{shard}.jsonl") for shard in range(shards)]
        if within:  # where nothing can be lost with a process, but time with starting it
            options = {"quick": arguments.quick, "dry": True, "text": arguments.text}
            parts.run(part.name, record.Record(files[0], seconds), **options)
        else:
            _processes(part.name, files, seconds, arguments)
        found = _merged([record.read(file) for file in files])
    return {"seconds": round(time.monotonic() - started, 1), **found}


def _processes(name: str, files: Sequence[Path], seconds: float, arguments: argparse.Namespace) -> None:
    """Runs one process per file, which writes to it; those that outlast their time are ended with all they started."""
    command = [sys.executable, str(Path(__file__).resolve()), "--part", name, "--seconds", str(seconds)]
    command += ["--quick"] * arguments.quick + ["--dry"] * arguments.dry
    command += [] if arguments.text is None else ["--text", str(arguments.text)]
    running: list[tuple[subprocess.Popen[bytes], Path]] = []
    for number, file in enumerate(files):
        with file.with_suffix(".err").open("wb") as errors:
            shard = ["--lines", str(file), "--shard", f"{number}/{len(files)}"]
            process = subprocess.Popen(
                [*command, *shard], stdout=errors, stderr=errors, start_new_session=True
            )
        running.append((process, file))
    ends = time.monotonic() + seconds + _GRACE
    for process, file in running:
        lines = record.Record(file, 0)
        try:
            code = process.wait(max(0.0, ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            lines.fail(f"stopped after {seconds + _GRACE:.0f} s, in the middle of something")
            continue
        if code != 0:
            text = file.with_suffix(".err").read_text(encoding="utf-8", errors="replace")
            lines.fail(f"exit {code}: {' '.join(text[-600:].split())}")


def _merged(shards: Sequence[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """The shards' lines together; their counts of cases added up."""
    found = {kind: [line for shard in shards for line in shard[kind]] for kind in shards[0]}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for row in found["rows"]:
        key = row["case"], row["name"]
        if key in rows and row["unit"] == "cases":
            rows[key]["value"] += row["value"]
        else:
            rows[key] = row
    return {**found, "rows": list(rows.values()), "notes": list(dict.fromkeys(found["notes"]))}


def _reported(result: dict[str, Any], path: Path | None, *, dry: bool) -> int:
    width = shutil.get_terminal_size((120, 20)).columns
    for name, part in result["parts"].items():
        print(f"\n== {name} ({part['seconds']:.0f} s)\n{results.table(part)}")
    lines = [f"{name}: {line}" for name, part in result["parts"].items() for line in part["failures"]]
    if not dry:  # whose tiny shapes say nothing about limits
        lines = results.missed(result)
    print("\n" + "=" * min(width, 120))
    print("\n".join(lines) or "nothing failed" + ("" if dry else ", every limit is kept"))
    print(f"results: {path}")
    return 1 if lines else 0


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _commit() -> str:
    """Of the checkout, with a + where it has changes; "unknown" outside one."""
    try:
        git = ["git", "-C", str(_ROOT)]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.strip() + ("+" if changes.stdout.strip() else "")


if __name__ == "__main__":
    sys.exit(main())
