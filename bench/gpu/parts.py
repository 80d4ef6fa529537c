"""The parts of the check: what each is, in the order in which they run, and a part run within this process."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

from gpu.record import DeviceLost, OutOfTime, Record


@dataclass(frozen=True)
class Part:
    """seconds: what it may take. shards: processes that share its cases, since compiling them is what takes time."""

    name: str
    seconds: float
    shards: int = 1


PARTS = (
    Part("device", 40),
    Part("parity_adamw", 60),
    Part("parity_losses", 150, shards=8),
    Part("parity_large", 80),
    Part("memory", 40),
    Part("cross_entropy", 120),
    Part("adamw", 90),
    Part("distillation", 70),
    Part("end_to_end_full", 75),
    Part("end_to_end_lora", 90),
    Part("sanitizer", 100),
    Part("end_to_end_trainer", 90),
)
TUNE = Part("tune", 240)


def run(
    name: str,
    record: Record,
    *,
    quick: bool,
    dry: bool,
    text: Path | None = None,
    shard: int = 0,
    shards: int = 1,
) -> None:
    """One part. Whatever stops it short of its end is a failure in its record."""
    import torch

    from gpu.device import Machine

    machine = Machine(torch.device("cpu" if dry else "cuda"), quick, dry, shard, shards)
    try:
        with record.attempt(name):
            _run(name, machine, record, text)
    except (OutOfTime, DeviceLost) as stopped:
        record.fail(str(stopped))


def _run(name: str, machine: object, record: Record, text: Path | None) -> None:
    from gpu.device import Machine

    assert isinstance(machine, Machine)
    match name:
        case "device":
            device(machine, record)
        case "parity_adamw":
            from gpu import parity_adamw

            parity_adamw.run(machine, record)
        case "parity_losses" | "parity_large":
            from gpu import parity_losses

            (parity_losses.small if name == "parity_losses" else parity_losses.large)(machine, record)
        case "memory":
            from gpu import memory

            memory.run(machine, record)
        case "cross_entropy" | "distillation":
            from gpu import ratios_losses

            (ratios_losses.cross_entropy if name == "cross_entropy" else ratios_losses.distillation)(
                machine, record
            )
        case "adamw":
            from gpu import ratios_adamw

            ratios_adamw.run(machine, record)
        case "end_to_end_full" | "end_to_end_lora":
            from gpu import end_to_end

            (end_to_end.full if name == "end_to_end_full" else end_to_end.lora)(machine, record, text)
        case "end_to_end_trainer":
            from gpu import own_trainer

            own_trainer.run(machine, record, text)
        case "sanitizer":
            from gpu import sanitizer

            sanitizer.run(machine, record)
        case "tune":
            from gpu import tune

            tune.run(machine, record)
        case _:
            raise ValueError(f"no part {name!r}")


def device(machine: object, record: Record) -> None:
    """Part device: what is measured on, and what it does at best."""
    import torch

    from gpu.device import Machine, interleaved

    assert isinstance(machine, Machine)
    record.fact({"device": _facts(machine), "versions": _versions()})
    size = machine.pick(8192, 8192, 64)
    a, b = (torch.randn(size, size, device=machine.device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    case = f"matrix product, {size}³, bf16, random numbers"
    found = interleaved(machine, record, case, {"torch.mm": lambda: torch.mm(a, b, out=out)}, 10)
    record.row(case, "rate", 2 * size**3 / found["torch.mm"].median / 1e9, "TFLOP/s")


def _facts(machine: object) -> dict[str, object]:
    import torch

    from gpu.device import Machine

    assert isinstance(machine, Machine)
    if machine.device.type != "cuda":
        return {"name": "CPU in place of a GPU", "slug": "dry", "driver": "none"}
    properties = torch.cuda.get_device_properties(machine.device)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        driver = "unknown"
    return {
        "name": properties.name,
        "slug": "-".join("".join(c if c.isalnum() else " " for c in properties.name.lower()).split()),
        "driver": driver.split("\n")[0].strip(),
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
    }


def _versions() -> dict[str, str]:
    import importlib.metadata

    import torch

    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
    }
    for name in (
        "triton",
        "transformers",
        "peft",
        "liger-kernel",
        "quack-kernels",
        "torchao",
        "bitsandbytes",
    ):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
