"""Back-translations of the training rows: made once, before the training, and drawn from while it goes on.

Sennrich et al. (2016) translate monolingual text back to get sources; as augmentation a text goes into another
language and back (Yu et al. 2018; Xie et al. 2020, "UDA")."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import torch

from tunesmith.data.augment.stored import EXAMPLE, from_json
from tunesmith.data.augment.words import Unit, fields, join, split
from tunesmith.data.order import raw
from tunesmith.data.table import Encoded, Table, finish_table, write_table
from tunesmith.errors import UserError
from tunesmith.hub import resolve_path
from tunesmith.recipe.augment import BackTranslation
from tunesmith.tracking.progress import track
from tunesmith.unpartitioned import unpartitioned

_KEY = "data.augment.0"  # the rules have it first
_FORMAT = 1  # of the cache


class BackTranslated:
    """Draws one of its variants for each text of a row; a text without any stays."""

    def __init__(self, variants: Table | None) -> None:
        self.variants = variants

    def __call__(self, texts: list[list[Unit]], key: tuple[int, ...]) -> list[list[Unit]]:
        if self.variants is None:
            return texts
        stored: list[list[str]] = json.loads(self.variants.value("variants", key[2]))
        drawn = raw(len(texts), *key)
        return [
            split(found[int(number % len(found))]) if found else units
            for units, found, number in zip(texts, stored, drawn.tolist(), strict=True)
        ]


def prepare_variants(asked: BackTranslation, table: Table, device: torch.device) -> Table:
    """The variants of every row of a training table that keeps examples: from the cache, or made now. One process of a
    machine makes them, the others wait on its lock."""
    folder = table.folder.parent / f"variants-{_key(asked, table)}"
    with filelock.FileLock(f"{folder}.lock"):
        if not (folder / "table.json").is_file():
            _build(asked, table, device, folder)
    return Table(folder)


def check_models(asked: BackTranslation) -> list[str]:
    """What the models are, from their configs alone. Raises UserError for one that is no such model."""
    return [f"{name} {model_type(path, name)}" for name, path in _models(asked).items()]


def model_type(path: str, name: str) -> str:
    from transformers import AutoConfig

    place = resolve_path(path, Path(), f"{_KEY}.{name}")
    try:
        config = AutoConfig.from_pretrained(place)
    except (OSError, ValueError) as error:
        what = str(error).strip().splitlines()[0]
        raise UserError(f"{_KEY}.{name}: {path} cannot be read: {what}") from error
    if not config.is_encoder_decoder:
        raise UserError(
            f"{_KEY}.{name}: {path} is a {config.model_type}, not a sequence-to-sequence model (Marian, T5, BART, …)"
        )
    return config.model_type


def _models(asked: BackTranslation) -> dict[str, str]:
    back = {} if asked.back_model is None else {"back_model": asked.back_model}
    return {"model": asked.model, **back}


def _key(asked: BackTranslation, table: Table) -> str:
    settings = asked.model_dump(exclude={"probability", "batch_size", "model", "back_model"})
    parts = [_FORMAT, table.folder.name, settings, *map(_content, _models(asked).values())]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _content(model: str) -> str | list[tuple[str, str]]:
    """The files of a model's folder by their hashes; a hub id stands for itself."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    found: list[tuple[str, str]] = []
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        with file.open("rb") as opened:
            found.append((file.name, hashlib.file_digest(opened, "sha256").hexdigest()))
    return found


def _build(asked: BackTranslation, table: Table, device: torch.device, folder: Path) -> None:
    rows = [
        [join(units) for units in fields(from_json(table.value(EXAMPLE, row)))] for row in range(len(table))
    ]
    texts = sorted(
        {text for row in rows for text in row if text.strip()}, key=lambda text: (-len(text), text)
    )
    with unpartitioned():  # other ranks, which ZeRO-3 would build and generate with, wait on the lock
        variants = dict(_translated_back(asked, texts, device))
    kept = {text: _others(text, found) for text, found in variants.items()}
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        lines: Iterator[Encoded] = (
            {"variants": json.dumps([kept.get(text, []) for text in row], ensure_ascii=False)} for row in rows
        )
        kinds = write_table(temporary, lines)
        counts = {
            "texts": len(texts),
            "variants": sum(map(len, kept.values())),
            "texts_without": sum(not found for found in kept.values()),
        }
        finish_table(temporary, kinds, {"counts": counts})
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _others(text: str, found: Sequence[str]) -> list[str]:
    """Those that are not the text itself, blanks and capitals aside, each once."""
    known = {_plain(text): "", "": ""}
    for one in found:
        known.setdefault(_plain(one), one)
    return [one for one in known.values() if one]


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _translated_back(
    asked: BackTranslation, texts: Sequence[str], device: torch.device
) -> Iterator[tuple[str, list[str]]]:
    """Each text with what came back: the pivots are the best beams, and each is translated back by its best beam. What
    a model cannot read whole or does not end is left out: half a text may have another label."""
    there = _Translator(asked, "model", asked.model, asked.prefixes[0], device)
    back = there
    if asked.back_model is not None:
        back = _Translator(asked, "back_model", asked.back_model, asked.prefixes[1], device)
    starts = range(0, len(texts), asked.batch_size)
    for start in track(starts, "translating training rows, in batches", len(starts)):
        batch = texts[start : start + asked.batch_size]
        pivots = there.translate(batch, asked.prefixes[0], asked.num_variants)
        flat = [pivot for found in pivots for pivot in found]
        returned: list[str] = []
        for at in range(0, len(flat), asked.batch_size):
            found = back.translate(flat[at : at + asked.batch_size], asked.prefixes[1], 1)
            returned += [one[0] if one else "" for one in found]
        rest = iter(returned)
        for text, found in zip(batch, pivots, strict=True):
            yield text, [next(rest) for _ in found]


class _Translator:
    def __init__(
        self, asked: BackTranslation, name: str, path: str, prefix: str, device: torch.device
    ) -> None:
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

        model_type(path, name)
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
            model: Any = AutoModelForSeq2SeqLM.from_pretrained(path, dtype="auto")
        except (OSError, ValueError) as error:
            what = str(error).strip().splitlines()[0]
            raise UserError(f"{_KEY}.{name}: {path} cannot be read: {what}") from error
        self.model: Any = model.to(device).eval()
        self.asked = asked
        config = self.model.config
        positions = getattr(config, "max_position_embeddings", None) or self.tokenizer.model_max_length
        self.longest = min(int(positions), self.tokenizer.model_max_length)

    @torch.no_grad()
    def translate(self, texts: Sequence[str], prefix: str, times: int) -> list[list[str]]:
        """At most `times` translations of each text, the best first."""
        if not texts:
            return []
        encoded = self.tokenizer([prefix + text for text in texts], verbose=False)["input_ids"]
        fits = [i for i, ids in enumerate(encoded) if 0 < len(ids) <= self.longest]
        found: list[list[str]] = [[] for _ in texts]
        if not fits:
            return found
        inputs = self.tokenizer.pad({"input_ids": [encoded[i] for i in fits]}, return_tensors="pt")
        out = self.model.generate(
            input_ids=inputs["input_ids"].to(self.model.device),
            attention_mask=inputs["attention_mask"].to(self.model.device),
            num_beams=self.asked.num_beams,
            num_return_sequences=times,
            max_new_tokens=self.asked.max_new_tokens,
            do_sample=False,
        )
        ends = self.ends(out[:, 1:], self.tokenizer.eos_token_id)
        read = self.tokenizer.batch_decode(out, skip_special_tokens=True)
        for place, i in enumerate(fits):
            rows = range(place * times, (place + 1) * times)
            found[i] = [read[row].strip() for row in rows if ends[row] and read[row].strip()]
        return found

    @staticmethod
    def ends(out: torch.Tensor, eos: int) -> list[bool]:
        """Which of the texts [texts, tokens] have an end."""
        return (out == eos).any(1).tolist()
