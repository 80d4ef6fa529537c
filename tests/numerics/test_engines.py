"""What an engine promises of itself: that it engaged, or that the run stops and says what did not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from objective_cases import (
    ADAMW,
    CASES,
    SHARDED,
    SHARED,
    SPLIT,
    WHOLE,
    Layout,
    Run,
    apart,
    assert_same_curves,
    recipe,
)
from tunesmith.recipe.load import dump_recipe

# A driver breaks one thing in the library below an engine, and trains: the run must stop.
_DRIVER = """
import sys
from pathlib import Path
{sabotage}
from tunesmith.errors import TunesmithError
from tunesmith.recipe.load import load_recipe
from tunesmith.run import Resume, run
if __name__ == "__main__":
    try:
        run(load_recipe(Path(sys.argv[1])).recipe, Path(sys.argv[2]), Resume())
    except TunesmithError as error:
        print(f"exit {{error.exit_code}}: {{error}}")
"""

_SABOTAGE = {
    "fsdp2": (
        "import tunesmith.engine.fsdp2 as fsdp2\nfsdp2.fully_shard = lambda module, **kwargs: module",
        "fsdp2 did not engage: rank 0: the module was not sharded",
    ),
    "fsdp2-root-left-out": (
        "import tunesmith.engine.fsdp2 as fsdp2\n"
        "fsdp2.transformer_layers = lambda model: []\n"
        "sharded = fsdp2.fully_shard\n"
        "fsdp2.fully_shard = lambda module, **kwargs: sharded(module.model.model, **kwargs)",
        "fsdp2 did not engage: rank 0: the module was not sharded",
    ),
    "zero1": (
        "import tunesmith.engine.zero as zero\n"
        "made = zero.config\n"
        "def config(*args):\n"
        "    found = made(*args)\n"
        "    found['zero_optimization']['stage'] = 2\n"
        "    return found\n"
        "zero.config = config",
        "zero1 did not engage: rank 0: DeepSpeed runs stage 2",
    ),
    "zero2": (
        "import tunesmith.engine.zero as zero\n"
        "made = zero.config\n"
        "def config(*args):\n"
        "    found = made(*args) | {'gradient_clipping': 1.0}\n"
        "    found['zero_optimization']['compute_grad_norm'] = True\n"
        "    return found\n"
        "zero.config = config",
        "DeepSpeed clips by itself",
    ),
    "zero3": (
        "import accelerate\n"
        "accelerate.Accelerator.prepare = lambda self, module, optimizer: (module, optimizer)",
        "zero3 did not engage: rank 0: accelerate prepared a TrainModule",
    ),
}


@pytest.mark.parametrize("name", _SABOTAGE)
def test_an_engine_that_did_not_engage_stops_the_run(workshop: Path, tmp_path: Path, name: str) -> None:
    strategy = name.partition("-")[0]
    sabotage, expected = _SABOTAGE[name]
    made = recipe(
        workshop, CASES["sft"], ADAMW, Layout(4), 2, parallel={"strategy": strategy}, output_dir=str(tmp_path)
    ).model_copy(update={"run_name": name})
    (tmp_path / "driver.py").write_text(_DRIVER.format(sabotage=sabotage))
    (tmp_path / "recipe.yaml").write_text(dump_recipe(made))
    ran = subprocess.run(
        [sys.executable, tmp_path / "driver.py", tmp_path / "recipe.yaml", workshop],
        env=alone(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "exit 3: parallel.strategy: " in ran.stdout, ran.stdout + ran.stderr
    assert expected in ran.stdout


def alone() -> dict[str, str]:
    launched = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return {k: v for k, v in os.environ.items() if k not in launched} | {"TUNESMITH_DEVICE": "cpu"}


@pytest.mark.parametrize("strategy", [{"strategy": "ddp"}, *SHARDED.values(), SPLIT, SHARED], ids=str)
def test_the_timeout_bounds_every_process_group(train: Run, strategy: dict[str, Any]) -> None:
    """Also the groups that meshes and DeepSpeed make: there the collectives of a step run."""
    two = train("sft", ADAMW, Layout(4, 2), 1, parallel={**strategy, "timeout": 77.0})
    assert two.facts["collective_timeouts"] == [77.0]


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero3", "fsdp2"])
def test_a_parameter_without_a_use_decays_everywhere(train: Run, workshop: Path, strategy: str) -> None:
    """LayoutLM's pooler has no part in the loss of tagged tokens."""
    model = {
        "model_name_or_path": None,
        "init": "from_config",
        "dropout": 0.0,
        "tokenizer": str(workshop / "models" / "bert_tags"),
        "config": {
            "model_type": "layoutlm",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 160,
            "max_2d_position_embeddings": 4,
        },
    }
    one = train("token_classification", ADAMW, WHOLE, 4, model=model)
    assert one.facts["unused_parameters"] == [
        "model.layoutlm.pooler.dense.weight",
        "model.layoutlm.pooler.dense.bias",
    ]
    two = train("token_classification", ADAMW, Layout(4, 2), 4, model=model, parallel={"strategy": strategy})
    assert sorted(two.facts["unused_parameters"]) == sorted(one.facts["unused_parameters"])
    assert_same_curves(two, one)
    name = "layoutlm.pooler.dense.weight"
    assert apart(float(two.weights[name].norm()), float(one.weights[name].norm())) < 1e-6
