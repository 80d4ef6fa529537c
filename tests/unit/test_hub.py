"""A model that is neither a folder, nor in the cache, nor to be had."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest

from tunesmith import hub
from tunesmith.errors import UserError
from tunesmith.hub import resolve_path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's client, whose host nobody knows."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.invalid")
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    hub.host_is_known.cache_clear()
    return tmp_path / "hub"


def test_no_folder_and_no_hub_is_one_line_with_the_key(cache: Path) -> None:
    said = (
        "model.tokenizer: there is no folder runs/x; as a model of the hub it is not in the hub's cache "
        f"({cache}), and hub.invalid cannot be reached from here"
    )
    with pytest.raises(UserError, match=f"^{re.escape(said)}$"):
        resolve_path("runs/x", Path(), "model.tokenizer")


def test_offline_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"and HF_HUB_OFFLINE is set$"):
        resolve_path("org/model", Path())


def test_a_model_of_the_cache_needs_no_hub(cache: Path) -> None:
    (cache / "models--org--model" / "snapshots").mkdir(parents=True)
    assert resolve_path("org/model", Path()) == "org/model"


def test_a_hub_thathost_is_known_or_behind_a_proxy_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy.invalid:3128")
    assert resolve_path("org/model", Path()) == "org/model"
    monkeypatch.delenv("https_proxy")
    asked: list[Any] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *where: asked.append(where) or [])
    assert resolve_path("org/model", Path()) == "org/model"
    assert asked == [("hub.invalid", 443)]
