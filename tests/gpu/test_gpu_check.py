"""What `make gpu-check` holds the kernels to on a GPU, parity and memory in brief; skipped, visibly, without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu_check.py"
PARTS = ("parity_adamw", "parity_losses", "parity_large", "memory")

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.slow,
]


@pytest.mark.parametrize("part", PARTS)
def test_part(part: str, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--quick", "--only", part, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text(encoding="utf-8"))["parts"][part]
    assert found["rows"]
    assert not found["failures"]
