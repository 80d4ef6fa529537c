"""That the output folder is one and the same on every node, takes files and renames as checkpoints need them, and
has room for those to come."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Generator, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from tunesmith.errors import TunesmithError
from tunesmith.hub import resolve_path
from tunesmith.preflight.compare import Roll, node_name
from tunesmith.preflight.content import safetensors_header
from tunesmith.preflight.exchange import Meeting
from tunesmith.preflight.findings import Finding, error, warning
from tunesmith.recipe import Recipe
from tunesmith.tracking.text import size

_SEEN_WITHIN = 5.0  # seconds for a network file system to show another node's new file
_SHARE = "mount the same file system there, or set output_dir to a folder that all nodes share"


def prove(meeting: Meeting, folder: Path, recipe: Recipe, base: Path) -> list[Finding]:
    """Rank 0 leaves a nonce in a new folder inside `folder`; every node reads it, writes, renames and syncs beside it,
    and rank 0 looks for what they wrote. Nothing is left."""
    if not meeting.claim.leads:
        return meeting.decide("folder", None, lambda _: [], _leaders)
    if not meeting.is_first:
        told = meeting.hear("folder/trial")
        said: dict[str, Any] = {} if told is None else try_folder(folder, told["name"], told["nonce"])
        said |= {"folder": str(folder), "disk": meeting.probe.disk(folder)}
        return meeting.decide("folder", said, lambda _: [], _leaders)
    with _made(folder) as fault:
        name, nonce = f".tunesmith-preflight-{secrets.token_hex(6)}", secrets.token_hex(16)
        said: dict[str, Any] = {"fault": fault} if fault else _leave(folder, name, nonce)
        meeting.tell("folder/trial", None if "fault" in said else {"name": name, "nonce": nonce})
        if "fault" not in said:
            said = try_folder(folder, name, nonce)
        said |= {"folder": str(folder), "disk": meeting.probe.disk(folder)}
        needed = room(recipe, base)
        try:
            return meeting.decide(
                "folder", said, lambda values: _judge(meeting, folder, name, values, needed), _leaders
            )
        finally:
            shutil.rmtree(folder / name, ignore_errors=True)


def _leaders(roll: Roll) -> list[int]:
    return sorted(claim.rank for claim in roll.claims if claim.leads)


@contextlib.contextmanager
def _made(folder: Path) -> Generator[str | None]:
    """The folder, for as long as it is empty otherwise: a check leaves none behind. Yields what is wrong."""
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    fault = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as caught:
        fault = f"{folder} cannot be made: {caught.strerror}"
    yield fault
    for place in new:
        with contextlib.suppress(OSError):  # it is used
            place.rmdir()


def _leave(folder: Path, name: str, nonce: str) -> dict[str, Any]:
    try:
        (folder / name).mkdir()
        _write(folder / name / "nonce", nonce)
    except OSError as caught:
        return {"fault": f"{folder} cannot be written: {caught.strerror}"}
    return {}


def _write(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def try_folder(folder: Path, name: str, nonce: str) -> dict[str, Any]:
    """What one node can do there: `shared` (it reads the nonce), and `fault` where a step of a checkpoint's
    publication fails, else `left`, the file that rank 0 is to see."""
    trial, end = folder / name, time.monotonic() + _SEEN_WITHIN
    while True:
        try:
            shared = (trial / "nonce").read_text(encoding="utf-8") == nonce
            break
        except FileNotFoundError:
            if time.monotonic() > end:
                return {"shared": False}
            time.sleep(0.1)
        except OSError as caught:
            return {"shared": True, "fault": f"{folder} cannot be read: {caught.strerror}"}
    own = secrets.token_hex(6)
    doing = "written"
    try:
        staging, final = trial / f"staging-{own}", trial / f"final-{own}"
        staging.mkdir()
        _write(staging / "part", nonce)
        doing = "renamed in"
        (staging / "part").rename(staging / "whole")
        staging.rename(final)
        doing = "synced"
        handle = os.open(trial, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as caught:
        return {"shared": shared, "fault": f"{folder} cannot be {doing}: {caught.strerror}"}
    return {"shared": shared, "left": f"final-{own}/whole"}


def _judge(
    meeting: Meeting, folder: Path, name: str, values: Mapping[int, Any], needed: tuple[int, int] | None
) -> list[Finding]:
    found: list[Finding] = []
    for claim in meeting.leaders():
        said, node = values[claim.rank], node_name(claim)
        if said.get("shared") is False:
            what = f"{said['folder']} is not the folder that rank 0 sees: what rank 0 wrote is not there"
            found.append(error(node, what, _SHARE))
        elif "fault" in said:
            fix = "free space there, get the right to write, or set output_dir to another folder"
            found.append(error(node, said["fault"], fix))
        elif "left" in said and not _appears(folder / name / said["left"]):
            what = f"what it writes into {folder} does not come to rank 0 within {_SEEN_WITHIN:.0f} s"
            found.append(error(node, what, _SHARE))
    if not found:
        found += room_findings(meeting.node, folder, values, needed)
    return found


def _appears(path: Path) -> bool:
    end = time.monotonic() + _SEEN_WITHIN
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def room_findings(
    node: str, folder: Path, values: Mapping[int, Any], needed: tuple[int, int] | None
) -> Iterator[Finding]:
    """`values` hold (free, total) bytes of the folder's file system as each node sees it."""
    free = min((said["disk"][0] for said in values.values() if said.get("disk")), default=None)
    if needed is None or free is None or free >= needed[1]:
        return
    least, most = needed
    fix = "free space there, lower checkpoint.save_total_limit, or set output_dir to another disk"
    if free < least:
        yield error(node, f"{folder} has {size(free)} free, the checkpoints need at least {size(least)}", fix)
    else:
        yield warning(node, f"{folder} has {size(free)} free, the checkpoints take up to {size(most)}", fix)


def room(recipe: Recipe, base: Path) -> tuple[int, int] | None:
    """Bytes that the run's checkpoints and final/ take: at least and at most; None where the model's files do not say
    its parameters. At least: what is kept while one more is written, if so many are made; at most: the best one is
    kept besides. With adapters both hold what is trained alone, as the model's files give the rest again."""
    from tunesmith.planning.optimizers import BF16_STATE_BYTES, state_bytes

    shapes = parameter_shapes(recipe, base)
    if not shapes:
        return None
    trained = adapted_shapes(recipe, base) if recipe.trainable.adapters else shapes
    precision = recipe.training.precision
    width = 2 if precision.startswith("bf16_") else 4
    rounded = BF16_STATE_BYTES.get(precision)
    adapters = width * sum(map(prod, trained))
    final = adapters if recipe.trainable.adapters else width * sum(map(prod, shapes))
    weights = final + (width * sum(map(prod, shapes)) if _saves_the_base(recipe) else 0)
    state = state_bytes(recipe.optim, trained) if rounded is None else rounded * sum(map(prod, trained))
    kept = recipe.checkpoint.save_total_limit or 2
    saves = 1
    if isinstance(recipe.checkpoint.save_steps, int) and recipe.training.max_steps is not None:
        saves += recipe.training.max_steps // recipe.checkpoint.save_steps
    # what is frozen has no state
    least = min(saves, kept + 1) * (weights + (0 if recipe.trainable.freeze else state)) + final
    return least, max(least, (kept + 2) * (weights + state) + final)


def _saves_the_base(recipe: Recipe) -> bool:
    """Whether checkpoints beside adapters hold the base too: where no files give it, or an adapter's start changes
    it (tunesmith.assemble)."""
    starts = [str(getattr(one, "init_lora_weights", "")) for one in recipe.trainable.adapters]
    changes = any(start.startswith(("pissa", "olora", "loftq")) for start in starts)
    return bool(recipe.trainable.adapters) and (changes or recipe.model.init != "pretrained")


def adapted_shapes(recipe: Recipe, base: Path) -> list[tuple[int, ...]]:
    """Of what is trained in a model with adapters, modules that are trained whole included; none where it cannot be
    told (the run says why)."""
    from tunesmith.planning.inspect import inspect

    try:
        units = inspect(recipe, base).workload.units
    except (TunesmithError, OSError, ValueError, RuntimeError):
        return []
    return [p.shape for unit in units for p in unit.parameters if p.trainable]


def parameter_shapes(recipe: Recipe, base: Path) -> list[tuple[int, ...]]:
    """As the headers of the model's safetensors files say; none where it has no such files."""
    name = recipe.model.model_name_or_path
    if name is None:
        return []
    shapes: list[tuple[int, ...]] = []
    try:
        for file in sorted(Path(resolve_path(name, base)).glob("*.safetensors")):
            header: dict[str, Any] = json.loads(safetensors_header(file))
            shapes += [tuple(entry["shape"]) for key, entry in header.items() if key != "__metadata__"]
    except (TunesmithError, OSError, ValueError, KeyError, TypeError):
        return []  # a broken file is the model loader's to name
    return shapes
