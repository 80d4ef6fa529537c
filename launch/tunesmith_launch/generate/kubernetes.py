"""A JobSet for Kubernetes: one Indexed Job with a pod per machine, each of which runs `tunesmith train`.

A rank of a world of fixed size cannot be replaced alone, so nothing restarts a single pod (`restartPolicy: Never`,
`backoffLimit: 0`): the first that fails fails the Job, and the JobSet then starts all pods again, unless the exit code
says that this is of no use. A Job fails for the reason PodFailurePolicy where one of its rules says FailJob; any other
reason means a restart, which is what a JobSet does where none of its rules fits. (Manuals of batch/v1 Job and of
jobset.x-k8s.io/v1alpha2.)"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import LiteralScalarString

from tunesmith.errors import UserError
from tunesmith.recipe.load import Loaded
from tunesmith_launch.generate.job import Job, printable

_FINAL_CODES = [1, 2, 3, 4]  # docs/run-folder.md; 5 and 6 can be resumed
_SECRETS = ("HF_TOKEN", "WANDB_API_KEY")
_FOLDER = "/etc/tunesmith"
_REPLICATED_JOB = "machine"
_LARGEST = 900_000  # bytes of a recipe; a ConfigMap holds 1 MiB


@dataclass(frozen=True, slots=True)
class Options:
    """`claim` and `mount`: the PersistentVolumeClaim that all pods share, and where; the working folder is there.
    `secret`: the Secret whose keys HF_TOKEN and WANDB_API_KEY, where it has them, the pods see. `grace`: seconds for
    the last save of a pod that must go."""

    name: str
    image: str
    claim: str | None = None
    mount: str | None = None
    namespace: str | None = None
    secret: str = "tunesmith"
    port: int = 29500
    cpus_per_node: int | None = None
    memory_per_node: str | None = None
    grace: int = 300
    restarts: int = 10


def name_of(run_name: str, given: str | None) -> str:
    """The name of the JobSet: as given, or the run's made to fit. Raises UserError."""
    longest = 63 - len(f"-{_REPLICATED_JOB}-0-9999-abcde")  # of a pod: a DNS label
    if given is None:
        fitted = re.sub(r"[^a-z0-9]+", "-", run_name.lower())[:longest].strip("-")
        return fitted if re.match("[a-z]", fitted) else f"run-{fitted}"[:longest].strip("-")
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", given) or len(given) > longest:
        raise UserError(
            f"--name {given}: a name is of a-z, 0-9 and -, begins with a letter and has at most {longest} characters"
        )
    return given


def volume(text: str) -> tuple[str, str]:
    """CLAIM:PATH. Raises UserError."""
    claim, _, mount = text.partition(":")
    if (
        not re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", claim)
        or not mount.startswith("/")
        or mount == "/"
    ):
        raise UserError(f"--pvc {text}: CLAIM:PATH is expected, such as training:/data")
    return claim, printable("--pvc", mount)


def manifest(job: Job, options: Options, loaded: Loaded, text: str) -> str:
    """The ConfigMap with the recipe, whose file holds `text`, and the JobSet. Raises UserError."""
    relative = list(_relative_paths(loaded))
    if relative:
        raise UserError(
            f"{loaded.source}: {', '.join(relative)}: in a pod the recipe lies in {_FOLDER}, so its data and models "
            "need absolute paths (on the volume of --pvc, or in the image), hub: or builtin:"
        )
    if len(text.encode()) > _LARGEST:
        raise UserError(f"{loaded.source} has more than {_LARGEST:,} bytes: too many for a ConfigMap")
    yaml = YAML()
    yaml.width = 2**16
    stream = io.StringIO()
    stream.write(f"# {job.about('kubernetes')}\n")
    yaml.dump_all([_config_map(job, options, text), _job_set(job, options)], stream)
    return stream.getvalue()


def _relative_paths(loaded: Loaded) -> Iterator[str]:
    recipe = loaded.recipe
    for key, data in recipe.each_data.items():
        for split in ("train", "eval", "test"):
            for source in getattr(data, split):
                if not source.path.startswith(("hub:", "builtin:", "/", "~", "$")):
                    yield f"{key}.{split}: {source.path}"
        if data.cache_dir is not None and not data.cache_dir.startswith(("/", "~", "$")):
            yield f"{key}.cache_dir: {data.cache_dir}"
    for name in ("model_name_or_path", "tokenizer", "chat_template"):
        value = getattr(recipe.model, name)
        if isinstance(value, str) and not value.startswith(("/", "~", "$")) and _is_local(value, loaded.base):
            yield f"model.{name}: {value}"


def _is_local(value: str, base: Path) -> bool:
    """Whether it is a path, not a hub id, a name of ours or a template written out."""
    return value.startswith(".") or (value.isprintable() and len(value) < 1024 and (base / value).exists())


def _metadata(options: Options, name: str) -> dict[str, Any]:
    return {"name": name} | ({"namespace": options.namespace} if options.namespace else {})


def _config_map(job: Job, options: Options, text: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(options, f"{options.name}-recipe"),
        "immutable": True,  # what is restarted is what was started
        "data": {_file(job): LiteralScalarString(text) if _is_literal(text) else text},
    }


def _file(job: Job) -> str:
    """A recipe without a run_name is called after its file."""
    return f"{job.run_name}.yaml"


def _is_literal(text: str) -> bool:
    """Whether YAML's block style keeps it as it is."""
    lines = text.split("\n")
    plain = all(line.isprintable() and line == line.rstrip() for line in lines)
    return plain and text.endswith("\n") and not text.endswith("\n\n") and not lines[0].startswith(" ")


def _job_set(job: Job, options: Options) -> dict[str, Any]:
    rule = {
        "name": "of_no_use_to_restart",
        "action": "FailJobSet",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _metadata(options, options.name),
        "spec": {
            # machine 0 is looked for before it is ready
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": options.restarts, "rules": [rule]},
            "replicatedJobs": [
                {"name": _REPLICATED_JOB, "replicas": 1, "template": {"spec": _job(job, options)}}
            ],
        },
    }


def _job(job: Job, options: Options) -> dict[str, Any]:
    disrupted = {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    final = {
        "action": "FailJob",
        "onExitCodes": {"containerName": "tunesmith", "operator": "In", "values": list(_FINAL_CODES)},
    }
    return {
        "completionMode": "Indexed",
        "completions": job.nodes,
        "parallelism": job.nodes,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [disrupted, final]},  # the first that fits counts
        "template": {"spec": _pod(job, options)},
    }


def _pod(job: Job, options: Options) -> dict[str, Any]:
    mounts: list[dict[str, Any]] = [
        {"name": "recipe", "mountPath": _FOLDER, "readOnly": True},
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    volumes: list[dict[str, Any]] = [
        {"name": "recipe", "configMap": {"name": f"{options.name}-recipe"}},
        {"name": "shm", "emptyDir": {"medium": "Memory"}},  # NCCL and data loaders; 64 MiB without
    ]
    container: dict[str, Any] = {
        "name": "tunesmith",
        "image": printable("--image", options.image),
        "command": _command(job, options),
        "env": _environment(job, options),
    }
    if options.claim is not None:
        mounts.append({"name": "runs", "mountPath": options.mount})
        volumes.append({"name": "runs", "persistentVolumeClaim": {"claimName": options.claim}})
        container["workingDir"] = options.mount
    if resources := _resources(job, options):
        container["resources"] = resources
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": options.grace,
        "containers": [container | {"volumeMounts": mounts}],
        "volumes": volumes,
    }


def _command(job: Job, options: Options) -> list[str]:
    inside = replace(job, recipe=f"{_FOLDER}/{_file(job)}")
    # Kubernetes expands $(NAME) in a command; what was typed is meant as it is
    words = [word.replace("$(", "$$(") for word in inside.train_arguments]
    if job.nodes > 1:
        main = f"{options.name}-{_REPLICATED_JOB}-0-0.{options.name}"
        words += ["--machine-rank", "$(JOB_COMPLETION_INDEX)"]
        words += ["--main-process-ip", main, "--main-process-port", str(options.port)]
    return ["tunesmith", "train", *words]


def _environment(job: Job, options: Options) -> list[dict[str, Any]]:
    """Secrets by reference alone."""
    found: list[dict[str, Any]] = [
        {
            "name": name,
            "valueFrom": {
                "secretKeyRef": {"name": printable("--secret", options.secret), "key": name, "optional": True}
            },
        }
        for name in _SECRETS
    ]
    if job.gpus_per_node == 0:
        found.append({"name": "TUNESMITH_DEVICE", "value": "cpu"})
    return found


def _resources(job: Job, options: Options) -> dict[str, Any]:
    limits: dict[str, Any] = {"nvidia.com/gpu": str(job.gpus_per_node)} if job.gpus_per_node else {}
    requests: dict[str, Any] = {}
    if options.cpus_per_node is not None:
        requests["cpu"] = str(options.cpus_per_node)
    if options.memory_per_node is not None:
        requests["memory"] = limits["memory"] = printable("--memory-per-node", options.memory_per_node)
    return {name: value for name, value in (("requests", requests), ("limits", limits)) if value}
