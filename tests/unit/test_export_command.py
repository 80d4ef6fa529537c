"""`tunesmith export`: the folder loads in transformers alone and gives the run's outputs; what does not is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tunesmith.adapters.attach import attach
from tunesmith.commands import export as module
from tunesmith.commands.export import export
from tunesmith.commands.finished import FinishedRun, open_run
from tunesmith.errors import MachineError, UserError
from tunesmith.recipe.adapters import Adapter
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


LORA = {"type": "lora", "r": 2, "lora_alpha": 1.0, "init_lora_weights": "gaussian"}


def adapted(run_dir: Path, settings: dict[str, Any]) -> FinishedRun:
    """The run with an adapter on its final/, as if that had been the base, and the adapter trained."""
    run = open_run(run_dir)
    model = run.recipe.model.model_copy(update={"model_name_or_path": str(run_dir / "final")})
    adapter: Adapter = TypeAdapter(Adapter).validate_python(settings)
    attached = attach(run.model, [adapter], run.objective.auto_class.__name__, run_dir, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in attached.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    run.engine.train_module.model = attached.model
    return dataclasses.replace(run, recipe=run.recipe.model_copy(update={"model": model}))


@pytest.mark.parametrize(
    ("case", "settings"),
    [
        ("causal_lm", LORA),
        ("causal_lm_gpt2", LORA | {"init_lora_weights": "pissa"}),
        ("single_label", LORA),
        ("question_answering", {"type": "ia3"}),
        ("seq2seq_t5", LORA | {"use_dora": True}),
    ],
)
def test_adapters_alone_and_merged(
    trained: Trained, tmp_path: Path, case: str, settings: dict[str, Any]
) -> None:
    alone = export(adapted(trained(case), settings), tmp_path / "alone")
    assert alone.what == "adapter"
    assert alone.difference <= 1e-5 * max(1.0, alone.scale)
    names = {path.name for path in (tmp_path / "alone").iterdir()}
    assert names >= {"adapter_model.safetensors", "adapter_config.json", "README.md", "tokenizer.json"}
    assert "model.safetensors" not in names
    merged = export(adapted(trained(case), settings), tmp_path / "merged", merge=True)
    assert merged.what == "merged"
    assert merged.difference <= merged.tolerance == pytest.approx(1e-4 * max(1.0, merged.scale))
    assert merged.scale == alone.scale
    weights, base = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", trained(case) / "final")
    )
    assert weights.keys() == base.keys()  # no trace of the adapter
    assert any(not torch.equal(weights[name], base[name]) for name in base)


def test_a_prompt_is_exported_and_not_merged(trained: Trained, tmp_path: Path) -> None:
    settings = {"type": "p_tuning", "num_virtual_tokens": 3}
    found = export(adapted(trained("single_label"), settings), tmp_path / "alone")
    assert found.parameters < 1000  # the table and the head, not the encoder
    with pytest.raises(UserError, match="--merge: P_TUNING stands before the input"):
        export(adapted(trained("single_label"), settings), tmp_path / "merged", merge=True)
    assert [path.name for path in tmp_path.iterdir()] == ["alone"]


def test_merging_in_another_dtype(trained: Trained, tmp_path: Path) -> None:
    found = export(adapted(trained("causal_lm"), LORA), tmp_path / "out", "bf16", merge=True)
    assert 0 < found.difference <= found.tolerance
    assert {v.dtype for v in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_a_merger_that_computes_something_else_is_not_published(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.adapters import merge as merging

    real = merging.merge

    def damaged(model: Any) -> Any:
        merged = real(model)
        with torch.no_grad():
            next(merged.parameters()).mul_(1.01)
        return merged

    monkeypatch.setattr(merging, "merge", damaged)
    with pytest.raises(MachineError, match="its outputs differ from the trained model's by"):
        export(adapted(trained("causal_lm"), LORA), tmp_path / "out", merge=True)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_merge(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--merge: the run trained no adapter"):
        export(open_run(trained("causal_lm")), tmp_path / "out", merge=True)
