"""The command line as a user meets it: in processes of its own, and in this one where nothing else is needed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tunesmith
from tunesmith.recipe.load import shipped_recipes
from tunesmith_launch import doctor
from tunesmith_launch.cli import app
from tunesmith_launch.command import Command
from tunesmith_launch.recipes import listing

RECIPE = """
model: {model_name_or_path: builtin:minilm}
data: {train: {path: a.csv, format: classification, columns: {text: text, label: label}}}
objective: {type: classification}
"""
HEAVY = {"torch", "transformers", "accelerate", "datasets", "numpy", "pydantic", "ruamel", "rich"}


def tunesmith_in(
    folder: Path, *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from tunesmith_launch.cli import main; main()", *arguments]
    env = {name: value for name, value in os.environ.items() if not name.startswith("TUNESMITH_")}
    env |= {"TUNESMITH_DEVICE": "cpu"} | (environment or {})
    return subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    return path


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    program = (
        "import sys, tunesmith_launch.cli as c\n"
        "try: c.main()\n"
        "except SystemExit as e: assert e.code == 0, e.code\n"
        "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    assert "recipes" in done.stdout
    assert set(done.stderr.split()) & HEAVY == set()


INSPECTING = {"check", "preview", "evaluate", "predict", "export", "ensemble", "average"}


@pytest.mark.parametrize(
    "words",
    [
        ["train"],
        ["recipes"],
        ["recipes", "copy"],
        ["schema"],
        ["doctor"],
        ["plan"],
        *(["launch", kind] for kind in ("slurm", "kubernetes", "accelerate", "torchrun")),
        *([name] for name in sorted(INSPECTING)),
    ],
)
def test_every_command_shows_an_example(words: list[str]) -> None:
    shown = CliRunner().invoke(app, [*words, "--help"])
    assert shown.exit_code == 0
    assert re.search(rf"Example: tunesmith {' '.join(words)}\b", shown.output)


def test_every_command_is_in_the_test_of_examples() -> None:
    named = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
    assert (
        named | {group.name for group in app.registered_groups}
        == {
            "train",
            "recipes",
            "launch",
            "plan",
            "schema",
            "doctor",
        }
        | INSPECTING
    )


def test_version() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"tunesmith {tunesmith.__version__}\n"


def test_faults_of_a_recipe_are_lines_on_stderr_and_exit_2(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(RECIPE + "optim: {learning_rat: 1}\nschedule: {warmup_ratio: 7}\n")
    done = tunesmith_in(tmp_path, "train", "r.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        ["r.yaml:5", "optim.learning_rat"],
        ["r.yaml:6", "schedule.warmup_ratio"],
    ]


def test_debug_adds_the_traceback(tmp_path: Path) -> None:
    done = tunesmith_in(tmp_path, "train", "none.yaml", environment={"TUNESMITH_DEBUG": "1"})
    assert done.returncode == 2
    assert done.stderr.startswith("Traceback")
    assert done.stderr.splitlines()[-1].startswith("none.yaml: no such file")


def test_dry_run_prints_the_command_and_starts_nothing(recipe: Path, tmp_path: Path) -> None:
    done = tunesmith_in(tmp_path, "train", "r.yaml", "training.seed=3", "--dry-run", "--num-processes", "2")
    assert (done.returncode, done.stderr) == (0, "")
    line = done.stdout.partition("\n")[0]
    assert f"{sys.executable} -m accelerate.commands.launch --multi_gpu" in line
    assert line.endswith("-m tunesmith r.yaml training.seed=3")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("trace", ["metrics.jsonl", "checkpoint-5"])
def test_a_used_folder_is_left_alone(recipe: Path, tmp_path: Path, trace: str) -> None:
    folder = tmp_path / "runs" / "r"
    folder.mkdir(parents=True)
    (folder / trace).touch()
    (folder / "exit.json").write_text("kept")
    done = tunesmith_in(tmp_path, "train", "r.yaml")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "continue it with --resume, replace it with --overwrite" in done.stderr
    assert (folder / "exit.json").read_text() == "kept"


def test_resume_and_overwrite_exclude_each_other(recipe: Path, tmp_path: Path) -> None:
    done = tunesmith_in(tmp_path, "train", "r.yaml", "--resume", "--overwrite")
    assert (done.returncode, done.stderr) == (2, "--resume and --overwrite exclude each other\n")


def test_train_hands_the_ranks_what_was_typed(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[Command, Path]] = []

    def supervise(command: Command, folder: Path, *_: object) -> int:
        started.append((command, folder))
        return 6

    monkeypatch.setattr("tunesmith_launch.train.supervise", supervise)
    monkeypatch.setenv("TUNESMITH_DEVICE", "cpu")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    stale = tmp_path / "out" / "r" / "exit.json"
    stale.parent.mkdir(parents=True)
    stale.touch()
    out = f"output_dir={tmp_path}/out"
    done = CliRunner().invoke(app, ["train", str(recipe), "--overwrite", out, "training.seed=3"])
    assert done.exit_code == 6, done.output
    ((command, folder),) = started
    assert command.argv == (
        sys.executable,
        "-m",
        "tunesmith",
        str(recipe),
        out,
        "training.seed=3",
        "--overwrite",
    )
    assert folder == tmp_path / "out" / "r"
    assert not stale.exists()


def test_recipes_are_listed_with_what_they_are_for() -> None:
    lines = CliRunner().invoke(app, ["recipes"]).output.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped_recipes())
    assert all(len(line.split()) > 3 for line in lines)
    assert listing().splitlines() == lines


def test_a_recipe_is_copied_once(tmp_path: Path) -> None:
    first = tunesmith_in(tmp_path, "recipes", "copy", "quickstart")
    assert (first.returncode, first.stdout) == (0, "quickstart.yaml\n")
    copied = tmp_path / "quickstart.yaml"
    assert copied.read_bytes() == shipped_recipes()["quickstart"].read_bytes()
    copied.write_text("mine")
    again = tunesmith_in(tmp_path, "recipes", "copy", "quickstart")
    assert again.returncode == 2
    assert again.stderr.startswith("quickstart.yaml exists already")
    assert copied.read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quickstrat"], "no recipe is called quickstrat; did you mean quickstart?"),
        (["zzzzz"], "no recipe is called zzzzz; there are "),
        (["quickstart", "none/a.yaml"], "none/a.yaml cannot be written: No such file or directory"),
    ],
)
def test_what_cannot_be_copied(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = tunesmith_in(tmp_path, "recipes", "copy", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(message)


def test_schema_is_json() -> None:
    schema = json.loads(CliRunner().invoke(app, ["schema"]).output)
    assert "model" in schema["properties"]


def test_doctor_finds_this_machine_fit() -> None:
    lines = CliRunner().invoke(app, ["doctor"]).output.splitlines()
    assert {line.split()[0] for line in lines} <= {"ok", "warn", "fail"}
    assert {"python", "torch", "device", "bf16", "memory"} <= {line.split()[1] for line in lines}


def test_doctor_fails_with_3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tunesmith_launch.doctor._requirements", lambda extra: ["torch>=999"] if not extra else []
    )
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 3
    (line,) = [line for line in done.output.splitlines() if line.startswith("fail")]
    assert re.search(r"torch +\S+, needs >=999 → pip install -U tunesmith", line)


def test_doctor_names_what_is_missing_and_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    requires = [
        "core>=1",
        "part>=2; extra == 'wandb'",
        "other; extra == 'dev'",
        "never; python_version < '3'",
    ]
    monkeypatch.setattr("importlib.metadata.requires", lambda _: requires)
    assert [(f.level, f.what) for f in doctor.packages()][2:] == [("fail", "core")]
    (optional,) = doctor.extras()
    assert (optional.level, optional.what, optional.fix) == ("ok", "part", "pip install 'tunesmith[wandb]'")


def test_doctor_shows_variables_that_matter_and_no_secret() -> None:
    variables = {
        "HF_TOKEN": "hush",
        "ACCELERATE_USE_FSDP": "true",
        "WORLD_SIZE": "2",
        "HOME": "/me",
        "NCCL_DEBUG": "INFO",
    }
    found = {finding.what: (finding.level, finding.text) for finding in doctor.environment(variables)}
    assert found.keys() == {"HF_TOKEN", "ACCELERATE_USE_FSDP", "WORLD_SIZE", "NCCL_DEBUG"}
    assert found["HF_TOKEN"] == ("ok", "is set")
    assert found["ACCELERATE_USE_FSDP"][0] == found["WORLD_SIZE"][0] == "warn"


def test_memory_limit_of_a_control_group(tmp_path: Path) -> None:
    assert doctor.memory_limit(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    assert doctor.memory_limit(tmp_path) is None
    (tmp_path / "memory.max").write_text("1073741824\n")
    assert doctor.memory_limit(tmp_path) == 2**30
