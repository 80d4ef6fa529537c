"""New tokens: put into the tokenizer and the embedding, trained, saved, loaded again and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support import run_dir, tiny_recipe
from tunesmith.commands.export import export
from tunesmith.commands.finished import open_run
from tunesmith.errors import UserError
from tunesmith.recipe import Recipe
from tunesmith.run import Resume, run

TOKENS = ["w1", "<new-1>", "<new-2>"]  # the first is known
LORA: dict[str, Any] = {"type": "lora", "r": 4, "target_modules": "all-linear"}


def base(folder: Path) -> Path:
    """A trained model of the old vocabulary."""
    recipe = tiny_recipe(folder / "base")
    run(recipe, folder, Resume())
    return run_dir(recipe) / "final"


def more(folder: Path, model: Path, name: str, tokens: list[str], **trainable: Any) -> Recipe:
    about = {"init": "pretrained", "config": {}, "model_name_or_path": str(model), "add_tokens": tokens}
    return tiny_recipe(folder, model=about | {"tokenizer": str(model)}, trainable=trainable, run_name=name)


def test_every_parameter_is_trained_with_new_rows(tmp_path: Path) -> None:
    model = base(tmp_path)
    rows = load_file(model / "model.safetensors")["model.embed_tokens.weight"].shape[0]
    recipe = more(tmp_path, model, "full", TOKENS)
    run(recipe, tmp_path, Resume())
    final = run_dir(recipe) / "final"
    assert len(AutoTokenizer.from_pretrained(final)) == rows + 2
    loaded: Any = AutoModelForCausalLM.from_pretrained(final)
    assert loaded.get_input_embeddings().weight.shape[0] == loaded.config.vocab_size == rows + 2


def test_a_lora_trains_saves_and_merges_the_rows_of_new_tokens(tmp_path: Path) -> None:
    model = base(tmp_path)
    old = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    recipe = more(tmp_path, model, "lora", TOKENS, adapters=[LORA])
    # what is new stands in the text, so that it is learned
    train = Path(recipe.data.train[0].path)
    train.write_text(train.read_text("utf-8").replace("w2", "<new-1>"), encoding="utf-8")
    run(recipe, tmp_path, Resume())
    saved = load_file(run_dir(recipe) / "final" / "adapter_model.safetensors")
    (rows,) = (value for name, value in saved.items() if "trainable_tokens" in name)
    assert rows.shape == (3, old.shape[1])
    merged = export(open_run(run_dir(recipe)), tmp_path / "merged", merge=True)
    assert merged.difference < 1e-5
    found = load_file(tmp_path / "merged" / "model.safetensors")["model.embed_tokens.weight"]
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "merged")
    new = [tokenizer.convert_tokens_to_ids(token) for token in TOKENS]
    assert new[1:] == [len(old), len(old) + 1]
    assert torch.equal(found[new], rows)
    kept = [row for row in range(len(old)) if row not in new]
    assert torch.equal(found[kept], old[kept])
    mean = old.mean(0)
    assert not torch.allclose(found[new[1]], mean, atol=1e-3)  # it has moved


def test_other_rows_and_modules_do_not_leave_the_new_ones_out(tmp_path: Path) -> None:
    model = base(tmp_path)
    lora = LORA | {"modules_to_save": ["lm_head"], "trainable_token_indices": [7]}
    recipe = more(tmp_path, model, "both", TOKENS, adapters=[lora])
    run(recipe, tmp_path, Resume())
    saved = load_file(run_dir(recipe) / "final" / "adapter_model.safetensors")
    (rows,) = (value for name, value in saved.items() if "trainable_tokens" in name)
    assert len(rows) == 4


def test_tokens_that_nothing_would_train_are_refused(tmp_path: Path) -> None:
    recipe = more(tmp_path, base(tmp_path), "ia3", TOKENS, adapters=[{"type": "ia3"}])
    with pytest.raises(UserError, match=r"model\.add_tokens: ia3 leaves the rows of new tokens untrained"):
        run(recipe, tmp_path, Resume())


def test_a_foreign_tokenizer_is_refused(tmp_path: Path) -> None:
    weights = base(tmp_path)
    tokenizer: Any = AutoTokenizer.from_pretrained(weights)
    tokenizer.add_tokens(["<a>", "<b>"])
    tokenizer.save_pretrained(tmp_path / "other")
    recipe = more(tmp_path, weights, "foreign", [])
    recipe = recipe.model_copy(
        update={"model": recipe.model.model_copy(update={"tokenizer": str(tmp_path / "other")})}
    )
    with pytest.raises(UserError, match="they do not belong together"):
        run(recipe, tmp_path, Resume())
