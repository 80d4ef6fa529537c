"""AdamW where there is no native library: the reason is given, and the updates are those of the library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from adamw_cases import KINDS, everything, gradients, make, parameters, run, same, values

_FOLDER = Path(__file__).parent
_PROGRAM = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from adamw_cases import KINDS, everything, gradients, make, parameters, run, values
from tunesmith_kernels.adamw import AdamW, path_for
results = {}
for name, kind in KINDS.items():
    params = parameters(values(kind.dtype))
    optimizer = make(params, kind, max_norm=1.0)
    run(optimizer, params, gradients(3, kind.dtype))
    results[name] = everything(optimizer, params)
try:
    run(make(params, kind, backend="cpu"), params, gradients(1, kind.dtype))
except RuntimeError as error:
    refusal = str(error)
torch.save([path_for("cpu"), refusal, results], sys.argv[2])
"""


def _run(program: str, out: Path, tmp_path: Path, variables: dict[str, str]) -> Any:
    environment = os.environ | {"TUNESMITH_KERNELS_CACHE": str(tmp_path / "cache")} | variables
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(_FOLDER), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(out)


def test_without_the_library_the_updates_are_the_same(tmp_path: Path) -> None:
    off = "TUNESMITH_KERNELS_NATIVE=0 turns the native library off"
    (name, why), refusal, results = _run(
        _PROGRAM, tmp_path / "out.pt", tmp_path, {"TUNESMITH_KERNELS_NATIVE": "0"}
    )
    assert (name, why) == ("reference", f"plain torch: {off}")
    assert refusal == f"AdamW(backend='cpu'): {off}"
    for kind_name, kind in KINDS.items():
        params = parameters(values(kind.dtype))
        optimizer = make(params, kind, max_norm=1.0, backend="cpu")
        run(optimizer, params, gradients(3, kind.dtype))
        assert same(everything(optimizer, params), results[kind_name]), kind_name


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("false", "/false"), ("no-such-compiler", "no C++ compiler found (CXX=no-such-compiler)")],
)
def test_without_a_compiler_the_reason_is_said(compiler: str, reason: str, tmp_path: Path) -> None:
    program = (
        "import sys, torch; from tunesmith_kernels.adamw import path_for\n"
        "torch.save(path_for('cpu'), sys.argv[2])"
    )
    name, why = _run(program, tmp_path / "out.pt", tmp_path, {"CXX": compiler})
    assert name == "reference"
    assert reason in why
    assert "\n" not in why
