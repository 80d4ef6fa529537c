"""Evaluation by generation: the model answers the evaluation prompts, the answers are compared with the references."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from tunesmith.batch import Batch
from tunesmith.data.order import deal
from tunesmith.data.prepare import Dataset
from tunesmith.engine import Engine
from tunesmith.metrics.text import bleu, chrf, exact_match, rouge
from tunesmith.objectives import Objective
from tunesmith.objectives.base import Scores
from tunesmith.recipe.evaluation import Generate


def generate(
    engine: Engine, objective: Objective, dataset: Dataset, rows: Sequence[int], settings: Generate,
    per_device: int, progress: Callable[[int], None] = lambda _: None,
) -> dict[int, str]:  # fmt: skip
    """Row → generated text, on every rank. The rows are dealt over the ranks."""
    prompts = {row: objective.prompt(dataset.table, row) for row in rows}
    ordered = sorted(rows, key=lambda row: -len(prompts[row]))
    options = {
        "max_new_tokens": settings.max_new_tokens,
        "num_beams": settings.num_beams,
        "do_sample": False,
        "pad_token_id": objective.tokenizer.pad_token_id,
        "eos_token_id": objective.stop_token_ids(),
    }
    found: dict[int, str] = {}
    window = engine.world_size * per_device
    engine.module.eval()
    with torch.inference_mode():
        for start in range(0, len(ordered), window):
            (cells,) = deal(ordered[start : start + window], engine.world_size, per_device)
            cell = cells[engine.rank]
            chosen = [prompts[row] for row in cell or ordered[:1]]
            batch = prompt_batch(
                chosen, objective.tokenizer.pad_token_id, left=objective.prompt_padding == "left"
            )
            ids = engine.forward(batch, "generate", options=options)
            texts: list[str] = objective.tokenizer.batch_decode(ids, skip_special_tokens=True)
            found |= dict(zip(cell, texts, strict=False))
            progress(len(ordered[start : start + window]))
    engine.module.train()
    return {row: text for part in engine.gather(found) for row, text in part.items()}


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
    texts = generate(engine, objective, dataset, rows, settings, per_device, progress)
    if engine.rank != 0:
        return engine.broadcast(None)
    predictions = [texts[row].strip() for row in rows]
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
            "generated": texts[row],
            "references": references[row],
        }
        for row in list(rows)[: settings.show]
    ]
    return engine.broadcast(Scores(metrics, {"samples": samples}))
