"""The plain recipes that strategies are held against, and what they read: docstrings of the standard library, repeated
until they fill the tokens that a row may have, so that all steps are of one length."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from tunesmith.data.rows import read_rows
from tunesmith.recipe import Recipe
from tunesmith.recipe.data import Source
from tunesmith.run import Resume, run

ROWS = 16
TASKS = ("one", "two", "three")
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}

Values = dict[str, Any]


@dataclass(frozen=True)
class Bases:
    """The plain recipes, over what `prepare` leaves in `folder`."""

    folder: str

    def source(self, kind: str = "classification", **columns: str) -> Values:
        return {"path": f"{self.folder}/rows.jsonl", "format": kind, "columns": columns}

    def common(self, rows: int, micro: int) -> Values:
        return {
            "model": {"model_name_or_path": "builtin:minilm"},
            "training": {
                "max_steps": 20,
                "global_batch_size": rows,
                "per_device_train_batch_size": micro,
                "precision": "fp32",
            },
            "tracking": {"progress": "off"},
            "output_dir": self.folder,
            "run_name": "bench",
        }

    def task(self, source: Values, **objective: Any) -> Values:
        data = {"train": [source], "max_length": 64, "cache_dir": self.folder}
        return {"data": data, "objective": {"type": "classification"} | objective}

    def rows(self) -> Values:
        made = self.common(ROWS, ROWS) | self.task(self.source())
        return changed(made, data={"split": {"eval": 0.1}})

    def numbers(self, rows: int = ROWS, **columns: str) -> Values:
        kind = "pairs" if "text_pair" in columns else "classification"
        return self.common(rows, rows) | self.task(self.source(kind, **columns), problem="regression")

    def tokens(self) -> Values:
        return self.common(ROWS, ROWS) | self.task(self.source("tokens"), type="token_classification")

    def old(self) -> Values:
        return changed(self.rows(), model={"model_name_or_path": f"{self.folder}/old/final"})

    def student(self) -> Values:
        return changed(self.rows(), model={"config": {"num_hidden_layers": 3}})

    def language(self, layers: int = 2) -> Values:
        """From nothing, with MiniLM's vocabulary of 30,522."""
        source = self.source("text") | {"limit": 200}  # each makes several rows
        model = {
            "init": "from_config",
            "config": LLAMA | {"num_hidden_layers": layers},
            "tokenizer": "builtin:minilm",
        }
        return self.common(ROWS, ROWS) | self.task(source, type="causal_lm") | {"model": model}

    def chats(self) -> Values:
        """The lower layers of `old_chats`, which has 2,048 tokens of its own."""
        model = {"model_name_or_path": f"{self.folder}/old_chats/final", "config": {"num_hidden_layers": 2}}
        made = (
            self.common(ROWS, ROWS) | self.task(self.source("prompt_answer"), type="sft") | {"model": model}
        )
        return changed(made, data={"max_length": 128})

    def one_task(self) -> Values:
        """24 rows in three forwards."""
        return self.common(24, 8) | self.task(self.source())

    def three_tasks(self, balancing: str = "fixed") -> Values:
        mixing = {"mixing": {"type": "together"}, "balancing": {"type": balancing}}
        tasks = {name: self.task(self.source()) for name in TASKS}
        return self.common(24, 8) | {"tasks": tasks, "multitask": mixing}

    def auxiliary(self) -> Values:
        words = self.task(self.source("text"), type="masked_lm") | {"weight": 0.1}
        mixing = {"type": "together", "rows": {"own": ROWS, "words": ROWS // 2}}
        tasks = {"own": self.task(self.source()), "words": words}
        return self.common(ROWS + ROWS // 2, ROWS) | {"tasks": tasks, "multitask": {"mixing": mixing}}


def changed(plain: Values, **sections: Any) -> Values:
    """`plain` with the keys of each section in place of its own."""
    found = dict(plain)
    for name, value in sections.items():
        found[name] = {**found.get(name, {}), **value} if isinstance(value, dict) else value
    return found


def prepare(folder: str) -> None:
    """What strategies begin with: rows, a finished run, and small Llamas to learn from."""
    bases = Bases(folder)
    source = Source(path="builtin:stdlib_docstrings", format="text", limit=600)
    found = [row.values for row in read_rows(source, Path())]
    labels = sorted({str(values["label"]) for values in found})
    lines = [json.dumps(_row(number, values, labels)) for number, values in enumerate(found)]
    Path(folder, "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    Path(folder, "synonyms.tsv").write_text("return\tgive\nlist\tsequence\nstring\ttext\n", encoding="utf-8")
    once: Values = {"training": {"max_steps": 1}}
    runs = {"old": bases.rows(), "old_language": bases.language(layers=4)}
    for name, size in (("old_chats", 2048), ("old_unlike", 1024)):
        tokenizer = {"type": "train_bpe", "vocab_size": size}
        model = {"init": "from_config", "config": LLAMA, "tokenizer": tokenizer, "chat_template": "chatml"}
        runs[name] = bases.chats() | {"model": model}
    for name, values in runs.items():
        run(Recipe.model_validate(changed(values, **once) | {"run_name": name}), Path(), Resume())


def _row(number: int, values: Values, labels: list[str]) -> Values:
    """80 words, which are 64 tokens or more even where some are dropped."""
    short, label = str(values["text"]), str(values["label"])
    words = list(islice(cycle(short.split()), 80))
    votes = {name: 0.3 / (len(labels) - 1) for name in labels} | {label: 0.7}
    return {
        "text": " ".join(words),
        "short": short,
        "label": label,
        "votes": votes,
        "number": number % 4,
        "group": number // 4,
        "question": "What does it say?",
        "tokens": words,
        "tags": ["B-name" if word[0].isupper() else "O" for word in words],
        "prompt": short[:200],
        "answer": short[:200],
    }
