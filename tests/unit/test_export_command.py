"""`tunesmith export`: the folder loads in transformers alone and gives the run's outputs; what does not is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tunesmith.commands import export as module
from tunesmith.commands.export import export
from tunesmith.commands.finished import open_run
from tunesmith.errors import MachineError, UserError
from tunesmith.tracking.metrics_file import read

Trained = Callable[[str], Path]
EVERY = (
    "single_label", "pairs", "multi_label", "regression", "token_classification", "question_answering",
    "seq2seq_t5", "seq2seq_bart", "sft", "causal_lm", "causal_lm_gpt2", "masked_lm", "next_sentence",
    "span_corruption",
)  # fmt: skip


@pytest.mark.parametrize("case", EVERY)
def test_every_objective_exports_what_it_trained(trained: Trained, tmp_path: Path, case: str) -> None:
    found = export(open_run(trained(case)), tmp_path / "out")
    assert found.difference == 0.0
    assert found.scale > 0
    weights, final = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "out", trained(case) / "final")
    )
    assert weights.keys() == final.keys()
    assert all(torch.equal(weights[name], final[name]) for name in final)


@pytest.mark.parametrize(("dtype", "kind"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_other_dtypes_are_the_rounded_weights(
    trained: Trained, tmp_path: Path, dtype: Any, kind: Any
) -> None:
    run = open_run(trained("causal_lm"))
    found = export(run, tmp_path / "out", dtype)
    weights, final = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "out", run.run_dir / "final")
    )
    assert all(torch.equal(weights[name], final[name].to(kind)) for name in final)
    assert 0 < found.difference < 0.05 * found.scale
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["dtype"]
        == str(kind).split(".")[1]
    )
    assert found.bytes < sum(path.stat().st_size for path in (run.run_dir / "final").iterdir())


def test_a_checkpoints_weights(trained: Trained, tmp_path: Path) -> None:
    run_dir = trained("causal_lm")
    export(open_run(run_dir, 1), tmp_path / "one")
    export(open_run(run_dir, 2), tmp_path / "two")
    one, two, final = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "one", tmp_path / "two", run_dir / "final")
    )
    assert all(torch.equal(two[name], final[name]) for name in final)
    assert not all(torch.equal(one[name], final[name]) for name in final)
    card = (tmp_path / "one" / "README.md").read_text(encoding="utf-8")
    row = next(row for row in read(run_dir / "metrics.jsonl") if row["step"] == 1 and "eval_loss" in row)
    assert f"| eval_loss | {row['eval_loss']:.4g} |" in card


def test_large_models_are_split(trained: Trained, tmp_path: Path) -> None:
    export(open_run(trained("causal_lm")), tmp_path / "out", max_shard_size="50KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1


def test_a_chat_model_stops_and_renders_as_it_was_trained(trained: Trained, tmp_path: Path) -> None:
    run = open_run(trained("sft"))
    export(run, tmp_path / "out")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template(
        [{"role": "user", "content": "red"}], tokenize=False, add_generation_prompt=True
    ).startswith("<|im_start|>user\nred<|im_end|>")
    stops = GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id
    assert stops == run.objective.stop_token_ids()
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in stops
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_card_has_the_facts(trained: Trained, tmp_path: Path, workshop: Path) -> None:
    run_dir = trained("single_label")
    export(open_run(run_dir), tmp_path / "name-of-it")
    card = (tmp_path / "name-of-it" / "README.md").read_text(encoding="utf-8")
    test = next(row for row in read(run_dir / "metrics.jsonl") if "test_loss" in row)
    for fact in (
        "pipeline_tag: text-classification",
        "# name-of-it",
        "- Base model: bert_single",
        "- Objective: classification",
        "- Labels (4): a, b, c, d",
        "(single.jsonl)",
        f"| test_accuracy | {test['test_accuracy']:.4g} |",
        f"- torch {torch.__version__}",
    ):
        assert fact in card
    assert str(workshop) not in card  # a folder of the machine tells nobody anything


def test_a_folder_in_use_is_left_alone(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="is in use"):
        export(open_run(trained("causal_lm")), tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]


def test_what_does_not_load_back_is_not_published(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = vars(module)["_reload"]

    def damaged(*arguments: Any) -> Any:
        model = real(*arguments)
        with torch.no_grad():
            next(model.parameters()).view(-1)[0] += 1e-3
        return model

    monkeypatch.setattr(module, "_reload", damaged)
    with pytest.raises(MachineError, match="differ from what was written"):
        export(open_run(trained("causal_lm")), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_values_that_a_dtype_does_not_have(trained: Trained, tmp_path: Path) -> None:
    run = open_run(trained("causal_lm"))
    with torch.no_grad():
        next(run.model.parameters()).view(-1)[0] = 1e6
    with pytest.raises(UserError, match="not finite in fp16: use bf16"):
        export(run, tmp_path / "out", "fp16")
    assert list(tmp_path.iterdir()) == []
