"""Generated jobs that train: under stand-ins for Slurm's commands, two nodes are two process trees of this machine. And
`--restart`, which they pass."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.slurm_stubs import install, requeued
from tests.support import assert_same_bits, final_weights, launch, metrics, run_dir, tiny_recipe
from tunesmith.recipe import Recipe
from tunesmith.recipe.load import dump_recipe

pytestmark = pytest.mark.slow

TUNESMITH = "from tunesmith_launch.cli import main; main()"
SECRETS = {"WANDB_API_KEY": "planted-wandb-key", "HF_TOKEN": "planted-hf-token"}

# acts on every process, after the given optimizer step is done
KILL_AFTER = """
import os, signal
from tunesmith.loop import Loop
plain = Loop._due
def due(self, step):
    if step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, step)
Loop._due = due
"""


class Slurm:
    """A folder from which jobs are submitted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = install(folder / "bin", tunesmith=TUNESMITH, sleep="")
        self.environment |= SECRETS | {"OMP_NUM_THREADS": "1", "SLURM_JOB_ID": str(_job_with_free_ports())}

    def generate(self, recipe: Path, *options: str) -> Path:
        words = ["launch", "slurm", str(recipe), "--nodes=2", "--gpus-per-node=0", *options]
        script = self.folder / "job.sh"
        subprocess.run(
            [self.folder / "bin" / "tunesmith", *words, f"--output={script}", "--force"],
            cwd=self.folder,
            env=os.environ | self.environment,
            capture_output=True,
            check=True,
        )
        return script

    def start(self, script: Path, restarts: int = 0) -> subprocess.Popen[str]:
        count = {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
        return subprocess.Popen(
            ["bash", script],
            cwd=self.folder,
            env=os.environ | self.environment | count,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def tell_to_stop(self) -> None:
        os.kill(int(Path(self.environment["SRUN_PID"]).read_text()), signal.SIGUSR1)


def _job_with_free_ports() -> int:
    """The number of a job whose two ports nothing listens on."""
    taken = {connection.laddr.port for connection in psutil.net_connections("inet") if connection.laddr}
    for job in range(os.getpid() % 7500, os.getpid() % 7500 + 7500):
        port = 15000 + 2 * (job % 7500)
        if not {port, port + 1} & taken:
            return job
    raise AssertionError("no free port")


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path)


def write(recipe: Recipe, folder: Path) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    return path


def test_a_job_of_two_nodes_is_stopped_requeued_and_ends(slurm: Slurm, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, training={"max_steps": 400}, checkpoint={"save_steps": 1000})
    script = slurm.generate(write(recipe, tmp_path), "--requeue=1")
    job = slurm.start(script)
    assert job.stderr is not None
    said = ""
    while "step 3/" not in said:
        line = job.stderr.readline()
        assert line, said
        said += line
    slurm.tell_to_stop()
    _, err = job.communicate(timeout=240)
    assert job.returncode == 5, said + err
    assert len(requeued(slurm.environment)) == 1
    (saved,) = run_dir(recipe).glob("checkpoint-*")
    stopped = int(saved.name.removeprefix("checkpoint-"))
    assert 3 <= stopped < 400

    job = slurm.start(script, restarts=1)
    _, err = job.communicate(timeout=240)
    assert job.returncode == 0, err
    assert [row["step"] for row in metrics(recipe) if "loss" in row] == list(range(1, 401))
    facts = json.loads((run_dir(recipe) / "environment.json").read_text())["facts"]
    assert facts["world_size"] == 2
    assert final_weights(recipe)
    for file in tmp_path.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert not [name for name, value in SECRETS.items() if value.encode() in content], file


def test_a_job_whose_input_is_wrong_ends_with_2_and_is_not_requeued(slurm: Slurm, tmp_path: Path) -> None:
    recipe = write(tiny_recipe(tmp_path), tmp_path)
    job = slurm.start(slurm.generate(recipe, "--requeue=3", "data.train.0.path=none.jsonl"))
    _, err = job.communicate(timeout=240)
    assert job.returncode == 2, err
    assert "none.jsonl: no such file" in err
    assert requeued(slurm.environment) == []


@pytest.mark.parametrize("kind", ["accelerate", "torchrun"])
def test_the_printed_commands_train_on_two_machines(kind: str, slurm: Slurm, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, training={"max_steps": 3})
    port = 15000 + 2 * int(slurm.environment["SLURM_JOB_ID"])
    words = [str(write(recipe, tmp_path)), "--nodes=2", "--gpus-per-node=0", "--main-process-ip=127.0.0.1"]
    environment = os.environ | slurm.environment | {"GLOO_SOCKET_IFNAME": "lo"}
    environment["PATH"] += f"{os.pathsep}{Path(sys.executable).parent}"
    printed = subprocess.run(
        [tmp_path / "bin" / "tunesmith", "launch", kind, *words, f"--main-process-port={port}"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    machines = [
        subprocess.Popen(
            ["bash", "-c", line], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
        )
        for line in printed.stdout.splitlines()
        if not line.startswith("#")
    ]
    assert len(machines) == 2
    ends = [machine.communicate(timeout=240)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], "".join(ends)
    assert [row["step"] for row in metrics(recipe) if "loss" in row] == [1, 2, 3]
    facts = json.loads((run_dir(recipe) / "environment.json").read_text())["facts"]
    assert facts["world_size"] == 2


# --restart


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Ten steps, never stopped, begun by --restart."""
    recipe = tiny_recipe(tmp_path_factory.mktemp("whole"))
    done = launch(recipe, "--restart")
    assert done.returncode == 0, done.stderr
    return recipe


def curve(recipe: Recipe) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in metrics(recipe)]


def test_restart_begins_again_where_nothing_whole_was_saved(whole: Recipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    assert launch(recipe, "--restart", driver=KILL_AFTER.format(step=3)).returncode == -signal.SIGKILL
    assert metrics(recipe)
    again = launch(recipe, "--restart")
    assert again.returncode == 0, again.stderr
    assert "has no whole checkpoint: the run begins again" in again.stdout
    assert curve(recipe) == curve(whole)
    assert_same_bits(final_weights(recipe), final_weights(whole))


def test_restart_continues_from_the_newest_whole_checkpoint(whole: Recipe, tmp_path: Path) -> None:
    """A start from the beginning would be killed again."""
    recipe = tiny_recipe(tmp_path)
    assert launch(recipe, driver=KILL_AFTER.format(step=7)).returncode == -signal.SIGKILL
    again = launch(recipe, "--restart", driver=KILL_AFTER.format(step=4))
    assert again.returncode == 0, again.stderr
    assert curve(recipe) == curve(whole)
    assert_same_bits(final_weights(recipe), final_weights(whole))


def test_restart_names_broken_checkpoints(whole: Recipe, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    assert launch(recipe, driver=KILL_AFTER.format(step=7)).returncode == -signal.SIGKILL
    broken = next((run_dir(recipe) / "checkpoint-5").rglob("*.safetensors"))
    broken.write_bytes(broken.read_bytes()[:-1])
    again = launch(recipe, "--restart")
    assert again.returncode == 0, again.stderr
    assert "skipped checkpoint-5: " in again.stdout
    assert "the run begins again" in again.stdout
    assert_same_bits(final_weights(recipe), final_weights(whole))


def test_restart_goes_with_no_other_flag(tmp_path: Path) -> None:
    recipe = write(tiny_recipe(tmp_path), tmp_path)
    words = ["-c", TUNESMITH, "train", str(recipe), "--restart", "--resume"]
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "--resume and --restart exclude each other\n")
