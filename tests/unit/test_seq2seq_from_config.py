"""An encoder-decoder from nothing, with a tokenizer of its own: what its decoder begins with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith.commands.finished import open_run
from tunesmith.commands.predict import predict_texts
from tunesmith.recipe import Recipe
from tunesmith.recipe.evaluation import Generate
from tunesmith.run import Resume, run

T5 = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
BART = {
    "model_type": "bart",
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "max_position_embeddings": 64,
}
PAD, END = 0, 1  # of a tokenizer that train_bpe makes


@pytest.mark.parametrize(
    ("config", "start"),
    [(T5, PAD), (BART, END), (T5 | {"decoder_start_token_id": 3}, 3)],
    ids=["T5: padding", "BART: the end marker", "given"],
)
def test_the_decoder_begins_with_what_its_family_has(
    config: dict[str, Any], start: int, tmp_path: Path
) -> None:
    rows = [{"prompt": f"red {i}", "answer": f"blue {i}"} for i in range(16)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    made = Recipe.model_validate(
        {
            "model": {
                "init": "from_config",
                "config": config,
                "tokenizer": {"type": "train_bpe", "vocab_size": 300},
            },
            "data": {"train": {"path": "a.jsonl", "format": "prompt_answer"}, "max_length": 32},
            "objective": {"type": "seq2seq"},
            "training": {"max_steps": 1, "per_device_train_batch_size": 8},
            "output_dir": str(tmp_path),
            "run_name": "made",
        }
    )
    run(made, tmp_path, Resume())
    saved = json.loads((tmp_path / "made" / "final" / "config.json").read_text(encoding="utf-8"))
    assert saved["decoder_start_token_id"] == start
    done = open_run(tmp_path / "made")
    model: Any = done.engine.train_module.model
    assert model.generation_config.decoder_start_token_id == start
    (answer,) = predict_texts(done, ["red 1"], Generate(max_new_tokens=3))
    assert isinstance(answer["generated"], str)
