"""The preflight in real processes on hosts out of network namespaces: a few of the faults that
bench/preflight_faults.py injects, a clean run, and what training does with a finding."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.distributed.nodes import Nodes
from tests.distributed.preflight_cases import CASES, CLEAN
from tests.distributed.preflight_jobs import LIMIT, NAMES, Case, machines, make_folders, run_case
from tests.support import launch, tiny_recipe

TUNESMITH = Path(sys.executable).with_name("tunesmith")
BY_NAME = {case.name: case for case in CASES}

# one for each way by which a fault comes to light
CHOSEN = [
    "one byte of the data",
    "the recipe differs",
    "transformers is older",
    "a clock 5 minutes ahead",
    "/dev/shm full",
    "an output folder of its own",
    "loopback is chosen",
    "a link slowed ten times",
    "two nodes that do not reach each other",
    "a sum that is wrong",
    "a rank twice",
    "another service at rank 0's port",
    "the same machine rank twice",
    "a machine that does not come",
    "the port is taken",
]
THREE = pytest.mark.parametrize("nodes", [3], indirect=True)


@pytest.mark.slow
@THREE
@pytest.mark.parametrize("name", CHOSEN)
def test_a_fault_is_named_with_node_and_fix(name: str, nodes: Nodes) -> None:
    case = BY_NAME[name]
    result = run_case(case, nodes)
    assert None not in result.codes, f"hangs: {result.output}"
    assert result.named, result.output
    assert result.fixed, result.line
    assert case.code in result.codes, result.output


@pytest.mark.slow
@THREE
@pytest.mark.parametrize("case", CLEAN, ids=lambda case: case.name)
def test_sound_machines_give_nothing(case: Case, nodes: Nodes) -> None:
    result = run_case(case, nodes)
    assert set(result.codes) == {0}, result.output
    assert "✗ " not in result.output
    assert "! " not in result.output
    assert "0 errors, 0 warnings" in result.output


@pytest.mark.slow
def test_nothing_is_left_in_the_output_folder(tmp_path: Path, nodes: Nodes) -> None:
    make_folders(tmp_path)
    (tmp_path / "out").rmdir()
    jobs = []
    for start in machines():
        words = [word.replace("{port}", "29511") for word in start.cli]
        command = [TUNESMITH, "check", "r.yaml", "--distributed", *words]
        env = {"OMP_NUM_THREADS": "1", "TUNESMITH_DEVICE": "cpu"}
        jobs.append(nodes.start(nodes[start.node], command, env, tmp_path / NAMES[start.node]))
    said = [job.communicate(timeout=LIMIT) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    assert "✓ an all-reduce of known values is exact" in said[0][0]
    assert said[1][0] == ""  # machine 0 reports
    assert not (tmp_path / "out").exists()


# rank 1 has cached rows that another tokenizer or code has made
OTHER_ROWS = """
import os
import tunesmith.preflight.agree as agree
if os.environ["RANK"] == "1":
    digest = agree.table_digest
    agree.table_digest = lambda folder: "x" + digest(folder)
"""
OTHER_DATA = """
import os
import tunesmith.preflight.content as content
os.environ["LOCAL_RANK"] = "0"
if os.environ["RANK"] == "1":
    digest = content.digest_file
    content.digest_file = lambda path: digest(path) + "x"
"""


@pytest.mark.slow
def test_training_does_not_begin_where_ranks_disagree(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    done = launch(recipe, processes=2, driver=OTHER_DATA)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "train.jsonl has another content" in line]
    assert len(lines) == 1, done.stderr
    run = tmp_path / "runs" / "tiny"
    assert json.loads((run / "exit.json").read_text())["code"] == 2
    assert not (run / "metrics.jsonl").exists()


@pytest.mark.slow
def test_training_does_not_begin_on_other_rows(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    done = launch(recipe, processes=2, driver="import os\nos.environ['LOCAL_RANK'] = '0'\n" + OTHER_ROWS)
    assert done.returncode != 0
    assert "the prepared train rows are others than elsewhere" in done.stderr
    assert json.loads((tmp_path / "runs" / "tiny" / "exit.json").read_text())["code"] == 2


@pytest.mark.slow
def test_what_was_agreed_is_in_the_facts(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, training={"max_steps": 1})
    done = launch(recipe, processes=2)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "runs" / "tiny" / "environment.json").read_text())["facts"]["preflight"]
    assert [node["ranks"] for node in facts["nodes"]] == [2]
    assert facts["warnings"] == []
    assert not [path for path in (tmp_path / "runs").iterdir() if path.name.startswith(".")]
