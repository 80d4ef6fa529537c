"""A clipped step of the optimizers on Triton: at most five launches, and no operator of torch's that would be one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

COUNT = """
import sys, torch
from torch.utils._python_dispatch import TorchDispatchMode
from tunesmith_kernels import AdamW, AdamW8bit, triton_support

launched, operators = [], []
launch = triton_support.launch

def counted(kernel, *arguments, **options):
    launched.append(kernel)
    busy[0] = True
    launch(kernel, *arguments, **options)
    busy[0] = False

triton_support.launch = counted
busy = [False]

class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not busy[0]:
            operators.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

dtype = torch.bfloat16 if sys.argv[2] != "fp32" else torch.float32
params = [torch.nn.Parameter(torch.ones(5000).to(dtype)), torch.nn.Parameter(torch.ones(3, 7).to(dtype))]
for p in params:
    p.grad = torch.ones_like(p)
options = {} if sys.argv[1] == "AdamW8bit" else {"precision": sys.argv[2]}
optimizer = {"AdamW": AdamW, "AdamW8bit": AdamW8bit}[sys.argv[1]](params, max_norm=1.0, backend="triton", **options)
optimizer.step()  # makes the states and tables
launched.clear(), operators.clear()
with Operators():
    optimizer.step()
print(len(launched), *sorted(set(operators)))
"""
# views, memory, and the profiler's marks: none of them starts anything on a device
HARMLESS = {"view", "detach", "alias", "empty", "empty_like", "as_strided", "lift_fresh"}
HARMLESS |= {"_record_function_enter_new", "_record_function_exit"}


@pytest.mark.parametrize(
    ("optimizer", "precision"),
    [
        ("AdamW", "fp32"),
        ("AdamW", "master"),
        ("AdamW", "stochastic"),
        ("AdamW", "kahan"),
        ("AdamW8bit", "fp32"),
    ],
)
def test_a_clipped_step_is_a_few_launches(optimizer: str, precision: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", COUNT, optimizer, precision],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    count, *operators = done.stdout.split()
    assert 3 <= int(count) <= 5
    assert set(operators) <= HARMLESS, operators
