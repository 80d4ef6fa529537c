"""Generation of text: for prediction, and for evaluations that compare the model's answers with the references."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tunesmith.batch import Batch
from tunesmith.data.order import deal
from tunesmith.data.prepare import Dataset
from tunesmith.engine import Engine
from tunesmith.errors import UserError
from tunesmith.metrics.text import bleu, chrf, exact_match, rouge
from tunesmith.objectives import Objective
from tunesmith.objectives.base import Scores
from tunesmith.recipe.evaluation import Generate


@dataclass(frozen=True, slots=True)
class Generated:
    """Row → text without end markers; and the rows whose prompt lost its beginning, for the model has no more
    positions."""

    texts: dict[int, str]
    cut: frozenset[int]


def generate(
    engine: Engine, objective: Objective, dataset: Dataset, rows: Sequence[int], settings: Generate,
    per_device: int, progress: Callable[[int], None] = lambda _: None,
) -> Generated:  # fmt: skip
    """Greedy or beam search from the rows' prompts; equal on every rank. The rows are dealt over the ranks."""
    room = prompt_room(engine.train_module.model, settings.max_new_tokens)
    whole = {row: objective.prompt(dataset.table, row) for row in rows}
    prompts = {row: prompt if room is None else prompt[-room:] for row, prompt in whole.items()}
    ordered = sorted(rows, key=lambda row: -len(prompts[row]))
    options = search_options(objective, settings)
    found: dict[int, str] = {}
    window = engine.data_size * per_device
    engine.module.eval()
    with torch.no_grad():
        for start in range(0, len(ordered), window):
            (cells,) = deal(ordered[start : start + window], engine.data_size, per_device)
            cell = cells[engine.data_rank]
            chosen = [prompts[row] for row in cell or ordered[:1]]
            batch = prompt_batch(
                chosen, objective.tokenizer.pad_token_id, left=objective.prompt_padding == "left"
            )
            ids = engine.forward(batch, "generate", options=options)
            found |= dict(zip(cell, (answer_text(objective, row) for row in ids.tolist()), strict=False))
            progress(len(ordered[start : start + window]))
    engine.module.train()
    texts = {row: text for part in engine.gather(found) for row, text in part.items()}
    return Generated(texts, frozenset(row for row in rows if len(prompts[row]) < len(whole[row])))


def search_options(objective: Objective, settings: Generate) -> dict[str, Any]:
    """What transformers' `generate` is to be told."""
    stops = objective.stop_strings()
    return {
        "max_new_tokens": settings.max_new_tokens,
        "num_beams": settings.num_beams,
        "do_sample": False,
        "pad_token_id": objective.tokenizer.pad_token_id,
        "eos_token_id": objective.stop_token_ids() or None,
        **({"stop_strings": stops, "tokenizer": objective.tokenizer} if stops else {}),
    }


def prompt_room(model: Any, max_new_tokens: int) -> int | None:
    """The longest prompt that leaves a decoder `max_new_tokens` positions; None without such a bound. (Of an
    encoder-decoder `max_length` bounds the source, in training as here.)"""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None or model.config.is_encoder_decoder:
        return None
    positions -= getattr(model, "virtual_positions", 0)
    if positions <= max_new_tokens:
        raise UserError(
            f"max_new_tokens: {max_new_tokens} leave no room for a prompt: the model has {positions} positions"
        )
    return positions - max_new_tokens


def answer_text(objective: Objective, ids: Sequence[int]) -> str:
    """Generated tokens up to the first stop token, and their text up to the first stop string."""
    stops = set(objective.stop_token_ids())
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    text: str = objective.tokenizer.decode(ids[:end], skip_special_tokens=True)
    for stop in objective.stop_strings():
        text = text.partition(stop)[0]
    return text


def prompt_batch(prompts: Sequence[Any], pad_token_id: int, *, left: bool) -> Batch:
    """Decoders' prompts are padded on the left, so that all end where generation begins."""
    longest = max(len(prompt) for prompt in prompts)
    ids = np.full((len(prompts), longest), pad_token_id, dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        place = slice(longest - len(prompt), None) if left else slice(0, len(prompt))
        ids[i, place], mask[i, place] = prompt, 1
    inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    return Batch(inputs, {}, tuple(range(len(prompts))), int(mask.sum()))


def evaluate_generation(
    engine: Engine, objective: Objective, dataset: Dataset, settings: Generate, per_device: int,
    progress: Callable[[int], None] = lambda _: None,
) -> Scores:  # fmt: skip
    """BLEU, chrF, ROUGE and exact match of greedy or beam search against the references; some samples to read."""
    rows = range(min(len(dataset), settings.limit or len(dataset)))
    found = generate(engine, objective, dataset, rows, settings, per_device, progress)
    if engine.rank != 0:
        return engine.broadcast(None)
    predictions = [found.texts[row].strip() for row in rows]
    references: list[list[str]] = [json.loads(dataset.table.value("references", row)) for row in rows]
    metrics = {
        **bleu(predictions, references).metrics,
        **chrf(predictions, references).metrics,
        **rouge(predictions, references),
        **exact_match(predictions, references, settings.answer),
    }
    samples = [
        {
            "prompt": objective.tokenizer.decode([int(i) for i in objective.prompt(dataset.table, row)]),
            "generated": found.texts[row],
            "references": references[row],
        }
        for row in list(rows)[: settings.show]
    ]
    cut = {"prompts_cut": len(found.cut)} if found.cut else {}
    return engine.broadcast(Scores(metrics, {"samples": samples, **cut}))
