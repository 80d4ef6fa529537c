"""A NaN in one sample: the update is suppressed, the run stops and names the sample, nothing is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.numerics.rank_pool import Pools
from tests.support import TINY, launch, metrics, run_dir, tiny_recipe, word_tokenizer
from tunesmith.checkpoint.tensors import load_state
from tunesmith.errors import TrainingStopped
from tunesmith.recipe import Recipe
from tunesmith.run import Resume, run

pytestmark = pytest.mark.usefixtures("one_thread")

BAD_LINE = 58


def poisoned_recipe(folder: Path) -> Recipe:
    """A model whose embedding of one word is NaN; the word stands in one document, which the loss meets late."""
    from transformers import AutoConfig, AutoModelForCausalLM

    recipe = tiny_recipe(folder, data={"shuffle": False, "group_by_length": False})
    tokenizer = word_tokenizer(folder / "tokenizer", ("poison",))
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**TINY, "vocab_size": 52, "pad_token_id": 0, "eos_token_id": 1})
    model = AutoModelForCausalLM.from_config(config)
    model.get_input_embeddings().weight.data[51] = float("nan")
    model.save_pretrained(folder / "model")
    train = folder / "train.jsonl"
    lines = train.read_text(encoding="utf-8").splitlines()
    lines[BAD_LINE - 1] = json.dumps({"text": "w1 poison w2"})
    train.write_text("\n".join(lines) + "\n", encoding="utf-8")
    model_section = {
        "init": "pretrained",
        "model_name_or_path": str(folder / "model"),
        "tokenizer": str(tokenizer),
    }
    return Recipe.model_validate(
        recipe.model_dump(exclude={"model", "evaluation"})
        | {"model": model_section, "checkpoint": {"save_steps": 3}}
    )


@pytest.mark.parametrize(
    ("processes", "strategy"), [(1, "auto"), (2, "ddp"), (2, "zero2"), (2, "zero3"), (2, "fsdp2")]
)
def test_the_run_stops_and_names_the_sample(
    pools: Pools, tmp_path: Path, processes: int, strategy: str
) -> None:
    recipe = poisoned_recipe(tmp_path)
    recipe = Recipe.model_validate(
        recipe.model_dump(exclude={"evaluation", "checkpoint"})
        | {"parallel": {"strategy": strategy}, "checkpoint": {"save_steps": 3}}
    )
    if processes == 1:
        with pytest.raises(TrainingStopped) as stopped:
            run(recipe, Path(), Resume())
    else:
        with pytest.raises(RuntimeError) as stopped:
            pools[processes].run(recipe, Path())
    said = str(stopped.value)
    assert said.count("TrainingStopped: ") == (processes if processes > 1 else 0)
    # rows 57 to 60 are the last, short step: step 8 of 8
    assert f"{tmp_path / 'train.jsonl'}:{BAD_LINE}" in said
    assert "step 8" in said
    assert "rank" in said
    steps = [row["step"] for row in metrics(recipe)]
    assert max(steps) == 7, "the bad step left a row in the log"


def test_weights_and_checkpoint_are_untouched(tmp_path: Path) -> None:
    recipe = poisoned_recipe(tmp_path)
    stopped = launch(recipe)
    assert stopped.returncode == 4
    assert "step 8" in stopped.stderr
    assert json.loads((run_dir(recipe) / "exit.json").read_text(encoding="utf-8"))["code"] == 4
    saved = load_state(run_dir(recipe) / "checkpoint-6" / "weights")
    for name, value in saved.items():
        clean = value[:51] if "embed_tokens" in name else value
        assert torch.isfinite(clean).all(), name
    assert sorted(path.name for path in run_dir(recipe).glob("checkpoint-*")) == [
        "checkpoint-3",
        "checkpoint-6",
    ]
