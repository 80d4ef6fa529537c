"""`tunesmith average`: the weights by hand in fp64, and a folder that is a finished run again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from tests.unit.conftest import MakeRecipe, Trained
from tunesmith.commands.average import average
from tunesmith.commands.evaluate import evaluate_run, measure
from tunesmith.commands.export import export
from tunesmith.commands.finished import Weights, open_run
from tunesmith.ensemble import task_vectors
from tunesmith.ensemble.options import Asked
from tunesmith.ensemble.weight_files import WeightFiles, write_like
from tunesmith.errors import UserError
from tunesmith.run import Resume, run
from tunesmith_launch.cli import app

More = Callable[..., Path]
LORA = {"type": "lora", "lora_alpha": 4.0, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def more(workshop: Path, make_recipe: MakeRecipe) -> More:
    """more(name, case, **sections) → a run under that name; equal names train once."""
    done: dict[str, Path] = {}

    def once(name: str, case: str = "single_label", **sections: Any) -> Path:
        if name not in done:
            sections.setdefault("training", {"seed": 5, "max_steps": 4})
            run(make_recipe(case, run_name=name, **sections), workshop, Resume())
            done[name] = workshop / "runs" / name
        return done[name]

    return once


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "final" / "model.safetensors")


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name].double(), value.double(), atol=1e-7, rtol=1e-6), name


def test_an_average_is_a_finished_run(trained: Trained, more: More, tmp_path: Path) -> None:
    a, b = trained("single_label"), more("second")
    out = tmp_path / "soup"
    made = average([str(a), str(b)], Asked("uniform"), out)
    theirs = weights(a), weights(b)
    close(
        weights(out), {name: (theirs[0][name].double() + theirs[1][name].double()) / 2 for name in theirs[0]}
    )
    found = evaluate_run(open_run(out), "eval")
    names = [row["on eval"] for row in made.table]
    assert names == [str(a), str(b), "mean of members", "best member (accuracy)", "uniform"]
    assert made.table[-1]["loss"] == pytest.approx(found.found.metrics["loss"], abs=1e-6)
    assert made.table[0]["loss"] == pytest.approx(measure(open_run(a), "eval")["loss"], abs=1e-6)
    assert export(open_run(out), tmp_path / "exported").difference == 0.0
    about = json.loads((out / "environment.json").read_text(encoding="utf-8"))["made_of"]
    assert [one["weight"] for one in about["members"]] == [0.5, 0.5]
    assert all(len(one["sha256"]) == 64 for one in about["members"])
    again = average([str(out), str(b)], Asked("weighted", weights=(0.25, 0.75)), tmp_path / "second")
    assert again.folder == tmp_path / "second"  # an average of an average


def test_checkpoints_of_a_run_by_weights(trained: Trained, tmp_path: Path) -> None:
    a = trained("single_label")
    average([f"{a}:checkpoint-1", str(a)], Asked("weighted", weights=(0.25, 0.75)), tmp_path / "out")
    export(open_run(a, 1), tmp_path / "one")
    one, last = load_file(tmp_path / "one" / "model.safetensors"), weights(a)
    close(weights(tmp_path / "out"), {n: 0.25 * one[n].double() + 0.75 * last[n].double() for n in one})


def test_a_greedy_soup_is_no_worse_than_its_best_member(trained: Trained, more: More, tmp_path: Path) -> None:
    members = [trained("single_label"), more("second"), more("third", training={"seed": 6, "max_steps": 6})]
    made = average([str(m) for m in members], Asked("greedy"), tmp_path / "out")
    alone = [measure(open_run(m), "eval")["macro_f1"] for m in members]
    assert made.table[-1]["macro_f1"] >= max(alone)
    kept = [row["in the soup"] for row in made.table[:3]]
    assert "kept" in kept
    about = json.loads((tmp_path / "out" / "environment.json").read_text(encoding="utf-8"))["made_of"]
    chosen = [weights(Path(one["run"])) for one in about["members"]]
    assert len(chosen) == kept.count("kept")
    mean = {n: torch.stack([w[n].double() for w in chosen]).mean(0) for n in chosen[0]}
    close(weights(tmp_path / "out"), mean)
    assert measure(open_run(tmp_path / "out"), "eval")["macro_f1"] == made.table[-1]["macro_f1"]


def test_wise_ft_between_what_was_pretrained_and_the_run(workshop: Path, more: More, tmp_path: Path) -> None:
    """A base without the head: the head is the run's."""
    base = workshop / "models" / "bert_mlm"
    tuned = more("from-mlm", model={"model_name_or_path": str(base)})
    average([str(base), str(tuned)], Asked("wise", alphas=(0.3,)), tmp_path / "out")
    start, end = load_file(base / "model.safetensors"), weights(tuned)
    expected = {n: 0.7 * start[n].double() + 0.3 * v.double() if n in start else v for n, v in end.items()}
    assert {n for n in end if n not in start} >= {"classifier.weight", "classifier.bias"}
    close(weights(tmp_path / "out"), expected)
    line = average([str(base), str(tuned)], Asked("wise", alphas=(0.0, 0.5, 1.0)), None)
    assert [row["on eval"] for row in line.table] == ["alpha 0", "alpha 0.5", "alpha 1"]
    assert line.folder is None
    whole = measure(open_run(tuned), "eval")
    assert line.table[-1]["loss"] == pytest.approx(whole["loss"], abs=1e-6)


def test_wise_ft_between_two_runs(trained: Trained, more: More, tmp_path: Path) -> None:
    a, b = trained("single_label"), more("second")
    average([str(a), str(b)], Asked("wise", alphas=(0.25,)), tmp_path / "out")
    close(
        weights(tmp_path / "out"),
        {n: 0.75 * v.double() + 0.25 * weights(b)[n].double() for n, v in weights(a).items()},
    )


@pytest.mark.parametrize("method", ["task", "ties", "dare_linear", "dare_ties"])
def test_task_vectors_of_whole_models(
    workshop: Path, trained: Trained, more: More, tmp_path: Path, method: Any
) -> None:
    a, b = trained("single_label"), more("second")
    density = None if method == "task" else 0.4
    seed = 7 if method.startswith("dare") else None
    asked = Asked(method, weights=(0.6, 0.9), density=density, seed=seed)
    average([str(a), str(b)], asked, tmp_path / "out")
    base = load_file(workshop / "models" / "bert_single" / "model.safetensors")
    expected: dict[str, Tensor] = {}
    for name, value in weights(a).items():
        if value.is_floating_point():
            taus = [w[name].double() - base[name].double() for w in (weights(a), weights(b))]
            merged = task_vectors.merge(method, taus, [0.6, 0.9], density or 1.0, (seed or 0, name))
            expected[name] = base[name].double() + merged
        else:
            expected[name] = value
    close(weights(tmp_path / "out"), expected)
    open_run(tmp_path / "out")


@pytest.mark.parametrize(
    ("r", "method"), [(2, "linear"), (3, "linear"), (3, "ties"), (2, "uniform"), (2, "task")]
)
def test_adapters_of_runs(more: More, tmp_path: Path, r: int, method: Any) -> None:
    sections: dict[str, Any] = {"trainable": {"adapters": [LORA | {"r": 2}]}}
    a = more("lora-a", training={"seed": 1, "max_steps": 4}, **sections)
    b = more(f"lora-{r}", training={"seed": 2, "max_steps": 4}, trainable={"adapters": [LORA | {"r": r}]})
    asked = Asked(
        method, weights=(0.5, 0.5) if method == "task" else None, density=0.5 if method == "ties" else None
    )
    made = average([str(a), str(b)], asked, tmp_path / "out")
    assert made.table
    again = measure(open_run(tmp_path / "out"), "eval")
    assert again["loss"] == pytest.approx(made.table[-1]["loss"], abs=1e-6)
    merged = export(open_run(tmp_path / "out"), tmp_path / "merged", merge=True)
    assert merged.difference <= merged.tolerance
    if method in ("uniform", "task") or (method, r) == ("linear", 3):  # exact: the mean of the merged models
        for name, folder in (("ma", a), ("mb", b)):
            export(open_run(folder), tmp_path / name, merge=True)
        one, two, out = (load_file(tmp_path / n / "model.safetensors") for n in ("ma", "mb", "merged"))
        for name, value in out.items():
            assert torch.allclose(value, (one[name] + two[name]) / 2, atol=1e-6), name
    folder = tmp_path / "moved"
    (tmp_path / "out").rename(folder)
    assert measure(open_run(folder), "eval")["loss"] == pytest.approx(again["loss"], abs=1e-6)


def test_a_share_of_an_adapter(more: More, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"trainable": {"adapters": [LORA | {"r": 2}]}}
    a = more("lora-a", training={"seed": 1, "max_steps": 4}, **sections)
    average([str(a)], Asked("task", weights=(0.5,)), tmp_path / "out")
    ours, theirs = (load_file(f / "final" / "adapter_model.safetensors") for f in (tmp_path / "out", a))
    for name in ours:
        if ".lora_A." in name:  # alpha 4 over rank 2: the scale of 2 is in A now
            assert torch.allclose(ours[name], 0.5 * 2 * theirs[name])
        elif ".lora_B." in name or "classifier" in name:
            assert torch.equal(ours[name], theirs[name])


# refusals


def test_what_does_not_go_together_is_refused_by_name(
    workshop: Path, trained: Trained, more: More, tmp_path: Path
) -> None:
    a, b, out = str(trained("single_label")), str(more("second")), tmp_path / "out"
    lora = str(
        more("lora-a", training={"seed": 1, "max_steps": 4}, trainable={"adapters": [LORA | {"r": 2}]})
    )
    turned = str(more("turned-labels", objective={"labels": ["d", "c", "b", "a"]}))
    for given, asked, said in (
        ([a], Asked("uniform"), "takes 2 or more, 1 given"),
        ([a, a], Asked("uniform"), "named twice"),
        ([a, str(trained("regression"))], Asked("uniform"), "its labels are not those of"),
        ([a, turned], Asked("uniform"), "its labels are not those of"),
        ([a, str(trained("causal_lm"))], Asked("uniform"), "objective causal_lm is not classification"),
        ([a, lora], Asked("uniform"), "one trained adapters"),
        ([a, b], Asked("uniform", weights=(0.5, 0.5)), "--weights: has no effect"),
        ([a, b], Asked("weighted"), "needs --weights"),
        ([a, b], Asked("weighted", weights=(0.5, 0.6)), "sum to 1.1"),
        ([a, b], Asked("weighted", weights=(0.5, 0.3, 0.2)), "3 weights for 2 members"),
        ([a, b], Asked("ties"), "needs --density"),
        ([a, b], Asked("ties", density=1.5), "is a share"),
        ([a, b], Asked("ties", density=0.5, seed=1), "--seed: has no effect"),
        ([a, b], Asked("wise"), "takes BASE RUN and --alpha"),
        ([str(workshop / "models" / "bert_single"), lora], Asked("wise", alphas=(0.5,)), "zero in the base"),
        ([lora, lora + ":checkpoint-3"], Asked("ties", density=0.5, base=a), "--base: has no effect"),
        ([a, b + ":checkpoint-9"], Asked("uniform"), "has no checkpoint-9"),
        ([a, b + ":nine"], Asked("uniform"), "write RUN or RUN:checkpoint-N"),
    ):
        with pytest.raises(UserError, match=said):
            average(given, asked, out)
        assert not out.exists(), said
    with pytest.raises(UserError, match="--out: is missing"):
        average([a, b], Asked("uniform"), None)
    with pytest.raises(UserError, match="is in use"):
        average([a, b], Asked("uniform"), Path(a))
    average([a, b], Asked("uniform"), out)
    with pytest.raises(UserError, match="--overwrite"):
        average([a, b], Asked("uniform"), out)
    average([a, b], Asked("uniform", overwrite=True), out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_another_architecture_is_refused(
    trained: Trained, more: More, workshop: Path, tmp_path: Path
) -> None:
    other = more("averaged-other-base", model={"model_name_or_path": str(workshop / "models" / "bert_mlm")})
    config = other / "final" / "config.json"
    values = json.loads(config.read_text(encoding="utf-8")) | {"layer_norm_eps": 0.5}
    config.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(UserError, match=r"its config has layer_norm_eps = 0\.5"):
        average([str(trained("single_label")), str(other)], Asked("uniform"), tmp_path / "out")


def test_eval_rows_of_another_split_are_not_compared(trained: Trained, more: More, tmp_path: Path) -> None:
    other = more("averaged-split-8", data={"split": {"eval": 0.2, "test": 0.2, "seed": 8}})
    given = [str(trained("single_label")), str(other)]
    made = average(given, Asked("uniform"), tmp_path / "out")
    assert made.table == []
    assert "eval rows of" in made.note
    with pytest.raises(UserError, match="chooses by eval rows, but"):
        average(given, Asked("greedy"), tmp_path / "greedy")


def test_counters_must_agree(tmp_path: Path) -> None:
    from tunesmith.ensemble.soup import combine_files

    for name, count in (("a", 3), ("b", 4)):
        (tmp_path / name).mkdir()
        tensors = {"w": torch.full((2,), float(count)), "steps": torch.tensor(count)}
        save_file(tensors, tmp_path / name / "model.safetensors")
    with pytest.raises(UserError, match="b: steps, which is no number to be averaged, is not that of a"):
        combine_files(
            [tmp_path / "a", tmp_path / "b"],
            ["a", "b"],
            tmp_path / "out",
            lambda _, v: task_vectors.weighted_sum(v, (0.5, 0.5)),
        )


def test_files_are_written_a_tensor_at_a_time_as_safetensors_reads_them(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    tensors = {
        "half": torch.randn(3, 5).bfloat16(),
        "one": torch.tensor(4.0),
        "int": torch.arange(7),
        "none": torch.zeros(0, 3),
    }
    save_file(tensors, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    asked: list[str] = []
    with WeightFiles(tmp_path / "in") as files:

        def make(name: str) -> Tensor:
            asked.append(name)
            return files[name]

        write_like(tmp_path / "in", tmp_path / "out", make)
    assert sorted(asked) == sorted(tensors)
    whole = (tmp_path / "in" / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == whole


def test_weights_are_named_as_runs_and_checkpoints() -> None:
    assert Weights.parse("runs/a:checkpoint-20") == Weights(Path("runs/a"), 20)
    assert str(Weights.parse("runs/a:checkpoint-20")) == "runs/a:checkpoint-20"
    assert Weights.parse("runs/a") == Weights(Path("runs/a"))


def test_the_command_line(trained: Trained, more: More, tmp_path: Path) -> None:
    runner, out = CliRunner(), str(tmp_path / "out")
    given = [str(trained("single_label")), str(more("second"))]
    done = runner.invoke(
        app, ["average", *given, "--method", "weighted", "--weights", "0.4,0.6", "--out", out]
    )
    assert done.exit_code == 0, done.output
    assert "mean of members" in done.output
    assert runner.invoke(app, ["evaluate", out, "--split", "test"]).exit_code == 0
    done = runner.invoke(app, ["predict", out, "--text", "red river a"])
    assert json.loads(done.stdout).keys() == {"text", "label", "score"}
    done = runner.invoke(app, ["average", *given, "--weights", "a,b", "--out", out])
    assert isinstance(done.exception, UserError)
    assert "write numbers with commas" in str(done.exception)
