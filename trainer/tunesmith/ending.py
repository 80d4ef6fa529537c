"""How a run ended, as its folder says it (exit.json) and as its exit code says it (docs/run-folder.md)."""

from __future__ import annotations

import errno
import json
import os
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tunesmith.errors import TunesmithError
from tunesmith.recipe.paths import resolve_paths
from tunesmith.recipe.root import Recipe

MACHINE_UNFIT, STOPPED, INTERRUPTED, PEER_LOST = 3, 4, 5, 6

# what gloo, NCCL and the store of the ranks say where the other end of a connection is gone or silent
_LOST_CONNECTION = re.compile(
    r"connection (closed|reset|refused)|broken pipe|timed? ?out|remote (process|error)|failed to recv",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a run, or one rank of it, ended. `step` is the last optimizer step known to be done, None before the
    first."""

    code: int
    reason: str
    rank: int
    step: int | None

    @property
    def is_cause(self) -> bool:
        """Whether something went wrong here. A rank that was stopped (5, 128 + signal) or that lost a peer (6) may
        only follow another's failure."""
        return self.code not in {0, INTERRUPTED, PEER_LOST} and self.code < 128

    def outranks(self, other: Ending) -> bool:
        """Whether this explains the end of the run better than `other`; of two alike the first told does."""
        return (self.is_cause, self.code != 0) > (other.is_cause, other.code != 0)


class Signalled(KeyboardInterrupt):
    """SIGTERM or SIGHUP at a time when no training could be saved."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def run_folder(recipe: Recipe, base: Path) -> Path:
    """`output_dir/run_name`, absolute. Raises UserError where a path names a variable that is not set."""
    return Path(resolve_paths(recipe, base).output_dir) / recipe.run_name


def holds_a_run(folder: Path) -> bool:
    """Whether a run has trained in this folder before."""
    return (folder / "metrics.jsonl").exists() or any(folder.glob("checkpoint-*"))


def last_step(folder: Path) -> int | None:
    """The last optimizer step that was logged or saved in the run's folder."""
    steps = [int(p.name[11:]) for p in folder.glob("checkpoint-*") if p.name[11:].isdigit()]
    try:
        lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    except OSError:
        lines = []
    for line in reversed(lines):
        try:
            steps.append(int(json.loads(line)["step"]))
        except (ValueError, KeyError, TypeError):
            continue  # the process may have been killed while it wrote this line
        break
    return max(steps, default=None)


def describe(error: BaseException, folder: Path | None) -> tuple[int, str] | None:
    """(exit code, what to tell the user); None for a fault of ours, whose traceback matters."""
    first_line = str(error).partition("\n")[0]
    match error:
        case TunesmithError():
            return error.exit_code, str(error)
        case KeyboardInterrupt():
            if folder is not None and any(folder.glob("checkpoint-*")):
                return (
                    INTERRUPTED,
                    "interrupted before a new checkpoint; continue from the last with --resume",
                )
            number = error.number if isinstance(error, Signalled) else 2
            return 128 + number, "interrupted before the first checkpoint: nothing was saved"
        case SystemExit():
            return 1, f"something called exit({error.code!r}) in the middle of the run"
        case MemoryError():
            return MACHINE_UNFIT, _out_of_memory("this machine", first_line)
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            where = f" ({error.filename})" if error.filename else ""
            return MACHINE_UNFIT, f"the disk is full{where}: free space, then continue with --resume"
        case RuntimeError() if type(error).__name__ == "OutOfMemoryError":
            return MACHINE_UNFIT, _out_of_memory("the device", first_line)
        case RuntimeError() if "DefaultCPUAllocator: can't allocate memory" in str(error):
            return MACHINE_UNFIT, _out_of_memory("this machine", first_line)
        case RuntimeError() | ConnectionError() if _is_peer_loss(error):
            return PEER_LOST, f"a peer was lost ({first_line}); continue with --resume"
        case _:
            return None


def _out_of_memory(what: str, detail: str) -> str:
    said = f": {detail}" if detail else ""
    return f"{what} is out of memory{said}; lower training.per_device_train_batch_size or data.max_length"


def _is_peer_loss(error: BaseException) -> bool:
    """Only for what torch.distributed raises: gloo's plain RuntimeErrors name its source files."""
    text = str(error)
    distributed = type(error).__name__.startswith("Dist") or "gloo" in text or "TCPStore" in text
    return distributed and _LOST_CONNECTION.search(text) is not None


def record(folder: Path, ending: Ending) -> Ending | None:
    """Writes exit.json, atomically. Returns the ending that already stood there, which stays unless it is
    outranked; None where this is the first. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    target, fresh = folder / "exit.json", folder / f".exit-{ending.rank}-{os.getpid()}"
    try:
        with fresh.open("w", encoding="utf-8") as file:
            file.write(json.dumps(asdict(ending), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(fresh, target)  # unlike a rename, it fails where another rank was first
            return None
        except OSError:  # it exists, or the file system has no hard links
            before = read(folder)
            if before is None or ending.outranks(before):
                fresh.replace(target)
            return before
    finally:
        fresh.unlink(missing_ok=True)


def read(folder: Path) -> Ending | None:
    """What exit.json says; None where there is none or it is not whole."""
    try:
        values = json.loads((folder / "exit.json").read_text(encoding="utf-8"))
        return Ending(int(values["code"]), str(values["reason"]), int(values["rank"]), values["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def wait_for_word(folder: Path, seconds: float) -> None:
    """Until a rank has left word of the end, if one does."""
    end = time.monotonic() + seconds
    while read(folder) is None and time.monotonic() < end:
        time.sleep(0.05)
