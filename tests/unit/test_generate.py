"""What `tunesmith launch` generates: against golden files, and read by those who will read it. After a change that is
meant, TUNESMITH_WRITE_GOLDEN=1 writes the golden files anew."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tunesmith.errors import UserError
from tunesmith.recipe.load import load_recipe
from tunesmith_launch.generate import direct, kubernetes, slurm
from tunesmith_launch.generate.job import Job, read

GOLDEN = Path(__file__).with_name("golden")
RECIPE = """\
# what is trained
model: {model_name_or_path: builtin:minilm}
data: {train: {path: /data/a.csv, format: classification, columns: {text: text, label: label}}}
objective: {type: classification}
"""
TOPOLOGIES = [(1, 8), (4, 8), (2, 0)]
OVERRIDES = ("optim.learning_rate=1e-4", "data.cache_dir=/c/Bob's runs $(x)")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "banking.yaml"
    path.write_text(RECIPE)
    return path


def job(nodes: int, gpus: int) -> Job:
    return Job("recipes/banking.yaml", OVERRIDES, "banking", nodes, gpus)


def address(nodes: int) -> direct.Address:
    return direct.Address("node0" if nodes > 1 else None, 29500)


def compare(name: str, text: str) -> None:
    file = GOLDEN / name
    if os.environ.get("TUNESMITH_WRITE_GOLDEN") == "1":
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


def slurm_script(nodes: int, gpus: int) -> str:
    """The plainest, for one node; else with everything that can be asked for."""
    if nodes == 1:
        return slurm.script(job(nodes, gpus), slurm.Options("/home/me/project"))
    options = slurm.Options(
        "/home/me/my project",
        "gpu",
        "lab",
        "12:00:00",
        48,
        "400G",
        600,
        5,
        ("module load cuda", "source .venv/bin/activate"),
        ("--qos=high",),
    )
    return slurm.script(job(nodes, gpus), options)


@pytest.mark.parametrize(("nodes", "gpus"), TOPOLOGIES)
def test_slurm(nodes: int, gpus: int, tmp_path: Path) -> None:
    text = slurm_script(nodes, gpus)
    compare(f"slurm-{nodes}x{gpus}.sh", text)
    shellcheck(text, tmp_path / "whole.sh")
    if nodes > 1:
        (inner,) = re.findall(r"(?s)on_node='\n(.*?)\n'\n", text)
        shellcheck(f"#!/bin/bash\n{inner}\n", tmp_path / "inner.sh")


def shellcheck(text: str, file: Path) -> None:
    file.write_text(text, encoding="utf-8")
    checker = Path(sys.executable).with_name("shellcheck")
    # not looked at: the user's own file that --setup names; a `$(x)` in the user's argument that stays as it is;
    # that a trap's function is called nowhere
    words = [checker, "--severity=style", "--exclude=SC1091,SC2016,SC2329", file]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_slurm_refuses_what_would_end_a_line() -> None:
    for options in (
        slurm.Options("/a\n#SBATCH --account=other"),
        slurm.Options("/a", partition=""),
        slurm.Options("/a", setup=("true\nfalse",)),
        slurm.Options("/a", sbatch=("--qos=a\n",)),
    ):
        with pytest.raises(UserError, match="is empty or holds characters"):
            slurm.script(job(1, 1), options)


# Kubernetes


def kubernetes_options(**values: Any) -> kubernetes.Options:
    return kubernetes.Options(**{"name": "banking", "image": "registry/tunesmith:1", **values})


def manifest(recipe: Path, nodes: int, gpus: int, **options: Any) -> str:
    made, loaded = read(recipe, OVERRIDES, nodes, gpus)
    return kubernetes.manifest(made, kubernetes_options(**options), loaded, recipe.read_bytes().decode())


def documents(text: str) -> tuple[Any, Any]:
    config_map, job_set = YAML(typ="safe", pure=True).load_all(text)
    return config_map, job_set


@pytest.mark.parametrize(("nodes", "gpus"), TOPOLOGIES)
def test_kubernetes(nodes: int, gpus: int, recipe: Path) -> None:
    options: dict[str, Any] = {"claim": "training", "mount": "/data"}
    if nodes == 2:
        options |= {"namespace": "lab", "cpus_per_node": 16, "memory_per_node": "64Gi", "secret": "mine"}
    text = manifest(recipe, nodes, gpus, **options)
    compare(f"kubernetes-{nodes}x{gpus}.yaml", text)
    config_map, job_set = documents(text)
    assert_valid(config_map, job_set)
    assert config_map["data"] == {"banking.yaml": RECIPE}


def assert_valid(config_map: Any, job_set: Any) -> None:
    """By the published models: types and required fields are checked; a field that they do not know would be dropped,
    so what they write must be what they read."""
    from kubeflow_trainer_api.models import IoK8sApiCoreV1ConfigMap, JobsetV1alpha2JobSet

    for model, values in ((IoK8sApiCoreV1ConfigMap, config_map), (JobsetV1alpha2JobSet, job_set)):
        read_back = model.from_dict(values)
        assert read_back is not None
        assert read_back.to_dict() == values


def test_the_validation_sees_faults(recipe: Path) -> None:
    for key, value in (("restartPolcy", "Never"), ("terminationGracePeriodSeconds", "5"), ("containers", {})):
        config_map, job_set = documents(manifest(recipe, 2, 8))
        job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][key] = value
        with pytest.raises((AssertionError, ValueError, TypeError, AttributeError)):
            assert_valid(config_map, job_set)


def container(text: str) -> dict[str, Any]:
    _, job_set = documents(text)
    return job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]


def test_a_pods_command_is_what_was_typed(recipe: Path) -> None:
    """Kubernetes expands $(NAME) and makes $$( a $(."""
    command = container(manifest(recipe, 2, 0))["command"]
    assert command[:5] == [
        "tunesmith",
        "train",
        "/etc/tunesmith/banking.yaml",
        OVERRIDES[0],
        OVERRIDES[1].replace("$(", "$$("),
    ]
    assert "$(JOB_COMPLETION_INDEX)" in command
    assert "banking-machine-0-0.banking" in command
    assert "--main-process-ip" not in container(manifest(recipe, 1, 8))["command"]


def test_the_recipe_keeps_its_run_name_in_the_pod(recipe: Path, tmp_path: Path) -> None:
    odd = recipe.rename(tmp_path / "my recipe (2).yaml")
    text = manifest(odd, 1, 8)
    config_map, _ = documents(text)
    ((file, content),) = config_map["data"].items()
    (tmp_path / file).write_text(content)
    assert load_recipe(tmp_path / file).recipe.run_name == load_recipe(odd).recipe.run_name
    assert container(text)["command"][2] == f"/etc/tunesmith/{file}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a\n",
        "a",
        "a\n\n",
        "\na\n",
        "  a\n b\n",
        "a \nb\n",
        "a\tb\n",
        "a\r\nb\r\n",
        "a: 'ä→'\n",
        "---\na\n...\n",
        "#\n",
    ],
)
def test_every_recipe_arrives_as_it_is(text: str, recipe: Path) -> None:
    made, loaded = read(recipe, (), 1, 1)
    config_map, _ = documents(kubernetes.manifest(made, kubernetes_options(), loaded, text))
    assert config_map["data"] == {"banking.yaml": text}


def test_what_a_pod_would_not_find_is_refused(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    for override in (
        "data.train.path=a.csv",
        "data.cache_dir=cache",
        "model.model_name_or_path=./models",
        "model.model_name_or_path=models",
        "model.tokenizer=models",
    ):
        key, _, value = override.partition("=")
        made, loaded = read(recipe, (override,), 1, 1)
        with pytest.raises(UserError, match=f"banking.yaml: {key.removesuffix('.path')}: {value}: in a pod"):
            kubernetes.manifest(made, kubernetes_options(), loaded, RECIPE)
    for override in (
        "data.train.path=hub:ag_news",
        "data.train.path=$D/a.csv",
        "model.model_name_or_path=org/models",
    ):
        made, loaded = read(recipe, (override,), 1, 1)
        kubernetes.manifest(made, kubernetes_options(), loaded, RECIPE)


def test_a_recipe_too_large_for_a_config_map_is_refused(recipe: Path) -> None:
    made, loaded = read(recipe, (), 1, 1)
    with pytest.raises(UserError, match="too many for a ConfigMap"):
        kubernetes.manifest(made, kubernetes_options(), loaded, "#" * 1_000_000)


def test_names_are_those_of_dns() -> None:
    assert kubernetes.name_of("Banking_77.v2", None) == "banking-77-v2"
    assert kubernetes.name_of("77", None) == "run-77"
    longest = kubernetes.name_of("x" * 128, None)
    assert len(f"{longest}-machine-0-9999-abcde") == 63
    assert kubernetes.name_of("x", "my-run") == "my-run"
    for bad in ("My", "a_b", "-a", "a-", "7a", "x" * 64, ""):
        with pytest.raises(UserError, match=re.escape(f"--name {bad}: ")):
            kubernetes.name_of("x", bad)
    assert kubernetes.volume("a:/b") == ("a", "/b")
    for bad in ("a", "a:b", ":/b", "a:/", "A:/b"):
        with pytest.raises(UserError, match="CLAIM:PATH"):
            kubernetes.volume(bad)


# accelerate and torchrun


@pytest.mark.parametrize(("nodes", "gpus"), TOPOLOGIES)
def test_accelerate(nodes: int, gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = direct.accelerate_config(job(nodes, gpus), address(nodes))
    compare(f"accelerate-{nodes}x{gpus}.yaml", config)
    file = tmp_path / "config.yaml"
    file.write_text(config)
    lines = direct.accelerate_lines(job(nodes, gpus), "CONFIG")
    compare(f"accelerate-{nodes}x{gpus}.txt", lines)
    commands = [shlex.split(line) for line in lines.splitlines() if not line.startswith("#")]
    assert len(commands) == nodes
    for machine, words in enumerate(commands):
        accelerate_reads_it_as_meant(words, file, machine, nodes, gpus, monkeypatch)


def accelerate_reads_it_as_meant(
    words: list[str], config: Path, machine: int, nodes: int, gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_multi_gpu_env

    variables = [word for word in words if word.startswith(("ACCELERATE_", "TUNESMITH_"))]
    assert variables == (["ACCELERATE_USE_CPU=true", "TUNESMITH_DEVICE=cpu"] if gpus == 0 else [])
    words = [str(config) if word == "CONFIG" else word for word in words[len(variables) :]]
    assert words[:2] == ["accelerate", "launch"]
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    parser: Any = launch.launch_command_parser()
    args, _, _ = launch._validate_launch_command(parser.parse_args(words[2:]))
    assert (args.multi_gpu, args.use_fsdp, args.use_deepspeed, args.cpu) == (True, False, False, False)
    assert (args.num_processes, args.num_machines) == (nodes * max(1, gpus), nodes)
    assert (args.module, args.training_script) == (True, "tunesmith")
    assert args.training_script_args == ["recipes/banking.yaml", *OVERRIDES]
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda _: False)
    environment = prepare_multi_gpu_env(args)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    assert "ACCELERATE_USE_FSDP" not in environment
    assert "ACCELERATE_USE_DEEPSPEED" not in environment
    if nodes > 1:
        assert (args.master_addr, args.master_port, args.node_rank) == ("node0", "29500", machine)


def test_accelerate_with_one_process() -> None:
    config = direct.accelerate_config(job(1, 0), direct.Address(None, 29500))
    assert YAML(typ="safe", pure=True).load(config)["distributed_type"] == "NO"


@pytest.mark.parametrize(("nodes", "gpus"), TOPOLOGIES)
def test_torchrun(nodes: int, gpus: int) -> None:
    from torch.distributed.run import get_args_parser

    lines = direct.torchrun_lines(job(nodes, gpus), address(nodes))
    compare(f"torchrun-{nodes}x{gpus}.txt", lines)
    commands = [shlex.split(line) for line in lines.splitlines() if not line.startswith("#")]
    assert len(commands) == nodes
    for machine, words in enumerate(commands):
        args = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
        assert (args.module, args.training_script) == (True, "tunesmith")
        assert args.training_script_args == ["recipes/banking.yaml", *OVERRIDES]
        assert args.nproc_per_node == str(max(1, gpus))
        if nodes > 1:
            assert (args.nnodes, args.node_rank, args.rdzv_backend) == (str(nodes), machine, "static")
            assert (args.master_addr, args.master_port) == ("node0", 29500)


def test_the_address_goes_with_the_number_of_machines() -> None:
    for made, place, words in (
        (job(2, 8), direct.Address(None, 1), "--nodes 2 needs --main-process-ip"),
        (job(1, 8), direct.Address("node0", 1), "--main-process-ip has no effect with one node"),
    ):
        for generate in (direct.accelerate_config, direct.torchrun_lines):
            with pytest.raises(UserError, match=words):
                generate(made, place)


# what all of them refuse, and never write


def test_recipe_and_topology_must_agree(recipe: Path) -> None:
    with pytest.raises(
        UserError, match="single runs one process, not 16; use auto, or ask for one by --nodes and"
    ):
        read(recipe, ("parallel.strategy=single",), 2, 8)
    with pytest.raises(UserError, match="ddp needs two processes or more"):
        read(recipe, ("parallel.strategy=ddp",), 1, 1)
    assert read(recipe, ("parallel.strategy=zero3",), 2, 0)[0].processes == 2
    with pytest.raises(UserError, match="is empty or holds characters"):
        read(recipe.rename(recipe.with_name("a\nb.yaml")), (), 1, 1)


KINDS = {
    "slurm": ["--output=made"],
    "kubernetes": ["--image=me/t", "--pvc=a:/b", "--output=made"],
    "accelerate": ["--main-process-ip=node0", "--output=made"],
    "torchrun": ["--main-process-ip=node0", "--output=made"],
}


def launch(kind: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    program = "from tunesmith_launch.cli import main; main()"
    words = ["launch", kind, "banking.yaml", "--nodes=2", "--gpus-per-node=8", *options]
    secrets = {
        "WANDB_API_KEY": "planted-wandb",
        "HF_TOKEN": "planted-hf",
        "AWS_SECRET_ACCESS_KEY": "planted-aws",
    }
    return subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=folder,
        env=os.environ | secrets | {"TUNESMITH_SUBMIT": "planted-other"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_written_once_and_hold_no_secret(kind: str, recipe: Path, tmp_path: Path) -> None:
    done = launch(kind, tmp_path, *KINDS[kind])
    assert done.returncode == 0, done.stderr
    assert done.stderr == "written to made\n"
    made = tmp_path / "made"
    first = made.read_text()
    assert "banking" in first
    said = (
        done.stdout
        + done.stderr
        + "".join(file.read_text() for file in tmp_path.rglob("*") if file.is_file())
    )
    assert "planted" not in said
    again = launch(kind, tmp_path, *KINDS[kind], "training.seed=9")
    assert (again.returncode, made.read_text()) == (2, first)
    assert again.stderr == "made exists already: replace it with --force, or name another file\n"
    forced = launch(
        kind, tmp_path, *KINDS[kind], "--force", "--main-process-port=1234" if kind != "slurm" else "--time=1"
    )
    assert forced.returncode == 0, forced.stderr
    assert made.read_text() != first


def test_what_is_not_written_is_printed(recipe: Path, tmp_path: Path) -> None:
    printed = launch("slurm", tmp_path)
    assert (printed.returncode, printed.stdout[:12]) == (0, "#!/bin/bash\n")
    warned = launch("kubernetes", tmp_path, "--image=me/t")
    assert warned.stderr == (
        "without --pvc the run's folder is lost with its pods, and they share no folder for their checkpoints\n"
    )
    assert [file.name for file in tmp_path.iterdir()] == ["banking.yaml"]
    unsound = launch("torchrun", tmp_path, "training.sead=1")
    assert unsound.returncode == 2
    assert "did you mean seed?" in unsound.stderr


def test_secrets_are_references(recipe: Path) -> None:
    environment = container(manifest(recipe, 2, 8, secret="mine"))["env"]
    assert {item["name"] for item in environment} == {"HF_TOKEN", "WANDB_API_KEY"}
    for item in environment:
        assert item.keys() == {"name", "valueFrom"}
        assert item["valueFrom"]["secretKeyRef"] == {"name": "mine", "key": item["name"], "optional": True}
