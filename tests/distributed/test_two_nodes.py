"""A run on two machines is the run on one: the same losses, started by `tunesmith train` or by `accelerate launch`
on each of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.nodes import Nodes
from tests.support import metrics, tiny_recipe
from tunesmith.recipe import Recipe
from tunesmith.recipe.load import dump_recipe

pytestmark = pytest.mark.slow

STRATEGIES = ["ddp", "zero3", "fsdp2"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TUNESMITH_DEVICE": "cpu", "ACCELERATE_USE_CPU": "true"}
TRAIN = "from tunesmith_launch.cli import main; main()"


def written(folder: Path, name: str, strategy: str) -> tuple[Recipe, Path]:
    recipe = tiny_recipe(
        folder,
        training={"max_steps": 6},
        checkpoint={"save_steps": 3},
        parallel={"strategy": strategy, "timeout": 60},
        run_name=name,
    )
    path = folder / f"{name}.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    return recipe, path


def by_tunesmith(path: Path, nodes: Nodes, rank: int) -> list[str]:
    machines = ["--num-machines", "2", "--machine-rank", str(rank), "--main-process-ip", nodes[0].address]
    return [sys.executable, "-c", TRAIN, "train", str(path), "--num-processes", "2", *machines]


def by_accelerate(path: Path, nodes: Nodes, rank: int) -> list[str]:
    how = ["--multi_gpu", "--num_processes=2", "--num_machines=2", f"--machine_rank={rank}", "--same_network"]
    how += [f"--main_process_ip={nodes[0].address}", "--main_process_port=29500", "--rdzv_backend=static"]
    how += ["--mixed_precision=no", "--dynamo_backend=no"]
    return [sys.executable, "-m", "accelerate.commands.launch", *how, "-m", "tunesmith", str(path)]


def finish(processes: Sequence[subprocess.Popen[str]]) -> None:
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said


def losses(recipe: Recipe) -> list[Any]:
    return [row["loss"] for row in metrics(recipe) if "loss" in row]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_machines_train_as_one_does(tmp_path: Path, nodes: Nodes, strategy: str) -> None:
    one, path = written(tmp_path, "one", strategy)
    argv = [sys.executable, "-c", TRAIN, "train", str(path), "--num-processes", "2"]
    alone = subprocess.Popen(
        argv,
        cwd=tmp_path,
        env=os.environ | ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    finish([alone])
    expected = losses(one)
    assert len(expected) == 6
    for name, command in (("tunesmith", by_tunesmith), ("accelerate", by_accelerate)):
        recipe, path = written(tmp_path, name, strategy)
        finish(
            [
                nodes.start(node, command(path, nodes, rank), ENVIRONMENT, tmp_path)
                for rank, node in enumerate(nodes)
            ]
        )
        assert losses(recipe) == expected, name
