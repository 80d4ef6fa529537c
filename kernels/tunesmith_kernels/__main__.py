"""Prints which path each op takes here, and why."""

from tunesmith_kernels import explain

for op, (path, why) in explain().items():
    print(f"{op:22s} {path:10s} {why}")
