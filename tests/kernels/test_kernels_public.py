"""The package's public face: its names, its own account of the paths, and that it stands alone."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import tunesmith_kernels
from tunesmith_kernels import native


def test_the_public_names_are_there() -> None:
    for name in tunesmith_kernels.__all__:
        assert getattr(tunesmith_kernels, name).__doc__, name


def test_it_imports_torch_alone() -> None:
    """Neither the trainer nor triton nor anything that torch does not bring."""
    code = (
        "import sys, torch\nbefore = set(sys.modules)\nimport tunesmith_kernels\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(new - set(sys.stdlib_module_names) - {'torch', 'tunesmith_kernels'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_it_explains_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tunesmith_kernels.explain("cpu")
    assert {path for path, _ in found.values()} == {"cpu"}
    assert found["AdamW"] == ("cpu", "C++, one pass over all tensors")
    assert tunesmith_kernels.explain("cpu", torch.float16)["linear_cross_entropy"][0] == "torch"
    monkeypatch.setattr(native, "unavailable", lambda: "no C++ compiler found")
    found = tunesmith_kernels.explain("cpu")
    assert found["linear_cross_entropy"] == (
        "torch",
        "torch's operators on chunks of logits, slower: no C++ compiler found",
    )
    assert found["AdamW8bit"][0] == "reference"


def test_it_prints_what_it_explains() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tunesmith_kernels"], capture_output=True, text=True, check=True
    )
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(tunesmith_kernels.explain())
