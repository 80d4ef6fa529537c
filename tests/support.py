"""What several test folders need: a tiny model from nothing, its recipe, and runs of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tunesmith.recipe import Recipe
from tunesmith.recipe.load import dump_recipe

WORDS = [f"w{i}" for i in range(48)]
TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attention_dropout": 0.1,
    "tie_word_embeddings": False,
}


def write_documents(path: Path, rows: int = 60) -> Path:
    """Documents of 3 to 22 words, a pure function of their number."""
    lines = [
        " ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(3 + (i * 5) % 20)) for i in range(rows)
    ]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    return path


def word_tokenizer(folder: Path, extra: tuple[str, ...] = ()) -> Path:
    """A tokenizer of whole words, saved."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS, *extra])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return folder


def tiny_recipe(folder: Path, **sections: Any) -> Recipe:
    """A causal LM on `write_documents`: 10 steps of 8 rows, a checkpoint every 5. Sections are merged in."""
    folder.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {
        "model": {
            "init": "from_config",
            "config": TINY,
            "tokenizer": str(word_tokenizer(folder / "tokenizer")),
        },
        "data": {
            "train": [{"path": str(write_documents(folder / "train.jsonl")), "format": "text"}],
            "max_length": 24,
            "cache_dir": str(folder / "cache"),
        },
        "objective": {"type": "causal_lm"},
        "optim": {"learning_rate": 1e-2},
        "training": {"max_steps": 10, "global_batch_size": 8, "per_device_train_batch_size": 4},
        "checkpoint": {"save_steps": 5},
        "tracking": {"logging_steps": 1, "progress": "lines"},
        "output_dir": str(folder / "runs"),
        "run_name": "tiny",
    }
    for name, value in sections.items():
        values[name] = {**values[name], **value} if isinstance(values.get(name), dict) else value
    return Recipe.model_validate(values)


def launch(
    recipe: Recipe, *options: str, processes: int = 1, driver: str = ""
) -> subprocess.CompletedProcess[str]:
    """Runs the recipe in real processes: `python -m tunesmith`, or torchrun. `driver` is Python that runs first, in
    every process: the faults of a test."""
    path = Path(recipe.output_dir).parent / f"{recipe.run_name}.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    arguments = ["-m", "tunesmith", str(path), *options]
    if driver:
        start = path.with_suffix(".driver.py")
        text = f"import sys\nsys.argv = {['tunesmith', str(path), *options]!r}\n{driver}\n"
        start.write_text(
            text + "import runpy\nrunpy.run_module('tunesmith', run_name='__main__')\n", encoding="utf-8"
        )
        arguments = [str(start)]
    if processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        arguments = [*torchrun, *arguments]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "TUNESMITH_DEVICE": "cpu",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )


def run_dir(recipe: Recipe) -> Path:
    return Path(recipe.output_dir) / recipe.run_name


def metrics(recipe: Recipe) -> list[dict[str, Any]]:
    lines = (run_dir(recipe) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def final_weights(recipe: Recipe) -> dict[str, torch.Tensor]:
    return load_file(run_dir(recipe) / "final" / "model.safetensors")


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"weights differ: {different}"
