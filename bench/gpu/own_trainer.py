"""The setup of `end_to_end.full` through this project's own trainer, where what it imports is installed: a recipe, a
text file, `python -m tunesmith`."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gpu import end_to_end
from gpu.device import Machine
from gpu.record import Record
from gpu.results import ROOT

_NEEDS = ("pydantic", "ruamel", "rich", "datasets", "filelock", "pyarrow", "tokenizers", "psutil")


def run(machine: Machine, record: Record, text: Path | None) -> None:
    """Part end_to_end_trainer."""
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        record.note(f"not run: the trainer needs {', '.join(missing)}, not installed")
        return
    setup = end_to_end.setups(machine)[0]
    with tempfile.TemporaryDirectory() as folder, record.attempt("python -m tunesmith"):
        steps = _steps(record, setup, Path(folder), text)
        counted = steps[end_to_end.WARM_UP :]
        speeds = [step["tokens_per_second"] for step in counted]
        record.row(
            setup.name, "tunesmith's trainer: speed", statistics.median(speeds), "tokens/s", least=min(speeds)
        )
        if machine.device.type == "cuda":
            peak = max(step["peak_memory_bytes"] for step in steps)
            record.row(setup.name, "tunesmith's trainer: peak memory", peak / 1e9, "GB")
        record.note(
            f"tokens of {'synthetic words' if text is None else text.name}; bf16 parameters rounded "
            f"stochastically, gradient checkpointing; {len(counted)} steps after {end_to_end.WARM_UP}"
        )


def _steps(record: Record, setup: end_to_end.Setup, folder: Path, text: Path | None) -> list[dict[str, Any]]:
    """The lines that the run wrote of its steps."""
    source = folder / "text.txt"
    tokens = (end_to_end.WARM_UP + setup.steps) * setup.rows * setup.length
    source.write_text(_words(tokens) if text is None else text.read_text(encoding="utf-8"), encoding="utf-8")
    recipe = folder / "recipe.yaml"  # JSON is YAML
    recipe.write_text(json.dumps(_recipe(setup, source, folder)), encoding="utf-8")
    path = os.pathsep.join(str(ROOT / name) for name in ("trainer", "kernels", "launch"))
    subprocess.run(
        [sys.executable, "-m", "tunesmith", str(recipe)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        check=True,
        capture_output=True,
        timeout=max(record.remaining(), 1),
    )
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "tokens_per_second" in line]


def _recipe(setup: end_to_end.Setup, source: Path, folder: Path) -> dict[str, Any]:
    return {
        "model": {
            "init": "from_config",
            "tokenizer": {"type": "train_bpe", "vocab_size": min(16_384, setup.config["vocab_size"] - 100)},
            "gradient_checkpointing": True,
            "config": {"model_type": "llama", **setup.config},
        },
        "data": {
            "train": {"path": str(source), "format": "text"},
            "max_length": setup.length,
            "packing": True,
            "cache_dir": str(folder / "cache"),
        },
        "objective": {"type": "causal_lm"},
        "optim": {"learning_rate": end_to_end.LEARNING_RATE, "max_grad_norm": end_to_end.MAX_NORM},
        "training": {
            "max_steps": end_to_end.WARM_UP + setup.steps,
            "global_batch_size": setup.rows,
            "per_device_train_batch_size": setup.rows,
            "precision": "bf16_stochastic",
        },
        "tracking": {"logging_steps": 1},
        "output_dir": str(folder),
        "run_name": "run",
    }


def _words(count: int) -> str:
    """As many words as tokens are wanted; a word is at least one."""
    drawn = random.Random(0)
    known = ["".join(drawn.choices("etaoinshrdlu", k=drawn.randint(1, 9))) for _ in range(5000)]
    words = drawn.choices(known, [1 / (rank + 1) for rank in range(len(known))], k=count)
    return "\n\n".join(" ".join(words[start : start + 200]) for start in range(0, count, 200))
