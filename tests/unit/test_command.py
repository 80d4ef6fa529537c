"""The command that starts the ranks: what it is, that accelerate reads it as meant, and which clusters are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunesmith.errors import UserError
from tunesmith.recipe.load import Loaded, load_recipe
from tunesmith_launch.cluster import Options, count_accelerators, resolve
from tunesmith_launch.command import ACCELERATE_CONFIG, Cluster, Command, build

ARGUMENTS = ["my recipe.yaml", "run_name=a b", "--resume"]
RECIPE = """
model: {model_name_or_path: builtin:minilm}
data: {train: {path: a.csv, format: classification, columns: {text: text, label: label}}}
objective: {type: classification}
"""


def command(cluster: Cluster, environ: dict[str, str] | None = None) -> Command:
    return build(ARGUMENTS, cluster, environ or {}, "python")


def first_line(cluster: Cluster, environ: dict[str, str] | None = None) -> str:
    return command(cluster, environ).render().partition("\n")[0]


def test_one_process_is_the_rank_itself() -> None:
    one = command(Cluster(cores=8))
    assert not one.has_agent
    assert (
        one.render() == "OMP_WAIT_POLICY=passive python -m tunesmith 'my recipe.yaml' 'run_name=a b' --resume"
    )


def test_one_process_forgets_what_a_cluster_says_of_its_nodes() -> None:
    one = command(Cluster(), {"WORLD_SIZE": "4", "RANK": "1", "HOME": "/home/me"})
    assert one.render().startswith("env -u RANK -u WORLD_SIZE OMP_WAIT_POLICY=passive python -m tunesmith ")
    environment = one.environment({"WORLD_SIZE": "4", "RANK": "1", "HOME": "/home/me"})
    assert environment == {"HOME": "/home/me", "OMP_WAIT_POLICY": "passive"}


def test_several_processes_on_a_cpu() -> None:
    assert first_line(Cluster(num_processes=4, cores=10)) == (
        "ACCELERATE_USE_CPU=true OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300 "
        f"python -m accelerate.commands.launch --multi_gpu --config_file {ACCELERATE_CONFIG} "
        "--num_processes 4 --num_machines 1 --machine_rank 0 --main_process_port 0 --rdzv_backend static "
        "--mixed_precision no --dynamo_backend no "
        "-m tunesmith 'my recipe.yaml' 'run_name=a b' --resume"
    )


def test_several_machines_with_accelerators() -> None:
    cluster = Cluster(16, 2, 1, "node0", 29500, accelerators=8, cores=96)
    assert first_line(cluster) == (
        "OMP_NUM_THREADS=12 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300 "
        f"python -m accelerate.commands.launch --multi_gpu --same_network --config_file {ACCELERATE_CONFIG} "
        "--num_processes 16 --num_machines 2 --machine_rank 1 --main_process_port 29500 --rdzv_backend static "
        "--mixed_precision no --dynamo_backend no --main_process_ip node0 "
        "-m tunesmith 'my recipe.yaml' 'run_name=a b' --resume"
    )


def test_what_the_caller_set_is_kept() -> None:
    own = {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "active", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "9"}
    assert command(Cluster(2, cores=8), own).env == {"ACCELERATE_USE_CPU": "true"}


def test_more_processes_than_cores_get_a_thread_each() -> None:
    assert command(Cluster(8, cores=2)).env["OMP_NUM_THREADS"] == "1"


def test_the_files_are_shown() -> None:
    lines = command(Cluster(2)).render().splitlines()
    assert lines[1] == f"# {ACCELERATE_CONFIG}:"
    assert "#   distributed_type: 'NO'" in lines


@pytest.mark.parametrize("cluster", [Cluster(2, cores=4), Cluster(4, 2, 1, "127.0.0.1", 29511, cores=4)])
def test_accelerate_reads_it_as_meant(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing of the user's own accelerate config, which is full of other things here."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_multi_gpu_env

    own = tmp_path / "default_config.yaml"
    own.write_text(
        "{compute_environment: LOCAL_MACHINE, distributed_type: FSDP, mixed_precision: fp16, num_processes: 7,"
        " gpu_ids: '3', debug: true, dynamo_config: {dynamo_backend: INDUCTOR}, fsdp_config: {fsdp_version: 2}}"
    )
    monkeypatch.setattr(launch, "default_config_file", str(own))
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(own))
    for name in (
        "OMP_NUM_THREADS",
        "ACCELERATE_MIXED_PRECISION",
        "ACCELERATE_USE_FSDP",
        "ACCELERATE_DEBUG_MODE",
    ):
        monkeypatch.delenv(name, raising=False)
    built = command(cluster)
    for name, value in built.env.items():
        monkeypatch.setenv(name, value)
    assert built.argv[:3] == ("python", "-m", "accelerate.commands.launch")
    parser: Any = launch.launch_command_parser()
    args, _, from_config = launch._validate_launch_command(parser.parse_args(list(built.argv[3:])))
    assert (args.multi_gpu, args.use_fsdp, args.use_deepspeed, args.cpu) == (True, False, False, False)
    assert (args.num_processes, args.num_machines, args.machine_rank) == (
        cluster.num_processes,
        cluster.num_machines,
        cluster.machine_rank,
    )
    assert (args.module, args.training_script, args.training_script_args) == (True, "tunesmith", ARGUMENTS)
    assert not from_config
    environment = prepare_multi_gpu_env(args)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    assert environment["ACCELERATE_DYNAMO_BACKEND"] == "NO"
    assert environment["OMP_NUM_THREADS"] == "2"
    assert "ACCELERATE_USE_FSDP" not in environment
    assert "ACCELERATE_DEBUG_MODE" not in environment
    assert args.nproc_per_node == "2"
    if cluster.num_machines > 1:
        assert (args.master_addr, args.master_port, args.node_rank) == ("127.0.0.1", "29511", 1)


def loaded(tmp_path: Path, *overrides: str) -> Loaded:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    return load_recipe(path, overrides)


CPU = {"TUNESMITH_DEVICE": "cpu"}


def test_a_cpu_runs_one_process_by_default(tmp_path: Path) -> None:
    cluster = resolve(Options(), loaded(tmp_path), CPU)
    assert (cluster.num_processes, cluster.num_machines, cluster.accelerators) == (1, 1, 0)
    assert cluster.main_process_port is None
    assert cluster.cores >= 1


def test_accelerators_are_the_default_number_on_every_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith_launch.cluster.count_accelerators", lambda _: 4)
    machines = Options(num_machines=2, machine_rank=1, main_process_ip="node0")
    cluster = resolve(machines, loaded(tmp_path), {})
    assert (cluster.num_processes, cluster.processes_here, cluster.main_process_port) == (8, 4, 29500)
    assert resolve(Options(), loaded(tmp_path, "parallel.strategy=single"), {}).num_processes == 1
    with pytest.raises(UserError, match="5 processes on this machine, which shows 4 accelerators"):
        resolve(Options(num_processes=5), loaded(tmp_path), {})


@pytest.mark.parametrize(
    ("options", "override", "message"),
    [
        (
            Options(num_processes=2),
            "parallel.strategy=single",
            "parallel.strategy: single runs one process, not 2",
        ),
        (Options(), "parallel.strategy=ddp", "parallel.strategy: ddp needs two processes or more"),
        (Options(main_process_ip="node0"), "seed", "no effect without --num-machines"),
        (Options(machine_rank=1), "seed", "no effect without --num-machines"),
        (Options(num_machines=2), "seed", "--num-machines 2 needs --main-process-ip"),
        (
            Options(num_machines=2, main_process_ip="a"),
            "seed",
            "needs --main-process-ip .* and --machine-rank",
        ),
        (Options(None, 2, 2, "a"), "seed", "--machine-rank 2: with --num-machines 2 the ranks are 0 to 1"),
        (Options(3, 2, 0, "a"), "seed", "must be a multiple of --num-machines 2"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, options: Options, override: str, message: str) -> None:
    recipe = loaded(tmp_path, "training.seed=1" if override == "seed" else override)
    with pytest.raises(UserError, match=message):
        resolve(options, recipe, CPU)


def test_a_start_inside_another_launcher_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="LOCAL_RANK is set"):
        resolve(Options(), loaded(tmp_path), CPU | {"LOCAL_RANK": "0"})


def test_without_device_files_there_is_no_accelerator(tmp_path: Path) -> None:
    assert count_accelerators({}, tmp_path) == 0
    assert count_accelerators(CPU) == 0
