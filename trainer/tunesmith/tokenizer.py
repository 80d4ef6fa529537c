"""The run's tokenizer: loaded, or trained once on the training text and kept in the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from tunesmith.data.examples import Chat, Example, Labelled, Question, SourceTarget, Text, Tokens
from tunesmith.data.prepare import cache_root, split_examples
from tunesmith.data.rows import content_hash
from tunesmith.model import load_tokenizer
from tunesmith.recipe import Recipe
from tunesmith.recipe.model import TrainTokenizer


def tokenizer_for(recipe: Recipe, base: Path) -> tuple[Any, list[str]]:
    """The tokenizer of the recipe, and notes for the start-up report."""
    wanted = recipe.model.tokenizer
    if not isinstance(wanted, TrainTokenizer):
        return load_tokenizer(recipe.model, base)
    parts = {
        "settings": wanted.model_dump(),
        "sources": [content_hash(source, base) for source in recipe.data.train],
        "split": None if recipe.data.split is None else recipe.data.split.model_dump(),
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
    folder = cache_root(recipe.data) / f"tokenizer-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{folder}.lock"):
        if not (folder / "tokenizer.json").is_file():
            texts = (
                text for _, example in split_examples(recipe.data, base, "train") for text in _texts(example)
            )
            tokenizer, _ = load_tokenizer(recipe.model, base, texts)
            save_tokenizer(tokenizer, folder)
    trained = recipe.model.model_copy(update={"tokenizer": str(folder)})
    tokenizer, notes = load_tokenizer(trained, base)
    return tokenizer, [
        *notes,
        f"a byte-level BPE tokenizer of {len(tokenizer)} tokens, trained on data.train",
    ]


def tokenizer_hash(tokenizer: Any) -> str:
    """Of everything that shapes token ids and rendered chats. How rows are cut and padded is no part of it: each call
    says it anew, and the last one's stays in the object and in what is saved of it."""
    digest = hashlib.sha256()
    if tokenizer.is_fast:
        digest.update(_uncut(tokenizer.backend_tokenizer).to_str().encode())
    else:
        digest.update(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    for value in (tokenizer.special_tokens_map, tokenizer.chat_template, type(tokenizer).__name__):
        digest.update(json.dumps(value, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Its files, the same whether it has cut or padded rows before or not."""
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(folder)


def _uncut(backend: Any) -> Any:
    """The tokenizer without the settings of its last call; itself where it has none."""
    if backend.truncation is None and backend.padding is None:
        return backend
    copy = type(backend).from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def _texts(example: Example) -> Iterator[str]:
    match example:
        case Text():
            yield example.text
        case Chat():
            yield from (message.content for message in example.messages)
        case Labelled():
            yield from (part for part in (example.text, example.text_pair) if part)
        case Tokens():
            yield " ".join(example.tokens)
        case Question():
            yield from (example.question, example.context)
        case SourceTarget():
            yield from (example.source, *example.targets)
