"""The device that is checked: a CUDA one; or, for `--dry`, the CPU in its place with tiny shapes, torch's operators for
Triton's and the host's clock for the device's."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from gpu.record import Record
from tunesmith_kernels.triton_support import interpreting

Value = TypeVar("Value")
_AHEAD = 20_000_000  # cycles, some 10 ms: what a host needs to queue the work of an optimizer step


@dataclass(frozen=True)
class Machine:
    device: torch.device
    quick: bool = False
    dry: bool = False
    shard: int = 0  # this process does every `shards`-th case of a part
    shards: int = 1

    def pick(self, full: Value, quick: Value, dry: Value) -> Value:
        return dry if self.dry else quick if self.quick else full

    @property
    def triton(self) -> bool:
        """Whether the kernels are Triton's: on the CPU with TRITON_INTERPRET=1 alone."""
        return not self.dry or interpreting()

    @property
    def loss_backend(self) -> Any:
        return "triton" if self.triton else "torch"

    @property
    def optimizer_backend(self) -> Any:
        return "triton" if self.triton else "reference"

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def mine(self, index: int) -> bool:
        return index % self.shards == self.shard

    @contextlib.contextmanager
    def peak(self) -> Generator[list[int]]:
        """Yields a list that holds, afterwards, the bytes that were allocated at most within, beyond those before; on
        the CPU nothing counts them, and it is 0."""
        found: list[int] = []
        if self.device.type != "cuda":
            yield found
            found.append(0)
            return
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        yield found
        torch.cuda.synchronize(self.device)
        found.append(torch.cuda.max_memory_allocated(self.device) - before)

    def time(self, call: Callable[[], object]) -> float:
        """Milliseconds of the device from the call's first work to its last. The device is kept busy meanwhile, so that
        the host's time counts only where the call waits for the device or the host falls behind."""
        if self.device.type != "cuda":
            started = time.perf_counter()
            call()
            return (time.perf_counter() - started) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        torch.cuda._sleep(_AHEAD)  # pyright: ignore[reportPrivateUsage]
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def host_time(self, call: Callable[[], object]) -> float:
        """Milliseconds of the host until the call returns, whatever the device still has to do."""
        self.synchronize()
        started = time.perf_counter()
        call()
        return (time.perf_counter() - started) * 1e3


@dataclass(frozen=True)
class Times:
    """Milliseconds."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def least(self) -> float:
        return min(self.samples)


def interleaved(
    machine: Machine, record: Record, case: str, contenders: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, Times]:
    """Times all contenders in turns, after two calls of each to warm up; one that raises is a failure, and left out.
    Writes a row for each."""
    able: dict[str, Callable[[], object]] = {}
    for name, call in contenders.items():
        with record.attempt(f"{case}: {name}", needs=2):
            for _ in range(2):
                call()
            machine.synchronize()
            able[name] = call
    samples: dict[str, list[float]] = {name: [] for name in able}
    for _ in range(rounds):
        for name, call in able.items():
            samples[name].append(machine.time(call))
    found = {name: Times(tuple(values)) for name, values in samples.items()}
    for name, times in found.items():
        record.row(case, name, times.median, "ms", least=times.least)
    return found


def ratio(
    record: Record, case: str, found: Mapping[str, Times], over: str, under: str, limit: str | None = None
) -> None:
    """A row for the times of `over` ÷ those of `under`, where both ran."""
    if over in found and under in found:
        a, b = found[over], found[under]
        record.row(case, f"{over} ÷ {under}", a.median / b.median, "×", limit, least=a.least / b.least)


def moved(value: Any, device: torch.device) -> Any:
    """A copy of a structure of dataclasses, dicts and lists with its tensors on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: moved(getattr(value, f.name), device) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **fields)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, list):
        return [moved(item, device) for item in value]
    return value
