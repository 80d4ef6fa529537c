"""A run can be stopped and continued: by the same engine bit for bit, by another, or by more ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from objective_cases import (
    ADAMW,
    CASES,
    OFFLOADED,
    SHARDED,
    SHARED,
    SPLIT,
    TWO,
    WHOLE,
    Layout,
    Run,
    assert_same_curves,
    read_result,
    recipe,
)
from rank_pool import Pools
from tunesmith.run import Resume, run


def interrupted(run_dir: Path, copy: Path, step: int) -> Path:
    """A copy of a finished run as it stood after the checkpoint of `step`."""
    shutil.copytree(run_dir, copy)
    for path in copy.glob("checkpoint-*"):
        if int(path.name[11:]) > step:
            shutil.rmtree(path)
    shutil.rmtree(copy / "final")
    rows = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    kept = [json.dumps(row) for row in rows if row["step"] <= step]
    (copy / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    return copy


BF16 = ("bf16_master", "bf16_stochastic", "bf16_kahan")


@pytest.mark.parametrize(
    ("strategy", "precision"),
    [(name, "fp32") for name in ("ddp", *SHARDED, *OFFLOADED, "tensor", "sequence")]
    + [("fsdp2", precision) for precision in BF16],
)
def test_a_resumed_run_ends_with_the_same_bits(
    workshop: Path, pools: Pools, strategy: str, precision: str
) -> None:
    parallel = {"ddp": {"strategy": "ddp"}, **SHARDED, **OFFLOADED, "tensor": SPLIT, "sequence": SHARED}[
        strategy
    ]
    made = recipe(
        workshop, CASES["sft"], ADAMW, TWO, 6, training={"precision": precision},
        parallel=parallel, checkpoint={"save_steps": 3, "save_total_limit": None, "final": "last"},
    )  # fmt: skip
    whole = made.model_copy(update={"run_name": f"whole-{strategy}-{precision}"})
    pools[2].run(whole, workshop)
    again = made.model_copy(update={"run_name": f"again-{strategy}-{precision}"})
    runs = workshop / "runs"
    interrupted(runs / whole.run_name, runs / again.run_name, 3)
    pools[2].run(again, workshop, Resume(resume=True))
    a, b = (load_file(runs / r.run_name / "final" / "model.safetensors") for r in (whole, again))
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.equal(b[name]), name


@pytest.mark.parametrize(
    ("saved", "continued"),
    [("ddp", "fsdp2"), ("fsdp2", "zero3"), ("zero3", "zero1"), ("zero1", "single"), ("fsdp2", "fsdp2x4"),
     ("single", "zero2"), pytest.param("zero3", "zero3x4", marks=pytest.mark.slow),
     pytest.param("zero2", "ddpx4", marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_run_goes_on_with_another_engine(
    workshop: Path, pools: Pools, train: Run, saved: str, continued: str
) -> None:
    """The world may change too: the same rows, the same losses."""
    expected = train("single_label", ADAMW, WHOLE, 6)
    before = _cross(workshop, pools, saved, f"from-{saved}-{continued}", None)
    copy = f"to-{saved}-{continued}"
    interrupted(workshop / "runs" / before, workshop / "runs" / copy, 3)
    _cross(workshop, pools, continued, copy, Resume(resume=True))
    found = read_result(workshop / "runs" / copy)
    assert_same_curves(found, expected)


def _cross(workshop: Path, pools: Pools, engine: str, run_name: str, how: Resume | None) -> str:
    strategy, _, many = engine.partition("x")
    world_size = 1 if strategy == "single" else int(many or 2)
    made = recipe(
        workshop, CASES["single_label"], ADAMW, Layout(16 // world_size, world_size), 6,
        parallel={"strategy": strategy}, checkpoint={"save_steps": 3, "save_total_limit": None, "final": "last"},
        training={"per_device_train_batch_size": 2},
    ).model_copy(update={"run_name": run_name})  # fmt: skip
    if world_size == 1:
        run(made, workshop, how or Resume())
    else:
        pools[world_size].run(made, workshop, how)
    return run_name
