"""What each group of parameters takes, and the peak that the start-up report predicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bench.measure_memory import Case
from tests.unit.test_planning import LLAMA, LORA, found
from tunesmith.planning.groups import memory_table
from tunesmith.planning.predict import Built, predict_peak
from tunesmith.planning.quantised import four_bit_bytes
from tunesmith.preflight.folder import adapted_shapes, room
from tunesmith.recipe import Recipe

SHAPES = [(8, 16), (16,)]
NUMEL = 8 * 16 + 16


def recipe(parallel: dict[str, Any] | None = None, **settings: Any) -> Recipe:
    case = Case("groups", LLAMA, parallel=parallel or {"strategy": "single"}, length=32, **settings)
    return case.recipe()


def group(**settings: Any) -> dict[str, Any]:
    rates = {"learning_rate": 1e-4, "weight_decay": 0.01}
    kind = {"tag": "decay", "trained_from": 0, "dtype": "float32", "shapes": SHAPES, "parameters": NUMEL}
    return kind | rates | settings


def amounts(row: dict[str, Any]) -> tuple[int, int, int]:
    return row["weights"], row["gradients"], row["optimizer"]


def test_a_group_takes_weights_gradients_and_what_the_optimizer_keeps() -> None:
    frozen = group(tag="frozen", trained_from=None)
    first, rest, total = memory_table([group(), frozen], recipe(), 1)
    # AdamW: two moments in fp32, and a step counter per tensor
    assert amounts(first) == (4 * NUMEL, 4 * NUMEL, 8 * NUMEL + 8)
    assert amounts(rest) == (4 * NUMEL, 0, 0)
    assert amounts(total) == (8 * NUMEL, 4 * NUMEL, 8 * NUMEL + 8)
    assert total["parameters"] == 2 * NUMEL
    assert "shapes" not in first


def test_what_opens_later_has_its_state_from_the_start() -> None:
    later, _ = memory_table([group(trained_from=100)], recipe(), 1)
    assert amounts(later) == (4 * NUMEL, 4 * NUMEL, 8 * NUMEL + 8)
    assert later["trained_from"] == 100


def test_bf16_parameters_have_the_state_of_their_rounding() -> None:
    settings = recipe(precision="bf16_kahan")
    row, _ = memory_table([group(dtype="bfloat16")], settings, 1)
    assert amounts(row) == (2 * NUMEL, 2 * NUMEL, 6 * NUMEL)


@pytest.mark.parametrize("kind", [{"type": "nf4"}, {"type": "fp4", "double_quant": False}, {"type": "int8"}])
def test_quantised_weights_count_their_scales(kind: dict[str, Any]) -> None:
    settings = recipe(adapters=(LORA,), quantization=kind)
    shapes = [(64, 160), (160, 64)]
    row, _ = memory_table(
        [group(trained_from=None, dtype=kind["type"], shapes=shapes, parameters=2 * 64 * 160)], settings, 1
    )
    nested = kind.get("double_quant", True)
    expected = 2 * four_bit_bytes(64 * 160, double_quant=nested)
    if kind["type"] == "int8":
        expected = 2 * 64 * 160 + 4 * (64 + 160)
    assert amounts(row) == (expected, 0, 0)


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        ({"strategy": "ddp"}, (4.0, 4.0, 8.0)),
        ({"strategy": "zero1"}, (4.0, 4.0, 3.0)),
        ({"strategy": "zero2"}, (4.0, 1.0, 3.0)),
        ({"strategy": "zero3"}, (1.0, 1.0, 3.0)),
        ({"strategy": "fsdp2"}, (1.0, 1.0, 2.0)),
        ({"strategy": "fsdp2", "shard_size": 2}, (2.0, 2.0, 4.0)),
        ({"strategy": "fsdp2", "offload": True}, (0.0, 0.0, 0.0)),
        ({"strategy": "zero2", "offload_optimizer": True}, (4.0, 1.0, 0.0)),
    ],
    ids=lambda one: "-".join(map(str, one.values())) if isinstance(one, dict) else "",
)
def test_a_device_holds_its_share(parallel: dict[str, Any], expected: tuple[float, ...]) -> None:
    """Bytes an element on one of four ranks; DeepSpeed has an fp32 copy of what it updates."""
    shapes = [(400, 100)]
    rows = memory_table([group(shapes=shapes, parameters=40_000)], recipe(parallel), 4)
    assert [value / 40_000 for value in amounts(rows[0])] == pytest.approx(expected, abs=1e-3)


def test_the_table_is_the_plans_weights_and_state() -> None:
    about = found(adapters=(LORA,), quantization="nf4")
    parameters = [p for unit in about.workload.units for p in unit.parameters]
    kinds = {
        "lora": [p.shape for p in parameters if p.trainable],
        "plain": [p.shape for p in parameters if not p.trainable and p.stored == 4 * p.numel],
        "nf4": [p.shape for p in parameters if p.stored != 4 * p.numel],
    }
    groups = [
        group(
            tag=tag,
            shapes=shapes,
            parameters=sum(torch.Size(shape).numel() for shape in shapes),
            trained_from=0 if tag == "lora" else None,
            dtype="nf4" if tag == "nf4" else "float32",
        )
        for tag, shapes in kinds.items()
    ]
    *_, total = memory_table(groups, about.recipe, 1)
    assert total["parameters"] == about.workload.numel
    assert total["weights"] == about.workload.stored


def test_the_predicted_peak_is_the_plans_with_the_process() -> None:
    settings = recipe(adapters=(LORA,))
    told = predict_peak(settings, Path(), Built(None, 1, "cpu", rows=4))
    assert told["bytes"] == sum(told["parts"].values()) > 0
    assert told["moment"]
    before_a_step = told["bytes"] - told["parts"]["optimizer"]
    beside = predict_peak(settings, Path(), Built(None, 1, "cpu", rows=4, process_peak=before_a_step + 1_000))
    assert beside["process_bytes"] == 1_000
    assert beside["bytes"] == told["bytes"] + 1_000
    shorter = predict_peak(settings, Path(), Built(None, 1, "cpu", rows=4, longest=16))
    assert shorter["bytes"] < told["bytes"]


def test_what_cannot_be_predicted_is_said_and_stops_nothing() -> None:
    adapters = ({"type": "lora", "target_modules": ["no_such_module"]},)
    told = predict_peak(recipe(adapters=adapters), Path(), Built(None, 1, "cpu", rows=4))
    assert told["bytes"] is None
    assert "no_such_module" in told["why"]


def on_disk(tmp_path: Path, **trainable: Any) -> Recipe:
    """A recipe on a folder with the LLAMA's config and weights."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    shapes = {p.name: p.shape for unit in found().workload.units for p in unit.parameters}
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    return Case("on disk", str(tmp_path), length=32, **trainable).recipe()


def test_adapters_need_little_room_on_the_disk(tmp_path: Path) -> None:
    whole, some = on_disk(tmp_path), on_disk(tmp_path, adapters=(LORA,))
    full, little = room(whole, tmp_path), room(some, tmp_path)
    assert full is not None
    assert little is not None
    trained = sum(torch.Size(shape).numel() for shape in adapted_shapes(some, tmp_path))
    assert trained == 5 * 4 * ((64 + 64) + (64 + 32))
    # one checkpoint with weights and two moments, and final/
    assert little[0] == pytest.approx(16 * trained, rel=0.02)
    assert little[1] < full[0] / 10


@pytest.mark.parametrize("start", ["pissa", "olora", "loftq"])
def test_a_start_that_changes_the_base_saves_it_too(tmp_path: Path, start: str) -> None:
    plain = room(on_disk(tmp_path, adapters=(LORA,)), tmp_path)
    changed = room(on_disk(tmp_path, adapters=(LORA | {"init_lora_weights": start},)), tmp_path)
    assert plain is not None
    assert changed is not None
    assert changed[0] - plain[0] == 4 * found().workload.numel
